"""What clients ask of a fleet and what they get: counted by each gateway from beat to beat, added up for the scaler."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kervan.config.workload import Slo
from kervan.fleet.directory import DemandCounts, ReplicaShare
from kervan.policy.autoscale.state import Demand

if TYPE_CHECKING:
    from kervan.fleet.link import ReplicaLink
    from kervan.fleet.stream import Stream

# Durations are told as counts of bins, so that those of several gateways add up; each bin is so many times the last.
BIN_RATIO = 1.05
LEAST_S = 1e-4
COUNTS = (
    "arrived", "arrived_prompt_tokens", "shed", "finished", "finished_output_tokens", "generated_tokens",
    "first_tokens", "first_tokens_good", "finished_good",
)  # fmt: skip
GAUGES = ("held", "held_tokens", "queued", "queued_tokens", "running", "running_context_tokens")


def bin_of(value_s: float) -> int:
    """The number of the bin that a duration is in."""
    return round(math.log(max(value_s, LEAST_S)) / math.log(BIN_RATIO))


def quantile_s(bins: Mapping[int, int], share: float) -> float | None:
    """The duration below which a share of those in the bins is, within half a bin; None without any."""
    total, seen = sum(bins.values()), 0
    for number in sorted(bins):
        seen += bins[number]
        if seen >= share * total:
            return float(BIN_RATIO**number)
    return None


class DemandMeter:
    """Of one client. `slo`: of the fleet, for what counts as good."""

    def __init__(self) -> None:
        self.slo = Slo()
        self._counts = dict.fromkeys(COUNTS, 0)
        self._ttfts: dict[int, int] = {}
        self._taken_s = time.monotonic()

    def arrived(self, stream: "Stream") -> None:
        """A request has opened a stream."""
        stream.arrived_s = time.monotonic()
        self._counts["arrived"] += 1
        self._counts["arrived_prompt_tokens"] += stream.prompt_tokens

    def placed(self, stream: "Stream") -> None:
        """A stream is on a replica for the first time; what the prefix cache there has of its prompt is not work."""
        self._counts["arrived_prompt_tokens"] -= stream.prompt_tokens - stream.queued_tokens

    def shed(self, num_streams: int) -> None:
        """A request was refused because the queue was full."""
        self._counts["arrived"] += num_streams
        self._counts["shed"] += num_streams

    def first_token(self, stream: "Stream") -> None:
        """A stream has got its first token; its wait for a replica counts."""
        stream.first_token_s = now_s = time.monotonic()
        ttft_s = now_s - stream.arrived_s
        self._counts["first_tokens"] += 1
        self._counts["first_tokens_good"] += self.slo.is_met(ttft_s=ttft_s, tpot_s=0.0, e2e_s=0.0)
        number = bin_of(ttft_s)
        self._ttfts[number] = self._ttfts.get(number, 0) + 1

    def generated(self, num_tokens: int) -> None:
        """A step has given so many tokens."""
        self._counts["generated_tokens"] += num_tokens

    def finished(self, stream: "Stream") -> bool:
        """A stream has ended as it should; whether within the SLO."""
        now_s, num_tokens = time.monotonic(), len(stream.generated)
        self._counts["finished"] += 1
        self._counts["finished_output_tokens"] += num_tokens
        if stream.first_token_s is None:  # one without tokens, like an embedding, or with all that its client lacked
            e2e_s = now_s - stream.arrived_s
            return self.slo.is_met(ttft_s=0.0 if num_tokens else e2e_s, tpot_s=0.0, e2e_s=e2e_s)
        ttft_s = stream.first_token_s - stream.arrived_s
        tpot_s = (now_s - stream.first_token_s) / max(1, num_tokens - 1)
        e2e_s = now_s - stream.arrived_s
        is_good = self.slo.is_met(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)
        self._counts["finished_good"] += is_good
        return is_good

    def take(self, streams: "Iterable[Stream]", links: "Mapping[str, ReplicaLink]") -> DemandCounts:
        """What was counted since the last call, and what is there now. Takes about a microsecond per stream."""
        now_s = time.monotonic()
        window_s, self._taken_s = now_s - self._taken_s, now_s
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        ttfts, self._ttfts = self._ttfts, {}
        held = [s.prompt_tokens + len(s.generated) for s in streams if s.replica_id is None and s.replaying is None]
        gauges = dict.fromkeys(GAUGES, 0) | {"held": len(held), "held_tokens": sum(held)}
        tpots: dict[int, int] = {}
        shares: dict[str, ReplicaShare] = {}
        for link in links.values():
            running = [stream for stream in link.streams.values() if stream.gave_token]
            context_tokens = sum(stream.prompt_tokens + len(stream.generated) for stream in running)
            num_queued = len(link.streams) - len(running)
            step_s = link.pace_s(now_s)
            shares[link.replica_id] = ReplicaShare(
                len(link.streams), context_tokens, link.load.queued_tokens, None if step_s is None else round(step_s, 5)
            )
            gauges["queued"] += num_queued
            gauges["queued_tokens"] += link.load.queued_tokens
            gauges["running"] += len(running)
            gauges["running_context_tokens"] += context_tokens
            if step_s is not None and running:
                number = bin_of(step_s)
                tpots[number] = tpots.get(number, 0) + len(running)
        return DemandCounts(window_s=round(window_s, 4), ttfts=ttfts, tpots=tpots, replicas=shares, **counts, **gauges)


def total(told: Sequence[DemandCounts], gauges: Sequence[DemandCounts], window_s: float) -> Demand:
    """The demand of a fleet. `told`: all beats of the window of `window_s`; `gauges`: the last one of each gateway."""
    counts = {name: max(0, sum(getattr(part, name) for part in told)) for name in COUNTS}
    now = {name: sum(getattr(part, name) for part in gauges) for name in GAUGES}
    ttfts, tpots = _added(part.ttfts for part in told), _added(part.tpots for part in gauges)
    return Demand(
        window_s=window_s,
        **counts,
        **now,
        ttft_p50_s=quantile_s(ttfts, 0.5),
        ttft_p95_s=quantile_s(ttfts, 0.95),
        tpot_p50_s=quantile_s(tpots, 0.5),
        tpot_p95_s=quantile_s(tpots, 0.95),
    )


def _added(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    bins: dict[int, int] = {}
    for part in parts:
        for number, count in part.items():
            bins[number] = bins.get(number, 0) + count
    return bins
