"""Statistics that several parts use; standard library only."""

import math
import random
import statistics
from collections.abc import Callable, Sequence

Z95 = 1.959963984540054  # two-sided 95% of the normal distribution


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest of `values` (method 7 of Hyndman and Fan 1996).

    Raises: ValueError of nothing, or `q` outside 0..1.
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(f"quantile {q} of {len(values)} values")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def wilson_interval(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share; (0, 1) of no trials.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    center = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def bootstrap_interval(
    values: Sequence[float],
    *,
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of a statistic of `values`; seeded, so the same values give the same interval.

    Raises: ValueError of nothing.
    Source: Efron 1979. With fewer than about six values the interval is narrower than its confidence says.
    """
    if not values:
        raise ValueError("bootstrap of no values")
    rng = random.Random(seed)
    drawn = [statistic(rng.choices(values, k=len(values))) for _ in range(draws)]
    tail = (1 - confidence) / 2
    return quantile(drawn, tail), quantile(drawn, 1 - tail)
