import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy import admission
from kervan.policy.admission import AdmissionState

STATES = st.builds(
    AdmissionState,
    outstanding_streams=st.integers(0, 3000),
    capacity_streams=st.integers(0, 1000),
    max_queued_streams=st.integers(0, 1000),
    num_gateways=st.integers(0, 8),
    completed_per_s=st.floats(0, 1000),
)


@pytest.mark.parametrize(
    ("outstanding", "capacity", "queued", "gateways", "per_s", "admitted", "retry_after_s"),
    [
        pytest.param(99, 64, 36, 1, 5.0, True, 0, id="bound 64+36=100: one place left"),
        pytest.param(100, 64, 36, 1, 5.0, False, 1, id="one too many: 1/5 s, at least 1 s"),
        pytest.param(109, 64, 36, 1, 2.0, False, 5, id="ten too many at 2/s: 5 s"),
        pytest.param(110, 64, 36, 1, 2.0, False, 6, id="eleven at 2/s: 5.5, up to 6 s"),
        pytest.param(1099, 64, 36, 1, 2.0, False, 60, id="1,000 at 2/s: 500 s, at most 60 s"),
        pytest.param(100, 64, 36, 1, 0.0, False, 60, id="nothing completes: 60 s"),
        pytest.param(100, 64, 36, 1, 1e-313, False, 60, id="a rate that has decayed for hours: 60 s"),
        pytest.param(49, 64, 36, 2, 5.0, True, 0, id="two gateways: bound 50"),
        pytest.param(50, 64, 36, 2, 5.0, False, 1, id="two gateways: full at 50"),
        pytest.param(33, 64, 36, 3, 5.0, False, 1, id="100/3 gateways: bound 33"),
        pytest.param(99, 64, 36, 0, 5.0, True, 0, id="gateways not known yet: as one"),
        pytest.param(35, 0, 36, 1, 5.0, True, 0, id="no replica lives: the queue still holds"),
        pytest.param(0, 0, 0, 4, 0.0, True, 0, id="never below one stream"),
        pytest.param(1, 0, 0, 4, 0.5, False, 2, id="then one in 1/0.5 s"),
    ],
)
def test_bound_and_retry_after(
    outstanding: int,
    capacity: int,
    queued: int,
    gateways: int,
    per_s: float,
    admitted: bool,
    retry_after_s: int,
) -> None:
    decision = admission.decide(AdmissionState(outstanding, capacity, queued, gateways, per_s))
    assert (decision.admitted, decision.retry_after_s) == (admitted, retry_after_s)


def test_a_refusal_shows_its_arithmetic() -> None:
    reason = admission.decide(AdmissionState(60, 64, 36, 2, 5.0)).reason
    assert "60 streams are open" in reason
    assert "its bound is 50 ((64 running + 36 queued) / 2 gateways)" in reason
    assert "retry after 3 s" in reason  # 60 - 50 + 1 = 11 streams at 5/s


@given(STATES, st.integers(0, 1000))
def test_more_load_never_helps(state: AdmissionState, more: int) -> None:
    busier = AdmissionState(
        state.outstanding_streams + more,
        state.capacity_streams,
        state.max_queued_streams,
        state.num_gateways,
        state.completed_per_s,
    )
    now, later = admission.decide(state), admission.decide(busier)
    assert now.admitted or not later.admitted
    assert now.retry_after_s is not None
    assert later.retry_after_s is not None
    assert later.retry_after_s >= now.retry_after_s


@pytest.mark.parametrize(
    ("num_streams", "outstanding", "bulk", "admitted", "retry_after_s"),
    [
        pytest.param(96, 0, 0, True, 0, id="64+32=96: one request may take all of an idle fleet's queue"),
        pytest.param(97, 0, 0, False, None, id="97 never fit"),
        pytest.param(50, 46, 0, True, 0, id="46+50=96"),
        pytest.param(50, 47, 0, False, 1, id="47+50: one too many, 1/5 s"),
        pytest.param(9, 96, 96, False, 2, id="9 of 64 slots are above 1/8: bulk, 9/5 s"),
        pytest.param(8, 96, 96, True, 0, id="8 are not: of 96 bulk streams 72 are counted"),
        pytest.param(1, 119, 96, True, 0, id="23 others + 72 = 95"),
        pytest.param(1, 120, 96, False, 1, id="24 others + 72 = 96: full"),
        pytest.param(1, 96, 72, False, 1, id="not more than 72: all are counted"),
    ],
)
def test_requests_of_many_streams(
    num_streams: int, outstanding: int, bulk: int, admitted: bool, retry_after_s: int | None
) -> None:
    decision = admission.decide(AdmissionState(outstanding, 64, 32, 1, 5.0, bulk_streams=bulk), num_streams)
    assert (decision.admitted, decision.retry_after_s) == (admitted, retry_after_s)


def test_what_fits_when_all_replicas_are_ready_is_only_shed_before() -> None:
    assert admission.decide(AdmissionState(0, 0, 32, 1, 0.0, full_capacity_streams=64), 96).retry_after_s == 60
    assert admission.decide(AdmissionState(0, 0, 32, 1, 0.0, full_capacity_streams=64), 97).retry_after_s is None


@pytest.mark.parametrize(
    ("capacity", "gateways", "slots"), [(64, 1, 48), (64, 2, 24), (1, 1, 1), (2, 1, 2), (4, 1, 3), (0, 1, 1)]
)
def test_bulk_requests_leave_slots_to_others(capacity: int, gateways: int, slots: int) -> None:
    assert admission.bulk_slots(capacity, gateways) == slots


@given(STATES, st.integers(0, 3000))
def test_one_stream_finds_room_whatever_bulk_requests_do(state: AdmissionState, bulk: int) -> None:
    crowded = dataclasses.replace(state, outstanding_streams=state.outstanding_streams + bulk, bulk_streams=bulk)
    others = dataclasses.replace(state, outstanding_streams=state.outstanding_streams * 4)
    assert admission.decide(crowded).admitted or not admission.decide(others).admitted


@given(STATES)
def test_an_admitted_stream_waits_for_nothing_and_a_shed_one_for_1_to_60_s(state: AdmissionState) -> None:
    decision = admission.decide(state)
    assert decision.retry_after_s is not None
    assert decision.retry_after_s == 0 if decision.admitted else 1 <= decision.retry_after_s <= 60


@given(STATES, st.integers(0, 100))
def test_more_replicas_never_shed_what_fewer_admit(state: AdmissionState, more: int) -> None:
    larger = AdmissionState(
        state.outstanding_streams,
        state.capacity_streams + more,
        state.max_queued_streams,
        state.num_gateways,
        state.completed_per_s,
    )
    assert admission.decide(larger).admitted or not admission.decide(state).admitted
