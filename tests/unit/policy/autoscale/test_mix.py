from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.policy.autoscale import decisions, mix
from kervan.policy.autoscale.state import FleetState, PoolState, ReplicaState


def pools(on_demand: tuple[int, int], spot: tuple[int, int], **more: Any) -> tuple[PoolState, PoolState]:
    asked = more.pop("targets", (on_demand[0], spot[0]))
    return (
        PoolState(name="on-demand", minimum=on_demand[0], maximum=on_demand[1], target=asked[0], usd_per_hour=4.0),
        PoolState(**{"name": "spot", "minimum": spot[0], "maximum": spot[1], "target": asked[1], "usd_per_hour": 1.5} | more),
    )  # fmt: skip


def state(found: tuple[PoolState, ...], now_s: float = 0.0, ready: int = 0, starting: int = 0) -> FleetState:
    spot = tuple(
        ReplicaState(id=f"s{n}", pool="spot", phase="ready" if n < ready else "starting", node=f"n{n}")
        for n in range(ready + starting)
    )
    return FleetState(now_s=now_s, local_minute=0, pools=found, replicas=spot, demand=None)


@pytest.mark.parametrize(
    ("total", "on_demand", "spot"),
    [(0, 1, 0), (1, 1, 0), (3, 1, 2), (7, 1, 6), (9, 3, 6), (20, 4, 6)],
)
def test_spot_takes_what_is_above_the_floor_where_it_is_cheaper(total: int, on_demand: int, spot: int) -> None:
    found = mix.split(total, state(pools((1, 4), (0, 6)), ready=6), {})
    assert found.targets == {"on-demand": on_demand, "spot": spot}


def test_losses_cost_a_start_and_what_serves_meanwhile() -> None:
    # 12 losses an hour, 300 s each: an hour of each hour is lost, so 1.5 + 1 * (1.5 + 4) dollars for an hour's service.
    (_, lossy) = pools((1, 4), (0, 6), losses_per_hour=12.0, start_s=300.0)
    assert mix.hourly_cost(lossy, other_usd=4.0) == pytest.approx(1.5 + 5.5)
    found = mix.split(4, state(pools((1, 4), (0, 6), losses_per_hour=12.0, start_s=300.0)), {})
    assert found.targets == {"on-demand": 4, "spot": 0}
    assert "spot costs more with its losses" in found.reason


def test_unknown_prices_count_as_spot_being_the_cheaper() -> None:
    found = mix.split(
        3, state(pools((1, 4), (0, 6), usd_per_hour=None, losses_per_hour=12.0, start_s=300.0), ready=2), {}
    )
    assert found.targets["spot"] == 2


def test_on_demand_covers_spot_that_is_missing_and_goes_when_it_is_back() -> None:
    memory: Any = {}
    asked = (1, 3)
    counts = []
    for now_s in range(0, 400, 5):
        ready = 1 if now_s < 60 else 3
        found = mix.split(4, state(pools((1, 4), (0, 6), targets=asked), float(now_s), ready), memory)
        memory, asked = found.memory, (found.targets["on-demand"], found.targets["spot"])
        counts.append(found.targets["on-demand"])
    assert counts[:3] == [1, 1, 1]
    assert counts[4] == 3  # 20 s: two missing for 15 s
    assert counts[23] == 3  # 115 s: whole for 55 s, and a start takes 60
    assert counts[24] == 1


def test_cover_follows_the_losses_and_not_the_load() -> None:
    """Two are lost and come back; then every 50 s one more is wanted and starts at once: it has not been lost."""
    memory: Any = {}
    asked = (1, 3)
    counts = []
    for now_s in range(0, 400, 5):
        more = max(0, now_s - 60) // 50
        is_starting = now_s >= 110 and (now_s - 60) % 50 < 20
        present = 1 if now_s < 60 else 3 + more
        seen = state(pools((1, 4), (0, 20), targets=asked), float(now_s), present - is_starting, int(is_starting))
        found = mix.split(4 + more, seen, memory)
        memory, asked = found.memory, (found.targets["on-demand"], found.targets["spot"])
        counts.append(found.targets["on-demand"])
    assert counts[4] == counts[23] == 3
    assert counts[24] == 2  # 120 s: on their nodes for 60 s, and a new one is not ready yet
    assert set(counts[26:]) == {1}


@pytest.mark.parametrize(
    ("start_s", "most_s", "hold_s"),
    [(100.0, 300.0, 100.0), (5.0, 300.0, 60.0), (900.0, 300.0, 300.0), (100.0, 2.0, 2.0)],
)
def test_cover_stays_for_as_long_as_a_start_takes(start_s: float, most_s: float, hold_s: float) -> None:
    found = state(pools((1, 4), (0, 6)))
    pool = replace(found.pools[0], start_s=start_s)
    assert mix.hold_s(replace(found, cover_hold_s=most_s), pool) == hold_s


def test_a_fleet_that_is_kept_as_large_as_it_is_does_not_grow_by_its_cover() -> None:
    """Six are asked for, on spot nodes of which there are two: on-demand stands in for four, and is not covered again."""
    memory: dict[str, Any] = {}
    asked = (6, 0)  # all on-demand so far: they stay until spot has been as it is for 300 s
    for now_s in range(400):
        seen = state(pools((1, 24), (0, 24), targets=asked), float(now_s), ready=2)
        total = decisions.asked(seen, memory)
        found = decisions.decision(seen, total, decisions.bounds(seen), "as it is", numbers={}, memory=memory)
        memory, asked = dict(found.memory), (found.targets["on-demand"], found.targets["spot"])
        assert total == 6
    assert asked == (1 + 3, 5)


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(0, 30), low=st.integers(0, 3), more=st.integers(0, 5), spot_low=st.integers(0, 3),
    spot_more=st.integers(0, 8), ready=st.integers(0, 8), room=st.none() | st.integers(0, 9),
)  # fmt: skip
def test_each_pool_stays_within_its_bounds(
    total: int, low: int, more: int, spot_low: int, spot_more: int, ready: int, room: int | None
) -> None:
    found = pools((low, low + more), (spot_low, spot_low + spot_more), room=room)
    targets = mix.split(total, state(found, ready=ready), {}).targets
    for pool in found:
        assert pool.minimum <= targets[pool.name] <= pool.maximum
