import datetime
import re
from pathlib import Path
from typing import Any

import pytest

from kervan.errors import ConfigError
from kervan.fleet.vllm import arguments, versions


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
    arguments.check({name: None})


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
        arguments.check({"dtype": "half", name: 1})


@pytest.mark.parametrize("name", ["zzzzqqqq", "", "--dtype=half", "__init__"])
def test_a_name_like_no_other_is_refused_with_where_to_look(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"no engine argument {name!r}; ")):
        arguments.check({name: None})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("dtype", "foo", "'foo' is not one of auto, bfloat16, float, float16, float32, half"),
        ("dtype", ["half", "float"], '["half", "float"] is a list; give one of auto, bfloat16, float'),
        ("dtype", {"a": 1}, '{"a": 1} is a mapping; give one of auto'),
        ("enforce_eager", "1", "'1' is not true or false; write enforce_eager=true"),
        ("enforce_eager", 0, "0 is not true or false; write enforce_eager=false"),
        ("enforce_eager", "maybe", "'maybe' is not true or false; give one of them"),
        ("max_num_seqs", True, "True is not a whole number; give one, or leave it out"),
        ("max_num_seqs", 8.5, "8.5 is not a whole number; give one"),
        ("max_num_seqs", "many", "'many' is not a whole number; give one"),
        ("max_model_len", "4x", "'4x' is not a whole number such as 4096, 4k (4,000) or 4K (4,096), or auto"),
        ("max_num_batched_tokens", "1e4", "'1e4' is not a whole number such as 4096"),
        ("gpu_memory_utilization", "90%", "'90%' is not a number; give one"),
        ("allowed_origins", "http://a", "'http://a' is not a list of texts in JSON; write for example [\"http://a\"]"),
        ("allowed_origins", "5", "'5' is not a list of texts; give one"),
        ("allowed_origins", [5], "[5] has an item that is no text; give texts only"),
        ("served_model_name", [], "[] is an empty list; leave it out for vLLM's default"),
        ("served_model_name", ["a", None], '["a", null] has the item None; give a list, each item a text'),
        ("served_model_name", ["a", "-b"], "has the item '-b', which vLLM's parser would read as an option"),
        ("cudagraph_capture_sizes", [1, "x"], "has the item 'x', which is not a whole number"),
        ("cudagraph_capture_sizes", "1,2", "'1,2' is not a whole number"),
        ("lora_modules", "sql", "'sql' is neither NAME=PATH nor a mapping of name and path"),
        ("lora_modules", [{"name": "sql"}], "which lacks path; give both"),
        ("compilation_config", {"modus": 3}, '{"modus": 3} has no field \'modus\'; did you mean mode?'),
        ("compilation_config", '{"modus": 3}', "has no field 'modus'; did you mean mode?"),
        ("compilation_config", "3", "'3' is not a mapping; give one"),
        ("compilation_config", "{3", "'{3' is not a mapping in JSON; write for example {"),
        ("kv_transfer_config", {"kv_role": "x"}, "has the field kv_role='x', which is not one of"),
        ("kv_transfer_config", {"kv_port": "x"}, "has the field kv_port='x', which is no number; give one"),
        ("structured_outputs_config", {"backend": "xgramar"}, "did you mean xgrammar?"),
        ("limit_mm_per_prompt", "image=2", "'image=2' is not a mapping in JSON"),
        ("quantization", "fp9", "values for it; did you mean fp8?"),
        ("tool_call_parser", "hermess", "values for it; did you mean hermes?"),
        ("reasoning_parser", "zzz", "'zzz' is not one of "),
        ("attention_backend", "flash_atn", "did you mean flash_attn?"),
        ("load_format", "dumy", "did you mean dummy?"),
        ("enable_auto_tool_choice", True, "true needs tool_call_parser too"),
        ("hf_token", False, "... is not a text; give one, or leave it out"),  # the token itself is not shown
        ("revision", datetime.date(2024, 1, 1), "is a date or time; write it in quotes"),
        ("additional_config", {"a": {1, 2}}, "is of the type set; give a text, number, list or mapping"),
        ("chat_template", "a\0b", "has a null byte; leave it out"),
    ],
)  # fmt: skip
def test_a_value_that_vllm_would_not_take_is_refused(name: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments.check({name: value})
    message = str(caught.value)
    assert message.startswith(f"engine argument {name}=")
    assert problem in message
    assert "\n" not in message


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ConfigError, match="nested more than 50 deep"):
        arguments.check({"additional_config": {"a": value}})


