"""How much of the share of requests that may be late has been used: what is left may be risked.

Late are answers that missed a bound of the SLO, for whatever reason, and requests that were refused. A fleet that has
used little of its budget may be sized closer to the load, and one that has used it up keeps more in reserve. So errors
of the models of rises and replicas do not add up: what they lead to is counted in the end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REMEMBERED_S = 7200.0  # what is older counts 1/e
AIM = 0.6  # of the share that may be late, so that chance does not carry it above
FEW = 500.0  # requests of a prior that is late as it is aimed at: fewer say little about one in a hundred
GAIN = 1.5  # nothing late: e^1.5 times as much may be risked
LEAST, MOST = 0.5, 3.0
LEAST_RESERVE = 0.7  # an incident is paid for with no more than 1 / 0.7 as many replicas


@dataclass(slots=True)
class LateBudget:
    """A working copy of what is remembered. Requests that ended, and those of them that were late."""

    ended: float = 0.0
    late: float = 0.0

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> "LateBudget":
        """What `to_memory` wrote; of an empty mapping one that nothing was seen of."""
        return cls(**memory)

    def to_memory(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {name: round(getattr(self, name), 3) for name in self.__slots__}

    def observe(self, *, dt: float, finished: int, good: int, refused: int) -> None:
        """What ended in `dt` seconds; of `finished`, `good` kept the SLO."""
        keep = math.exp(-dt / REMEMBERED_S)
        self.ended = keep * self.ended + finished + refused
        self.late = keep * self.late + finished - good + refused

    def factor(self, allowed: float) -> float:
        """By which more or less may be risked than if as many had been late as is aimed at. `allowed`: the share of
        requests that may be late.
        """
        return min(MOST, max(LEAST, math.exp(GAIN * (1 - self._used(allowed)))))

    def reserve(self, allowed: float) -> float:
        """What a replica is taken for, of what it is thought to take: less when more were late than is aimed at."""
        return max(LEAST_RESERVE, min(1.0, math.sqrt(1 / self._used(allowed))))

    def _used(self, allowed: float) -> float:
        """1: as many were late as is aimed at."""
        aim = AIM * allowed
        return (self.late + FEW * aim) / (self.ended + FEW) / aim
