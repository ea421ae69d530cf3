"""Make a model directory from a config.json alone: the config, and a tokenizer whose ids cover its vocabulary.

For runs with random weights (`--engine-arg load_format=dummy`) of a real architecture. The tokenizer is a byte-level
BPE of 2- to 4-letter pieces, a third of them with a leading space: an id costs as much to detokenize as a real one.

    python benchmarks/shape_model.py models/llama3-8b/config.json /tmp/llama3-8b
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def merges() -> Iterator[tuple[str, str]]:
    """Pairs of pieces that are already tokens, shortest first; about 493,000. U+0120 is a byte-level space."""
    pairs = ["".join(p) for p in product(ascii_lowercase, repeat=2)]
    yield from product(ascii_lowercase, repeat=2)
    yield from product(["\u0120"], pairs)
    triples = [pair + letter for pair, letter in product(pairs, ascii_lowercase)]
    yield from product(pairs, ascii_lowercase)
    yield from product(["\u0120"], triples)
    yield from product(pairs, pairs)


def byte_level_tokenizer(vocab_size: int, bos_id: int, eos_id: int) -> Tokenizer:
    """Exactly `vocab_size` ids, all of which decode to text but `bos_id` and `eos_id`.

    Raises: ValueError if vocab_size is below 258 (256 bytes and two special tokens) or above what `merges` yields.
    """
    specials = {bos_id: "<|begin|>", eos_id: "<|end|>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_merges = vocab_size - len(alphabet) - len(specials)
    pairs = list(islice(merges(), max(num_merges, 0)))
    if num_merges < 0 or len(pairs) < num_merges or max(specials) >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} with special ids {sorted(specials)}: need 258 to 493,000, ids below it"
        )
    ids = (i for i in range(vocab_size) if i not in specials)
    vocab = {token: i for i, token in specials.items()}
    vocab |= dict(zip([*alphabet, *(a + b for a, b in pairs)], ids, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials.values()])
    return tokenizer


def write_model(config: Path, out: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json under `out`."""
    shape = json.loads(config.read_text())
    out.mkdir(parents=True, exist_ok=True)
    bos_id, eos_id = shape.get("bos_token_id", 0), shape.get("eos_token_id", 1)
    eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    tokenizer = byte_level_tokenizer(shape["vocab_size"], bos_id, eos_id)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(shape, indent=1) + "\n")
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": shape.get("max_position_embeddings", 8192),
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a Hugging Face config.json")
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    write_model(args.config, args.out_dir)
    print(args.out_dir)


if __name__ == "__main__":
    main()
