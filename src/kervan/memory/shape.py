"""The sizes of a dense decoder, as the estimate counts it and `decoder.py` builds it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.architecture import parse
from kervan.facts.architecture.spec import Attention, Mlp, ModelSpec
from kervan.facts.markup import json_value


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """A Llama-style decoder: RMS norms, rotary positions, grouped attention, an MLP of three matrices, no biases."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer."""
        attention = 2 * self.num_heads * self.head_dim + 2 * self.num_kv_heads * self.head_dim
        return self.hidden * (attention + 3 * self.intermediate) + 2 * self.hidden

    @property
    def table_parameters(self) -> int:
        """Numbers in the embedding table, and in the head if it has its own."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All numbers."""
        tables = self.table_parameters * (1 if self.is_tied else 2)
        return tables + self.num_layers * self.layer_parameters + self.hidden

    def step_flops(self, batch: int, seq: int) -> float:
        """Of a forward and a backward pass without recomputation: 6 for each weight and token, and attention's.

        Source: Megatron-LM (arXiv 2104.04473, section 5.1), halved where causal attention skips half of the products.
        """
        products = self.num_layers * (self.layer_parameters - 2 * self.hidden) + self.table_parameters
        attention = 6 * self.num_layers * self.num_heads * self.head_dim * seq
        return float(batch * seq) * (6 * products + attention)


# Shapes that need no file: for tests, and the sizes that docs/memory.md measures (Llama 3.2 1B and 3B, Llama 3.1 8B).
NAMED: dict[str, DecoderShape] = {
    shape.name: shape
    for shape in (
        DecoderShape(name="tiny", num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16,
                     intermediate=192, vocab=512, is_tied=False),
        DecoderShape(name="small", num_layers=8, hidden=192, num_heads=6, num_kv_heads=2, head_dim=32,
                     intermediate=512, vocab=512, is_tied=False),
        DecoderShape(name="1b", num_layers=16, hidden=2048, num_heads=32, num_kv_heads=8, head_dim=64,
                     intermediate=8192, vocab=128256, is_tied=True),
        DecoderShape(name="3b", num_layers=28, hidden=3072, num_heads=24, num_kv_heads=8, head_dim=128,
                     intermediate=8192, vocab=128256, is_tied=True),
        DecoderShape(name="8b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128,
                     intermediate=14336, vocab=128256, is_tied=False),
    )
}  # fmt: skip


def read(model: str) -> DecoderShape:
    """The shape of a name in `NAMED`, or of a directory's `config.json`.

    Raises: ConfigError for neither, and for a model that is no dense decoder of equal layers.
    """
    path = Path(model)
    if model in NAMED and not path.exists():
        return NAMED[model]
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json_value(file.read_text())
    except OSError:
        raise ConfigError(
            f"{model!r} is no directory with a config.json, and no named shape; give a model's directory, or one of "
            f"{', '.join(NAMED)}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); give a model's directory") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a JSON {type(config).__name__}, not an object; give a model's directory")
    return of_spec(parse(config, str(file)), path.resolve().name if path.is_dir() else path.stem)


def of_spec(spec: ModelSpec, name: str) -> DecoderShape:
    """The shape of a model spec. Raises: ConfigError for a model that is no dense decoder of equal layers."""
    blocks: list[Any] = [block for layer in spec.layers for block in (*layer.mixers, *layer.feed_forwards)]
    strange = [block for block in blocks if not isinstance(block, Attention | Mlp)]
    if strange:
        raise ConfigError(
            f"{spec.source}: {spec.architecture} has layers of kind {type(strange[0]).__name__}, and training "
            "memory is "
            f"known for dense attention and MLP alone; take a dense model, or a named shape ({', '.join(NAMED)})"
        )
    widths = {block.width for block in blocks if isinstance(block, Mlp)}
    matrices = {block.matrices for block in blocks if isinstance(block, Mlp)}
    heads = {(b.num_heads, b.num_kv_heads, b.head_dim) for b in blocks if isinstance(b, Attention)}
    if len(widths) != 1 or len(heads) != 1 or matrices != {3}:
        raise ConfigError(
            f"{spec.source}: {spec.architecture} has layers of several sizes or an MLP without a gate, and training "
            f"memory is known for equal Llama-style layers alone; take such a model, or a named shape "
            f"({', '.join(NAMED)})"
        )
    num_heads, num_kv_heads, head_dim = heads.pop()
    return DecoderShape(
        name=name, num_layers=spec.num_layers, hidden=spec.hidden, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, intermediate=widths.pop(), vocab=spec.vocab, is_tied=spec.is_tied,
    )  # fmt: skip
