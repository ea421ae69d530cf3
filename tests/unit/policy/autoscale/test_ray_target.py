import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.config.autoscale import RaySettings
from kervan.policy.autoscale.ray_target import RayTarget, aggregated, wanted
from kervan.policy.autoscale.state import Demand, FleetState, PoolState, ReplicaState


@pytest.mark.parametrize(
    ("average", "running", "target", "more", "count"),
    [
        (20.0, 2, 2, {}, 10),
        (20.0, 2, 2, {"upscaling_factor": 0.5}, 6),  # 2 + 0.5 * (10 - 2)
        (3.0, 4, 4, {}, 2),
        (3.0, 4, 4, {"downscaling_factor": 0.5}, 3),  # 4 + 0.5 * (1.5 - 4) = 2.75
        (7.0, 4, 4, {"downscaling_factor": 0.1}, 4),  # 3.5 is 4
        (5.0, 4, 4, {"downscaling_factor": 0.1}, 3),  # 3.85 rounds to 4, and 2.5 is less than 4: one goes
        (0.0, 3, 3, {}, 0),
        (50.0, 0, 5, {}, 5),  # all are starting: nobody serves, and the target stays
    ],
)
def test_rays_formula(average: float, running: int, target: int, more: dict[str, float], count: int) -> None:
    assert wanted(average, running, target, RaySettings(target_ongoing_requests=2.0, **more)) == count


@pytest.mark.parametrize(("function", "value"), [("mean", 2.0), ("max", 4.0), ("min", 0.0)])
def test_aggregation(function: str, value: float) -> None:
    assert aggregated([0.0, 2.0, 4.0], function) == value
    assert aggregated([], function) == 0.0


class Asked:
    """A fleet of a number of replicas that are all ready at once."""

    def __init__(self, low: int = 1, high: int = 8, target: int = 1, **more: Any) -> None:
        self.policy = RayTarget(RaySettings(target_ongoing_requests=2.0, metrics_interval_s=1.0, **more))
        self.low, self.high, self.target, self.memory, self.now_s = low, high, target, {}, 0.0  # type: ignore[var-annotated]

    def seconds(self, count: int, ongoing: int) -> int:
        for _ in range(count):
            self.now_s += 1
            pool = PoolState(name="on-demand", minimum=self.low, maximum=self.high, target=self.target)
            replicas = tuple(ReplicaState(id=f"r{n}", pool="on-demand", phase="ready") for n in range(self.target))
            demand = Demand(window_s=1.0, running=ongoing)
            now = FleetState(now_s=self.now_s, local_minute=0, pools=(pool,), replicas=replicas, demand=demand)
            decision = self.policy.decide(now, self.memory)
            self.memory = json.loads(json.dumps(decision.memory))
            self.target = decision.targets["on-demand"]
        return self.target


def test_up_after_its_delay_and_down_after_its() -> None:
    fleet = Asked(look_back_period_s=1.0)
    assert fleet.seconds(30, 8) == 1
    assert fleet.seconds(1, 8) == 4
    assert fleet.seconds(600, 2) == 4
    assert fleet.seconds(1, 2) == 1


def test_a_moment_of_the_other_direction_begins_the_delay_again() -> None:
    fleet = Asked(look_back_period_s=1.0)
    fleet.seconds(25, 8)
    fleet.seconds(1, 2)
    assert fleet.seconds(30, 8) == 1
    assert fleet.seconds(1, 8) == 4


def test_the_look_back_period_smooths() -> None:
    fleet = Asked(upscale_delay_s=0.0, look_back_period_s=10.0)
    fleet.seconds(10, 2)
    assert fleet.seconds(1, 12) == 2  # (9 * 2 + 12) / 10 = 3 ongoing


def test_to_none_and_back() -> None:
    fleet = Asked(low=0, downscale_delay_s=5.0, downscale_to_zero_delay_s=20.0, look_back_period_s=1.0)
    assert fleet.seconds(20, 0) == 1
    assert fleet.seconds(1, 0) == 0
    assert fleet.seconds(1, 1) == 1  # at once


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 100)), max_size=5), st.integers(0, 3), st.integers(0, 9))
def test_within_bounds_whatever_comes(loads: list[tuple[int, int]], low: int, more: int) -> None:
    fleet = Asked(low=low, high=low + more, target=low, upscale_delay_s=3.0, downscale_delay_s=5.0)
    for seconds, ongoing in loads:
        assert low <= fleet.seconds(seconds, ongoing) <= low + more
