"""When requests arrive in an open loop: pure, seeded, lazily.

A process with unit rate (constant, Poisson, gamma) is warped by the integral of the rate, so that stages and ramps
work alike for all three.
Source: inversion method for nonhomogeneous processes, Cinlar 1975, "Introduction to Stochastic Processes".
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kervan.errors import ConfigError
from kervan.units import MAX_RATE, find_rate_per_s, parse_duration_s

Process = Literal["constant", "poisson", "gamma"]
STAGES_HELP = "2@30s (2 requests/s for 30 s), 2..10@1min (a ramp) or burst:100 (at once), joined by commas"


@dataclass(frozen=True, slots=True)
class Stage:
    """A rate in requests/s that goes linearly from `start_rate` to `end_rate`; or, with `burst`, arrivals at once."""

    start_rate: float
    end_rate: float
    duration_s: float
    burst: int = 0

    @property
    def expected_arrivals(self) -> float:
        """How many requests come in the stage; infinite in one that does not end."""
        if self.burst:
            return self.burst
        return math.inf if math.isinf(self.duration_s) else (self.start_rate + self.end_rate) / 2 * self.duration_s

    def time_of(self, arrivals: float) -> float:
        """Seconds into the stage after which `arrivals` are expected."""
        if arrivals <= 0:
            return 0.0
        slope = 0.0 if self.start_rate == self.end_rate else (self.end_rate - self.start_rate) / self.duration_s
        if slope == 0.0:
            return arrivals / self.start_rate
        # The stable root of slope/2 t^2 + start_rate t - arrivals = 0.
        return 2 * arrivals / (self.start_rate + math.sqrt(max(0.0, self.start_rate**2 + 2 * slope * arrivals)))


def steady(rate: float, duration_s: float = math.inf) -> tuple[Stage, ...]:
    """One stage of `rate` requests/s for `duration_s`, by default without end.

    Raises: ConfigError for a rate that is not above 0, or not finite.
    """
    if not 0 < rate < math.inf:
        raise ConfigError(f"rate {rate:g} is not above 0; give requests per second, like 2.5")
    return (Stage(rate, rate, duration_s),)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """The stages of a text like `"2@30s,2..10@1min,burst:100"`: rates in requests/s, and how long each lasts.

    Raises: ConfigError for a part that is none of these forms.
    """
    return tuple(_stage(item.strip()) for item in text.split(","))


def _stage(item: str) -> Stage:
    kind, _, count = item.partition(":")
    if kind == "burst":
        if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count)):
            raise ConfigError(f"stage {item!r} has no number of requests; write burst:100")
        return Stage(0.0, 0.0, 0.0, int(count))
    rates, separator, duration = item.partition("@")
    start, is_ramp, end = rates.partition("..")
    start_rate = find_rate_per_s(start)
    end_rate = find_rate_per_s(end) if is_ramp else start_rate
    if not separator or not (0 <= start_rate < MAX_RATE and 0 <= end_rate < MAX_RATE):
        raise ConfigError(f"stage {item!r} is none; write {STAGES_HELP}")
    duration_s = parse_duration_s(duration, f"stage {item!r}: duration")
    if duration_s <= 0:
        raise ConfigError(f"stage {item!r} lasts no time; give a duration above 0")
    return Stage(start_rate, end_rate, duration_s)


def offsets_s(stages: Sequence[Stage], process: Process, *, burstiness: float = 1.0, seed: int = 0) -> Iterator[float]:
    """Seconds after the start of each arrival, in order; endless when the last stage is.

    `burstiness`: the gamma distribution's shape; 1 is Poisson, smaller is burstier (squared coefficient of variation
    of the gaps: 1/shape). The first arrival of a constant rate is at 0.
    """
    rng = random.Random(f"arrivals {seed}")
    if process == "constant":
        units: Iterator[float] = itertools.count(0.0)
    elif process == "poisson":
        units = itertools.accumulate(rng.expovariate(1.0) for _ in itertools.repeat(None))
    else:
        gaps = (rng.gammavariate(burstiness, 1 / burstiness) for _ in itertools.repeat(None))
        units = itertools.accumulate(gaps)
    begin_s, passed = 0.0, 0.0  # of the stage: its start, and the expected arrivals before it, bursts left out
    unit = next(units)
    for stage in stages:
        if stage.burst:
            yield from itertools.repeat(begin_s, stage.burst)
            continue
        while unit < passed + stage.expected_arrivals:
            yield begin_s + stage.time_of(unit - passed)
            unit = next(units)
        passed += stage.expected_arrivals
        begin_s += stage.duration_s
