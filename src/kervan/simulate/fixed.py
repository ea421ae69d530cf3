"""Policies that need no model: a fixed number, to compare others with."""

from collections.abc import Mapping
from typing import Any

from kervan.policy.autoscale.state import Decision, FleetState


class FixedNumber:
    """So many replicas in the first pool, whatever comes; the others at their least. None: the most of each pool."""

    def __init__(self, count: int | None = None) -> None:
        self.name = "fixed" if count is None else f"fixed:{count}"
        self._count = count

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """The same each time."""
        targets = {}
        for place, pool in enumerate(state.pools):
            wanted = pool.maximum if self._count is None else self._count if not place else pool.minimum
            targets[pool.name] = wanted
        return Decision(targets=targets, reason="a fixed number")
