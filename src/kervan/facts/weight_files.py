"""What can be told of a model's files before anything starts: weights that are missing or cut off, no tokenizer."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kervan.units import plural

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf", ".safetensors.index.json", ".bin.index.json")
# Values of vLLM's `load_format` that read such files from the model's directory; source: LoadFormats of 0.32.
LOADED_FROM_DIRECTORY = frozenset(
    {
        "auto", "hf", "safetensors", "pt", "npcache", "gguf", "bitsandbytes", "mistral", "fastsafetensors",
        "instanttensor",
    }
)  # fmt: skip
INDEX = "model.safetensors.index.json"
# Of a safetensors file: source https://huggingface.co/docs/safetensors/index#format.
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"
FETCH_AGAIN = "fetch the model again, or add --engine-arg load_format=dummy for random weights"
# Names of files with a vocabulary; some tokenizers need none but their settings.
TOKENIZER_FILE = re.compile(r"token|vocab|merges|sentencepiece|spiece|spm|tekken|\.model$", re.IGNORECASE)


def problem(model: str, load_format: Any = None) -> str | None:
    """What to do about weights that are missing, cut off or broken; None where nothing is wrong."""
    return missing_weights(model, load_format) or broken_weights(model, load_format)


def problem_on_node(node: str, model: str, load_format: Any = None) -> str | None:
    """What to do about a model that node `node`, on which this runs, cannot load; None where nothing is wrong.

    `load_format`: as in `missing_weights`; `dummy` where only the directory is needed.
    """
    if Path(model).is_absolute() and not Path(model).exists():
        return (
            f"node {node} has no {model}; copy the model to that path on each node that serves it, "
            "or give a Hugging Face id"
        )
    found = problem(model, load_format)
    return f"node {node}: {found}" if found else None


def missing_weights(model: str, load_format: Any = None) -> str | None:
    """What to do about a local directory that has no weights for vLLM to load; None where nothing is missing.

    `load_format`: vLLM's argument. `dummy` needs no files, and some loaders take them from elsewhere.
    """
    directory = Path(model)
    if not _is_loaded_from(directory, load_format):
        return None
    try:
        if any(path.name.endswith(WEIGHT_FILES) for path in directory.iterdir()):
            return None
    except OSError:  # vLLM says what it cannot read
        return None
    return (
        f"{model} has no weights (*.safetensors, *.bin, *.pt, *.gguf, or their index); fetch them, or add "
        "--engine-arg load_format=dummy for random ones"
    )


def broken_weights(model: str, load_format: Any = None) -> str | None:
    """What is wrong with the weights of a local directory: parts that are missing or cut off; None for nothing.

    Reads the headers of the safetensors files, a few ms each. Other formats have no length to compare.
    """
    directory = Path(model)
    if not _is_loaded_from(directory, load_format):
        return None
    try:
        named = _named_by_index(directory / INDEX)
        if missing := sorted(name for name in named if not (directory / name).exists()):
            return (
                f"{model} lacks {plural(len(missing), 'file')} of the {len(named)} that {INDEX} names, such as "
                f"{missing[0]}; {FETCH_AGAIN}"
            )
        files = [directory / name for name in sorted(named)] or sorted(directory.glob("*.safetensors"))
        for path in files:
            if problem := _broken_file(path):
                return f"{path} {problem}; {FETCH_AGAIN}"
    except OSError as error:
        return f"the weights of {model} cannot be read ({error}); check who may read them"
    return None


def missing_tokenizer(model: str) -> str | None:
    """What to do about a local directory in Hugging Face format without any file of a tokenizer; None if it has one."""
    directory = Path(model)
    if not (directory / "config.json").exists():
        return None
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return None
    if any(TOKENIZER_FILE.search(name) or name.endswith(".gguf") for name in names):
        return None
    return (
        f"{model} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...); fetch its files, or name one: "
        "--engine-arg tokenizer=NAME"
    )


def _is_loaded_from(directory: Path, load_format: Any) -> bool:
    return str(load_format or "auto") in LOADED_FROM_DIRECTORY and directory.is_dir()


def _named_by_index(path: Path) -> set[str]:
    """The files that an index names; none without an index, or with one that vLLM has to complain about."""
    try:
        names = json.loads(path.read_text()).get("weight_map", {}).values()
        return {name for name in names if isinstance(name, str)}
    except FileNotFoundError:
        return set()
    except (ValueError, AttributeError, RecursionError):
        return set()


def _broken_file(path: Path) -> str | None:
    """What is wrong with a safetensors file: its header says where its last tensor ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(max(LENGTH_BYTES, len(LFS_POINTER)))
        if head.startswith(LFS_POINTER):
            return "is a pointer of Git LFS and no weights: 'git lfs pull' fetches them"
        if size < LENGTH_BYTES:
            return f"has {plural(size, 'byte')}, which are no weights"
        header_bytes = int.from_bytes(head[:LENGTH_BYTES], "little")
        if header_bytes > MAX_HEADER_BYTES:
            return f"is no safetensors file: its header would have {header_bytes:,} bytes"
        if LENGTH_BYTES + header_bytes > size:
            return f"is cut off: it has {size:,} bytes, and its header alone {header_bytes:,}"
        file.seek(LENGTH_BYTES)
        text = file.read(header_bytes)
    try:
        end = max(_ends(json.loads(text)), default=0)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        return "is no safetensors file: its header is no JSON of tensors"
    wanted = LENGTH_BYTES + header_bytes + end
    if size < wanted:
        return f"is cut off: it has {size:,} bytes of {wanted:,}"
    return None


def _ends(header: dict[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name != "__metadata__":
            yield int(tensor["data_offsets"][1])
