"""`kervan up --auto`: the settings that a plan gives."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from harness.places import MODELS

from kervan.cli.up import _planned
from kervan.config import fleet as fleets
from kervan.errors import ConfigError
from kervan.twin.settings import settings

MODEL = str(MODELS / "llama3-70b")


def planned(**words: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return _planned({"model": MODEL, "engine": "twin", "gpu": "H200", **words}, None, said.append), said


def test_the_plan_fills_in_what_is_not_given() -> None:
    words, said = planned(engine_args={"max_model_len": "4096"}, name="chat")
    config = fleets.from_mapping(words, "test")
    assert config.tp * config.pp * config.replicas == 8  # a twin stands for one of eight GPUs
    assert config.tp > 1  # 131 GiB of weights do not fit one
    assert config.name == "chat"
    assert words["engine_args"]["max_model_len"] == "4096"
    assert set(words["engine_args"]) == {"max_model_len", "max_num_batched_tokens", "max_num_seqs"}
    assert said == [line for line in said if line.startswith("plan: ")] and len(said) == 1


@pytest.mark.parametrize("given", [{"tp": 2}, {"replicas": 3}, {"pools": {"spot": "2"}}], ids=str)
def test_a_layout_beside_it_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"--auto chooses the layout, and {next(iter(given))} is given too"):
        planned(**given)


def test_gpus_of_another_cluster_are_not_guessed() -> None:
    with pytest.raises(ConfigError, match="kervan plan --gpu KIND --gpus N"):
        _planned({"model": MODEL}, "10.0.0.1:6379", print)


def test_a_model_that_is_not_here_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"fetch its config\.json into a directory"):
        planned(model="Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"enforce_eager": True},
            r"does not count it; plan without it, and add it to kervan up with a layout of your own",
        ),
        ({"max_modle_len": "4096"}, "did you mean max_model_len"),
        ({"tensor_parallel_size": "2"}, r"use --tp"),
    ],
    ids=str,
)
def test_arguments_that_are_not_counted_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(engine_args=arguments)


def test_weights_in_fp8_count_for_the_layout_and_the_twin() -> None:
    words, _ = planned(engine_args={"quantization": "fp8", "max_model_len": "4096"})
    assert words["engine_args"]["quantization"] == "fp8"
    config = fleets.from_mapping(words, "test")
    assert (
        settings(config).limits.num_blocks
        > settings(dataclasses.replace(config, engine_args={"max_model_len": "4096"})).limits.num_blocks
    )
