"""What a start decides of a fleet's settings: CPU threads, and the number of gateways."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.places import MODELS

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError
from kervan.serve import start
from kervan.serve.start import num_gateways, on_cpu


@pytest.mark.parametrize(
    ("replicas", "env", "expected"),
    [
        pytest.param(1, {}, {}, id="one engine may have vLLM's own binding"),
        pytest.param(2, {}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "4"}, id="8 cores / 2"),
        pytest.param(9, {}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}, id="at least one"),
        pytest.param(2, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, id="the user's"),
    ],
)
def test_cpu_replicas_share_the_cores(
    replicas: int, env: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    config = FleetConfig(model="m", replicas=replicas, env=env)
    assert on_cpu(config, cores=8).env == expected


@pytest.mark.parametrize(
    ("words", "cores", "number"),
    [
        ({}, 2, 1),
        ({}, 16, 2),
        ({}, 128, 4),
        ({"max_gateways": 1}, 128, 1),  # --gateways 0..1
        ({"max_gateways": 3}, 128, 3),
        ({"max_gateways": 8}, 16, 2),
        ({"max_gateways": 8}, 128, 4),
        ({"gateways": 6, "max_gateways": 8}, 128, 6),
    ],
)
def test_there_is_a_gateway_for_8_cores_up_to_4_and_to_the_most_allowed(
    words: dict[str, int], cores: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert num_gateways(FleetConfig(model="m", **words)) == number
    FleetConfig(model="m", **words | {"gateways": number})  # is no contradiction


def test_a_directory_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.arguments, "check", lambda names: None)  # whichever vLLM is installed
    shutil.copy(MODELS / "llama3-8b" / "config.json", tmp_path)

    def config(**engine_args: Any) -> FleetConfig:
        return FleetConfig(model=str(tmp_path), engine_args=engine_args)

    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path} has no weights .* --engine-arg load_format=dummy"):
        start.validate(config())
    for allowed in (
        config(load_format="dummy"),
        config(load_format="runai_streamer"),
        FleetConfig(model=str(tmp_path), engine="twin", gpu="H200"),
    ):
        assert start.validate(allowed) == allowed
    assert start.validate(config(), is_here=False) == config()  # its nodes may have them
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert start.validate(config()) == config()
    (tmp_path / "tokenizer.json").unlink()
    for allowed in (config(tokenizer="other"), config(skip_tokenizer_init=True)):
        assert start.validate(allowed) == allowed


def test_a_model_that_only_the_nodes_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.arguments, "check", lambda names: None)
    config = FleetConfig(model=str(tmp_path / "model"))
    assert start.validate(config, is_here=False) == config
    with pytest.raises(ConfigError, match=r"is neither a directory here nor .* check the path"):
        start.validate(config)
    with pytest.raises(ConfigError, match="or give the absolute path that it has on the nodes"):
        start.validate(FleetConfig(model="./model"), is_here=False)


def test_the_file_of_keys_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = FleetConfig(model=str(MODELS / "llama3-8b"), engine="twin", gpu="H200", api_keys_file="keys.yaml")
    assert start.validate(config).api_keys_file == str(tmp_path / "keys.yaml")
