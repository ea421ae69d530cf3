"""vLLM's arguments: which are kervan's, and how they are read and written."""

from typing import Any

import pytest

from kervan.config import engine_arguments
from kervan.config.engine_arguments import OWNED
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError


@pytest.mark.parametrize("key", OWNED)
def test_engine_arguments_that_kervan_sets_are_refused(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FleetConfig(model="m", engine_args={key: "1"})
    assert str(caught.value) == f"engine argument {key!r} is kervan's to set; use {OWNED[key]}"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_model_len", "4096", ["--max-model-len", "4096"]),
        ("max_model_len", 4096, ["--max-model-len", "4096"]),
        ("gpu_memory_utilization", 0.8, ["--gpu-memory-utilization", "0.8"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("hf_overrides", {"a": [1]}, ["--hf-overrides", '{"a": [1]}']),
        ("served_model_name", ["a", "b"], ["--served-model-name", "a", "b"]),
        ("lora_modules", [{"name": "l", "path": "/p"}], ["--lora-modules", '{"name": "l", "path": "/p"}']),
        ("chat_template", "{{ messages }}", ["--chat-template", "{{ messages }}"]),
        ("allowed_origins", ["http://a", "http://b"], ["--allowed-origins", '["http://a", "http://b"]']),
        ("allowed_origins", [], ["--allowed-origins", "[]"]),
        ("middleware", ["auth.Check", "log.All"], ["--middleware", "auth.Check", "--middleware", "log.All"]),
        ("middleware", "auth.Check", ["--middleware", "auth.Check"]),
        ("cudagraph_capture_sizes", [1, 2, 4], ["--cudagraph-capture-sizes", "1", "2", "4"]),
        ("max_logprobs", -1, ["--max-logprobs=-1"]),
        ("chat_template", "-{{ messages }}", ["--chat-template=-{{ messages }}"]),
    ],
)
def test_engine_arguments_become_vllms_words(key: str, value: Any, words: list[str]) -> None:
    argv = FleetConfig(model="m", engine_args={key: value}).engine_argv
    start = argv.index(words[0])
    assert list(argv[start : start + len(words)]) == words


@pytest.mark.parametrize("value", [None, False])
def test_a_switch_that_is_off_is_left_out(value: bool | None) -> None:
    assert engine_arguments.to_argv({"disable_log_stats": value}) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ('{"a": 1}', {"a": 1}),
        ("[1, 2]", [1, 2]),
        ("4096", "4096"),
        ("8k", "8k"),
        ("", ""),
        ("half", "half"),
        ('{"bytes": 80G}', '{"bytes": 80G}'),  # which vLLM reads
    ],
)
def test_engine_values_are_read_only_where_vllm_could_not(text: str, value: Any) -> None:
    assert engine_arguments.parse_value(text) == value


def test_broken_json_names_the_likely_cause() -> None:
    with pytest.raises(ConfigError, match=r"not valid JSON .*; quote it for the shell"):
        engine_arguments.parse_value("{a: 1}")
