"""The load that a policy remembers: its level now, the lengths of requests, and how it rose before. Small, and JSON.

Level. Arrivals per second are averaged exponentially over 4, 16 and 64 s. The slow average is the level, unless a
faster one says, beyond its standard error, that the load is now above or below it: a step up is seen in seconds, and
noise is not taken for one. The error is that of a Poisson process whose variance is that of the arrivals seen.

Rises. What came before is what may come. In blocks as long as it takes from a decision to a ready replica, fleets are
followed on paper that take more than the level at the block's start by a little, or by much: each is a bucket that
requests fill and that empties at what the fleet takes, and what comes to one that is too full is late. So there is, for
each headroom, the share of requests that were late with it (`late_share`): of a burst, of a step, and of a long rise
alike. It is kept for headrooms in requests/s and for those in shares of the level, and the less of both counts: in a
growing load rises have a size, and after a fall they are smaller with the load.

Until there is history, some blocks of a prior stand in for it.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAST_S, MIDDLE_S, SLOW_S = TIMES_S = (4.0, 16.0, 64.0)
ERRORS = 2.0  # standard errors beyond which a faster average counts
STEADY = 0.2  # a load whose averages differ by less, and by what chance makes of them, stands still
MIN_VARIANCE = 0.25  # of arrivals at even distances a little is left: they come in whole numbers
FEW_ANSWERS = 200.0  # they say little about one in a hundred
LENGTHS_S = 300.0  # over which lengths and the variance of arrivals are averaged
REMEMBERED_S, REMEMBERED_BLOCKS = 7200.0, 64.0  # what is longer: after so long a rise counts 1/e
STEP_S = 10.0  # more between two decisions counts as so much
PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS = 256.0, 2.0  # before any answer has ended
# Rises of the load in 10 minutes, at the quantiles 1/16, 3/16 .. 15/16: 14 days of ServeGen's traces (median 3 to 6%,
# p95 28 to 36%, p99 40 to 75%). They grow about with the square root of the time.
PRIOR_RISES = (0.0, 0.0, 0.01, 0.03, 0.05, 0.09, 0.16, 0.40)
PRIOR_S = 600.0
PRIOR_BLOCKS = 4.0
# A block sees a rise from its middle on, on average, and replicas that are asked for at a rise come a block later.
SEEN_HALF = 2.0
BLOCK_STEPS = 50.0
HEADROOMS = (
    0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0, 4.0, 6.0, 9.0, 14.0, 20.0, 32.0,
)  # fmt: skip
"""Of the fleets on paper, in shares of the level at the start of a block, or of one replica where that is more."""
SIZES = (0.0, *(0.01 * 1.4**step for step in range(34)))
"""Headrooms in requests/s for which late requests are kept: to 900."""


@dataclass(slots=True)
class Load:
    """A working copy of what is remembered; `to_memory` makes it a mapping again."""

    observed_s: float = 0.0
    """Seconds that were seen, in all."""
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Request equivalents per second, over `TIMES_S`, still to be divided by what the weights sum to."""
    in_flight: float = 0.0
    """Requests that wait or run, over the slow time, still to be divided like `rates`."""
    unsteady_s: float = 0.0
    """When the load last moved, in seconds that were seen."""
    last_rate: float = 0.0
    variance: float = 0.0
    """Of the arrivals of a second, over their mean."""
    requests: float = 0.0
    """In about `LENGTHS_S`: for mean lengths."""
    prompt_tokens: float = 0.0
    prompts_variance: float = 0.0
    """Of the tokens of a prompt; learned from how much the sums of seconds vary."""
    prompts_seen_s: float = 0.0
    answers: float = 0.0
    output_tokens: float = 0.0
    finish_rate: float = 0.0
    """Answers that ended per second, over the middle time."""
    good: float = 1.0
    """Share of answers within the SLO, over `LENGTHS_S`; after a queue it begins anew."""
    judged: float = 0.0
    good_lately: float = 1.0
    """The same over the slow time."""
    judged_lately: float = 0.0
    peak: float = 0.0
    """Request equivalents per second, over the fast time: the most of late."""
    pending_s: float = 0.0
    pending_came: float = 0.0
    block_left_s: float = 0.0
    block_start: float = 0.0
    block_base: float = 0.0
    """Headrooms of the block are multiples of it."""
    block_came: float = 0.0
    buckets: tuple[float, ...] = ()
    block_late: tuple[float, ...] = ()
    came: float = 0.0
    """Request equivalents in the blocks that are remembered, and those of them that were late by headroom."""
    late_by_size: tuple[float, ...] = (0.0,) * len(SIZES)
    late_by_share: tuple[float, ...] = (0.0,) * len(HEADROOMS)

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> "Load":
        """What `to_memory` wrote; of an empty mapping a load that nothing is known of."""
        if not memory:
            return cls()
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in memory.items()
        }
        return cls(**known)

    def to_memory(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    # ---- what is known

    @property
    def level(self) -> float:
        """Request equivalents per second, now."""
        fast, middle, slow = (
            rate / max(1e-9, 1 - math.exp(-self.observed_s / time_s))
            for rate, time_s in zip(self.rates, TIMES_S, strict=True)
        )
        least = max(fast - self._error(fast, FAST_S), middle - self._error(middle, MIDDLE_S))
        most = min(fast + self._error(fast, FAST_S), middle + self._error(middle, MIDDLE_S))
        return max(0.0, min(max(slow, least), max(most, least)))

    @property
    def slow_rate(self) -> float:
        """Request equivalents per second, over the slow time."""
        return self.rates[2] / max(1e-9, 1 - math.exp(-self.observed_s / SLOW_S))

    @property
    def slow_in_flight(self) -> float:
        """Requests that wait or run, over the slow time: by Little's law it belongs to `slow_rate`."""
        return self.in_flight / max(1e-9, 1 - math.exp(-self.observed_s / SLOW_S))

    @property
    def steady_s(self) -> float:
        """For how long the load has been about the same: the averages over the middle and the slow time agree, but
        for what a Poisson process differs.
        """
        return self.observed_s - self.unsteady_s

    def _error(self, rate: float, time_s: float) -> float:
        return ERRORS * math.sqrt(max(rate, 1 / SLOW_S) * max(self.variance, MIN_VARIANCE) / (2 * time_s))

    @property
    def mean_prompt_tokens(self) -> float:
        """Of a request; 0 before there was one."""
        return self.prompt_tokens / self.requests if self.requests else 0.0

    @property
    def prompts_cv2(self) -> float:
        """Squared coefficient of variation of the prompts' lengths."""
        mean = self.mean_prompt_tokens
        return self.prompts_variance / mean**2 if mean else 0.0

    @property
    def arrivals_cv2(self) -> float:
        """About that of the distances between requests: variance over mean of the arrivals of a second."""
        known = min(1.0, self.observed_s / SLOW_S)
        return known * self.variance + (1 - known)

    @property
    def mean_output_tokens(self) -> float:
        """Of an answer; a guess before one has ended."""
        known = self.answers + PRIOR_REQUESTS
        return (self.output_tokens + PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS) / known

    def late_share(self, headroom: float, level: float, block_s: float) -> float:
        """The share of requests that would be late while the load rises, with so many requests/s above the level."""
        headroom = max(0.0, headroom)
        share = headroom / level if level > 0 else math.inf
        by_size = _at(SIZES, self.late_by_size, headroom)
        by_share = _at(HEADROOMS, self.late_by_share, share)
        scale = math.sqrt(min(1.0, block_s / PRIOR_S))
        prior = sum(max(0.0, 1 - share / (rise * scale)) for rise in PRIOR_RISES if rise) / len(PRIOR_RISES)
        weight = PRIOR_BLOCKS * block_s * level
        late = min(by_size, by_share) + weight * prior
        return SEEN_HALF * late / max(1e-9, self.came + weight)

    def usual_rise(self, level: float, block_s: float, loss: float) -> float:
        """The headroom in requests/s with which no more than `loss` would be late, to 5% of the level or less."""
        low, high = 0.0, max(level, 0.01)
        while self.late_share(high, level, block_s) > loss and high < SIZES[-1]:
            low, high = high, 2 * high
        while high - low > max(0.01, 0.02 * level):
            middle = (low + high) / 2
            low, high = (low, middle) if self.late_share(middle, level, block_s) <= loss else (middle, high)
        return high

    # ---- what comes in

    def observe(
        self,
        *,
        window_s: float,
        arrived: int,
        prompt_tokens: int,
        finished: int,
        output_tokens: int,
        good: int,
        in_flight: int,
        is_calm: bool,
        prompt_share: float,
        block_s: float,
        stay_s: float,
        wait_s: float,
        replica_rate: float,
    ) -> None:
        """One window. `prompt_share`: of a mean request's work that grows with its prompt; a long prompt counts as more
        than one request. `in_flight`: at its end. `good`: of those that finished, how many kept the SLO; it counts
        only if `is_calm`, when no queue is to blame. `stay_s`, `wait_s`, `replica_rate`: how
        long a request is in a replica, how much longer it may wait, and what a replica takes.
        """
        dt = min(window_s, STEP_S)
        if dt <= 0:
            return
        mean_prompt = self.mean_prompt_tokens
        equivalents = float(arrived)
        if mean_prompt and arrived:
            equivalents += prompt_share * (prompt_tokens / mean_prompt - arrived)
        rate = equivalents / window_s
        before = self.rates[2] / max(1e-9, 1 - math.exp(-self.observed_s / SLOW_S)) if self.observed_s else rate
        self.rates = tuple(  # type: ignore[assignment]
            one + (rate - one) * (1 - math.exp(-dt / time_s)) for one, time_s in zip(self.rates, TIMES_S, strict=True)
        )
        self.finish_rate += (finished / window_s - self.finish_rate) * (1 - math.exp(-dt / MIDDLE_S))
        keep = math.exp(-dt / LENGTHS_S)
        if before > 0:
            deviation = (rate - self.last_rate) ** 2 * window_s / (2 * before)
            known_s = LENGTHS_S * (1 - math.exp(-self.observed_s / LENGTHS_S))
            self.variance += (min(deviation, 100.0) - self.variance) * dt / max(known_s + dt, 10.0)
        self.last_rate = rate
        self.observed_s += dt
        self.in_flight += (in_flight - self.in_flight) * (1 - math.exp(-dt / SLOW_S))
        middle, slow = self.rates[1] / max(1e-9, 1 - math.exp(-self.observed_s / MIDDLE_S)), self.slow_rate
        if abs(middle - slow) > STEADY * slow + ERRORS * math.sqrt(slow / (2 * MIDDLE_S)):
            self.unsteady_s = self.observed_s
        self.requests = keep * self.requests + arrived
        self.prompt_tokens = keep * self.prompt_tokens + prompt_tokens
        if arrived and mean_prompt:
            deviation = (prompt_tokens - arrived * mean_prompt) ** 2 / arrived
            self.prompts_seen_s = keep * self.prompts_seen_s + dt
            self.prompts_variance += (deviation - self.prompts_variance) * dt / max(self.prompts_seen_s, 20.0)
        fast = self.rates[0] / max(1e-9, 1 - math.exp(-self.observed_s / FAST_S))
        self.peak = max(fast, self.peak * math.exp(-dt / SLOW_S))
        self.answers = keep * self.answers + finished
        self.output_tokens = keep * self.output_tokens + output_tokens
        if not is_calm:
            self.good, self.judged, self.good_lately, self.judged_lately = 1.0, 0.0, 1.0, 0.0
        elif finished:
            self.judged = keep * self.judged + finished
            self.good += (good / finished - self.good) * finished / max(self.judged, FEW_ANSWERS)
            self.judged_lately = math.exp(-dt / SLOW_S) * self.judged_lately + finished
            part = finished / max(self.judged_lately, FEW_ANSWERS)
            self.good_lately += (good / finished - self.good_lately) * part
        self._count_block(dt, rate * dt, block_s, stay_s, wait_s, replica_rate)

    def _count_block(
        self, dt: float, came: float, block_s: float, stay_s: float, wait_s: float, replica_rate: float
    ) -> None:
        if self.observed_s < 2 * MIDDLE_S:
            return  # the level of a load that has just begun is no rise
        if self.block_left_s <= 0:
            level = self.level
            self.block_left_s, self.block_start, self.block_came = block_s, level, 0.0
            self.block_base = max(level, replica_rate)
            self.buckets = (round(level * stay_s, 4),) * len(HEADROOMS)
            self.block_late = (0.0,) * len(HEADROOMS)
        self.pending_s, self.pending_came = self.pending_s + dt, self.pending_came + came
        if self.pending_s < block_s / BLOCK_STEPS - 1e-9 and self.pending_s < self.block_left_s:
            return
        dt, came, self.pending_s, self.pending_came = self.pending_s, self.pending_came, 0.0, 0.0
        ends = 1 - math.exp(-dt / max(1e-3, stay_s))  # of those in flight, if none has to wait
        buckets, late = [], []
        for headroom, bucket, before in zip(HEADROOMS, self.buckets, self.block_late, strict=True):
            takes = self.block_start + headroom * self.block_base
            full = bucket + came
            full -= min(takes * dt, full * ends)
            most = takes * (stay_s + wait_s)
            buckets.append(full)
            late.append(before + came if full > most else before)
        self.buckets, self.block_late = tuple(buckets), tuple(late)
        self.block_came += came
        self.block_left_s -= dt
        if self.block_left_s <= 0:
            self._end_block(block_s)

    def _end_block(self, block_s: float) -> None:
        keep = math.exp(-block_s / max(REMEMBERED_S, REMEMBERED_BLOCKS * block_s))
        sizes = [headroom * self.block_base for headroom in HEADROOMS]
        shares = [size / self.block_start if self.block_start > 0 else math.inf for size in sizes]
        self.came = round(keep * self.came + self.block_came, 3)
        self.late_by_size = tuple(
            round(keep * before + _at(sizes, self.block_late, size), 3)
            for before, size in zip(self.late_by_size, SIZES, strict=True)
        )
        self.late_by_share = tuple(
            round(keep * before + _at(shares, self.block_late, share), 3)
            for before, share in zip(self.late_by_share, HEADROOMS, strict=True)
        )
        self.buckets = self.block_late = ()


def _at(points: Sequence[float], values: Sequence[float], point: float) -> float:
    """Linear between points in order; the first and the last value outside."""
    above = bisect.bisect_right(points, point)
    if not above:
        return values[0]
    if above == len(points):
        return values[-1]
    low, high = points[above - 1], points[above]
    if math.isinf(high):
        return values[above - 1]
    return values[above - 1] + (values[above] - values[above - 1]) * (point - low) / (high - low)
