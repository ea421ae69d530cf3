"""What can be told of a model before anything starts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NEEDED_FIELDS = ("architectures", "model_type")


def resolve(model: str) -> str:
    """An absolute directory, or a Hugging Face id for vLLM to fetch.

    Raises: ConfigError when it is neither.
    """
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a name too long, a null byte
        raise ConfigError(f"model {model[:80]!r} is no usable path ({error}); check the path") from error
    if is_directory:
        return str(path.resolve())
    if is_file:
        if path.suffix == ".gguf":
            return str(path.resolve())
        raise ConfigError(f"model {model!r} is a file; give the directory that holds its config.json: {path.parent}")
    looks_local = model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model)
    if looks_local:
        raise ConfigError(
            f"model {model!r} is neither a directory here nor a Hugging Face id; "
            "check the path, or give an id such as Qwen/Qwen3-8B"
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
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a JSON {type(config).__name__}, not an object; fetch the model again")
    missing = [name for name in NEEDED_FIELDS if not config.get(name)]
    if missing:
        raise ConfigError(f"{path} lacks {' and '.join(missing)}; copy them from the model's page, or fetch it again")
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
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder-only transformer with (grouped-query) attention, dense or with experts.

    `active_parameters`: those that one token passes, without the embedding table.
    """

    num_layers: int
    parameters: int
    active_parameters: int
    kv_bytes_per_token: int
    vocab_size: int
    max_model_len: int
    bytes_per_parameter: float
    eos_token: int


def shape(config: dict[str, Any], source: str) -> Shape:
    """The sizes that follow from a `config.json`. KV cache in bf16; biases and norms are left out (below 0.1%).

    Raises: ConfigError when a field is missing; `source` names the file.
    """
    text_config = config.get("text_config")
    fields = text_config if isinstance(text_config, dict) else config

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise ConfigError(f"{source} has no whole number {names[0]!r}, so the model's size is not known")
        return default

    hidden, layers, heads = number("hidden_size"), number("num_hidden_layers"), number("num_attention_heads")
    kv_heads = number("num_key_value_heads", default=heads)
    head = number("head_dim", default=hidden // heads)
    vocab = number("vocab_size")
    attention = 2 * hidden * head * (heads + kv_heads)
    experts = number("num_experts", "num_local_experts", default=1)
    width = number("moe_intermediate_size", "intermediate_size") if experts > 1 else number("intermediate_size")
    expert = 3 * hidden * width
    router = hidden * experts if experts > 1 else 0
    used = number("num_experts_per_tok", default=1) if experts > 1 else 1
    table = vocab * hidden
    is_tied = bool(fields.get("tie_word_embeddings", False))
    eos = config.get("eos_token_id", fields.get("eos_token_id"))
    eos = eos[0] if isinstance(eos, list) and eos else eos
    return Shape(
        num_layers=layers,
        parameters=layers * (attention + experts * expert + router) + table * (1 if is_tied else 2),
        active_parameters=layers * (attention + used * expert + router) + table,
        kv_bytes_per_token=layers * 2 * kv_heads * head * 2,
        vocab_size=vocab,
        max_model_len=number("max_position_embeddings", default=8192),
        bytes_per_parameter=_bytes_per_parameter(config.get("quantization_config")),
        eos_token=eos if isinstance(eos, int) else vocab - 1,
    )


def _bytes_per_parameter(quantization: Any) -> float:
    if not isinstance(quantization, dict):
        return 2.0
    if "fp8" in str(quantization.get("quant_method", "")):
        return 1.0
    bits = quantization.get("bits")
    return bits / 8 if isinstance(bits, int) else 2.0


def special_tokens(model: str) -> frozenset[int]:
    """Ids that a local model's tokenizer keeps for itself (begin, end, roles); empty when it does not say."""
    try:
        added = json.loads((Path(model) / "tokenizer.json").read_text()).get("added_tokens", [])
        return frozenset(int(token["id"]) for token in added)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return frozenset()
