"""What can be told of a model before anything starts."""

import json
import os
import re
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_CONFIG_BYTES = 16 << 20
EXPERT_FIELDS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "num_routed_experts",
)  # fmt: skip
NEEDED_FIELDS = ("architectures", "model_type")


def resolve(model: str, *, is_here: bool = True) -> str:
    """An absolute directory, or a Hugging Face id for vLLM to fetch.

    `is_here`: it is served on this machine. Elsewhere, an absolute path that is not here may be on the nodes.

    Raises: ConfigError when it is neither.
    """
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a name too long, a null byte
        raise ConfigError(f"model {model[:80]!r} is not a usable path ({error}); check the path") from error
    if is_directory:
        return str(path.resolve())
    if is_file:
        if path.suffix == ".gguf":
            return str(path.resolve())
        raise ConfigError(f"model {model!r} is a file; give the directory that holds its config.json: {path.parent}")
    looks_local = model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model)
    if looks_local and path.is_absolute() and not is_here:
        return os.path.normpath(path)
    if looks_local:
        elsewhere = "" if is_here else ", or give the absolute path that it has on the nodes"
        raise ConfigError(
            f"model {model!r} is neither a directory here nor a Hugging Face id; "
            f"check the path, or give an id such as Qwen/Qwen3-8B{elsewhere}"
        )
    return model


def read_config(model: str) -> dict[str, Any] | None:
    """The `config.json` of a local model; None for a Hugging Face id.

    Raises: ConfigError when the file is missing, no JSON object, or lacks what vLLM needs to choose a model class.
    """
    directory = Path(model)
    if not directory.is_dir():
        return None
    path = directory / "config.json"
    if not path.exists():
        if (directory / "params.json").exists():  # Mistral's own format
            return None
        raise ConfigError(f"{directory} has no config.json; give a directory in Hugging Face format")
    config = _with_needed(_read_object(path), str(path))
    beside = directory / "hf_quant_config.json"  # ModelOpt's, which vLLM reads where config.json says nothing
    if not config.get("quantization_config") and beside.exists():
        config["quantization_config"] = _read_object(beside)
    return config


def _read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises: ConfigError in one short line for anything else.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{path} is no regular file; fetch the model again")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path} has {path.stat().st_size:,} bytes, above {MAX_CONFIG_BYTES:,}; fetch the model again"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); fetch the model again") from error
    return parse_object(content, str(path))


def parse_config(content: bytes, source: str) -> dict[str, Any]:
    """The content of a `config.json`; `source` names it in errors.

    Raises: ConfigError as `read_config`.
    """
    return _with_needed(parse_object(content, source), source)


def parse_object(content: bytes, source: str) -> dict[str, Any]:
    """A JSON object; `source` names it in errors.

    Raises: ConfigError in one short line for anything else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ConfigError(f"{source} cannot be read as JSON ({reason}); fetch the model again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{source} holds a JSON {type(found).__name__}, not an object; fetch the model again")
    return found


def _with_needed(config: dict[str, Any], source: str) -> dict[str, Any]:
    missing = [name for name in NEEDED_FIELDS if not config.get(name)]
    if missing:
        raise ConfigError(f"{source} lacks {' and '.join(missing)}; copy them from the model's page, or fetch it again")
    return config


def check_layout(config: dict[str, Any] | None, *, tp: int, pp: int, ep: int = 1) -> None:
    """Raises: ConfigError when `tp` does not divide the attention heads, `pp` exceeds the layers, or no experts."""
    if config is None:
        return
    text_config = config.get("text_config")
    fields = text_config if isinstance(text_config, dict) else config
    heads = fields.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0 and heads % tp:
        fitting = [n for n in range(1, min(heads, 64) + 1) if heads % n == 0]
        raise ConfigError(f"tp={tp} does not divide {heads} attention heads; use {_one_of(fitting)} (--tp)")
    layers = fields.get("num_hidden_layers")
    if isinstance(layers, int) and 0 < layers < pp:
        raise ConfigError(f"pp={pp} stages need as many layers, the model has {layers}; use at most --pp {layers}")
    if ep > 1 and not any(fields.get(name) for name in EXPERT_FIELDS):
        raise ConfigError(f"ep={ep} spreads experts, and the model has none; use --ep 1 (--tp spreads all layers)")


def _one_of(numbers: list[int]) -> str:
    alternatives = [str(n) for n in numbers]
    return alternatives[0] if len(alternatives) == 1 else f"{', '.join(alternatives[:-1])} or {alternatives[-1]}"


def special_tokens(model: str) -> frozenset[int]:
    """Ids that a local model's tokenizer keeps for itself (begin, end, roles); empty when it does not say."""
    try:
        added = json.loads((Path(model) / "tokenizer.json").read_text()).get("added_tokens", [])
        return frozenset(int(token["id"]) for token in added)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return frozenset()
