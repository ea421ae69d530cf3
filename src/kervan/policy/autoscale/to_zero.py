"""None at all: when the last replica may go, and when the first one is needed.

Requests that come while there is none are held at the gateways, which say so in `Demand.held`.
"""

from dataclasses import dataclass

from kervan.policy.autoscale.state import Demand

IDLE_S = 300.0
"""Without a request for so long, the last replica goes: ten starts of half a minute."""


@dataclass(frozen=True, slots=True)
class Idleness:
    """`at_least`: 0 or 1 replicas. `idle_since_s`: for the next decision."""

    at_least: int
    idle_since_s: float | None
    reason: str


def decide(demand: Demand, current: int, idle_since_s: float | None, *, now_s: float, idle_s: float) -> Idleness:
    """Whether a fleet that may go to none needs one. `current`: replicas that were asked for."""
    streams = demand.held + demand.queued + demand.running
    if streams or demand.arrived:
        what = f"{demand.held} held" if demand.held else f"{streams} in flight" if streams else f"{demand.arrived} came"
        return Idleness(1, None, f"{what}")
    since = now_s if idle_since_s is None else min(idle_since_s, now_s)
    if current > 0 and now_s - since < idle_s:
        return Idleness(1, since, f"idle for {now_s - since:.0f} of {idle_s:g} s")
    return Idleness(0, since, f"idle for {now_s - since:.0f} s")
