"""How many replicas each pool should have: tables worked by hand, and what must hold for any course of events."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy import pools
from kervan.policy.pools import STALL_S, OnDemandCount, Shortage, SpotState

AFTER_S, HOLD_S = 10.0, 100.0


def on_demand(
    spot: SpotState,
    current: int,
    history: tuple[Shortage, ...] = (),
    now_s: float = 1000.0,
    low: int = 2,
    high: int = 5,
) -> OnDemandCount:
    return pools.on_demand(spot, current, low, high, history, now_s=now_s, after_s=AFTER_S, hold_s=HOLD_S)


def short(*course: tuple[float, int]) -> tuple[Shortage, ...]:
    """(seconds before now, absent)"""
    return tuple(Shortage(1000.0 - ago_s, absent) for ago_s, absent in course)


@pytest.mark.parametrize(
    ("spot", "history", "current", "count", "reason"),
    [
        pytest.param((6, 6, 0), (), 2, 2, "6 of 6 spot replicas ready", id="all there"),
        pytest.param((6, 0, 6), short((50, 0)), 2, 2, "0 of 6", id="all start: none is begun beside them"),
        pytest.param((6, 4, 0), (), 2, 2, "", id="2 absent, from now on"),
        pytest.param((6, 4, 0), short((9, 2)), 2, 2, "", id="2 absent for 9 s of 10"),
        pytest.param((6, 4, 0), short((10, 2)), 2, 4, "2 of 6 spot replicas on no node for 10 s", id="for 10 s"),
        pytest.param((6, 5, 0), short((10, 3), (4, 1)), 2, 3, "1 of 6", id="the least of 10 s: 3, then 1"),
        pytest.param((6, 0, 0), short((20, 6)), 2, 5, "6 of 6", id="6 absent, 3 more allowed"),
        pytest.param((6, 4, 2), short((20, 2), (5, 0)), 4, 4, "2 of 2 missing", id="they start: none leaves yet"),
        pytest.param((6, 6, 0), short((500, 2), (60, 0)), 4, 4, "2 stay until spot has been whole again for 100 s", id="back for 60 s of 100"),
        pytest.param((6, 6, 0), short((500, 2), (100, 0)), 4, 2, "no more than 0 of 6", id="back for 100 s"),
        pytest.param((6, 5, 0), short((500, 3), (100, 1)), 5, 3, "no more than 1 of 6", id="two of three back"),
        pytest.param((6, 6, 0), short((500, 2), (90, 0), (50, 1), (40, 0)), 4, 4, "",
                     id="one was away 50 s ago: 4 is not 3, but 2 were missing within 100 s"),
        pytest.param((6, 6, 0), short((500, 2), (120, 0), (50, 1), (40, 0)), 4, 3, "no more than 1",
                     id="one was away 50 s ago"),
        pytest.param((6, 4, 2), short((500, 2), (120, 0)), 4, 4, "2 of 2 missing", id="on their nodes for long, not ready"),
        pytest.param((6, 6, 0), short((500, 2), (120, 0)), 4, 2, "no more than 0 of 6", id="ready now, on their nodes for 120 s"),
        pytest.param((7, 6, 1), short((500, 2), (120, 0)), 4, 3, "no more than 1 of 7", id="one more is wanted, and starts at once"),
        pytest.param((7, 7, 0), short((500, 2), (120, 0)), 3, 2, "no more than 0 of 7", id="it is ready: it was never missing"),
        pytest.param((6, 6, 0), (), 4, 4, "2 stay until spot has been whole again for 100 s", id="history lost: nothing changes"),
        pytest.param((6, 6, 0), (), 9, 5, "9 is outside 2 to 5", id="more than now allowed"),
        pytest.param((6, 6, 0), (), 0, 2, "0 is outside 2 to 5", id="fewer than the least"),
    ],
)  # fmt: skip
def test_on_demand_table(
    spot: tuple[int, int, int], history: tuple[Shortage, ...], current: int, count: int, reason: str
) -> None:
    wanted, ready, starting = spot
    decision = on_demand(SpotState(wanted, ready, starting), current, history)
    assert decision.count == count
    assert reason in decision.reason


EVENTS = st.lists(st.tuples(st.sampled_from([1.0, 3.0, 9.0, 30.0]), st.integers(0, 4), st.integers(0, 4)), max_size=60)


@given(EVENTS, st.integers(0, 3), st.integers(0, 4))
def test_whatever_spot_does(events: list[tuple[float, int, int]], low: int, more: int) -> None:
    """Never below the least or above the most, no turn back within the hold, and in the end no cover is left."""
    high, now_s, current, history = low + more, 0.0, low, tuple[Shortage, ...]()
    grown_s = float("-inf")
    for step_s, ready, starting in events:
        now_s += step_s
        decision = on_demand(SpotState(4, ready, min(starting, 4 - ready)), current, history, now_s, low, high)
        assert low <= decision.count <= high
        assert all(
            before.at_s < after.at_s for before, after in zip(decision.history, decision.history[1:], strict=False)
        )
        if decision.count > current:
            grown_s = now_s
        if decision.count < current:
            # What was added was missing all of `after_s` before, so it is dropped `hold_s` after that at the soonest.
            assert now_s - grown_s >= HOLD_S - AFTER_S
        current, history = decision.count, decision.history
    for _ in range(30):  # spot is whole again and stays so
        now_s += 5.0
        decision = on_demand(SpotState(4, 4), current, history, now_s, low, high)
        assert decision.count <= current
        current, history = decision.count, decision.history
    assert current == low
    assert len(history) == 1
    for _ in range(4):  # and away for good
        now_s += 5.0
        decision = on_demand(SpotState(4), current, history, now_s, low, high)
        current, history = decision.count, decision.history
    assert current == min(high, low + 4)


def test_spot_asks_for_all_that_it_wants_whatever_there_is() -> None:
    for state in (SpotState(6), SpotState(6, 2, 1), SpotState(6, 6)):
        assert pools.spot(state, now_s=0.0).count == 6


def test_a_change_of_settings_waits_for_no_node() -> None:
    """2 of 6 are there; the course of a change by hand."""
    begun = pools.spot(SpotState(6, 2, outdated=2), now_s=0.0)
    assert (begun.count, begun.reason) == (2, "2 of 2 have earlier settings")
    one_stops = pools.spot(SpotState(6, 1, outdated=1), begun.rollout, now_s=5.0)
    assert one_stops.count == 2  # not 1: the new one has the place of the old
    starts = pools.spot(SpotState(6, 1, 1, outdated=1), one_stops.rollout, now_s=9.0)
    assert starts.count == 2
    ended = pools.spot(SpotState(6, 1, 1), starts.rollout, now_s=99.0)
    assert (ended.count, ended.rollout) == (6, None)


def test_a_change_goes_on_when_a_node_goes_meanwhile() -> None:
    begun = pools.spot(SpotState(6, 3, outdated=3), now_s=0.0)
    lost = pools.spot(SpotState(6, 2, outdated=2), begun.rollout, now_s=10.0)
    assert lost.count == 3
    assert pools.spot(SpotState(6, 2, outdated=2), lost.rollout, now_s=9.0 + STALL_S).count == 3
    assert pools.spot(SpotState(6, 2, outdated=2), lost.rollout, now_s=10.0 + STALL_S).count == 2
    slow = pools.spot(SpotState(6, 2, 1, outdated=2), lost.rollout, now_s=10.0 + STALL_S)
    assert slow.count == 3  # it starts, and has a place


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_a_change_never_asks_for_more_than_is_wanted(wanted: int, ready: int, starting: int, outdated: int) -> None:
    state = SpotState(wanted, ready, starting, min(outdated, ready + starting))
    first = pools.spot(state, now_s=0.0)
    assert 0 <= first.count <= max(1, wanted)
    for now_s in (1.0, STALL_S, 3 * STALL_S):
        again = pools.spot(replace(state), first.rollout, now_s=now_s)
        assert again.count <= max(first.count, 1)
