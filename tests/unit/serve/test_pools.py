"""Where replicas of each pool may be, how many are waited for, and what is told of them; by hand-worked tables."""

from typing import Any

import pytest

from kervan.config.fleet import FleetConfig, from_mapping
from kervan.errors import CapacityError, ConfigError
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.serve import pools
from kervan.serve.changes import merge
from kervan.serve.placement import NodeDevices
from kervan.serve.versions import versions


def config(on_demand: str = "2..4", spot: str = "0..6", **words: Any) -> FleetConfig:
    words = {"policy": "fill", **words}
    return from_mapping({"model": "m", "pools": {"on-demand": on_demand, "spot": spot}, **words}, "a test")


def node(name: str, free: int, *, is_spot: bool = False) -> NodeDevices:
    return NodeDevices(name, 8, free, is_spot=is_spot)


def replicas(pool: str, *states: Any, version: str = "") -> list[ReplicaEntry]:
    version = version or versions(config()).replicas
    return [ReplicaEntry(f"{pool}-{i}", pool, "n", 1, state, version=version) for i, state in enumerate(states)]


def snapshot(*entries: list[ReplicaEntry]) -> Snapshot:
    entries_of_all = [entry for some in entries for entry in some]
    return Snapshot(1, entries_of_all, [], [], targets={"on-demand": 2, "spot": 6})


OWN, SPOT = node("own", 4), node("s1", 3, is_spot=True)
ONE_EACH = {"engine": "twin", "gpu": "H200", "twin": {"spot_per_node": 1}}


def test_replicas_are_bound_to_nodes_by_label_and_unlabelled_nodes_are_on_demand() -> None:
    assert pools.label_selector("spot") == {"ray.io/market-type": "spot"}
    assert pools.label_selector("on-demand") == {"ray.io/market-type": "!spot"}
    assert (pools.of_pool("spot", [OWN, SPOT]), pools.of_pool("on-demand", [OWN, SPOT])) == ([SPOT], [OWN])


def test_replicas_that_become_bound_are_replaced_and_others_are_not() -> None:
    plain = FleetConfig(model="m", replicas=2)
    assert versions(plain).replicas != versions(config()).replicas
    assert versions(config("3")).replicas == versions(config("1..9", "2")).replicas
    assert versions(plain).gateways == versions(config()).gateways


@pytest.mark.parametrize(
    ("words", "nodes", "held", "can_be", "awaited"),
    [
        pytest.param({}, [OWN, SPOT], {}, {"on-demand": 4, "spot": 3}, {"on-demand": 2, "spot": 3}, id="3 GPUs free"),
        pytest.param({}, [OWN], {}, {"on-demand": 4, "spot": 0}, {"on-demand": 2, "spot": 0}, id="no spot node"),
        pytest.param({}, [OWN, node("s", 8, is_spot=True)], {}, {"on-demand": 4, "spot": 6},
                     {"on-demand": 2, "spot": 6}, id="the most"),
        pytest.param({}, [OWN, SPOT], {"spot": 2}, {"on-demand": 4, "spot": 5}, {"on-demand": 2, "spot": 5},
                     id="3 free beside 2 that are there"),
        pytest.param({"tp": 2}, [OWN, SPOT], {}, {"on-demand": 2, "spot": 1}, {"on-demand": 2, "spot": 1}, id="tp 2"),
        pytest.param({"spot": "2..6"}, [OWN], {}, {"on-demand": 4, "spot": 0}, {"on-demand": 2, "spot": 2},
                     id="the least is waited for"),
        pytest.param({"engine": "twin", "gpu": "H200"}, [OWN, SPOT], {}, {"on-demand": 4, "spot": 6},
                     {"on-demand": 2, "spot": 6}, id="twins take nothing"),
        pytest.param({"engine": "twin", "gpu": "H200"}, [OWN], {}, {"on-demand": 4, "spot": 0},
                     {"on-demand": 2, "spot": 0}, id="but need a node"),
        pytest.param(ONE_EACH, [OWN, SPOT, node("s2", 0, is_spot=True)], {"spot": 1}, {"on-demand": 4, "spot": 2},
                     {"on-demand": 2, "spot": 2}, id="a node each"),
    ],
)  # fmt: skip
def test_what_a_start_waits_for(
    words: dict[str, Any],
    nodes: list[NodeDevices],
    held: dict[str, int],
    can_be: dict[str, int],
    awaited: dict[str, int],
) -> None:
    fleet = config(**words)
    assert pools.placeable(fleet, nodes, held) == can_be
    assert pools.awaited(fleet, can_be) == awaited


