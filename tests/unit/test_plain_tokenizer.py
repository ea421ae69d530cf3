"""A tokenizer for a model that has none."""

import json
from pathlib import Path

import pytest

from kervan import plain_tokenizer
from kervan.errors import ConfigError


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tekken.json", "qwen.tiktoken"])
def test_a_directory_with_a_tokenizer_keeps_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").touch()  # settings alone are none
    assert not plain_tokenizer.has_own(tmp_path)
    (tmp_path / name).touch()
    assert plain_tokenizer.has_own(tmp_path)


def test_all_ordinary_ids_are_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    config = {"text_config": {"vocab_size": 900, "eos_token_id": [899]}, "bos_token_id": 898}
    plain_tokenizer.write(config, tmp_path, chat_template=plain_tokenizer.CHAT_TEMPLATE)
    assert plain_tokenizer.special_ids(config, 900) == (898, 899)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.get_vocab_size() == 900
    assert all(made.decode([i]) for i in range(898))
    assert made.decode([898, 899]) == ""
    assert made.decode(made.encode("Hello, world").ids) == "Hello, world"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]


def test_a_vocabulary_that_it_cannot_cover_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 600000 is outside 258\.\.493,000"):
        plain_tokenizer.write({"vocab_size": 600_000}, tmp_path)
