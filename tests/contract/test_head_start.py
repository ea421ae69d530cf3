"""What is done while an engine imports vLLM is what the engine would else wait for."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from harness.live import eventually

from kervan.fleet.vllm import head_start

CLASS = "LlamaForCausalLM"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [CLASS], "model_type": "llama"}))
    return path


@pytest.mark.timeout(600)
def test_the_class_is_known_and_the_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    argv = ["--model", str(model)]
    first = head_start.begin(argv)
    assert first is not None
    assert list(first.args)[-3:] == [CLASS, "--", str(model / "model.safetensors")]
    head_start.wait_for_class(first, argv)
    assert first.wait(500) == 0
    kept = json.loads(
        (tmp_path / "cache" / "modelinfos" / f"vllm-model_executor-models-llama-{CLASS}.json").read_text()
    )
    assert kept["modelinfo"]["architecture"] == CLASS
    second = head_start.begin([*argv, "--load-format", "dummy"])
    assert second is None


def test_nothing_is_left_of_a_process_that_has_ended(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(head_start, "_mark", lambda _: model)  # vLLM has looked at the class
    process = head_start.begin(["--model", str(model)])
    assert process is not None
    assert list(process.args)[-2:] == ["--", str(model / "model.safetensors")]
    eventually(lambda: not psutil.pid_exists(process.pid), "the process is gone, not a zombie", 60, every_s=0.02)
    assert process.wait(10) == 0


@pytest.mark.parametrize("argv", [[], ["--model", "Qwen/Qwen3-8B"], ["--model", "/nowhere"]])
def test_without_a_local_model_there_is_nothing_to_do(argv: list[str]) -> None:
    assert head_start.begin(argv) is None


def test_a_broken_config_is_left_to_vllm(model: Path) -> None:
    (model / "config.json").write_text("{")
    assert head_start.begin(["--model", str(model)]) is None


def test_weights_that_do_not_fit_into_memory_are_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(head_start, "MEMORY_SHARE", 0.0)
    assert list(head_start._to_read(model)) == []


def test_files_that_cannot_be_read_are_the_engines_affair() -> None:
    done = subprocess.run(
        [sys.executable, "-m", head_start.__name__, "--", "/nowhere/model.safetensors"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "No such file" in done.stderr) == (0, True), done.stderr
