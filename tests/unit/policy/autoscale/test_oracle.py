import pytest

from kervan.policy.autoscale.oracle import SLOT_S, Oracle, Schedule, needed, plan
from kervan.policy.autoscale.replica_rate import ReplicaRate
from kervan.policy.autoscale.state import FleetState, PoolState


def rate(wait_s: float = 0.0) -> ReplicaRate:
    return ReplicaRate(requests_per_s=1.0, places=10.0, stay_s=10.0, quiet_stay_s=10.0, wait_s=wait_s)


def steps(*levels: tuple[float, float]) -> list[tuple[float, float]]:
    """Equal requests at even distances, of (requests/s, seconds)."""
    arrivals, begin_s = [], 0.0
    for level, seconds in levels:
        arrivals += [(begin_s + (n + 0.5) / level, 1.0) for n in range(int(level * seconds))]
        begin_s += seconds
    return arrivals


def test_each_step_of_the_load_gets_what_it_takes() -> None:
    counts = needed(steps((2, 50), (5, 50), (1, 50)), rate(), minimum=1, maximum=8, end_s=150.0)
    assert counts == [2] * 10 + [5] * 10 + [1] * 10


def test_a_burst_may_wait_as_long_as_the_bound_allows() -> None:
    # 10 requests at once: with no wait 2 replicas for 5 s; if half may wait for another 5 s, 1 replica for 10 s.
    burst = [(0.1 * n, 1.0) for n in range(10)]
    assert needed(burst, rate(), minimum=1, maximum=8, end_s=15.0) == [2, 1, 1]
    assert needed(burst, rate(wait_s=5.0), minimum=1, maximum=8, end_s=15.0) == [1, 1, 1]


def test_a_long_prompt_counts_as_more_than_one() -> None:
    assert needed([(0.0, 5.0), (1.0, 5.0)], rate(), minimum=1, maximum=8, end_s=10.0) == [2, 1]


def test_a_replica_stays_where_it_is_needed_again_within_a_start() -> None:
    load = steps((3, 50), (1, 30), (3, 50), (1, 200), (3, 50))
    schedule = plan(load, rate(), minimum=1, maximum=8, start_s=60.0, end_s=380.0)
    assert schedule.counts == (3, 1, 3)  # the dip of 30 s is kept, that of 200 s is not
    assert schedule.at_s == (0.0, 130.0, 330.0)
    # 130 s of 3, 200 s of 1, 50 s of 3, and two starts of 60 s paid before.
    assert schedule.replica_seconds(60.0, 380.0) == pytest.approx(390 + 200 + 150 + 120)


def test_as_a_policy_it_asks_a_start_ahead() -> None:
    oracle = Oracle(Schedule((0.0, 200.0, 300.0), (1, 4, 2)))

    def target(now_s: float) -> int:
        pool = PoolState(name="on-demand", minimum=1, maximum=8, target=1, start_s=100.0)
        now = FleetState(now_s=now_s, local_minute=0, pools=(pool,), replicas=(), demand=None)
        return oracle.decide(now, {}).targets["on-demand"]

    assert [target(at_s) for at_s in (90.0, 99.5, 250.0, 299.0, 301.0)] == [1, 4, 4, 4, 2]


def test_no_more_than_there_may_be() -> None:
    assert max(needed(steps((20, 60)), rate(), minimum=1, maximum=8, end_s=60.0)) == 8
    assert len(needed([], rate(), minimum=2, maximum=8, end_s=60.0)) == int(60 / SLOT_S)
