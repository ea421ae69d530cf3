"""The SLO policy on a fleet on paper: a replica takes one request per second, and a start takes 100 s."""

import json
import math
import random
from typing import Any

import pytest
from harness.paper_fleet import PaperFleet, PaperReplica
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.config.autoscale import parse_schedule
from kervan.config.workload import Slo
from kervan.policy.autoscale.late_budget import LEAST_RESERVE
from kervan.policy.autoscale.slo import WATCHED_S, SloPolicy, SloSettings
from kervan.policy.autoscale.state import Demand

SLO = Slo(ttft_s=3.0, tpot_s=0.1)


MODEL = PaperReplica()


def policy(model: PaperReplica | None = MODEL, **more: Any) -> SloPolicy:
    return SloPolicy(SloSettings(slo=SLO, **more), model)


def fleet(asked: SloPolicy | None = None, **more: Any) -> PaperFleet:
    return PaperFleet(asked or policy(), **more)


@pytest.mark.parametrize(("rate", "least", "most"), [(0.5, 1, 2), (4.5, 5, 6)])
def test_a_steady_load_gets_what_it_needs_and_a_little_more(rate: float, least: int, most: int) -> None:
    done = fleet(target=8).run(lambda _: rate, 800)
    assert least <= done.target <= most
    assert done.late == 0


def test_a_step_up_is_answered_within_seconds() -> None:
    done = fleet(target=4).run(lambda at_s: 2.0 if at_s <= 200 else 5.0, 230)
    assert done.targets[190] <= 4
    assert done.target >= 5


