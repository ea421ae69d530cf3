"""What a gateway has seen of its replicas: streams that ended or moved, tokens, first tokens, answers per second."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from kervan.config.workload import Slo
from kervan.fleet.directory import PrefixTokens, Traffic
from kervan.fleet.histogram import PAUSE_BOUNDS_S, TPOT_BOUNDS_S, TTFT_BOUNDS_S, Histogram, bounds_with
from kervan.fleet.link import ReplicaLink, ReplicaTally

# Their replica was lost, or its link broke; it stands still; it drains.
MoveReason = Literal["lost", "stalled", "drained"]
MOVE_REASONS: tuple[MoveReason, ...] = get_args(MoveReason)
# `kervan.metrics` says what each of these is.
Outcome = Literal["good", "slow", "broken", "refused", "left"]
BreakReason = Literal["given_up", "expired", "engine", "replay"]
QueueCause = Literal["no_replica", "lost_replica", "bulk_turn", "first_token"]
RATE_WINDOW_S = 10.0
KEEP_TALLY_S = 30.0  # of a replica that is gone, so that its last streams are counted too


@dataclass(slots=True)
class ClientCounts:
    """Events since the client started.

    `started`: streams; `ended`: by how, those that were refused before they were one too; `broken`: of these, why.
    `moves`: streams placed again, by reason; `moved_tokens`: prefilled again for that; `late_outputs`: of placements
    that were over.

    `broken_links`: links to replicas that ended; `lost_replicas`: those of them whose replica said that it died, or is
    no longer listed; `returned_replicas`: those whose replica was linked to again, so that nothing was lost.

    `move_pause_s`: of moved streams that had begun, from their last token before to the first one after; `drain_s`:
    from hearing that a replica drains until it had no stream of this client.
    """

    started: int = 0
    ended: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(get_args(Outcome), 0))
    broken: dict[BreakReason, int] = field(default_factory=lambda: dict.fromkeys(get_args(BreakReason), 0))
    moves: dict[MoveReason, int] = field(default_factory=lambda: dict.fromkeys(MOVE_REASONS, 0))
    moved_tokens: int = 0
    broken_links: int = 0
    lost_replicas: int = 0
    returned_replicas: int = 0
    late_outputs: int = 0
    move_pause_s: Histogram = field(default_factory=lambda: Histogram(PAUSE_BOUNDS_S))
    drain_s: Histogram = field(default_factory=lambda: Histogram(PAUSE_BOUNDS_S))

    @property
    def moved(self) -> int:
        """Streams placed again, for any reason."""
        return sum(self.moves.values())

    @property
    def given_up(self) -> int:
        """Streams that were rejected, because their replicas were lost with them."""
        return self.broken["given_up"]


class TrafficMeter:
    """Of one client. Counts of a replica outlive its link."""

    def __init__(self) -> None:
        self._tallies: dict[str, ReplicaTally] = {}
        self._bounds_s: tuple[tuple[float, ...], tuple[float, ...]] = TTFT_BOUNDS_S, TPOT_BOUNDS_S
        self._completed_per_s = 0.0
        self._rate_at_s = self._looked_s = time.monotonic()

    def tally(self, replica_id: str) -> ReplicaTally:
        """The counts of a replica's streams so far, over its earlier links too."""
        if replica_id not in self._tallies:
            ttft_bounds_s, tpot_bounds_s = self._bounds_s
            self._tallies[replica_id] = ReplicaTally(ttft=Histogram(ttft_bounds_s), tpot=Histogram(tpot_bounds_s))
        return self._tallies[replica_id]

    def set_slo(self, slo: Slo) -> None:
        """Have the SLO's bounds among the buckets. Others than before: histograms begin anew, as after a restart."""
        bounds_s = bounds_with(TTFT_BOUNDS_S, slo.ttft_s), bounds_with(TPOT_BOUNDS_S, slo.tpot_s)
        if bounds_s != self._bounds_s:
            self._bounds_s = bounds_s
            for tally in self._tallies.values():
                tally.ttft, tally.tpot = map(Histogram, bounds_s)

    def look(self, links: Mapping[str, ReplicaLink]) -> dict[str, Traffic]:
        """Replica id -> what came from it since the last call; one that is gone keeps its last counts for a while."""
        now_s = time.monotonic()
        elapsed_s, self._looked_s = now_s - self._looked_s, now_s
        traffic = {}
        for replica_id, tally in list(self._tallies.items()):
            if replica_id not in links and now_s - tally.unlinked_s > KEEP_TALLY_S:
                del self._tallies[replica_id]
            else:
                traffic[replica_id] = _told(tally)
        for link in links.values():
            ttft_s = statistics.median(link.ttfts_s) if link.ttfts_s else None
            rate = round(link.num_tokens / elapsed_s, 1) if elapsed_s > 0 else 0.0
            traffic[link.replica_id] = _told(link.tally, rate, ttft_s)
            link.tally.generated_tokens += link.num_tokens
            link.num_tokens = 0
            link.ttfts_s.clear()
        return traffic

    @property
    def tallies(self) -> Mapping[str, ReplicaTally]:
        """Replica id -> its counts; of those that are gone, for a while."""
        return self._tallies

    @property
    def completed_per_s(self) -> float:
        """Completed streams per second, averaged over about `RATE_WINDOW_S`."""
        return self._completed_per_s * self._decay(time.monotonic())

    def count_completed(self) -> None:
        """A stream has ended."""
        now_s = time.monotonic()
        self._completed_per_s = self._completed_per_s * self._decay(now_s) + 1 / RATE_WINDOW_S
        self._rate_at_s = now_s

    def _decay(self, now_s: float) -> float:
        return math.exp((self._rate_at_s - now_s) / RATE_WINDOW_S)


def _told(tally: ReplicaTally, tokens_per_s: float = 0.0, ttft_s: float | None = None) -> Traffic:
    prefix = PrefixTokens(tally.possible_cached_tokens, tally.predicted_cached_tokens, tally.cached_tokens)
    return Traffic(tokens_per_s, ttft_s, tally.num_served, tally.num_moved, prefix)