def test_spot_that_follows_the_load_is_not_waited_for() -> None:
    fleet = from_mapping({"model": "m", "pools": {"on-demand": "2..4", "spot": "1..6"}}, "a test")
    assert pools.awaited(fleet, {"on-demand": 4, "spot": 3}) == {"on-demand": 2, "spot": 1}


def test_a_fleet_without_pools_waits_for_its_number() -> None:
    fleet = FleetConfig(model="m", replicas=3)
    assert pools.awaited(fleet, pools.placeable(fleet, [SPOT], {})) == {"on-demand": 3}


@pytest.mark.parametrize(
    ("there", "is_settled"),
    [
        ((replicas("on-demand", "ready", "ready"), replicas("spot", "ready")), True),
        ((replicas("on-demand", "ready"), replicas("spot", "ready", "ready")), False),
        ((replicas("on-demand", "ready", "ready"), replicas("spot", "starting")), False),
        ((replicas("on-demand", "ready", "ready", "starting"), replicas("spot", "ready")), True),  # cover
        ((replicas("on-demand", *["ready"] * 4, "draining"), replicas("spot", "ready")), False),  # it goes still
        ((replicas("on-demand", "ready", "ready"), replicas("spot", "ready", version="old")), False),
    ],
)
def test_when_a_change_is_done(there: tuple[list[ReplicaEntry], ...], is_settled: bool) -> None:
    assert pools.are_settled(config(), snapshot(*there), {"on-demand": 2, "spot": 1}) == is_settled


def test_a_fixed_number_is_met_exactly() -> None:
    fleet = FleetConfig(model="m", replicas=2)
    made = versions(fleet).replicas
    for count, is_settled in ((1, False), (2, True), (3, False)):
        there = snapshot(replicas("on-demand", *["ready"] * count, version=made))
        assert pools.are_settled(fleet, there, {"on-demand": 2}) == is_settled


def test_the_least_of_each_pool_must_fit_on_its_own_nodes() -> None:
    pools.check(config(), [OWN, SPOT], {})
    pools.check(config(), [OWN], {})
    pools.check(config("5"), [OWN, SPOT], {"on-demand": 1.0})
    with pytest.raises(CapacityError, match=r"5 replicas of pool on-demand, each with 1 GPU, .*use --pool on-demand:4"):
        pools.check(config("5..6"), [OWN, node("s", 8, is_spot=True)], {})
    with pytest.raises(CapacityError, match=r"4 replicas of pool spot, .*s1: 3 of 8.*use --pool spot:3"):
        pools.check(config(spot="4..6"), [OWN, SPOT], {})
    with pytest.raises(
        CapacityError, match=r"no node has the label ray.io/market-type=spot.*--pool spot:0..6 to start without"
    ):
        pools.check(config(spot="4..6"), [OWN], {})
    with pytest.raises(CapacityError, match="use --replicas 3"):
        pools.check(FleetConfig(model="m", replicas=4), [SPOT], {})


def test_a_cluster_without_spot_nodes_is_told_of_in_plain_words() -> None:
    told = pools.warning(config(), [OWN])
    assert told.startswith("no node has the label ray.io/market-type=spot, so no replica of pool spot can be placed; ")
    assert "`ray start --labels ray.io/market-type=spot`" in told
    assert told.endswith("; meanwhile up to 4 on-demand replicas")
    assert "meanwhile" not in pools.warning(config("2"), [OWN])
    assert pools.warning(config(), [OWN, SPOT]) == ""
    assert pools.warning(config(spot="0"), [OWN]) == ""
    assert pools.warning(FleetConfig(model="m"), [OWN]) == ""


def test_room_is_looked_for_where_a_pool_has_replicas() -> None:
    full = node("s1", 0, is_spot=True)
    assert not pools.has_room(config(), [OWN, full], {"on-demand": 2, "spot": 8})
    assert pools.has_room(config(), [OWN, full], {"on-demand": 2, "spot": 0})
    assert pools.has_room(FleetConfig(model="m"), [OWN, full], {"on-demand": 2})


