"""What has been seen of a fleet since the command began: numbers over time, and events. Pure."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kervan.fleet.directory import Snapshot
from kervan.serve.status import FleetStatus
from kervan.serve.why import decided_line
from kervan.units import plural

MAX_VALUES = 240
MAX_EVENTS = 500


@dataclass(frozen=True, slots=True)
class ReplicaTraffic:
    """Of one replica, over all gateways. `ttft_s`: mean of the gateways' medians, weighted by nothing."""

    tokens_per_s: float
    ttft_s: float | None


def traffic(snapshot: Snapshot, replica_id: str) -> ReplicaTraffic:
    """What the gateways report of a replica."""
    shares = [gateway.traffic[replica_id] for gateway in snapshot.gateways if replica_id in gateway.traffic]
    return ReplicaTraffic(sum(share.tokens_per_s for share in shares), _mean([share.ttft_s for share in shares]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class Totals:
    """Of a fleet. `ttft_s`: mean of the medians of all replicas at all gateways, weighted by nothing."""

    tokens_per_s: float
    streams: int
    held: int
    moved: int
    ttft_s: float | None


def totals(snapshot: Snapshot) -> Totals:
    """Sums over the gateways."""
    shares = [share for gateway in snapshot.gateways for share in gateway.traffic.values()]
    return Totals(
        sum(share.tokens_per_s for share in shares),
        sum(gateway.streams for gateway in snapshot.gateways),
        sum(gateway.held for gateway in snapshot.gateways),
        sum(gateway.moved for gateway in snapshot.gateways),
        _mean([share.ttft_s for share in shares]),
    )


Values = deque[float | None]


def _values() -> Values:
    return deque(maxlen=MAX_VALUES)


@dataclass(slots=True)
class Series:
    """One value for each look, the latest last."""

    tokens_per_s: Values = field(default_factory=_values)
    streams: Values = field(default_factory=_values)
    held: Values = field(default_factory=_values)
    ttft_s: Values = field(default_factory=_values)
    load: Values = field(default_factory=_values)  # KV cache in use, or how busy a gateway is: 0 to 1


@dataclass(slots=True)
class History:
    """`events`: (time of day, what happened), the latest last. `parts`: by the id of a replica or gateway."""

    total: Series = field(default_factory=Series)
    parts: dict[str, Series] = field(default_factory=dict)
    events: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    last: Snapshot | None = None

    def take(self, status: FleetStatus, now_s: float) -> None:
        """What was seen now. `now_s`: Unix time."""
        snapshot = status.snapshot
        if self.last is not None:
            at = time.strftime("%X", time.localtime(now_s))
            self.events += [(at, line) for line in events(self.last, snapshot)]
        self.last = snapshot
        found = totals(snapshot)
        self.total.tokens_per_s.append(found.tokens_per_s)
        self.total.streams.append(found.streams)
        self.total.held.append(found.held)
        self.total.ttft_s.append(found.ttft_s)
        here = {*(replica.id for replica in snapshot.replicas), *(gateway.id for gateway in snapshot.gateways)}
        self.parts = {name: series for name, series in self.parts.items() if name in here}
        for replica in snapshot.replicas:
            series, rates = self.parts.setdefault(replica.id, Series()), traffic(snapshot, replica.id)
            series.tokens_per_s.append(rates.tokens_per_s)
            series.ttft_s.append(rates.ttft_s)
            series.streams.append(replica.running)
            series.held.append(replica.waiting)
            series.load.append(replica.kv_cache_usage)
        for gateway in snapshot.gateways:
            series = self.parts.setdefault(gateway.id, Series())
            series.tokens_per_s.append(sum(share.tokens_per_s for share in gateway.traffic.values()))
            series.streams.append(gateway.streams)
            series.held.append(gateway.held)
            series.load.append(gateway.busy)


def _replica_states(snapshot: Snapshot) -> dict[str, str]:
    return {r.id: "late" if r.lateness else r.state for r in snapshot.replicas}


def _gateway_states(snapshot: Snapshot) -> dict[str, str]:
    return {g.id: "late" if g.lateness else "ready" if g.is_ready else "starting" for g in snapshot.gateways}


def events(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """What happened between two snapshots, one line each."""
    for kind, states in (("replica", _replica_states), ("gateway", _gateway_states)):
        old, new = states(before), states(after)
        for name in sorted({*old, *new}):
            if name not in new:
                yield f"{kind} {name} is gone (was {old[name]})"
            elif name not in old:
                yield f"{kind} {name} appeared: {new[name]}"
            elif old[name] != new[name]:
                yield f"{kind} {name}: {old[name]} -> {new[name]}"
    yield from _moves(before, after)
    listed = {(node.node, notice.kind, notice.source) for node in before.nodes for notice in node.notices}
    for node in after.nodes:
        for notice in node.notices:
            if (node.node, notice.kind, notice.source) not in listed:
                yield f"node {node.node}: {notice.describe(notice.seen_s)}"
    decided = {entry.at_s for entry in before.scaling.history} if before.scaling is not None else set()
    for entry in after.scaling.history if after.scaling is not None else ():
        if entry.at_s not in decided:
            yield f"autoscaling: {decided_line(entry)}"
    reported = {failure.number for failure in before.failures}
    for failure in after.failures:
        if failure.number not in reported:
            yield f"{failure.who} failed: {failure.message}"


def _moves(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """Streams that left each replica, as each gateway tells; what is of no replica, as a sum."""
    old = {gateway.id: gateway for gateway in before.gateways}
    for gateway in after.gateways:
        if gateway.id not in old:
            continue
        count = gateway.moved - old[gateway.id].moved
        if count <= 0:
            continue
        left = {
            replica: share.num_moved - old[gateway.id].traffic[replica].num_moved
            for replica, share in gateway.traffic.items()
            if replica in old[gateway.id].traffic
        }
        told = [f"{number} off {replica}" for replica, number in left.items() if number > 0]
        yield f"gateway {gateway.id} moved {plural(count, 'stream')}{': ' if told else ''}{', '.join(told)}"
