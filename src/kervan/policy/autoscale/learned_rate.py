"""What one replica takes within the SLO where no model knows: from what replicas were seen to do.

The highest rate per replica that kept the SLO is taken as good; one that broke it as bad. Between, the pressure decides:
how close TTFT and TPOT are to their bounds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.config.workload import Slo
from kervan.policy.autoscale.replica_rate import ReplicaRate

GOOD, BAD = 0.99, 0.95  # shares of requests within the SLO
PRESSED = 0.8  # of a bound
MORE, LESS = 1.25, 0.5  # how far the rate is taken beyond what was seen, either way
FORGET_S = 3600.0  # what was seen counts for so long: a good rate sinks to what is there now, a bad one is forgotten
GOOD_S = 60.0  # over which in-flight requests and rates are averaged


@dataclass(slots=True)
class LearnedRate:
    """A working copy of what is remembered, per replica."""

    good: float = 0.0
    """Requests/s that kept the SLO, the most."""
    bad: float = 0.0
    """Requests/s that broke it, the least of late; 0: none has."""
    rate_now: float = 0.0
    in_flight: float = 0.0
    pressure: float = 0.0

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> "LearnedRate":
        """What `to_memory` wrote; of an empty mapping nothing."""
        return cls(**memory)

    def to_memory(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def observe(
        self,
        *,
        per_replica: float,
        in_flight: float,
        waiting: float,
        good: float,
        ttft_s: float | None,
        tpot_s: float | None,
        slo: Slo,
        dt: float,
        is_steady: bool,
    ) -> None:
        """What was seen in the last `dt` seconds, of the mean replica that is ready."""
        weight = 1 - math.exp(-dt / GOOD_S)
        pressures = [
            seen / bound
            for seen, bound in ((ttft_s, slo.ttft_s), (tpot_s, slo.tpot_s))
            if seen is not None and bound is not None
        ]
        self.rate_now += (per_replica - self.rate_now) * weight
        self.in_flight += (in_flight - self.in_flight) * weight
        if pressures:
            self.pressure += (min(2.0, max(pressures)) - self.pressure) * weight
        fade = math.exp(-dt / FORGET_S)
        self.good = max(self.good * fade, 0.0)
        if self.bad:
            self.bad /= fade
        if good >= GOOD and self.pressure < 1 and waiting < 1 + in_flight / 2:
            self.good = max(self.good, self.rate_now)
        elif good < BAD and is_steady and self.rate_now:
            self.bad = min(self.bad or math.inf, self.rate_now)
            self.good = min(self.good, 0.95 * self.bad)

    def rate(self, slo: Slo) -> ReplicaRate:
        """As well as it is known. Nothing seen: one request/s, until the first is seen."""
        now = self.rate_now
        reach = now * min(MORE, max(LESS, PRESSED / self.pressure)) if self.pressure else now * MORE
        most = max(self.good, reach)
        if self.pressure > PRESSED:
            most = min(most, max(reach, LESS * now))
        if self.bad:
            most = min(most, 0.95 * self.bad)
        most = max(most, 1e-3) if now or self.good else 1.0
        stay_s = self.in_flight / now if now > 1e-6 else 1.0
        bound_s = min((one for one in (slo.ttft_s, slo.e2e_s) if one is not None), default=0.0)
        return ReplicaRate(
            requests_per_s=most, places=most * stay_s, stay_s=stay_s, quiet_stay_s=stay_s, wait_s=bound_s / 2
        )
