"""What is counted in a simulation: for the policy each second, and for the result."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kervan.config.workload import Slo
from kervan.policy.autoscale.state import Demand
from kervan.simulate.stream import SimulatedStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one load under one policy with one seed.

    `attained`: share of all requests, shed ones too, that ended within all bounds of the SLO. `goodput_per_s`: such
    requests per second of the load. `replica_hours` by pool, from the decision to start one until it was gone; the mean
    of `mean_replicas` is over `episode_s`: until the last request had ended and the pools were back at their floor.
    `moves`: streams that were placed again; `broken`: that ended with an error.

    `timeline`: lists of equal length, one entry per `every_s`.
    """

    policy: str
    seed: int
    requests: int
    finished: int
    good: int
    shed: int
    broken: int
    moves: int
    lost_replicas: int
    started_replicas: int
    duration_s: float
    episode_s: float
    input_tokens: int
    output_tokens: int
    recomputed_tokens: int
    preemptions: int
    replica_hours: Mapping[str, float]
    mean_replicas: float
    mean_ready: float
    max_replicas: int
    usd: float | None
    ttft_s: Mapping[str, float | None]
    tpot_s: Mapping[str, float | None]
    events: int
    computed_s: float
    timeline: Mapping[str, list[Any]]
    every_s: float = 1.0
    counted: int = 0
    counted_good: int = 0
    decisions: list[tuple[float, str]] = field(default_factory=list)

    @property
    def attained(self) -> float:
        """The share of requests that kept the SLO."""
        return self.good / max(1, self.requests)

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that kept the SLO."""
        return self.good / max(1e-9, self.duration_s)

    @property
    def usd_per_mtok(self) -> float | None:
        """US dollars per million output tokens."""
        return None if self.usd is None or not self.output_tokens else self.usd / (self.output_tokens / 1e6)


class Tally:
    """Counts of one simulation."""

    def __init__(self, slo: Slo, counts_from_s: float = 0.0) -> None:
        self._counts_from_s = counts_from_s
        self.counted = self.counted_good = self.counted_bad = 0
        self._ttft_bound_s = math.inf if slo.ttft_s is None else slo.ttft_s
        self._tpot_bound_s = math.inf if slo.tpot_s is None else slo.tpot_s
        self._e2e_bound_s = math.inf if slo.e2e_s is None else slo.e2e_s
        self.requests = self.finished = self.good = self.shed = self.expired = self.moves = 0
        self.input_tokens = self.output_tokens = self.recomputed_tokens = 0
        self.ttfts_s = array("d")
        self.tpots_s = array("d")
        # Of the window.
        self.arrived = self.arrived_prompt_tokens = self.window_shed = self.window_finished = 0
        self.finished_output_tokens = self.window_good = self.first_tokens_good = 0
        self.window_ttfts_s: list[float] = []
        # Now.
        self.num_held = self.held_tokens = self.num_queued = self.queued_tokens = self.num_running = 0

    def came(self, prompt_tokens: int, sent_s: float) -> None:
        """A request came in."""
        self.counted += sent_s >= self._counts_from_s
        self.requests += 1
        self.arrived += 1
        self.arrived_prompt_tokens += prompt_tokens
        self.input_tokens += prompt_tokens

    def was_shed(self) -> None:
        """It was refused."""
        self.shed += 1
        self.window_shed += 1

    def gave_first(self, ttft_s: float) -> None:
        """A stream got its first token."""
        self.ttfts_s.append(ttft_s)
        self.window_ttfts_s.append(ttft_s)
        if ttft_s <= self._ttft_bound_s:
            self.first_tokens_good += 1

    def ended(self, stream: SimulatedStream, last_s: float) -> None:
        """A stream ended whole."""
        ttft_s, tokens = stream.first_s - stream.sent_s, stream.output_tokens
        tpot_s = (last_s - stream.first_s) / max(1, tokens - 1)
        if tokens > 1:
            self.tpots_s.append(tpot_s)
        self.finished += 1
        self.window_finished += 1
        self.output_tokens += tokens
        self.finished_output_tokens += tokens
        if (
            ttft_s <= self._ttft_bound_s
            and tpot_s <= self._tpot_bound_s
            and last_s - stream.sent_s <= self._e2e_bound_s
        ):
            self.good += 1
            self.window_good += 1
            self.counted_good += stream.sent_s >= self._counts_from_s
        else:
            self.counted_bad += stream.sent_s >= self._counts_from_s

    def demand(
        self, window_s: float, *, generated_tokens: int, running_context_tokens: int, paces: list[tuple[float, int]]
    ) -> Demand:
        """The demand of the window, which ends. `paces`: seconds between tokens, and streams that have them."""
        ttfts_s = sorted(self.window_ttfts_s)
        paces.sort()
        demand = Demand(
            window_s=window_s,
            arrived=self.arrived,
            arrived_prompt_tokens=self.arrived_prompt_tokens,
            shed=self.window_shed,
            finished=self.window_finished,
            finished_output_tokens=self.finished_output_tokens,
            generated_tokens=generated_tokens,
            first_tokens=len(ttfts_s),
            first_tokens_good=self.first_tokens_good,
            finished_good=self.window_good,
            ttft_p50_s=_nearest(ttfts_s, 0.5),
            ttft_p95_s=_nearest(ttfts_s, 0.95),
            tpot_p50_s=_weighted(paces, 0.5),
            tpot_p95_s=_weighted(paces, 0.95),
            held=self.num_held,
            held_tokens=self.held_tokens,
            queued=self.num_queued,
            queued_tokens=self.queued_tokens,
            running=self.num_running,
            running_context_tokens=running_context_tokens,
        )
        self.arrived = self.arrived_prompt_tokens = self.window_shed = self.window_finished = 0
        self.finished_output_tokens = self.window_good = self.first_tokens_good = 0
        self.window_ttfts_s = []
        return demand


def _nearest(ordered: list[float], q: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def _weighted(ordered: list[tuple[float, int]], q: float) -> float | None:
    left = q * sum(weight for _, weight in ordered)
    for value, weight in ordered:
        left -= weight
        if left <= 0:
            return value
    return None


def quantiles(values: array) -> dict[str, float | None]:  # type: ignore[type-arg]
    """p50, p95, p99; None of nothing."""
    ordered = sorted(values)
    return {f"p{q}": _between(ordered, q / 100) for q in (50, 95, 99)}


def _between(ordered: list[float], q: float) -> float | None:
    if not ordered:
        return None
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
