"""From a number of replicas to a decision: bounds, schedule, pools, and who leaves. All policies end here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kervan.config.autoscale import ScheduledMinimum
from kervan.policy.autoscale import leaving, mix, schedule
from kervan.policy.autoscale.state import Decision, FleetState


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of the whole fleet: `minimum` with the schedule, `room` for what can be placed (at most `maximum`)."""

    minimum: int
    maximum: int
    room: int
    scheduled: str = ""
    """The entry of the schedule that raises the minimum, or ""."""


def bounds(state: FleetState, scheduled: Sequence[ScheduledMinimum] = ()) -> Bounds:
    """The bounds now; the schedule's as far ahead as a start takes."""
    minimum = sum(pool.minimum for pool in state.pools)
    maximum = sum(pool.maximum for pool in state.pools)
    room = sum(pool.maximum if pool.room is None else min(pool.room, pool.maximum) for pool in state.pools)
    ahead_s = max((pool.start_s for pool in state.pools), default=0.0)
    wanted, source = schedule.minimum(scheduled, state.local_minute, ahead_s)
    wanted = min(wanted, maximum)
    is_raised = wanted > minimum
    return Bounds(max(minimum, wanted), maximum, room, source if is_raised else "")


def asked(state: FleetState, memory: Mapping[str, Any]) -> int:
    """Replicas that were asked for last, in all pools; of those that cover missing spot ones, these alone count."""
    return sum(pool.target for pool in state.pools) - mix.cover(state, memory.get("mix", {}))


def decision(
    state: FleetState,
    total: int,
    within: Bounds,
    reason: str,
    *,
    numbers: Mapping[str, float],
    memory: dict[str, Any],
) -> Decision:
    """`total` replicas, made a decision: never more than there is room for, nor than the bounds.

    Replicas beyond the room are not asked for, and the reason says so; those that were are not taken back by it.
    """
    count = min(max(total, within.minimum), within.maximum)
    if count < total:
        reason += f"; {within.maximum} are the most allowed"
    elif count > total:
        why = f"the schedule {within.scheduled!r}" if within.scheduled else "the least allowed"
        reason += f"; {count} by {why}" if within.scheduled else f"; {count} are {why}"
    least_placed = sum(pool.minimum for pool in state.pools)
    if count > max(within.room, least_placed):
        reason += f"; the cluster has room for {within.room}"
        count = max(within.room, least_placed)
    parts = mix.split(count, state, memory.get("mix", {}))
    memory["mix"] = parts.memory
    if parts.reason:
        reason += f": {parts.reason}"
    return Decision(
        targets=parts.targets,
        reason=reason,
        numbers=numbers,
        leaving=leaving.choose(state.replicas, parts.targets),
        memory=memory,
    )


def kept(state: FleetState, memory: Mapping[str, Any], why: str) -> Decision:
    """What was asked for last, within the pools' bounds, nobody leaves."""
    targets = {pool.name: min(max(pool.target, pool.minimum), pool.maximum) for pool in state.pools}
    total = sum(targets.values())
    return Decision(
        targets=targets, reason=f"keeps {total}: {why}", numbers={"replicas": float(total)}, memory=dict(memory)
    )
