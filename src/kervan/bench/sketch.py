"""Distributions in constant memory: mergeable, and exact to a known relative error.

Source: Masson, Rim, Lee 2019, "DDSketch: a fast and fully-mergeable quantile sketch" (logarithmic mapping). Written
here and not taken from a package because the client has about a microsecond for each value, and because intervals
and plots need the bins themselves.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

RELATIVE_ERROR = 0.005
SMALLEST = 1e-7  # seconds; what is below counts as 0
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_SCALE = 1 / math.log(_GAMMA)
_MIDDLE = 2 / (1 + _GAMMA)


@dataclass(frozen=True, slots=True)
class BinnedCounts:
    """Values of 0 or more, counted: what several sketches may add without doing the work again."""

    bins: Sequence[tuple[int, int]] = ()
    zeros: int = 0
    count: int = 0
    total: float = 0.0
    largest: float = 0.0


def binned(values: npt.NDArray[np.float64]) -> BinnedCounts:
    """The same bins as `Sketch.add` takes; of thousands of values at a thirtieth of the cost."""
    positive = values[values >= SMALLEST]
    keys = np.ceil(np.log(positive) * _SCALE).astype(np.int64)
    if not len(keys):
        return BinnedCounts((), len(values), len(values))
    first = int(keys.min())
    numbers = np.bincount(keys - first)
    (filled,) = numbers.nonzero()
    bins = list(zip((filled + first).tolist(), numbers[filled].tolist(), strict=True))
    return BinnedCounts(bins, len(values) - len(keys), len(values), float(positive.sum()), float(positive.max()))


@dataclass(slots=True)
class Sketch:
    """Counts of values of 0 or more. Quantiles are within 0.5% of the value at that rank."""

    bins: dict[int, int] = field(default_factory=dict)
    zeros: int = 0
    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, value: float, weight: int = 1) -> None:
        """Count `value`, `weight` times."""
        if value < SMALLEST:
            value = 0.0
            self.zeros += weight
        else:
            key = math.ceil(math.log(value) * _SCALE)
            self.bins[key] = self.bins.get(key, 0) + weight
        self.count += weight
        self.total += value * weight
        self.largest = max(self.largest, value)

    def extend(self, values: Iterable[float]) -> None:
        """Count each of `values`."""
        for value in values:
            self.add(value)

    def add_counts(self, counts: "BinnedCounts") -> None:
        """Count many values at once, as `binned` gives them."""
        for key, number in counts.bins:
            self.bins[key] = self.bins.get(key, 0) + number
        self.zeros += counts.zeros
        self.count += counts.count
        self.total += counts.total
        self.largest = max(self.largest, counts.largest)

    def merge(self, other: "Sketch") -> None:
        """Count everything that `other` has counted."""
        for key, count in other.bins.items():
            self.bins[key] = self.bins.get(key, 0) + count
        self.zeros += other.zeros
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    @property
    def mean(self) -> float | None:
        """The exact mean; None without values."""
        return self.total / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """The value at rank q*(count-1), rounded up to a rank; None of nothing. The largest is exact."""
        return quantiles(self.bins, self.zeros, self.count, self.largest, (q,))[0]

    def quantiles(self, qs: Sequence[float]) -> list[float | None]:
        """As `quantile`, for ascending `qs`."""
        return quantiles(self.bins, self.zeros, self.count, self.largest, qs)

    def cdf(self) -> list[tuple[float, float]]:
        """(value, share of values up to it), ascending."""
        points, seen = [], self.zeros
        if self.zeros:
            points.append((0.0, seen / self.count))
        for key in sorted(self.bins):
            seen += self.bins[key]
            points.append((min(value_of(key), self.largest), seen / self.count))
        return points


def value_of(key: int) -> float:
    """The value that stands for a bin: within the relative error of all values in it."""
    return math.exp(key / _SCALE) * _MIDDLE


def quantiles(bins: dict[int, int], zeros: int, count: int, largest: float, qs: Sequence[float]) -> list[float | None]:
    """Quantiles of a sketch's parts, for ascending `qs`."""
    if not count:
        return [None for _ in qs]
    keys = iter(sorted(bins))
    values: list[float | None] = []
    seen, value = zeros, 0.0
    for q in qs:
        rank = math.ceil(q * (count - 1)) + 1  # of the value looked for, 1 to count
        while seen < rank:
            key = next(keys)
            seen += bins[key]
            value = value_of(key)
        values.append(largest if rank == count else min(value, largest))
    return values


def merged(sketches: Iterable[Sketch]) -> Sketch:
    """One sketch of all that `sketches` have counted."""
    whole = Sketch()
    for sketch in sketches:
        whole.merge(sketch)
    return whole


def quantile_intervals(
    blocks: Sequence[Sketch], qs: Sequence[float], *, draws: int = 200, seed: int = 0
) -> list[tuple[float, float] | None]:
    """95% intervals of quantiles by bootstrap over blocks; None where fewer than 8 blocks have values.

    Blocks are stretches of the run, so that values which depend on each other (of one request, of one busy second) are
    drawn together. With single values drawn instead, intervals would be far too narrow.
    Source: Kunsch 1989, "The jackknife and the bootstrap for general stationary observations".
    """
    blocks = [block for block in blocks if block.count]
    if len(blocks) < 8:
        return [None for _ in qs]
    rng = random.Random(seed)
    drawn: list[list[float]] = [[] for _ in qs]
    for _ in range(draws):
        bins: dict[int, int] = {}
        zeros = count = 0
        largest = 0.0
        for block in rng.choices(blocks, k=len(blocks)):
            for key, number in block.bins.items():
                bins[key] = bins.get(key, 0) + number
            zeros += block.zeros
            count += block.count
            largest = max(largest, block.largest)
        for values, value in zip(drawn, quantiles(bins, zeros, count, largest, qs), strict=True):
            assert value is not None
            values.append(value)
    return [_middle95(sorted(values)) for values in drawn]


def _middle95(ordered: Sequence[float]) -> tuple[float, float]:
    tail = int(0.025 * len(ordered))
    return ordered[tail], ordered[-1 - tail]