def test_twins_that_have_a_spot_node_each() -> None:
    fleet = config(**ONE_EACH)
    assert (pools.per_node(fleet, "spot"), pools.per_node(fleet, "on-demand"), pools.per_node(config(), "spot")) == (
        1,
        None,
        None,
    )
    assert pools.has_room(fleet, [OWN, SPOT], {"on-demand": 9, "spot": 0})
    assert not pools.has_room(fleet, [OWN, SPOT], {"on-demand": 9, "spot": 1})
    there = snapshot(replicas("on-demand", "ready", "ready"), replicas("spot", "ready"))
    assert pools.explain(fleet, there, [OWN, SPOT]) == [
        "pool spot: 5 of 6 replicas wait for another spot node: each of 1 takes 1 (twin setting spot_per_node)"
    ]
    with pytest.raises(CapacityError, match=r"2 replicas .* 1 spot nodes take 1 each .* use --pool spot:1..6"):
        pools.check(config(spot="2..6", **ONE_EACH), [OWN, SPOT], {})


@pytest.mark.parametrize(
    ("there", "nodes", "told"),
    [
        pytest.param((replicas("on-demand", "ready", "ready"), replicas("spot", *["ready"] * 6)), [OWN, SPOT], [],
                     id="whole"),
        pytest.param((replicas("on-demand", "ready", "ready"),), [OWN],
                     ["pool spot: 6 of 6 replicas wait for a spot node, one with the label ray.io/market-type=spot"],
                     id="no spot node"),
        pytest.param((replicas("on-demand", "ready", "ready"), replicas("spot", *["ready"] * 4)),
                     [OWN, node("s", 0, is_spot=True)],
                     ["pool spot: 2 of 6 replicas wait for a spot node with 1 GPU free"], id="full"),
        pytest.param((replicas("on-demand", *["ready"] * 3), replicas("spot", *["ready"] * 5)), [OWN, SPOT],
                     ["pool spot: 1 of 6 replicas are on their way: there is room on a spot node",
                      "pool on-demand: 1 above its minimum cover for missing spot replicas"], id="covered"),
    ],
)  # fmt: skip
def test_what_is_not_as_wanted(
    there: tuple[list[ReplicaEntry], ...], nodes: list[NodeDevices], told: list[str]
) -> None:
    assert pools.explain(config(), snapshot(*there), nodes) == told


@pytest.mark.parametrize(
    ("before", "words", "told", "replicas"),
    [
        pytest.param(FleetConfig(model="m", replicas=3), {"pools": {"spot": "0..6"}},
                     {"on-demand": "3", "spot": "0..6"}, 3, id="a fleet's replicas become its on-demand pool"),
        pytest.param(config(), {"pools": {"spot": "1..3"}}, {"on-demand": "2..4", "spot": "1..3"}, 3, id="one changes"),
        pytest.param(config(), {"gateways": 2}, {"on-demand": "2..4", "spot": "0..6"}, 2, id="neither does"),
        pytest.param(FleetConfig(model="m"), {"replicas": 2}, {}, 2, id="no pools"),
        pytest.param(FleetConfig(model="m", max_replicas=4), {"pools": {"spot": "0..6"}},
                     {"on-demand": "1..4", "spot": "0..6"}, 1, id="a range becomes that of its on-demand pool"),
    ],
)  # fmt: skip
def test_pools_of_a_running_fleet_change_one_by_one(
    before: FleetConfig, words: dict[str, Any], told: dict[str, str], replicas: int
) -> None:
    after = from_mapping(merge(before, words), "a test")
    assert (after.pools, after.replicas) == (told, replicas)


def test_a_number_of_replicas_says_too_little_of_a_fleet_with_pools() -> None:
    with pytest.raises(ConfigError, match=r"has pools \(on-demand 2..4, spot 0..6\), so 5 .* --pool on-demand:5"):
        merge(config(), {"replicas": 5})


def test_where_the_cluster_adds_nodes_all_may_be_asked_for_and_nothing_is_refused() -> None:
    growing = config("2..4", "1..6", policy="slo", adds_nodes=True)
    assert pools.allowed(config("2..4", "0..6", policy="slo"), [OWN, SPOT], {}) == {"on-demand": 4, "spot": 3}
    assert pools.allowed(growing, [OWN], {}) == {"on-demand": 4, "spot": 6}
    pools.check(growing, [node("own", 0)], {})
    assert pools.warning(growing, [OWN]) == ""