@pytest.mark.parametrize(
    "given",
    [
        {"max_model_len": "auto"}, {"max_model_len": -1}, {"max_model_len": "25.6k"}, {"enforce_eager": False},
        {"disable_log_stats": False}, {"moe_backend": "Triton"}, {"attention_backend": "FLASH_ATTN"},
        {"hf_overrides": {"a": 1}}, {"hf_overrides": "module.function"}, {"hf_token": True},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": "3"}},
        {"kv_transfer_config": '{"kv_port": 14k}'}, {"limit_mm_per_prompt": {"image": 2}},
        {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}, {"middleware": []}, {"quantization": "None"},
        {"tool_call_parser": "mine", "tool_parser_plugin": "/p.py"}, {"max_lora_rank": 16},
    ],
)  # fmt: skip
def test_a_value_that_vllm_takes_is_taken(given: dict[str, Any]) -> None:
    arguments.check(given)


def test_fields_and_second_names_of_options_are_pointed_to() -> None:
    with pytest.raises(ConfigError, match=r"'compilation_config.mode'; .* compilation_config=\{\"mode\": VALUE\}"):
        arguments.check({"compilation_config.mode": 3})
    with pytest.raises(ConfigError, match="'device_memory_utilization'; write gpu_memory_utilization"):
        arguments.check({"device_memory_utilization": 0.5})


def test_names_of_plugins_may_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_has_plugins", lambda: True)
    arguments.check({"quantization": "mine"})


def test_a_source_that_is_laid_out_otherwise_is_read_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "engine/arg_utils.py": (
            "class EngineArgs:\n"
            "    def add_cli_args(parser):\n"
            "        model_kwargs = get_kwargs(ModelConfig)\n"
            "        parser.add_argument('--max-model-len', **model_kwargs['max_model_len'])\n"
            "        parser.add_argument('--new', type=new.kind, choices=new.choices)\n"
        ),
        "entrypoints/openai/cli_args.py": "class FrontendArgs:\n    chat_template: str | None = None\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(arguments, "installed_vllm", lambda: tmp_path)
    arguments.check({"max_model_len": "anything", "new": "x", "chat_template": "{{ x }}"})
    with pytest.raises(ConfigError, match="no engine argument 'dtype'"):
        arguments.check({"dtype": "half"})


def test_without_vllm_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'kervan\[gpu\]'"):
        arguments.check({"dtype": "half"})


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("0.32.0", None),
        ("0.24.0+cu129", None),
        ("0.33.0", "tested with (0.24.0 and 0.32.0); it is in the supported range >=0.24,<0.34"),
        ("0.33.1.dev3+gabc", "it is in the supported range"),
        ("0.34.0", ", and outside the supported range >=0.24,<0.34"),
        ("0.9.2", ", and outside the supported range"),
        ("unknown", "vLLM unknown is not a version that kervan is tested with"),
    ],
)
def test_a_version_that_is_not_tested_is_told(version: str, told: str | None) -> None:
    found = versions.untested(version)
    assert found is None if told is None else told in (found or "")


def test_the_installed_version_is_read_from_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "installed_vllm", lambda: tmp_path)
    assert arguments.installed_version() == "unknown"
    (tmp_path / "_version.py").write_text("version: str\n\n__version__ = version = '0.33.0'\n")
    assert arguments.installed_version() == "0.33.0"
    (tmp_path / "_version.py").write_text("version = '0.32.0'\n")
    assert arguments.installed_version() == "0.32.0"


def test_a_package_that_vllm_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(versions, "engine_version", lambda: "0.33.0")
    with pytest.raises(ConfigError, match=r"needs a package that is not installed \(No module named 'nowhere_to_be_"):
        versions._first("absent.module", "needy")
    with pytest.raises(ConfigError, match=r"vLLM 0\.33\.0 has none of absent\.module, absent"):
        versions._first("absent.module", "absent")
