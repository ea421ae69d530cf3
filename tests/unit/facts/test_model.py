"""What names a model, and whether a layout fits what its config.json says."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kervan.errors import ConfigError
from kervan.facts import model


def write_config(directory: Path, config: Any) -> str:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def test_a_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model.resolve("m") == model.resolve("./m") == str((tmp_path / "m").resolve())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.resolve("~/m") == str((tmp_path / "m").resolve())


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "a/b.c_d"])
def test_a_hub_id_stays(name: str) -> None:
    assert model.resolve(name) == name
    assert model.read_config(name) is None


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "none", "a/b/c", "-x/y", "a b/c"])
def test_what_is_neither_directory_nor_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"check the path, or give an id such as Qwen/Qwen3-8B"):
        model.resolve(name)


def test_a_file_is_refused_with_its_directory_except_gguf(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(ConfigError, match=f"give the directory that holds its config.json: {tmp_path}"):
        model.resolve(str(weights))
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert model.resolve(str(gguf)) == str(gguf)


def test_a_good_config_is_read(tmp_path: Path) -> None:
    assert model.read_config(write_config(tmp_path, LLAMA)) == LLAMA


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(None, "has no config.json; give a directory in Hugging Face format", id="none"),
        pytest.param("{", "cannot be read as JSON", id="no JSON"),
        pytest.param("[1]", "holds a JSON list, not an object", id="no object"),
        pytest.param({"model_type": "llama"}, "lacks architectures; copy them", id="no architectures"),
        pytest.param({"architectures": ["X"]}, "lacks model_type; copy them", id="no model type"),
        pytest.param({"architectures": []}, "lacks architectures and model_type", id="neither"),
        pytest.param({}, "lacks architectures and model_type", id="empty"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, config: Any, words: str) -> None:
    if config is not None:
        write_config(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        model.read_config(str(tmp_path))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_in_place_of_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\x80\x81")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        model.read_config(str(tmp_path))


def test_quantisation_in_a_file_beside(tmp_path: Path) -> None:
    """ModelOpt writes hf_quant_config.json; what config.json says itself comes first."""
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert model.read_config(write_config(tmp_path, LLAMA)) == LLAMA | {"quantization_config": beside}
    own = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    assert model.read_config(write_config(tmp_path, own)) == own
    (tmp_path / "hf_quant_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"hf_quant_config.json cannot be read as JSON"):
        model.read_config(write_config(tmp_path, LLAMA))


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_files_that_cannot_be_read_are_one_short_line(tmp_path: Path, file: str) -> None:
    path = tmp_path / file

    def error() -> str:
        if file != "config.json":
            write_config(tmp_path, LLAMA)
        with pytest.raises(ConfigError) as caught:
            model.read_config(str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path.write_text("[" * 200_000)
    assert "cannot be read as JSON (it is nested too deeply)" in error()
    path.write_text('{"a": ' + "9" * 100_000 + "}")
    assert len(error()) < 500
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file" in error()
    path.unlink()
    path.mkdir()
    assert "is no regular file" in error()


def test_mistrals_own_format_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert model.read_config(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("fields", "tp", "pp", "error"),
    [
        pytest.param({"num_attention_heads": 32, "num_hidden_layers": 32}, 8, 4, None, id="fits"),
        pytest.param({"num_attention_heads": 14}, 4, 1,
                     "tp=4 does not divide 14 attention heads; use 1, 2, 7 or 14 (--tp)", id="tp"),
        pytest.param({"num_attention_heads": 1}, 2, 1, "tp=2 does not divide 1 attention heads; use 1 (--tp)", id="one head"),
        pytest.param({"num_attention_heads": 12}, 24, 1,
                     "tp=24 does not divide 12 attention heads; use 1, 2, 3, 4, 6 or 12 (--tp)", id="more than heads"),
        pytest.param({"num_hidden_layers": 2}, 1, 3,
                     "pp=3 stages need as many layers, the model has 2; use at most --pp 2", id="pp"),
        pytest.param({"num_hidden_layers": 2}, 1, 2, None, id="a layer per stage"),
        pytest.param({"text_config": {"num_attention_heads": 6}}, 4, 1,
                     "tp=4 does not divide 6 attention heads; use 1, 2, 3 or 6 (--tp)", id="nested text config"),
        pytest.param({}, 8, 8, None, id="fields unknown: vLLM decides"),
        pytest.param({"num_attention_heads": None}, 3, 1, None, id="null: vLLM decides"),
        pytest.param(None, 3, 1, None, id="hub id: vLLM decides"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_the_model(fields: dict[str, Any] | None, tp: int, pp: int, error: str | None) -> None:
    if error is None:
        model.check_layout(fields, tp=tp, pp=pp)
        return
    with pytest.raises(ConfigError) as caught:
        model.check_layout(fields, tp=tp, pp=pp)
    assert str(caught.value) == error
