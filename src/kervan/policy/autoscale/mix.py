"""How many replicas of each market: on-demand as the floor and as cover, spot where it is cheaper in the end.

What a spot replica costs is its price, and what its losses cost: replicas that start again serve nobody meanwhile, and
something else must. What is missing of spot is covered by on-demand as `policy/pools.py` decides for fixed pools too:
losses come together, since a zone that loses one node often loses all, so what counts is how many are missing and not
how likely each was to go. Young nodes are lost most, and are the first to leave (`leaving.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kervan.policy import pools
from kervan.policy.autoscale.state import FleetState, PoolState, ReplicaState

ON_DEMAND, SPOT = "on-demand", "spot"
MAX_SHORTAGES = 64
HOLD_LEAST_S = 60.0


@dataclass(frozen=True, slots=True)
class Split:
    """Replicas by pool, and why; `memory` for the next decision."""

    targets: Mapping[str, int]
    reason: str
    memory: Mapping[str, Any]


def hourly_cost(pool: PoolState, *, other_usd: float) -> float:
    """US dollars per hour that a replica of the pool serves: paid while it starts again after each loss too.

    `other_usd`: the price of what serves meanwhile.
    """
    price = pool.usd_per_hour if pool.usd_per_hour is not None else other_usd
    lost_hours = pool.losses_per_hour * pool.start_s / 3600.0
    return price + lost_hours * (price + other_usd)


def split(
    total: int,
    state: FleetState,
    memory: Mapping[str, Any],
) -> Split:
    """`total` replicas over the pools of a fleet, within their bounds.

    The cheaper pool by `hourly_cost` takes what is above the minimums of all. What is missing of spot for
    `cover_after_s` is covered by on-demand, until spot has been whole for `hold_s` (`pools.on_demand`).
    """
    if len(state.pools) == 1:
        (only,) = state.pools
        return Split({only.name: _bounded(total, only)}, "", {})
    on_demand, spot = by_market(state)
    least = on_demand.minimum + spot.minimum
    rest = max(0, total - least)
    base_usd = on_demand.usd_per_hour if on_demand.usd_per_hour is not None else 1.0
    known = spot.usd_per_hour is not None and on_demand.usd_per_hour is not None
    is_cheaper = not known or hourly_cost(spot, other_usd=base_usd) < base_usd
    spot_most, on_demand_most = spot.maximum - spot.minimum, on_demand.maximum - on_demand.minimum
    if is_cheaper:
        to_spot = min(rest, spot_most)
        to_on_demand = min(rest - to_spot, on_demand_most)
    else:
        to_on_demand = min(rest, on_demand_most)
        to_spot = min(rest - to_on_demand, spot_most)
    wanted_spot = spot.minimum + to_spot
    floor = on_demand.minimum + to_on_demand
    here = [r for r in state.replicas if r.pool == spot.name]
    seen = pools.SpotState(
        wanted_spot,
        min(wanted_spot, _count(here, "ready")),
        min(wanted_spot, sum(r.phase == "starting" and bool(r.node) for r in here)),
        0,
    )
    history = tuple(pools.Shortage(*one) for one in memory.get("shortages", ()))
    extra = max(0, on_demand.target - floor)
    covered = pools.on_demand(
        seen, floor + min(extra, wanted_spot), floor, on_demand.maximum, history,
        now_s=state.now_s,
        after_s=state.cover_after_s,
        hold_s=hold_s(state, on_demand),
    )  # fmt: skip
    count = covered.count
    kept = [(one.at_s, one.absent) for one in covered.history[-MAX_SHORTAGES:]]
    price = "spot is the cheaper" if is_cheaper else "spot costs more with its losses"
    return Split(
        {on_demand.name: count, spot.name: wanted_spot},
        f"{wanted_spot} spot, {count} on-demand ({price}; {covered.reason})",
        {"shortages": kept, "cover": count - floor},
    )


def hold_s(state: FleetState, on_demand: PoolState) -> float:
    """How long on-demand replicas stay after the spot ones that they cover came back: as long as a start takes.

    To keep one for longer costs more than to start it again, should spot go again: then nobody knows better than to
    wait for as long as the other choice would have cost (the ski rental problem). At most the fleet's `cover_hold_s`.
    """
    return min(state.cover_hold_s, max(HOLD_LEAST_S, on_demand.start_s))


def cover(state: FleetState, memory: Mapping[str, Any]) -> int:
    """On-demand replicas of the last split that stand in for spot ones: both were asked for, and one is meant."""
    if len(state.pools) == 1:
        return 0
    on_demand, _ = by_market(state)
    return max(0, min(int(memory.get("cover", 0)), on_demand.target - on_demand.minimum))


def by_market(state: FleetState) -> tuple[PoolState, PoolState]:
    """The on-demand and the spot pool of a fleet that has two."""
    spot = next((pool for pool in state.pools if pool.name == SPOT), state.pools[-1])
    on_demand = next(pool for pool in state.pools if pool.name != spot.name)
    return on_demand, spot


def _count(replicas: Sequence[ReplicaState], phase: str) -> int:
    return sum(replica.phase == phase for replica in replicas)


def _bounded(count: int, pool: PoolState) -> int:
    most = pool.maximum if pool.room is None else min(pool.maximum, max(pool.room, pool.minimum))
    return min(max(count, pool.minimum), most)
