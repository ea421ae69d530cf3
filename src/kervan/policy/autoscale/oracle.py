"""What a perfect autoscaler would have used: it knows the load that comes, and nothing else is better than live.

It is a bound, and assumes:

- the load is known from the start, and each replica is asked for exactly as long before it is needed as a start takes
  (`start_s`, always the same), and leaves at once when it is not needed;
- a replica takes what `ReplicaRate` says, at the mean lengths of the load, and no more, whatever else is there; a
  longer prompt counts as more than one request;
- requests that come too fast wait as long as the TTFT bound allows (`wait_s` of the rate, as for the SLO policy), and
  the number is the least with which no request waits for longer: `needed`;
- a replica that is not needed for less than a start stays: to start it again costs more.

A policy that uses fewer replica-seconds and keeps the SLO has replicas that take more than the rate says.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kervan.policy.autoscale import decisions
from kervan.policy.autoscale.replica_rate import ReplicaRate
from kervan.policy.autoscale.state import Decision, FleetState

SLOT_S = 5.0  # the number changes no more often than so


@dataclass(frozen=True, slots=True)
class Schedule:
    """Replicas to be ready from each time on; times rise, and the number before the first is the least."""

    at_s: tuple[float, ...]
    counts: tuple[int, ...]

    def at(self, time_s: float) -> int:
        """How many at a time."""
        place = bisect.bisect_right(self.at_s, time_s) - 1
        return self.counts[max(0, place)]

    def replica_seconds(self, start_s: float, end_s: float) -> float:
        """Up to `end_s`, each start paid from when it is asked for."""
        total = 0.0
        for place, (begin_s, count) in enumerate(zip(self.at_s, self.counts, strict=True)):
            until_s = self.at_s[place + 1] if place + 1 < len(self.at_s) else end_s
            total += count * max(0.0, min(until_s, end_s) - begin_s)
            before = self.counts[place - 1] if place else count
            total += max(0, count - before) * min(start_s, begin_s)
        return total


def plan(
    arrivals: Sequence[tuple[float, float]],
    rate: ReplicaRate,
    *,
    minimum: int,
    maximum: int,
    start_s: float,
    end_s: float,
) -> Schedule:
    """The fewest replica-seconds that keep every wait within the bound. `arrivals`: (when, its work in mean requests),
    in order.
    """
    counts = needed(arrivals, rate, minimum=minimum, maximum=maximum, end_s=end_s)
    filled = _without_short_gaps(counts, max(1, math.ceil(start_s / SLOT_S)))
    changes = [place for place in range(len(filled)) if not place or filled[place] != filled[place - 1]]
    return Schedule(tuple(place * SLOT_S for place in changes), tuple(filled[place] for place in changes))


def needed(
    arrivals: Sequence[tuple[float, float]], rate: ReplicaRate, *, minimum: int, maximum: int, end_s: float
) -> list[int]:
    """The least number in each slot with which what waits at its end is served within `wait_s` of it.

    As little as possible, as late as possible: within one slot of the fewest for a load that rises or falls once, and
    close to it for others.
    """
    num_slots = max(1, math.ceil(end_s / SLOT_S))
    came = [0.0] * num_slots
    for at_s, work in arrivals:
        came[min(num_slots - 1, int(at_s / SLOT_S))] += work
    takes = rate.requests_per_s * SLOT_S
    least = max(minimum, 1)
    counts = [least] * num_slots
    queue = 0.0
    for place in range(num_slots):
        waiting = queue + came[place]
        bound = 1 + rate.wait_s / SLOT_S  # slots of one replica's work that may be there
        count = max(least, math.ceil(waiting / (takes * bound) - 1e-9))
        counts[place] = min(count, maximum)
        queue = max(0.0, waiting - counts[place] * takes)
    return counts


def _without_short_gaps(counts: Sequence[int], gap: int) -> list[int]:
    """Numbers with which no replica goes and comes again within `gap` slots."""
    filled = list(counts)
    for level in range(min(counts) + 1, max(counts) + 1):
        last = -1
        for place, count in enumerate(counts):
            if count >= level:
                if last >= 0 and place - last <= gap:
                    for between in range(last + 1, place):
                        filled[between] = max(filled[between], level)
                last = place
    return filled


class Oracle:
    """The schedule as a policy; `start_s` of the pool is what it looks ahead."""

    name = "oracle"

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """See `Policy`."""
        start_s = max((pool.start_s for pool in state.pools), default=0.0)
        later_s = state.now_s + start_s + 1.0
        now, later = self._schedule.at(state.now_s), self._schedule.at(later_s)
        begin = bisect.bisect_right(self._schedule.at_s, state.now_s)
        end = bisect.bisect_right(self._schedule.at_s, later_s)
        count = max((now, later, *self._schedule.counts[begin:end]))
        return decisions.decision(
            state, count, decisions.bounds(state), f"{now} are needed now, and {later} in {start_s:.0f} s",
            numbers={"needed": float(now), "needed_later": float(later)}, memory=dict(memory),
        )  # fmt: skip
