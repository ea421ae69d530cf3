import pytest

from kervan.policy.autoscale import to_zero
from kervan.policy.autoscale.state import Demand


@pytest.mark.parametrize(
    ("demand", "current", "since_s", "at_least", "next_since_s"),
    [
        ({"held": 1}, 0, 10.0, 1, None),
        ({"arrived": 1}, 0, 10.0, 1, None),  # it may be over already: another one is likely
        ({"running": 2}, 1, None, 1, None),
        ({}, 1, None, 1, 1000.0),  # idle from now on
        ({}, 1, 701.0, 1, 701.0),  # 299 s
        ({}, 1, 700.0, 0, 700.0),
        ({}, 0, None, 0, 1000.0),  # none there, none needed
        ({}, 1, 2000.0, 1, 1000.0),  # a clock that went back
    ],
)
def test_the_last_replica_goes_after_five_idle_minutes(
    demand: dict[str, int], current: int, since_s: float | None, at_least: int, next_since_s: float | None
) -> None:
    found = to_zero.decide(Demand(window_s=1.0, **demand), current, since_s, now_s=1000.0, idle_s=300.0)
    assert (found.at_least, found.idle_since_s) == (at_least, next_since_s)
    assert found.reason
