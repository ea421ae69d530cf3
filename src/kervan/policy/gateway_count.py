"""How many gateways a fleet needs: by how busy their event loops are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Shares of the time of a gateway's loop, which runs on one core. Above HIGH, a burst of first tokens waits in the loop;
# TARGET leaves room for connections that spread unevenly: the kernel deals them by hash, and a client keeps its.
HIGH = 0.7
TARGET = 0.5
LOW = 0.35


@dataclass(frozen=True, slots=True)
class GatewayCount:
    """How many gateways there should be."""

    count: int
    reason: str


def decide(busy: Sequence[float], current: int, minimum: int, maximum: int) -> GatewayCount:
    """`busy`: the share of the time in which each gateway's loop ran, or waited for a core. `current`: the number now.

    One leaves at a time, and only if the others stay below LOW without it; between LOW and HIGH nothing changes.
    """
    bounded = min(max(current, minimum), maximum)
    if bounded != current:
        return GatewayCount(bounded, f"{current} is outside {minimum} to {maximum}")
    if not busy:
        return GatewayCount(current, "no gateway has reported its load")
    mean = sum(busy) / len(busy)
    if mean > HIGH:
        # At most twice as many: what clients do with more gateways is not known.
        wanted = min(math.ceil(mean * current / TARGET), 2 * current, maximum)
        if wanted == current:
            return GatewayCount(current, f"loops are {mean:.0%} busy, and {maximum} gateways are the most allowed")
        return GatewayCount(wanted, f"loops are {mean:.0%} busy, above {HIGH:.0%}")
    if current > minimum and len(busy) >= current and (left := sum(busy) / (current - 1)) < LOW:
        return GatewayCount(current - 1, f"{current - 1} would be {left:.0%} busy, below {LOW:.0%}")
    return GatewayCount(current, f"loops are {mean:.0%} busy")
