"""The fleet as an autoscaling policy sees it, from what the directory has and the gateways tell. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kervan.config import autoscale
from kervan.config.fleet import FleetConfig
from kervan.fleet import demand
from kervan.fleet.directory import LATE_S, DemandCounts, GatewayEntry, ReplicaEntry, ReplicaShare, Scaling, Snapshot
from kervan.policy.autoscale.state import Demand, FleetState, PoolState, ReplicaState
from kervan.serve.scaler.rooms import Rooms
from kervan.serve.scaler.starts import Starts
from kervan.serve.versions import versions

LEAST_WINDOW_S = 0.1


class Observed(msgspec.Struct, frozen=True):
    """What a policy was told and has decided last, and kept; `kinds`: of the nodes. `state`: None before the first."""

    state: FleetState | None
    scaling: Scaling
    memory: dict[str, Any]
    kinds: list[str]


class DemandWindow:
    """The beats of gateways between two decisions.

    One that is late is taken to be asked what it was asked in its last beat, until it is listed no more: what its
    clients want does not end with its news. Without any news of any, there is no demand to be told.
    """

    def __init__(self) -> None:
        self._told: list[DemandCounts] = []
        self._by_gateway: dict[str, float] = {}  # seconds that each has told of
        self._heard_s: float | None = None
        self._has_heard = False

    def beat(self, entry: GatewayEntry, now_s: float) -> None:
        """A gateway has told."""
        if entry.demand is not None:
            self._told.append(entry.demand)
            self._by_gateway[entry.id] = self._by_gateway.get(entry.id, 0.0) + entry.demand.window_s
            self._heard_s, self._has_heard = now_s, True

    @property
    def has_heard(self) -> bool:
        """Whether a gateway has ever told: a fleet that starts has none yet."""
        return self._has_heard

    def is_complete(self, gateways: Sequence[GatewayEntry]) -> bool:
        """Whether all that are not late have told."""
        return bool(self._told) and all(g.id in self._by_gateway or g.lateness for g in gateways)

    def close(self, gateways: Sequence[GatewayEntry], now_s: float) -> tuple[Demand | None, float]:
        """The demand since the last call, and how old the news is; the next window begins."""
        told, windows_s = self._told, list(self._by_gateway.values())
        self._told, self._by_gateway = [], {}
        there = [gateway for gateway in gateways if gateway.demand is not None]
        if self._heard_s is None:
            self._heard_s = now_s
        age_s = now_s - self._heard_s
        if not there or age_s > LATE_S:
            return None, age_s
        told += [gateway.demand for gateway in there if gateway.lateness and gateway.demand is not None]
        window_s = max(LEAST_WINDOW_S, sum(windows_s) / len(windows_s)) if windows_s else 1.0
        return demand.total(told, [g.demand for g in there if g.demand is not None], window_s), 0.0


def replica_shares(gateways: Sequence[GatewayEntry]) -> dict[str, list[ReplicaShare]]:
    """Replica id -> what each gateway has there."""
    shares: dict[str, list[ReplicaShare]] = {}
    for gateway in gateways:
        for replica_id, share in gateway.demand.replicas.items() if gateway.demand is not None else ():
            shares.setdefault(replica_id, []).append(share)
    return shares


def replica_state(entry: ReplicaEntry, shares: Sequence[ReplicaShare], version: str) -> ReplicaState:
    """One replica. Its load is what the gateways have there: what it says of itself decides nothing."""
    steps_s = [share.step_s for share in shares if share.step_s is not None]
    return ReplicaState(
        id=entry.id,
        pool=entry.pool,
        phase="unhealthy" if entry.lateness else entry.state,
        node=entry.node,
        age_s=entry.age_s,
        ready_for_s=entry.ready_for_s,
        streams=sum(share.streams for share in shares),
        context_tokens=sum(share.context_tokens for share in shares),
        queued_tokens=sum(share.queued_tokens for share in shares),
        step_s=min(steps_s, default=None),
        is_outdated=entry.version != version,
    )


def fleet_state(
    config: FleetConfig,
    snapshot: Snapshot,
    *,
    now_s: float,
    demand: Demand | None,
    demand_age_s: float,
    targets: Mapping[str, int],
    rooms: Rooms,
    starts: Starts,
    kinds: Mapping[str, Sequence[str]],
    unix_s: float,
) -> FleetState:
    """The fleet at one second. `kinds`: of the nodes on which each pool's replicas may be. `unix_s`: Unix time."""
    version, shares = versions(config).replicas, replica_shares(snapshot.gateways)
    pools = tuple(
        PoolState(
            name=name,
            minimum=bounds.minimum,
            maximum=bounds.maximum,
            target=targets.get(name, bounds.minimum),
            room=rooms.room(name),
            start_s=starts.expected_s(kinds.get(name, ())),
        )
        for name, bounds in config.bounds.items()
    )
    scaling = config.autoscaler
    zone = scaling.time_zone if scaling is not None else autoscale.parse_time_zone("UTC")
    return FleetState(
        now_s=now_s,
        local_minute=autoscale.local_minute(unix_s, zone),
        pools=pools,
        replicas=tuple(replica_state(entry, shares.get(entry.id, ()), version) for entry in snapshot.replicas),
        demand=demand,
        demand_age_s=demand_age_s,
        cover_after_s=config.fallback_after_s,
        cover_hold_s=config.fallback_hold_s,
    )
