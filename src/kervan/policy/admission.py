"""Whether a gateway takes one more request: a bounded queue for the whole fleet, counted in streams.

A request opens as many streams as it has prompts times choices. One that opens many is a bulk request: it must fit in
the queue whole, and so that it delays others by little, it never has all of the fleet's slots (`bulk_slots`) nor, for
the others, all of its queue.
"""

import math
from dataclasses import dataclass

# Above this share of a gateway's slots, a request is a bulk request.
BULK_SHARE = 1 / 8
# Of a gateway's slots and of its queue, bulk requests have at most this share; the rest is for the others.
BULK_LIMIT = 3 / 4


@dataclass(frozen=True, slots=True)
class AdmissionState:
    """Load as one gateway sees it.

    `outstanding_streams`: open, or admitted and about to open; `bulk_streams` of these belong to bulk requests.
    `capacity_streams`: the sum of `max_num_seqs` over live replicas; `full_capacity_streams`: once all replicas that
    are listed are ready, at least the former.
    """

    outstanding_streams: int
    capacity_streams: int
    max_queued_streams: int
    num_gateways: int
    completed_per_s: float
    bulk_streams: int = 0
    full_capacity_streams: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """Admitted, or shed with the seconds after which a retry may succeed; None if none ever can."""

    admitted: bool
    retry_after_s: int | None
    reason: str
    is_bulk: bool = False


def bulk_slots(capacity_streams: int, num_gateways: int) -> int:
    """How many streams of bulk requests a gateway has on replicas at once, at least 1."""
    return max(1, math.ceil(BULK_LIMIT * capacity_streams / max(1, num_gateways)))


def decide(state: AdmissionState, num_streams: int = 1) -> Admission:
    """Admit `num_streams` more while this gateway's share of capacity + queue has room for all of them.

    The bound is `(capacity + max_queued) / num_gateways`, at least 1: gateways share the fleet evenly because
    the kernel spreads connections over them. Other than bulk requests find at least `1 - BULK_LIMIT` of it without
    streams of bulk requests, so that the sum may exceed it by that much. Retry-After is the time to drain back below
    the bound at the measured completion rate, between 1 and 60 s.
    """
    num_gateways = max(1, state.num_gateways)
    full_capacity = max(state.capacity_streams, state.full_capacity_streams)
    most = _bound(full_capacity, state.max_queued_streams, num_gateways)
    if num_streams > most:
        terms = _terms(full_capacity, state.max_queued_streams, num_gateways)
        reason = f"one request may open at most {most:,} in this fleet: {terms}"
        return Admission(False, None, reason)
    most_now = bound(state)
    is_bulk = num_streams > max(1, int(BULK_SHARE * full_capacity / num_gateways))
    counted = state.outstanding_streams
    if not is_bulk:
        counted -= max(0, state.bulk_streams - int(BULK_LIMIT * most_now))
    if counted + num_streams <= most_now:
        return Admission(True, 0, f"{counted} of {most_now} streams", is_bulk)
    excess = counted - most_now + num_streams
    wait_s = excess / state.completed_per_s if state.completed_per_s > 0 else 60.0
    retry_after_s = max(1, math.ceil(min(60.0, wait_s)))  # an idle rate decays towards 0: wait_s may be infinite
    terms = _terms(state.capacity_streams, state.max_queued_streams, num_gateways)
    asked = f", this request needs {num_streams} more" if num_streams > 1 else ""
    return Admission(
        False,
        retry_after_s,
        f"the queue is full: {counted} streams are open at this gateway{asked}, its bound is {most_now} ({terms}); "
        f"retry after {retry_after_s} s",
        is_bulk,
    )


def bound(state: AdmissionState) -> int:
    """Streams that the gateway has outstanding at most, bulk requests aside."""
    return _bound(state.capacity_streams, state.max_queued_streams, max(1, state.num_gateways))


def _bound(capacity_streams: int, max_queued_streams: int, num_gateways: int) -> int:
    return max(1, (capacity_streams + max_queued_streams) // num_gateways)


def _terms(capacity_streams: int, max_queued_streams: int, num_gateways: int) -> str:
    plural = "" if num_gateways == 1 else "s"
    return f"({capacity_streams} running + {max_queued_streams} queued) / {num_gateways} gateway{plural}"
