"""How many replicas each pool of a fleet should have: all spot ones that get a node, on-demand ones for the missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A replacement that has not even been placed for so long has no room beside the old replicas.
STALL_S = 300.0


@dataclass(frozen=True, slots=True)
class SpotState:
    """The spot pool now. `starting`: on a node, and not ready yet. `outdated`: of both, those of earlier settings."""

    wanted: int
    ready: int = 0
    starting: int = 0
    outdated: int = 0

    @property
    def present(self) -> int:
        """Replicas that are on a node, ready or not yet."""
        return self.ready + self.starting


@dataclass(frozen=True, slots=True)
class Shortage:
    """From `at_s` on, so many spot replicas were `absent`: on no node."""

    at_s: float
    absent: int


@dataclass(frozen=True, slots=True)
class OnDemandCount:
    """How many on-demand replicas there should be; `history` is for the next decision."""

    count: int
    history: tuple[Shortage, ...]
    reason: str


def on_demand(
    spot: SpotState,
    current: int,
    minimum: int,
    maximum: int,
    history: Sequence[Shortage] = (),
    *,
    now_s: float,
    after_s: float,
    hold_s: float,
) -> OnDemandCount:
    """The least, and one for each missing spot replica, up to the most.

    One is added for what was absent all the time of the last `after_s`: a spot replica that starts will be there before
    one that is begun now. One leaves when fewer are not ready now, and all the time of the last `hold_s` fewer were
    absent: capacity that has just come back is the likeliest to go again, and each change costs a start. A spot replica
    that is wanted in addition and gets a node at once has not gone. `current`: how many there are to be. A time that
    `history` does not cover changes nothing: a fleet whose history is lost keeps what it has for so long.
    """
    bounded = min(max(current, minimum), maximum)
    absent, unready = max(0, spot.wanted - spot.present), max(0, spot.wanted - spot.ready)
    kept = _since(history, now_s - max(after_s, hold_s))
    if not kept or kept[-1].absent != absent:
        kept = (*kept, Shortage(now_s, absent))
    known_s = now_s - kept[0].at_s
    at_least = min(shortage.absent for shortage in _since(kept, now_s - after_s)) if known_s >= after_s else 0
    absent_most = max(shortage.absent for shortage in _since(kept, now_s - hold_s))
    at_most = max(unready, absent_most) if known_s >= hold_s else math.inf
    extra = bounded - minimum
    covering = min(max(extra, at_least), at_most, maximum - minimum)
    count = minimum + int(covering)
    if bounded != current:
        reason = f"{current} is outside {minimum} to {maximum}"
    elif count > current:
        reason = f"{at_least} of {spot.wanted} spot replicas on no node for {after_s:g} s"
    elif count < current:
        reason = f"no more than {at_most} of {spot.wanted} spot replicas missing for {hold_s:g} s"
    elif extra > unready:
        reason = f"{extra} stay until spot has been whole again for {hold_s:g} s"
    elif extra:
        reason = f"{extra} of {unready} missing spot replicas covered"
    else:
        reason = f"{spot.ready} of {spot.wanted} spot replicas ready"
    return OnDemandCount(count, kept, reason)


def _since(history: Sequence[Shortage], since_s: float) -> tuple[Shortage, ...]:
    """What was so at any time from `since_s` on."""
    first = len(history)
    while first and (first == len(history) or history[first].at_s > since_s):
        first -= 1
    return tuple(history[first:])


@dataclass(frozen=True, slots=True)
class Rollout:
    """New settings are being brought in. `size`: replicas meanwhile; no old one has left since `since_s`."""

    size: int
    outdated: int
    since_s: float


@dataclass(frozen=True, slots=True)
class SpotCount:
    """How many spot replicas to ask for; `rollout` is for the next decision."""

    count: int
    rollout: Rollout | None
    reason: str


def spot(state: SpotState, rollout: Rollout | None = None, *, now_s: float) -> SpotCount:
    """All that are wanted: those without a node wait for one, and tell the cluster's autoscaler so.

    While settings change, only as many as were there when the change began: an old replica is let go when a new one is
    ready or has been given its place, and one that waits for a node would hold up that for ever.
    """
    if not state.outdated:
        return SpotCount(state.wanted, None, f"{state.ready} of {state.wanted} ready")
    if rollout is None:
        rollout = Rollout(max(1, min(state.wanted, state.present)), state.outdated, now_s)
    elif state.outdated != rollout.outdated:
        rollout = Rollout(rollout.size, state.outdated, now_s)
    elif now_s - rollout.since_s >= STALL_S:
        rollout = Rollout(max(1, min(rollout.size, state.present)), state.outdated, now_s)
    count = min(rollout.size, max(1, state.wanted))
    return SpotCount(count, rollout, f"{state.outdated} of {state.present} have earlier settings")
