"""What one replica takes within the SLO where no model knows: from what replicas were seen to do.

Pressure is how close TTFT and TPOT are to their bounds. It grows less than in proportion to the load until a replica
is full, since an empty one has some already; so a replica at a pressure p takes `PRESSED / p` times as much, if that is
not more than `FARTHEST`. What was seen to go well counts for hours, and so does what came out of replicas that had more
to do than they could: none takes more than that. `correction.py` lowers what goes wrong nevertheless.

A replica that is at ease until its KV cache is full gives no warning: without a model, the first load beyond that is
served late.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.config.workload import Slo
from kervan.policy.autoscale.replica_rate import ReplicaRate

WELL = 0.99  # share of requests within the SLO
PRESSED = 0.8  # of a bound
FARTHEST, NEAREST = 1.5, 0.5  # times the rate that is seen
FORGET_S = 7200.0  # what went well counts 1/e after so long
MEAN_S = 60.0  # over which requests in flight, rates and pressure are averaged
QUEUE = 2.0  # requests that wait at a replica, beside a quarter of those that it has: it has more than it can do
FULL_SHARE = 0.9
UNKNOWN_RATE = 1.0  # requests/s, before anything was seen


@dataclass(slots=True)
class LearnedRate:
    """A working copy of what is remembered, per replica."""

    seen_s: float = 0.0
    well: float = 0.0
    """Requests/s that kept the SLO, the most."""
    full: float = 0.0
    """Requests/s that came out of replicas with a queue; 0 where none had one."""
    now: float = 0.0
    in_flight: float = 0.0
    pressure: float = 0.0

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> "LearnedRate":
        """What `to_memory` wrote; of an empty mapping nothing."""
        return cls(**memory)

    def to_memory(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {name: round(getattr(self, name), 6) for name in self.__slots__}

    def observe(
        self,
        *,
        per_replica: float,
        finished: float,
        in_flight: float,
        waiting: float,
        good: float,
        pressure: float,
        dt: float,
    ) -> None:
        """What was seen in the last `dt` seconds, of the mean replica that is ready."""
        self.seen_s += dt
        weight = max(1 - math.exp(-dt / MEAN_S), dt / self.seen_s)
        self.now += (per_replica - self.now) * weight
        self.in_flight += (in_flight - self.in_flight) * weight
        if pressure:
            self.pressure += (min(2.0, pressure) - self.pressure) * (weight if self.pressure else 1.0)
        if waiting > QUEUE + in_flight / 4 and finished > 0:
            self.full += (finished - self.full) * (weight if self.full else 1.0)
            self.well = min(self.well, self.full)
        self.well *= math.exp(-dt / FORGET_S)
        if good >= WELL and self.pressure < 1 and waiting <= 1 + in_flight / 2 and self.seen_s > MEAN_S / 2:
            self.well = max(self.well, self.now)

    def rate(self, slo: Slo) -> ReplicaRate:
        """As well as it is known."""
        if not self.now or not self.pressure:
            most = max(self.well, UNKNOWN_RATE)
        else:
            reach = self.now * min(FARTHEST, max(NEAREST, PRESSED / self.pressure))
            most = reach if self.pressure > PRESSED else max(self.well, reach)
        if self.in_flight < 1 and self.now > 1e-6 and self.pressure < PRESSED:  # one after the other it takes at least
            most = max(most, self.now / max(self.in_flight, 1e-3))
        if self.full:
            most = min(most, FULL_SHARE * self.full)
        stay_s = self.in_flight / self.now if self.now > 1e-6 else 1.0
        bound_s = min((one for one in (slo.ttft_s, slo.e2e_s) if one is not None), default=0.0)
        return ReplicaRate(
            requests_per_s=max(most, 1e-4), places=max(most, 1e-4) * stay_s, stay_s=stay_s, quiet_stay_s=stay_s,
            wait_s=bound_s / 2,
        )  # fmt: skip
