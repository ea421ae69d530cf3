"""A tokenizer for a model that has none: ids of exactly its vocabulary, none of which means anything.

It is a byte-level BPE of 2- to 4-letter pieces, a third of them with a leading space: an id costs as much to detokenize
as a real one. For models without weights (`kervan calibrate`) and twins.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from kervan.errors import ConfigError

MIN_VOCAB = 258  # 256 bytes and two special tokens
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def has_own(model: Path) -> bool:
    """Whether a model's directory has a tokenizer."""
    return any((model / name).exists() for name in TOKENIZER_FILES) or any(model.glob("*.tiktoken"))


def write(config: Mapping[str, Any], out: Path, *, chat_template: str | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json into `out`, for a model with this config.json.

    Raises: ConfigError for one without a vocabulary, or with one that the tokenizer cannot cover.
    """
    fields = _text_fields(config)
    size = fields.get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"config.json has vocab_size {size!r}; give one of a language model")
    begin, end = special_ids(config, size)
    specials = {begin: "<|begin|>", end: "<|end|>"}  # one token where both ids are the same, as in Qwen's base models
    tokenizer = _byte_level_tokenizer(size, specials)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[begin],
        "eos_token": specials[end],
        "model_max_length": fields.get("max_position_embeddings", 8192),
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        facts["chat_template"] = chat_template
    (out / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n")


def _text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else dict(config)


def special_ids(config: Mapping[str, Any], vocab_size: int) -> tuple[int, int]:
    """First and last token; a config.json has one id, a list of them, null, or nothing."""
    fields, ids = _text_fields(config), []
    for name, default in (("bos_token_id", 0), ("eos_token_id", 1)):
        value = fields.get(name)
        value = value[0] if isinstance(value, list) and value else value
        ids.append(value if isinstance(value, int) and 0 <= value < vocab_size else default)
    return ids[0], ids[1]


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of pieces that are already tokens, shortest first; about 493,000. U+0120 is a byte-level space."""
    pairs = ["".join(p) for p in product(ascii_lowercase, repeat=2)]
    yield from product(ascii_lowercase, repeat=2)
    yield from product(["\u0120"], pairs)
    triples = [pair + letter for pair, letter in product(pairs, ascii_lowercase)]
    yield from product(pairs, ascii_lowercase)
    yield from product(["\u0120"], triples)
    yield from product(pairs, pairs)


def _byte_level_tokenizer(vocab_size: int, specials: Mapping[int, str]) -> Any:
    """A `tokenizers.Tokenizer` of exactly `vocab_size` ids, all of which decode to text but those of `specials`."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a model without a tokenizer needs the package tokenizers: pip install 'kervan[bench]'"
        ) from error
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_merges = vocab_size - len(alphabet) - len(specials)
    pairs = list(islice(_merges(), max(num_merges, 0)))
    if num_merges < 0 or len(pairs) < num_merges:
        raise ConfigError(f"vocab_size {vocab_size} is outside {MIN_VOCAB}..493,000, which the tokenizer can cover")
    ids = (i for i in range(vocab_size) if i not in specials)
    vocab = {token: i for i, token in specials.items()}
    vocab |= dict(zip([*alphabet, *(a + b for a, b in pairs)], ids, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials.values()])
    return tokenizer
