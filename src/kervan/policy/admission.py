"""Whether a gateway takes one more request: a bounded queue for the whole fleet."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdmissionState:
    """Load as one gateway sees it. `capacity_streams`: the sum of `max_num_seqs` over live replicas."""

    outstanding_streams: int
    capacity_streams: int
    max_queued_streams: int
    num_gateways: int
    completed_per_s: float


@dataclass(frozen=True, slots=True)
class Admission:
    """Admitted, or shed with the seconds after which a retry may succeed."""

    admitted: bool
    retry_after_s: int
    reason: str


def decide(state: AdmissionState) -> Admission:
    """Admit while this gateway's share of capacity + queue has room.

    The bound is `(capacity + max_queued) / num_gateways`, at least 1: gateways share the fleet evenly because
    the kernel spreads connections over them. Retry-After is the time to drain back below the bound at the
    measured completion rate, between 1 and 60 s.
    """
    bound = max(1, (state.capacity_streams + state.max_queued_streams) // max(1, state.num_gateways))
    if state.outstanding_streams < bound:
        return Admission(True, 0, f"{state.outstanding_streams} of {bound} streams")
    excess = state.outstanding_streams - bound + 1
    wait_s = excess / state.completed_per_s if state.completed_per_s > 0 else 60.0
    retry_after_s = max(1, math.ceil(min(60.0, wait_s)))  # an idle rate decays towards 0: wait_s may be infinite
    return Admission(
        False,
        retry_after_s,
        f"the queue is full: {state.outstanding_streams} streams are open at this gateway, its bound is {bound} "
        f"(({state.capacity_streams} running + {state.max_queued_streams} queued) / {max(1, state.num_gateways)} "
        f"gateways); retry after {retry_after_s} s",
    )
