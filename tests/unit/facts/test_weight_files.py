import json
from pathlib import Path
from typing import Any

import pytest

from kervan.facts import weight_files


def safetensors(*ends: int, data_bytes: int | None = None) -> bytes:
    """A file with a tensor of one byte each up to `ends`; `data_bytes`: how much of the data is there."""
    tensors: dict[str, Any] = {f"t{end}": {"dtype": "U8", "shape": [1], "data_offsets": [end - 1, end]} for end in ends}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    size = max(ends, default=0) if data_bytes is None else data_bytes
    return len(header).to_bytes(8, "little") + header + bytes(size)


def index(*names: str) -> str:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}})


@pytest.mark.parametrize(
    ("file", "load_format", "is_missing"),
    [
        ("README.md", None, True),
        ("config.json", "auto", True),
        ("tokenizer.json", "safetensors", True),
        ("model-00001-of-00002.safetensors", None, False),
        ("model.safetensors.index.json", "auto", False),
        ("pytorch_model.bin", "pt", False),
        ("weights.gguf", None, False),
        ("config.json", "dummy", False),
        ("config.json", "runai_streamer", False),
        ("config.json", "tensorizer", False),
        ("config.json", "sharded_state", False),
    ],
)
def test_weights_are_missed_where_vllm_would_load_them(
    tmp_path: Path, file: str, load_format: str | None, is_missing: bool
) -> None:
    (tmp_path / file).touch()
    words = weight_files.missing_weights(str(tmp_path), load_format)
    assert (words is not None) == is_missing
    if words is not None:
        assert words.startswith(f"{tmp_path} has no weights (")
        assert words.endswith("add --engine-arg load_format=dummy for random ones")


def test_weights_of_a_hub_id_and_of_a_file_are_not_missed(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert weight_files.missing_weights("Qwen/Qwen3-8B") is None
    assert weight_files.missing_weights(str(tmp_path / "model.gguf")) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(safetensors(1, 2, 3, data_bytes=2), "bytes of", id="the data are cut off"),
        pytest.param(
            safetensors(1)[:40], "is cut off: it has 40 bytes, and its header alone", id="the header is cut off"
        ),
        pytest.param(b"", "has 0 bytes, which are no weights", id="empty"),
        pytest.param(b"\xff" * 64, "its header would have", id="no length"),
        pytest.param((4).to_bytes(8, "little") + b"junk", "its header is no JSON of tensors", id="no JSON"),
        pytest.param((2).to_bytes(8, "little") + b"[]", "its header is no JSON of tensors", id="no object"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "'git lfs pull' fetches them",
            id="LFS",
        ),
    ],
)
def test_a_broken_file_is_told_with_the_fix(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    told = weight_files.broken_weights(str(tmp_path))
    assert told is not None
    assert told.startswith(f"{tmp_path}/model.safetensors ")
    assert problem in told
    assert told.endswith("; fetch the model again, or add --engine-arg load_format=dummy for random weights")
    assert weight_files.broken_weights(str(tmp_path), "dummy") is None


def test_the_arithmetic_of_a_cut_file(tmp_path: Path) -> None:
    whole = safetensors(1, 2, 3)
    (tmp_path / "model.safetensors").write_bytes(whole[:-2])
    assert f"it has {len(whole) - 2:,} bytes of {len(whole):,};" in (weight_files.broken_weights(str(tmp_path)) or "")


def test_files_that_an_index_names_must_be_there_and_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index("a.safetensors", "b.safetensors", "b.safetensors"))
    (tmp_path / "a.safetensors").write_bytes(safetensors(1))
    (tmp_path / "stray.safetensors").write_bytes(b"")  # vLLM does not read it either
    told = weight_files.broken_weights(str(tmp_path)) or ""
    assert told.startswith(f"{tmp_path} lacks 1 file of the 2 that model.safetensors.index.json names, such as b.safe")
    (tmp_path / "b.safetensors").write_bytes(safetensors(5))
    assert weight_files.broken_weights(str(tmp_path)) is None


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 5}', "{}"])
def test_an_index_that_says_nothing_is_left_to_vllm(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (tmp_path / "model.safetensors").write_bytes(safetensors(3, 1))
    assert weight_files.broken_weights(str(tmp_path)) is None


def test_other_formats_and_hub_ids_are_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files.broken_weights(str(tmp_path)) is None
    assert weight_files.broken_weights("Qwen/Qwen3-8B") is None


@pytest.mark.parametrize(
    ("files", "is_missing"),
    [
        (["config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"], True),
        (["config.json", "tokenizer.json"], False),
        (["config.json", "tokenizer.model.v3"], False),
        (["config.json", "vocab.txt"], False),
        (["config.json", "qwen.tiktoken", "tokenization_qwen.py"], False),
        (["config.json", "spm.model"], False),
        (["config.json", "tokenizer_config.json"], False),  # bytes need no vocabulary
        (["params.json", "consolidated.safetensors"], False),
    ],
)
def test_a_directory_without_any_file_of_a_tokenizer(tmp_path: Path, files: list[str], is_missing: bool) -> None:
    for name in files:
        (tmp_path / name).touch()
    told = weight_files.missing_tokenizer(str(tmp_path))
    assert (told is not None) == is_missing
    if told is not None:
        assert told.endswith("--engine-arg tokenizer=NAME")
