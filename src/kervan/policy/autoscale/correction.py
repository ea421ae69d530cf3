"""How a model of a replica is corrected by what is seen: slowly, and within bounds.

Two factors. Steps that take longer than the model says keep requests in a replica for longer: by Little's law that is
how many are in flight, over how many the model says (`pace`). And what counts in the end is who kept the SLO: a rate
per replica at which all was well is one that a replica takes, and one at which too many requests were late, with no
queue to blame, is one that it does not (`proven`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.config.workload import Slo
from kervan.policy.autoscale.replica_rate import ReplicaRate
from kervan.policy.autoscale.state import Demand, ReplicaModel

LEAST, MOST = 0.4, 1.5
LEAST_PACE = 0.02  # a device that is not what it is taken for, or that others use too
PACE_S = 300.0
FAR = math.log(1.5)  # what is further off than by half is followed sooner, as the square of how far
PROVEN_S = 60.0
FORGOTTEN_S, FORGIVEN_S = 7200.0, 1800.0  # so long until what was proven counts 1/e: of more than the model, of less
LATE_SHARE = 0.005  # half of the 1% of the requests that may be late; with half of that all is well
LOWERED_S = 300.0  # twice as many late as there may be lower the rate by 1/e in so long
VAIN_SHARE, HELPED_SHARE = 0.7, 0.8  # with so much less to do, no more than this of what was late should be left
VAIN_S = 3600.0  # if it does not, it is not tried again for so long
EASED_S = 300.0  # replicas have had that much less to do for so long: as long as who kept the SLO is averaged over
AT_EASE = 0.8  # of the bounds, at p95: more than this is no proof that all is well
CALM_S = 60.0  # after a queue, and what was in it
STEADY_S = 64.0
FEW = 2.0  # requests in flight in a replica: of fewer the pace is not known
SETTLED = 2.0  # times what is in flight now, that the mean may be
ASK_S = 30.0  # between two questions to the model


@dataclass(slots=True)
class Correction:
    """A working copy of what is remembered."""

    pace: float = 1.0
    proven: float = 1.0
    calm_since_s: float = -math.inf
    asked_s: float = -math.inf
    lowered_from: float = 0.0
    bad_before: float = 0.0
    load_before: float = 0.0
    eased_since_s: float = math.inf
    vain_until_s: float = -math.inf

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> "Correction":
        """What `to_memory` wrote; of an empty mapping none."""
        return cls(**{name: value for name, value in memory.items() if value is not None})

    def to_memory(self) -> dict[str, Any]:
        """All of it, for JSON, which has no infinity."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: None if math.isinf(value) else round(value, 5) for name, value in values.items()}

    @property
    def factor(self) -> float:
        """By which a replica takes more than its model says."""
        return min(MOST, max(LEAST_PACE, self.pace * self.proven))

    def observe(
        self,
        *,
        now_s: float,
        dt: float,
        per_replica: float,
        peak: float,
        in_flight: float,
        in_flight_now: float,
        waiting: float,
        good: float,
        good_lately: float,
        prompt_tokens: float,
        output_tokens: float,
        rate: ReplicaRate,
        model: ReplicaModel | None,
        pressure: float,
        steady_s: float,
        load_steady_s: float,
        is_growing: bool = False,
    ) -> None:
        """What was seen in the last `dt` seconds, of the mean replica that is ready. `per_replica` (requests/s) and
        `in_flight` are means of about the same minute; `in_flight_now` is of now. `peak`: the most requests/s of late.
        `good`, `good_lately`: who kept the SLO, over five minutes and over one. `steady_s`: since the number of
        replicas changed. `load_steady_s`: since the load did. `is_growing`: replicas are starting, which help already.
        """
        self.proven += (1.0 - self.proven) * (1 - math.exp(-dt / (FORGOTTEN_S if self.proven > 1 else FORGIVEN_S)))
        if peak > rate.requests_per_s * self.pace or waiting > 1 + 0.2 * in_flight:
            self.calm_since_s = now_s
        bad, allowed = 1 - good, LATE_SHARE
        is_bad = bad > allowed and 1 - good_lately > allowed
        if steady_s >= STEADY_S and per_replica > 0:
            shown = per_replica / (rate.requests_per_s * self.pace)
            if bad < allowed / 2 and pressure < AT_EASE and shown > self.proven:
                self.proven += (min(MOST, shown) - self.proven) * (1 - math.exp(-dt / PROVEN_S))
            elif is_bad and not is_growing and self.is_calm(now_s, rate) and now_s >= self.vain_until_s:
                self._lower(min(1.0, bad / allowed - 1) * dt / LOWERED_S, bad, per_replica, now_s)
        # Little's law is about a load that stands still: at the start of a burst many are in flight, and few have come.
        is_still = min(steady_s, load_steady_s) >= STEADY_S
        # After a queue the mean holds it for minutes, when it is long gone.
        is_past = in_flight > SETTLED * in_flight_now + 1
        if model is None or in_flight < FEW or waiting > 1 or not is_still or is_past or now_s - self.asked_s < ASK_S:
            return
        passed_s, self.asked_s = min(2 * ASK_S, now_s - self.asked_s), now_s
        there = min(per_replica, 0.98 * rate.requests_per_s)
        predicted = model.predict(
            requests_per_s=there, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        ).in_flight  # fmt: skip
        if there > 0 and math.isfinite(predicted):
            seen = min(MOST, max(LEAST_PACE, predicted / in_flight * per_replica / there))
            apart = math.log(seen / self.pace)
            self.pace *= math.exp(apart * (1 - math.exp(-passed_s / PACE_S * max(1.0, (apart / FAR) ** 2))))

    def is_calm(self, now_s: float, rate: ReplicaRate) -> bool:
        """Whether what ends now has come when there was no queue."""
        return now_s - self.calm_since_s > CALM_S + rate.stay_s

    def _lower(self, by: float, bad: float, per_replica: float, now_s: float) -> None:
        """Less per replica; if replicas that had that much less to do were not better, it is in vain."""
        if not self.lowered_from:
            self.lowered_from, self.bad_before, self.load_before = self.proven, bad, per_replica
        self.proven = max(LEAST, self.proven * (1 - by))
        if per_replica >= VAIN_SHARE * self.load_before:
            self.eased_since_s = math.inf
            return
        self.eased_since_s = min(self.eased_since_s, now_s)
        if now_s - self.eased_since_s >= EASED_S:
            if bad > HELPED_SHARE * self.bad_before:
                self.proven, self.vain_until_s = self.lowered_from, now_s + VAIN_S
            self.lowered_from, self.eased_since_s = 0.0, math.inf


def pressure(demand: Demand, slo: Slo) -> float:
    """How close TTFT and TPOT are to their bounds, at p95; 0 without news."""
    shares = [
        seen / bound
        for seen, bound in ((demand.ttft_p95_s, slo.ttft_s), (demand.tpot_p95_s, slo.tpot_s))
        if seen is not None and bound is not None
    ]
    return max(shares, default=0.0)
