import re
from pathlib import Path

import pytest

from kervan.errors import ConfigError
from kervan.fleet.vllm import argument_names


@pytest.mark.parametrize(
    "name",
    [
        "max_model_len",
        "gpu_memory_utilization",
        "max_num_seqs",
        "enforce_eager",
        "dtype",
        "quantization",
        "enable_lora",
        "lora_modules",
        "served_model_name",
        "tool_call_parser",
        "enable_auto_tool_choice",
        "reasoning_parser",
        "chat_template",
        "enable_prefix_caching",
        "scheduler_cls",
        "hf_overrides",
        "speculative_config",
        "kv_cache_memory_bytes",
    ],
)
def test_the_installed_vllm_knows(name: str) -> None:
    argument_names.check([name])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_model_length", "max_model_len"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("max_num_seq", "max_num_seqs"),
        ("enforce_eagre", "enforce_eager"),
        ("serve_model_name", "served_model_name"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_right_one(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"no engine argument '{name}'; did you mean .*\b{near}\b"):
        argument_names.check(["dtype", name])


@pytest.mark.parametrize("name", ["zzzzqqqq", "", "--dtype=half", "__init__"])
def test_a_name_like_no_other_is_refused_with_where_to_look(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"no engine argument {name!r}; ")):
        argument_names.check([name])


def test_names_are_read_from_either_layout_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "engine/arg_utils.py": "class EngineArgs:\n    max_model_len: int = 1\n    x = 2\nclass Other:\n    y: int\n",
        "entrypoints/openai/cli_args.py": "class FrontendArgs:\n    chat_template: str | None = None\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(argument_names, "installed_vllm", lambda: tmp_path)
    assert argument_names.installed_names() == {"max_model_len", "chat_template"}


def test_without_vllm_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'kervan\[gpu\]'"):
        argument_names.check(["dtype"])
