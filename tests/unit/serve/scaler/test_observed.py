"""What gateways tell, as the policy sees it."""

import pytest

from kervan.config.fleet import from_mapping
from kervan.fleet.directory import DemandCounts, GatewayEntry, ReplicaEntry, ReplicaShare, Snapshot
from kervan.serve.scaler.observed import DemandWindow, fleet_state, replica_state
from kervan.serve.scaler.rooms import Rooms
from kervan.serve.scaler.starts import Starts
from kervan.serve.versions import versions


def gateway(name: str = "g1", beat_age_s: float = 0.0, **counts: int) -> GatewayEntry:
    demand = DemandCounts(window_s=1.0, **counts)  # type: ignore[arg-type]
    return GatewayEntry(name, "n", 1, "", "", True, beat_age_s=beat_age_s, demand=demand)


def test_beats_of_all_gateways_add_up_and_none_counts_twice() -> None:
    window = DemandWindow()
    a, b = gateway("a", arrived=3, held=1, running=5), gateway("b", arrived=2, running=7)
    assert not window.is_complete([a, b])
    window.beat(a, 10.0)
    assert not window.is_complete([a, b])
    window.beat(b, 10.2)
    assert window.is_complete([a, b])
    demand, age_s = window.close([a, b], 10.2)
    assert demand is not None
    assert (demand.arrived, demand.held, demand.running, demand.window_s, age_s) == (5, 1, 12, 1.0, 0.0)
    demand, _ = window.close([a, b], 10.3)
    assert demand is not None
    assert (demand.arrived, demand.running) == (0, 12)


def test_a_gateway_that_is_late_is_asked_what_it_was_asked() -> None:
    window = DemandWindow()
    silent, other = gateway("a", beat_age_s=4.0, arrived=3, running=5), gateway("b", arrived=2, running=7)
    window.beat(other, 10.0)
    assert window.is_complete([silent, other])
    demand, _ = window.close([silent, other], 10.0)
    assert demand is not None
    assert (demand.arrived, demand.running, demand.window_s) == (5, 12, 1.0)


@pytest.mark.parametrize("listed", [[], [gateway("a", beat_age_s=6.0, running=5)]])
def test_without_news_there_is_no_demand_and_its_age_is_told(listed: list[GatewayEntry]) -> None:
    window = DemandWindow()
    window.beat(gateway("a"), 10.0)
    window.close([gateway("a")], 10.0)
    assert window.close(listed, 16.0) == (None, 6.0)


def test_what_a_replica_says_of_its_load_decides_nothing() -> None:
    entry = ReplicaEntry("r", "p", "n", 1, "ready", running=10**6, waiting=10**6, kv_cache_usage=1.0, version="v")
    shares = [ReplicaShare(2, 100, 30, 0.02), ReplicaShare(1, 50, 0, None)]
    seen = replica_state(entry, shares, "v")
    assert (seen.streams, seen.context_tokens, seen.queued_tokens, seen.step_s) == (3, 150, 30, 0.02)


def test_the_fleet_at_one_second() -> None:
    """Monday 1 January 2024, 08:30 in Berlin."""
    config = from_mapping(
        {"model": "m", "replicas": 1, "max_replicas": 8, "schedule": ["mon 08:00 min=2"], "time_zone": "Europe/Berlin"},
        "a test",
    )
    new = ReplicaEntry("new", "on-demand", "n", 1, "ready", version=versions(config).replicas, ready_for_s=9.0)
    late = ReplicaEntry("late", "on-demand", "n", 1, "ready", version="old", beat_age_s=4.0)
    rooms = Rooms()
    rooms.look({"on-demand": 5}, {}, {"on-demand": 0}, 0)
    state = fleet_state(
        config,
        Snapshot(1, [new, late], [gateway()], []),
        now_s=7.0,
        demand=None,
        demand_age_s=3.0,
        targets={"on-demand": 4},
        rooms=rooms,
        starts=Starts({"H200": [30.0]}),
        kinds={"on-demand": ["H200"]},
        unix_s=1704094200.0,
    )
    (pool,) = state.pools
    assert (pool.minimum, pool.maximum, pool.target, pool.room, pool.start_s) == (1, 8, 4, 5, 30.0)
    assert state.local_minute == 8 * 60 + 30
    assert [(r.id, r.phase, r.is_outdated) for r in state.replicas] == [
        ("new", "ready", False),
        ("late", "unhealthy", True),
    ]