def test_after_rises_were_seen_there_is_room_for_the_next_one() -> None:
    # 2, 4, 6 .. requests/s for 300 s each: from the second rise on, replicas for a rise of 2 are there before it comes.
    done = fleet(minimum=3, maximum=20).run(lambda at_s: 2.0 + 2 * (at_s // 300), 1200)
    assert done.targets[590] >= 6
    assert done.targets[890] >= 8
    assert done.targets[890] <= 10 / LEAST_RESERVE  # what was late in the first rises has used up what may be late
    before = done.late
    done.run(lambda _: 10.0, 200)
    assert done.late == before
    done.run(lambda _: 6.0, 2 * 7200)  # and is forgotten
    assert done.targets[max(done.targets)] <= 8


def test_a_fall_is_followed_once_a_smaller_fleet_was_enough_for_half_a_start() -> None:
    done = fleet(target=8).run(lambda at_s: 6.0 if at_s <= 650 else 1.0, 950)
    assert done.targets[640] >= 7
    assert done.targets[660] == done.targets[640]
    assert done.target <= 3


def test_nothing_leaves_before_the_load_has_been_watched() -> None:
    done = fleet(target=6).run(lambda _: 1.0, int(WATCHED_S) - 5)
    assert set(done.targets) == {6}


def test_a_backlog_is_cleared_soon_after_a_start() -> None:
    # 3/s on one replica from the beginning: 100 s later 200 wait.
    done = fleet().run(lambda _: 3.0, 250)
    assert max(done.targets) >= 5  # 3 for what comes, and 200 within half a start are 4 more
    done.run(lambda _: 3.0, 60)
    assert done.queue == 0


def test_without_a_model_the_number_follows_what_was_seen() -> None:
    done = fleet(policy(None)).run(lambda at_s: min(4.0, 0.5 + at_s / 250), 1100)
    assert 4 <= done.target <= 8
    assert done.late <= 0.1 * done.came


def test_news_that_stop_keep_the_number_and_are_told() -> None:
    done = fleet(target=4, has_news=lambda at_s: at_s < 200).run(lambda _: 3.0, 199)
    before = done.target
    done.run(lambda _: 7.0, 100)
    assert set(done.targets[200:]) == {before}
    assert "no news from the gateways" in done.reasons[-1]


def test_stale_news_are_none() -> None:
    done = fleet(target=4)
    done.run(lambda _: 3.0, 50)
    state = done.state(Demand(window_s=1.0, arrived=100))
    stale = type(state)(
        now_s=state.now_s, local_minute=0, pools=state.pools, replicas=state.replicas, demand=state.demand,
        demand_age_s=60.0,
    )  # fmt: skip
    decision = policy().decide(stale, done.memory)
    assert decision.targets == {"on-demand": done.target}
    assert "60 s" in decision.reason


@pytest.mark.parametrize("room", [0, 2, 3])
def test_no_more_are_asked_for_than_can_be_placed(room: int) -> None:
    done = fleet(room=room).run(lambda _: 6.0, 300)
    assert max(done.targets) == max(1, room)
    assert f"room for {room}" in done.reasons[-1]


def test_the_schedule_raises_the_least_a_start_before_its_hour() -> None:
    asked = policy(schedule=parse_schedule(["mon 00:10-00:20 min=5"]))
    done = fleet(asked).run(lambda _: 0.2, 1500)
    assert done.targets[470] < 5  # 7:50
    assert done.targets[510] == 5  # 8:30, 90 s before
    assert "the schedule 'mon 00:10-00:20 min=5'" in done.reasons[900]
    assert done.target < 5


def test_an_idle_fleet_that_may_go_to_none_goes_and_comes_back_with_the_first_request() -> None:
    asked = policy(to_zero_s=120.0)
    done = fleet(asked, minimum=0, target=1).run(lambda at_s: 0.2 if at_s < 200 else 0.0, 500)
    assert done.target == 0
    assert "idle for" in done.reasons[-1]
    done.run(lambda _: 1.0, 3)
    assert done.target >= 1


def test_rays_delays_are_kept_where_they_are_given() -> None:
    done = fleet(policy(downscale_delay_s=200.0), target=6)
    done.run(lambda at_s: 5.0 if at_s < 150 else 1.0, 340)
    assert done.target >= 6
    done.run(lambda _: 1.0, 200)
    assert done.target <= 3


def test_every_decision_has_its_reason_and_numbers() -> None:
    done = fleet(target=2)
    done.run(lambda _: 1.5, 60)
    decision = done.policy.decide(done.state(Demand(window_s=1.0, arrived=2)), done.memory)
    assert "requests/s" in decision.reason
    assert decision.numbers["replica_requests_per_s"] == pytest.approx(1.0, rel=0.05)
    assert decision.numbers["ready"] == 2
    assert all(math.isfinite(value) for value in decision.numbers.values())


def test_an_slo_that_no_replica_keeps_is_told() -> None:
    asked = SloPolicy(SloSettings(slo=Slo(ttft_s=0.01)), PaperReplica())
    done = PaperFleet(asked).run(lambda _: 2.0, 60)
    assert "TTFT 0.01 s (an empty replica needs 0.1 s)" in done.reasons[-1]
    assert done.target >= 2


# ---- properties


LOADS = st.lists(st.floats(0.0, 12.0), min_size=1, max_size=6)


@settings(max_examples=8, deadline=None)
@given(levels=LOADS, maximum=st.integers(1, 12), room=st.none() | st.integers(0, 12), has_model=st.booleans())
def test_whatever_comes_the_number_is_within_bounds_and_room(
    levels: list[float], maximum: int, room: int | None, has_model: bool
) -> None:
    done = PaperFleet(policy(PaperReplica() if has_model else None), maximum=maximum, room=room)
    done.run(lambda at_s: levels[int(at_s // 60) % len(levels)], 240)
    assert min(done.targets) >= 1
    assert max(done.targets) <= (maximum if room is None else max(1, min(room, maximum)))
    assert len(json.dumps(done.memory)) < 6000


@settings(max_examples=5, deadline=None)
@given(levels=LOADS)
def test_the_same_state_gives_the_same_decision(levels: list[float]) -> None:
    asked = policy()
    done = PaperFleet(asked).run(lambda at_s: levels[int(at_s // 30) % len(levels)], 120)
    state = done.state(Demand(window_s=1.0, arrived=3, arrived_prompt_tokens=3000, running=7))
    state = type(state)(
        now_s=state.now_s + 5, local_minute=0, pools=state.pools, replicas=state.replicas, demand=state.demand
    )
    before = json.dumps(done.memory)
    assert asked.decide(state, done.memory) == asked.decide(state, done.memory) == policy().decide(state, done.memory)
    assert json.dumps(done.memory) == before  # it is not written into


@settings(max_examples=5, deadline=None)
@given(rate=st.floats(0.2, 5.0), more=st.floats(1.0, 1.5))
def test_more_load_never_needs_fewer(rate: float, more: float) -> None:
    low = fleet(target=1, maximum=12).run(lambda _: rate, 200)
    high = fleet(target=1, maximum=12).run(lambda _: rate * more, 200)
    assert high.target >= low.target


@settings(max_examples=3, deadline=None)
@given(rate=st.floats(0.5, 7.0), swing=st.floats(0.0, 0.4), seed=st.integers(0, 100))
def test_a_load_that_swings_within_bounds_changes_the_number_seldom(rate: float, swing: float, seed: int) -> None:
    # Noise, and a wave as long as two starts: the worst for what waits half a start. Each time that a replica is missed,
    # the next one stays twice as long, so forty minutes see a few changes of direction only.
    rng = random.Random(seed)
    done = fleet(target=8)
    done.run(lambda at_s: rate * (1 + swing * math.sin(at_s * math.tau / 200)) * rng.uniform(0.5, 1.5), 2400)
    assert done.reversals <= 10


def test_a_load_that_stays_changes_nothing_any_more() -> None:
    for rate in (1.0, 2.91, 4.5):  # where one more or less replica is in balance
        done = fleet(target=6).run(lambda _, rate=rate: rate, 1500)
        assert len(set(done.targets[900:])) == 1, rate
