"""Which layers each stage gets, so that the slowest stage is as fast as can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from kervan.errors import ConfigError
from kervan.memory.shape import DecoderShape


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a micro-batch, in one unit: each layer, the embedding table before them, and norm, head and loss after."""

    layers: tuple[float, ...]
    embedding: float = 0.0
    head: float = 0.0

    def of(self, part: range) -> float:
        """Of a stage with these layers; the first has the table, the last the head."""
        total = sum(self.layers[part.start : part.stop])
        total += self.embedding if part.start == 0 else 0.0
        return total + (self.head if part.stop == len(self.layers) else 0.0)


def modelled(shape: DecoderShape, seq: int) -> Costs:
    """FLOPs of a token's forward pass: 2 for each weight of a product, and attention to half of the sequence.

    The table is looked up: it counts as reading and writing a token's numbers, two FLOPs each. The loss is in FP32 on
    each word: five FLOPs a logit (exponent, sum, and their gradient).
    """
    layer = 2.0 * (shape.layer_parameters - 2 * shape.hidden) + 2.0 * shape.num_heads * shape.head_dim * seq
    return Costs((layer,) * shape.num_layers, 2.0 * shape.hidden, 2.0 * shape.table_parameters + 5.0 * shape.vocab)


def balanced(costs: Costs, stages: int) -> tuple[range, ...]:
    """Neighbouring layers for each stage, at least one each, with the smallest cost of the dearest stage.

    Of equal cuts that whose costs differ least. O(layers^2 x stages). Raises: ConfigError for more stages than layers.
    """
    count = len(costs.layers)
    check_stages(stages, count)

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(dearest stage, sum of squares, ends) of layers from `first` in `left` stages."""
        if left == 1:
            cost = costs.of(range(first, count))
            return cost, cost**2, (count,)
        options = []
        for end in range(first + 1, count - left + 2):
            cost = costs.of(range(first, end))
            dearest, squares, ends = best(end, left - 1)
            options.append((max(cost, dearest), cost**2 + squares, (end, *ends)))
        return min(options, key=lambda option: (round(option[0], 12), option[1]))

    ends = best(0, stages)[2]
    return tuple(range(begin, end) for begin, end in zip((0, *ends), ends, strict=False))


def check_stages(stages: int, layers: int) -> None:
    """Raises: ConfigError for more stages than layers."""
    if stages > layers:
        raise ConfigError(
            f"{stages} stages are more than the model's {layers} layers, and each stage has one at least; give at most "
            f"{layers}"
        )


def given(text: str, layers: int, stages: int) -> tuple[range, ...]:
    """The cut of layer counts like `7,8,8,5`. Raises: ConfigError where they do not add up."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(
            f"--cut {text!r} is no list of layer counts above 0; write for example --cut {_even(layers, stages)}"
        )
    counts = [int(word) for word in words]
    if len(counts) != stages or sum(counts) != layers:
        raise ConfigError(
            f"--cut {text} gives {len(counts)} stages {sum(counts)} layers, and the model's {layers} layers go to "
            f"{stages} stages; write for example --cut {_even(layers, stages)}"
        )
    begins = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(range(begin, begin + count) for begin, count in zip(begins, counts, strict=True))


def _even(layers: int, stages: int) -> str:
    return ",".join(str(layers // stages + (index < layers % stages)) for index in range(stages))


def imbalance(costs: Costs, cut: Sequence[range]) -> float:
    """How much longer the dearest stage takes than the mean: 0 for a perfect cut."""
    each = [costs.of(part) for part in cut]
    return max(each) * len(each) / sum(each) - 1
