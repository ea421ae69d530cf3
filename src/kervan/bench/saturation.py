"""The highest open-loop rate that keeps an SLO: which rate to try next, and when a trial has shown enough.

Pure: `Trial` is told what ended, `Search` what trials found.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal

from kervan.stats import wilson_interval

Verdict = Literal["keeps", "breaks", "open"]
MIN_REQUESTS = 40
# Wald's boundaries for 5% errors of both kinds.
_ACCEPT = math.log((1 - 0.05) / 0.05)
BACKLOG_SHARE = 0.25
BACKLOG_MIN = 8
STEADY_ANSWERS = 5  # times that a request takes, after which a load counts as steady


@dataclass(frozen=True, kw_only=True)
class RateSearchOptions:
    """How to search. `attain`: the share of requests that must keep the SLO; a trial takes at most `max_trial_s`."""

    start_rate: float = 1.0
    attain: float = 0.95
    max_trial_s: float = 60.0


@dataclass(slots=True)
class Trial:
    """A sequential test of one rate: is the share of good requests at least `target`?

    The two hypotheses are `target` and `target - margin`; between them either answer is right.
    Source: Wald 1945, "Sequential tests of statistical hypotheses". Requests of one moment depend on each other, so
    an early answer needs `min_s` seconds and 40 requests besides, and an early yes a load that has been steady.
    """

    rate: float
    target: float = 0.95
    margin: float = 0.05
    min_s: float = 8.0
    max_s: float = 60.0
    _in_flight: list[tuple[float, int]] = field(default_factory=list)

    def verdict(self, *, good: int, ended: int, in_flight: int, elapsed_s: float) -> Verdict:
        """`in_flight` counts requests that have come and have not ended. To be called with growing `elapsed_s`.

        When more than a quarter of what came in the second half of the time was added to those in flight, the server
        falls behind, whatever the requests that ended say; a rate is not kept before that is over.
        """
        self._in_flight.append((elapsed_s, in_flight))
        if ended >= MIN_REQUESTS and elapsed_s >= self.min_s:
            score = self._score(good, ended)
            if score <= -_ACCEPT:
                return "breaks"
            # What is in flight at the rate is the time that a request takes (Little's law).
            is_steady = elapsed_s >= STEADY_ANSWERS * in_flight / self.rate
            if score >= _ACCEPT and is_steady and not self._is_behind(in_flight, elapsed_s):
                return "keeps"
        if elapsed_s < self.max_s:
            return "open"
        if self._is_behind(in_flight, elapsed_s) or not ended:
            return "breaks"
        return "keeps" if good / ended >= self.target else "breaks"

    def _score(self, good: int, ended: int) -> float:
        """Log of how much likelier `target` made this than `target - margin`."""
        low = max(1e-9, self.target - self.margin)
        high = min(self.target, 1 - 1e-9)
        return good * math.log(high / low) + (ended - good) * math.log((1 - high) / (1 - low))

    def _is_behind(self, in_flight: int, elapsed_s: float) -> bool:
        half = self._in_flight[bisect_left(self._in_flight, (elapsed_s / 2, 0))]
        growth = in_flight - half[1]
        return growth > BACKLOG_MIN and growth > BACKLOG_SHARE * self.rate * (elapsed_s - half[0])


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial that was decided. `interval`: 95% of the share of good requests."""

    rate: float
    keeps: bool
    good: int
    ended: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share, by Wilson's score."""
        return wilson_interval(self.good, self.ended)


@dataclass(slots=True)
class Search:
    """Doubles the rate until it breaks, halves the bracket until it is `tolerance` narrow, tries both ends again.

    The answer is an interval: the highest rate that kept the SLO each time, and the lowest that broke it.
    """

    start_rate: float = 1.0
    tolerance: float = 0.1
    max_trials: int = 16
    trials: list[TrialResult] = field(default_factory=list)

    def next_rate(self) -> float | None:
        """The rate to try next; None when the answer is good enough, or after `max_trials`."""
        if not self.trials:
            return self.start_rate
        if len(self.trials) >= self.max_trials:
            return None
        low, high = self.keeps_up_to, self.breaks_from
        if high is None:
            return low * 2
        if low == 0.0:
            lowest = min(trial.rate for trial in self.trials)
            return lowest / 2 if lowest > self.start_rate / 1024 else None
        if high / low > 1 + self.tolerance:
            return math.sqrt(low * high)
        for rate in (low, high):
            if sum(trial.rate == rate for trial in self.trials) < 2:
                return rate
        return None

    @property
    def keeps_up_to(self) -> float:
        """The highest rate below everything that broke; 0 when none kept the SLO."""
        high = self.breaks_from
        kept = [t.rate for t in self.trials if t.keeps and (high is None or t.rate < high)]
        return max(kept, default=0.0)

    @property
    def breaks_from(self) -> float | None:
        """The lowest rate that broke the SLO at least as often as it kept it; None when none did."""
        votes: dict[float, int] = {}
        for trial in self.trials:
            votes[trial.rate] = votes.get(trial.rate, 0) + (-1 if trial.keeps else 1)
        broken = [rate for rate, vote in votes.items() if vote > 0 or (vote == 0 and self._last(rate) is False)]
        return min(broken, default=None)

    def _last(self, rate: float) -> bool:
        return next(trial.keeps for trial in reversed(self.trials) if trial.rate == rate)
