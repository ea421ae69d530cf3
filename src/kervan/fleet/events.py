"""What has happened in a fleet since its directory started: starts, drains, notices, and when nodes had become empty.

It is counted where all of it is heard, so once, whatever number of gateways there is.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from kervan.fleet.histogram import PAUSE_BOUNDS_S, START_BOUNDS_S, Histogram

if TYPE_CHECKING:
    from kervan.fleet.directory import NodeEntry, NodeNotice, ReplicaEntry


class Counted(msgspec.Struct, frozen=True):
    """A histogram as it travels: what is at most each bound, and above the last one."""

    counts: list[int]
    sum_s: float


class EventCounts(msgspec.Struct, frozen=True):
    """As `kervan.metrics` tells them. `notices`: by kind and source; starts and drains by pool."""

    starts: dict[str, int] = {}
    start_s: dict[str, Counted] = {}
    start_failures: int = 0
    drains: dict[str, int] = {}
    notices: dict[str, dict[str, int]] = {}
    notice_to_empty_s: Counted | None = None


class FleetEvents:
    """Counts of one fleet; `now`: seconds that pass evenly."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._starts: dict[str, int] = {}
        self._start_s: dict[str, Histogram] = {}
        self._num_failures = 0
        self._drains: dict[str, int] = {}
        self._draining: set[str] = set()
        self._notices: dict[str, dict[str, int]] = {}
        self._to_empty_s = Histogram(PAUSE_BOUNDS_S)
        # By node and notice: when it was heard; None once the node was empty, or had no replica from the start.
        self._noticed: dict[tuple[str, NodeNotice], float | None] = {}

    def replica(self, before: "ReplicaEntry | None", entry: "ReplicaEntry") -> None:
        """A replica has told of itself; `before`: what it told last."""
        if before is None:
            self._starts[entry.pool] = self._starts.get(entry.pool, 0) + 1
            self._drains.setdefault(entry.pool, 0)
            self._start_s.setdefault(entry.pool, Histogram(START_BOUNDS_S))
        # Of one that was ready when this directory started, the start is long ago.
        if before is not None and (before.state, entry.state) == ("starting", "ready"):
            self._start_s[entry.pool].observe(entry.age_s)
        if entry.state == "draining":
            self.drains(entry)

    def drains(self, entry: "ReplicaEntry") -> None:
        """A replica drains, or was told to; counted once."""
        if entry.id not in self._draining:
            self._draining.add(entry.id)
            self._drains[entry.pool] = self._drains.get(entry.pool, 0) + 1

    def gone(self, replica_id: str) -> None:
        """A replica is listed no more."""
        self._draining.discard(replica_id)

    def failed(self) -> None:
        """Something could not start."""
        self._num_failures += 1

    def look(self, replicas: Sequence["ReplicaEntry"], nodes: Sequence["NodeEntry"]) -> None:
        """What notices there are, and which of their nodes have no stream left."""
        standing = {(node.node, notice) for node in nodes for notice in node.notices}
        for node, notice in standing - self._noticed.keys():
            of_kind = self._notices.setdefault(notice.kind, {})
            of_kind[notice.source] = of_kind.get(notice.source, 0) + 1
            is_here = any(node in (replica.node, *replica.nodes) for replica in replicas)
            self._noticed[node, notice] = self._now() if is_here and notice.is_certain else None
        for (node, notice), heard_s in list(self._noticed.items()):
            is_busy = any(
                node in (replica.node, *replica.nodes) and replica.running + replica.waiting for replica in replicas
            )
            if heard_s is not None and not is_busy:
                self._to_empty_s.observe(self._now() - heard_s)
                self._noticed[node, notice] = None
            if (node, notice) not in standing and not is_busy:
                del self._noticed[node, notice]

    def told(self) -> EventCounts:
        """All of it, to be told to others."""
        return EventCounts(
            starts=dict(self._starts),
            start_s={pool: _told(histogram) for pool, histogram in self._start_s.items()},
            start_failures=self._num_failures,
            drains=dict(self._drains),
            notices={kind: dict(by_source) for kind, by_source in self._notices.items()},
            notice_to_empty_s=_told(self._to_empty_s),
        )


def _told(histogram: Histogram) -> Counted:
    return Counted([*histogram.counts], histogram.sum_s)
