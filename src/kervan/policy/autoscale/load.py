"""The load that a policy remembers: its level now, the lengths of requests, and how it rose before. Small, and JSON.

Level. Arrivals per second are averaged exponentially over 4, 16 and 64 s. The slow average is the level, unless a
faster one says, beyond its own standard error, that the load is now above or below it: a step up is seen in seconds,
and noise is not taken for one. The error is that of a Poisson process whose variance is that of the arrivals seen.

Rises. In blocks as long as it takes from a decision to a ready replica, the level at the start and the highest one in
the block are kept. What came before is what may come: `rises` gives the rises seen, each as it would be from the level
now. A rise is taken to be of the same size, or in the same ratio, whichever is less: after a fall the ratio counts, and
in a growing load the size does. Until there is history, some blocks of a prior stand in for it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAST_S, MIDDLE_S, SLOW_S = TIMES_S = (4.0, 16.0, 64.0)
LENGTHS_S = 300.0  # over which lengths and the variance of arrivals are averaged
BLOCKS = 256  # that are remembered: 7 hours of starts of 100 s, an hour of starts of 15 s
STEP_S = 10.0  # more between two decisions counts as so much
PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS = 256.0, 2.0  # before any answer has ended
# Rises of the load in 10 minutes, at the quantiles 1/16, 3/16 .. 15/16: 14 days of ServeGen's traces (median 3 to 6%,
# p95 28 to 36%, p99 40 to 75%). They grow about with the square root of the time.
PRIOR_RISES = (0.0, 0.0, 0.01, 0.03, 0.05, 0.09, 0.16, 0.40)
PRIOR_S = 600.0


@dataclass(slots=True)
class Load:
    """A working copy of what is remembered; `to_memory` makes it a mapping again."""

    observed_s: float = 0.0
    """Seconds that were seen, in all."""
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Request equivalents per second, over `TIMES_S`, still to be divided by what the weights sum to."""
    variance: float = 0.0
    """Of the arrivals of a second, over their mean."""
    requests: float = 0.0
    """In about `LENGTHS_S`: for mean lengths."""
    prompt_tokens: float = 0.0
    answers: float = 0.0
    output_tokens: float = 0.0
    finish_rate: float = 0.0
    """Answers that ended per second, over the middle time."""
    good: float = 1.0
    """Share of answers and first tokens within the SLO, over the slow time."""
    block_left_s: float = 0.0
    block_start: float = 0.0
    block_most: float = 0.0
    blocks: tuple[tuple[float, float], ...] = ()

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> "Load":
        """What `to_memory` wrote; of an empty mapping a load that nothing is known of."""
        if not memory:
            return cls()
        known = dict(memory)
        known["rates"] = tuple(known["rates"])
        if known["blocks"] and not isinstance(known["blocks"], tuple):
            known["blocks"] = tuple(tuple(block) for block in known["blocks"])
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

    def _error(self, rate: float, time_s: float) -> float:
        return math.sqrt(max(rate, 1 / SLOW_S) * max(self.variance, MIN_VARIANCE) / (2 * time_s))

    @property
    def mean_prompt_tokens(self) -> float:
        """Of a request; 0 before there was one."""
        return self.prompt_tokens / self.requests if self.requests else 0.0

    @property
    def mean_output_tokens(self) -> float:
        """Of an answer; a guess before one has ended."""
        known = self.answers + PRIOR_REQUESTS
        return (self.output_tokens + PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS) / known

    def rises(self, level: float, horizon_s: float) -> tuple[list[float], float]:
        """(rises in `horizon_s` that the past knows, as they would be from this level, the largest first; how many
        blocks of the past they stand for, those without a rise included).
        """
        found = [
            min(most - start, (most / start - 1) * level if start else most - start) for start, most in self.blocks
        ]
        if self.block_most > self.block_start:  # the block that is not over yet
            start, most = self.block_start, self.block_most
            found.append(min(most - start, (most / start - 1) * level if start else most - start))
        scale = level * math.sqrt(min(1.0, horizon_s / PRIOR_S))
        found.extend(rise * scale for rise in PRIOR_RISES)
        count = len(found)
        return sorted((rise for rise in found if rise > 0), reverse=True), float(count)

    # ---- what comes in

    def observe(
        self,
        *,
        window_s: float,
        arrived: int,
        prompt_tokens: int,
        finished: int,
        output_tokens: int,
        judged: int,
        good: int,
        prompt_share: float,
        block_s: float,
    ) -> None:
        """One window. `prompt_share`: of a mean request's work that grows with its prompt; a long prompt counts as more
        than one request. `judged`: answers and first tokens, of which `good` kept the SLO.
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
            deviation = (rate - before) ** 2 * window_s / before
            self.variance += (min(deviation, 100.0) - self.variance) * (1 - keep)
        self.observed_s += dt
        self.requests = keep * self.requests + arrived
        self.prompt_tokens = keep * self.prompt_tokens + prompt_tokens
        self.answers = keep * self.answers + finished
        self.output_tokens = keep * self.output_tokens + output_tokens
        if judged:
            weight = 1 - math.exp(-dt / SLOW_S)
            self.good += (good / judged - self.good) * weight
        self._count_block(dt, block_s)

    def _count_block(self, dt: float, block_s: float) -> None:
        if self.observed_s < 2 * MIDDLE_S:
            return  # the level of a load that has just begun is no rise
        level = self.level
        if self.block_left_s <= 0:
            self.block_left_s, self.block_start, self.block_most = block_s, level, level
            return
        self.block_left_s -= dt
        self.block_most = max(self.block_most, level)
        if self.block_left_s <= 0:
            self.blocks = (*self.blocks[-(BLOCKS - 1) :], (round(self.block_start, 4), round(self.block_most, 4)))


MIN_VARIANCE = 0.25  # of arrivals at even distances a little is left: they come in whole numbers
