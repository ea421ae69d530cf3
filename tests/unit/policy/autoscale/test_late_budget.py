import json
import math

import pytest

from kervan.policy.autoscale.late_budget import AIM, LEAST, LEAST_RESERVE, MOST, LateBudget

ALLOWED = 0.01


def seen(late: int, of: int, budget: LateBudget | None = None, refused: int = 0) -> LateBudget:
    found = budget or LateBudget()
    found.observe(dt=1.0, finished=of, good=of - late, refused=refused)
    return LateBudget.from_memory(json.loads(json.dumps(found.to_memory())))


def test_nothing_is_changed_before_anything_was_seen_nor_when_as_many_are_late_as_is_aimed_at() -> None:
    assert (LateBudget().factor(ALLOWED), LateBudget().reserve(ALLOWED)) == pytest.approx((1.0, 1.0))
    as_aimed = seen(600, 100_000)
    assert AIM == 0.6
    assert (as_aimed.factor(ALLOWED), as_aimed.reserve(ALLOWED)) == pytest.approx((1.0, 1.0), rel=0.01)


def test_what_was_not_used_may_be_risked_within_bounds() -> None:
    assert seen(0, 500).factor(ALLOWED) == pytest.approx(2.117, rel=0.01)  # half of the prior: e^(1.5 / 2)
    assert seen(0, 10**6).factor(ALLOWED) == MOST
    assert seen(0, 10**6).reserve(ALLOWED) == 1.0  # a replica does not take more because all is well


def test_twice_as_many_late_as_aimed_at_take_a_third_off_what_a_replica_is_taken_for() -> None:
    twice = seen(1_200, 100_000)
    assert twice.reserve(ALLOWED) == pytest.approx(0.5**0.5, rel=0.01)
    assert twice.factor(ALLOWED) == LEAST
    assert seen(50_000, 100_000).reserve(ALLOWED) == LEAST_RESERVE


def test_refused_requests_are_late() -> None:
    assert seen(0, 100, refused=100).late == 100


def test_it_is_forgotten_in_hours() -> None:
    budget = seen(100, 1_000)
    for _ in range(6):
        budget.observe(dt=3600.0, finished=1_000, good=1_000, refused=0)
    assert budget.late == pytest.approx(100 * math.exp(-3), rel=0.01)
