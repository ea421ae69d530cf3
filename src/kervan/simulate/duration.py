"""Durations that are fixed or drawn: how long a replica takes to start."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.stats import quantile
from kervan.units import parse_duration_s

EXAMPLES = "100s, 60s..140s, lognormal:median=90s,sigma=0.3 or 80s@0.7,200s@0.3"
MAX_S = 30 * 86_400.0
POINTS = 200  # that a distribution is kept as


@dataclass(frozen=True, slots=True)
class DurationDistribution:
    """Seconds by quantile, evenly from the least to the most: a value between two of `quantiles_s` is as likely as
    between any other two.
    """

    text: str
    quantiles_s: tuple[float, ...]

    def sample(self, rng: random.Random) -> float:
        """One duration."""
        points = self.quantiles_s
        if len(points) == 1:
            return points[0]
        at = rng.random() * (len(points) - 1)
        low = int(at)
        return points[low] + (at - low) * (points[low + 1] - points[low])

    def quantile_s(self, q: float) -> float:
        """Seconds that a share `q` of them is below."""
        return quantile(self.quantiles_s, q)


def fixed(seconds: float) -> DurationDistribution:
    """Always the same."""
    return DurationDistribution(f"{seconds:g}s", (seconds,))


def measured(values_s: Sequence[float]) -> DurationDistribution:
    """As these were. Raises: ValueError of nothing."""
    if not values_s:
        raise ValueError("no durations")
    return DurationDistribution(f"{len(values_s)} measured", tuple(sorted(values_s)))


def parse_durations(text: str, subject: str = "duration") -> DurationDistribution:
    """`100s` always, `60s..140s` uniform, `lognormal:median=90s,sigma=0.3`, or `80s@0.7,200s@0.3` with weights.

    Raises: ConfigError, which names `subject`.
    """
    text = text.strip()
    found: tuple[float, ...]
    if text.startswith("lognormal:"):
        found = _lognormal(text, subject)
    elif "@" in text:
        found = _weighted(text, subject)
    elif ".." in text:
        low, _, high = text.partition("..")
        found = (parse_duration_s(low, subject), parse_duration_s(high, subject))
        if found[0] > found[1]:
            raise ConfigError(f"{subject} {text!r} goes down; write {high}..{low}")
    else:
        found = (parse_duration_s(text, subject),)
    if not 0 <= found[0] <= found[-1] <= MAX_S:
        raise ConfigError(f"{subject} {text!r} is outside 0 to 30 days; write {EXAMPLES}")
    return DurationDistribution(text, found)


def _lognormal(text: str, subject: str) -> tuple[float, ...]:
    values = dict(part.strip().partition("=")[::2] for part in text.partition(":")[2].split(","))
    if set(values) != {"median", "sigma"}:
        raise ConfigError(f"{subject} {text!r} needs median= and sigma=; write lognormal:median=90s,sigma=0.3")
    median_s = parse_duration_s(values["median"], f"{subject} median")
    try:
        sigma = float(values["sigma"])
    except ValueError:
        sigma = math.nan
    if not 0 <= sigma <= 3:
        raise ConfigError(f"{subject} sigma={values['sigma']!r} is not a number from 0 to 3; write sigma=0.3")
    from statistics import NormalDist

    normal = NormalDist()
    return tuple(median_s * math.exp(sigma * normal.inv_cdf((i + 0.5) / POINTS)) for i in range(POINTS))


def _weighted(text: str, subject: str) -> tuple[float, ...]:
    pairs = [part.partition("@")[::2] for part in text.split(",")]
    try:
        weights = [float(weight) for _, weight in pairs]
    except ValueError as error:
        raise ConfigError(f"{subject} {text!r} has a weight that is no number; write 80s@0.7,200s@0.3") from error
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ConfigError(f"{subject} {text!r}: weights must be 0 or more, not all 0; write 80s@0.7,200s@0.3")
    points: list[float] = []
    for duration, weight in pairs:
        points += [parse_duration_s(duration, subject)] * max(
            1 if weight else 0, round(200 * float(weight) / sum(weights))
        )
    return tuple(sorted(points))
