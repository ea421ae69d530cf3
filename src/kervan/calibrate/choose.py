"""Which servers a calibration runs: a few shapes, layouts and loads that fit this host and tell its constants apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.calibrate.serving import Point, Server
from kervan.errors import ConfigError

GIB = 1 << 30
WEIGHTS_SHARE = 0.7  # of a GPU's memory; the rest is for KV cache, activations and graphs
CONCURRENCIES = (1, 16, 64, 256)
QUICK_CONCURRENCIES = (1, 32)
PROMPTS = (256, 2048, 8000)  # the server's max_model_len is 8192
QUICK_PROMPTS = (2048,)

_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**_LLAMA, **shape, "num_attention_heads": heads, "head_dim": 128}


# Dense, of the field's usual sizes; two that fit are measured, so that what a layer costs and what a step costs differ.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-14b": _llama(5120, 13824, 48, 40),
    "llama-8b": _llama(4096, 14336, 32, 32),
    "llama-3b": _llama(3072, 8192, 28, 24),
    "llama-1b": _llama(2048, 5632, 20, 16),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to measure: its name and its `config.json`."""

    name: str
    config: Mapping[str, Any]


def weights_bytes(shape: Shape) -> int:
    """Of all weights in bf16, near enough to choose a layout: norms, biases and quantisation are left out.

    Raises: ConfigError for a config that is no language model's.
    """
    text = shape.config.get("text_config")
    fields = {**shape.config, **text} if isinstance(text, Mapping) else shape.config
    try:
        hidden, layers = int(fields["hidden_size"]), int(fields["num_hidden_layers"])
        heads, intermediate = int(fields["num_attention_heads"]), int(fields["intermediate_size"])
        vocab = int(fields["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the config.json of {shape.name} has no usable {error}; give a language model's") from error
    head_dim = int(fields.get("head_dim") or hidden // heads)
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    experts = int(fields.get("num_experts") or fields.get("num_local_experts") or 1)
    width = int(fields.get("moe_intermediate_size") or intermediate) if experts > 1 else intermediate
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return 2 * (2 * vocab * hidden + layers * (attention + experts * 3 * hidden * width))


def default_shapes(memory_bytes: int) -> list[Shape]:
    """The two largest usual ones whose weights take at most half of one GPU's memory; the smallest if none does."""
    shapes = [Shape(name, config) for name, config in SHAPES.items()]
    fitting = [shape for shape in shapes if weights_bytes(shape) <= memory_bytes / 2]
    return fitting[:2] or shapes[-1:]


def smallest_tp(shape: Shape, num_gpus: int, memory_bytes: int) -> int:
    """The smallest power of two of GPUs that holds the weights.

    Raises: ConfigError when all of them do not.
    """
    tp = 1
    need_bytes = weights_bytes(shape)
    while need_bytes > WEIGHTS_SHARE * tp * memory_bytes:
        tp *= 2
    if tp > num_gpus:
        need, have = need_bytes / GIB, num_gpus * memory_bytes / GIB
        raise ConfigError(
            f"{shape.name} has about {need:.0f} GiB of weights, {num_gpus} GPUs have {have:.0f} GiB, of which weights "
            f"may take {WEIGHTS_SHARE:.0%}; calibrate with a smaller model (--model), the constants hold for others"
        )
    return tp


def points(is_quick: bool) -> tuple[Point, ...]:
    """The loads of each server: decoding by batch size, and single prompts, whose first token is prefill."""
    decodes = [Point(n, 1024, 64 if n == 1 else 128) for n in (QUICK_CONCURRENCIES if is_quick else CONCURRENCIES)]
    prefills = [Point(1, isl, 8) for isl in (QUICK_PROMPTS if is_quick else PROMPTS)]
    return tuple(prefills + decodes)


def servers(shapes: Sequence[tuple[Shape, Path]], num_gpus: int, memory_bytes: int, *, is_quick: bool) -> list[Server]:
    """What to measure, most telling first: each model as small as it goes, then the last with twice the GPUs by TP
    and by PP, then the first over all GPUs. GPUs are given out in turn, so that servers stand side by side.

    Raises: ConfigError.
    """
    layouts: list[tuple[Shape, Path, int, int]] = []
    for shape, directory in shapes:
        layouts.append((shape, directory, smallest_tp(shape, num_gpus, memory_bytes), 1))
    shape, directory, tp, _ = layouts[-1]
    if 2 * tp <= num_gpus:
        layouts.append((shape, directory, 2 * tp, 1))
        if not is_quick:
            layouts.append((shape, directory, tp, 2))
    shape, directory, _, _ = layouts[0]
    most = 1 << (num_gpus.bit_length() - 1)
    heads = int(shape.config.get("num_attention_heads") or most)
    if most > 2 and heads % most == 0 and not is_quick:
        layouts.append((shape, directory, most, 1))
    loads = points(is_quick)
    return [
        Server(shape.name, directory, tp, pp, 1, gpus, loads)
        for (shape, directory, tp, pp), gpus in zip(
            layouts, place([tp * pp for _, _, tp, pp in layouts], num_gpus), strict=True
        )
    ]


def place(sizes: Iterable[int], num_gpus: int) -> list[tuple[int, ...]]:
    """GPUs for servers of these sizes: the next free ones, from 0 again when too few are left."""
    places, at = [], 0
    for size in sizes:
        if at + size > num_gpus:
            at = 0
        places.append(tuple(range(at, at + size)))
        at += size
    return places
