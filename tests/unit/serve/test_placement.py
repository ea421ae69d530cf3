"""Where replicas fit, by hand-worked tables."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.config.fleet import FleetConfig
from kervan.errors import CapacityError, ConfigError
from kervan.serve import placement
from kervan.serve.placement import NodeDevices


def gpus(*free_of_total: tuple[float, int]) -> list[NodeDevices]:
    return [NodeDevices(f"10.0.0.{i}", total, free) for i, (free, total) in enumerate(free_of_total, 1)]


def cpus(*totals: int) -> list[NodeDevices]:
    return [NodeDevices(f"10.0.0.{i}", total, total, device="CPU") for i, total in enumerate(totals, 1)]


def config(**words: Any) -> FleetConfig:
    return FleetConfig(model="m", **words)


EIGHTS = gpus((8, 8), (8, 8))


@pytest.mark.parametrize(
    ("words", "nodes", "expected"),
    [
        ({"tp": 8}, EIGHTS, 1),
        ({"tp": 4, "pp": 2}, EIGHTS, 1),  # as few nodes as can hold it
        ({"tp": 8, "pp": 2}, EIGHTS, 2),
        ({"tp": 4, "pp": 4}, EIGHTS, 2),  # two stages on each
        ({"tp": 4, "pp": 2, "nodes_per_replica": 2}, EIGHTS, 2),
        ({"tp": 2, "pp": 3}, gpus((4, 4), (2, 2), (2, 2)), 3),  # 3 stages divide over 1 or 3 nodes, not over 2
        ({"tp": 8, "pp": 2}, gpus((0, 8), (3, 8)), 2),  # what is free is another question
        ({"tp": 1, "pp": 2, "nodes_per_replica": 2}, cpus(2, 2), 2),
        ({"tp": 16, "engine": "twin", "gpu": "H200"}, EIGHTS, 1),
        ({"tp": 16}, [], 1),
    ],
)
def test_a_replica_spreads_over_as_few_nodes_as_can_hold_it(
    words: dict[str, Any], nodes: list[NodeDevices], expected: int
) -> None:
    assert placement.spread(config(**words), nodes).nodes_per_replica == expected


@pytest.mark.parametrize(
    ("words", "nodes", "parts"),
    [
        ({"tp": 16}, EIGHTS, ["tp*pp=16*1=16 GPUs", "must be on one node", "has 8 (10.0.0.1)", "--tp 8"]),
        ({"tp": 8, "pp": 4}, EIGHTS, ["8*4=32 GPUs", "10.0.0.1: 8, 10.0.0.2: 8", "add nodes"]),
        ({"tp": 1, "pp": 4, "nodes_per_replica": 4}, EIGHTS, ["4 nodes need 1 on each", "leave --nodes-per-replica"]),
        ({"tp": 4}, cpus(2, 2), ["tp*pp=4*1=4 CPU cores", "has 2", "--tp 2 --pp 1"]),
    ],
)
def test_what_no_node_can_hold_is_refused_with_the_sizes(
    words: dict[str, Any], nodes: list[NodeDevices], parts: list[str]
) -> None:
    with pytest.raises(CapacityError) as refused:
        placement.spread(config(**words), nodes)
    for part in parts:
        assert part in str(refused.value)


def test_tensor_parallel_over_two_nodes_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"nodes_per_replica=2 does not divide pp=1: a stage is whole on one node"):
        config(tp=2, nodes_per_replica=2)


@pytest.mark.parametrize(
    ("words", "nodes", "expected"),
    [
        ({"tp": 2}, gpus((8, 8), (3, 8)), 5),
        ({"tp": 8, "pp": 2, "nodes_per_replica": 2}, gpus((8, 8), (8, 8), (8, 8)), 1),  # the third has no partner
        ({"tp": 4, "pp": 2, "nodes_per_replica": 2}, gpus((8, 8), (4, 8), (4, 8)), 2),
        ({"tp": 4, "pp": 2, "nodes_per_replica": 2}, gpus((16, 16), (4, 8)), 1),  # never both halves on one node
        ({"gpus_per_replica": 0.5}, gpus((1.5, 2)), 3),
        ({"gpus_per_replica": 0.4}, gpus((2, 2)), 4),  # two to a GPU; a fifth would need two halves of two GPUs
        ({"tp": 1, "pp": 2, "nodes_per_replica": 2}, cpus(2, 1), 1),
    ],
)
def test_places(words: dict[str, Any], nodes: list[NodeDevices], expected: int) -> None:
    assert placement.places(config(**words), nodes) == expected


@given(
    free=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    tp=st.sampled_from([1, 2, 4]),
    count=st.integers(1, 3),
)
def test_places_are_as_many_as_replicas_that_can_be_put_there_one_by_one(free: list[int], tp: int, count: int) -> None:
    """The emptiest nodes first is the best order for groups that take each node once."""
    wanted = config(tp=tp, pp=count, nodes_per_replica=count)
    found = placement.places(wanted, gpus(*((n, 8) for n in free)))
    left = [n // tp for n in free]
    put = 0
    while True:
        left.sort(reverse=True)
        if len(left) < count or left[count - 1] < 1:
            break
        left[:count] = [n - 1 for n in left[:count]]
        put += 1
    assert found == put


@pytest.mark.parametrize(
    ("words", "held", "is_refused"),
    [
        ({"tp": 2, "replicas": 4}, 0, True),
        ({"tp": 2, "replicas": 3}, 0, False),
        ({"tp": 2, "replicas": 4}, 2, False),  # one of them runs already
        ({"gpus_per_replica": 0.5, "replicas": 13}, 0, True),
        ({"gpus_per_replica": 0.5, "replicas": 12}, 0, False),
        ({"tp": 2, "replicas": 99, "engine": "twin", "gpu": "H200"}, 0, False),
    ],
)
def test_what_does_not_fit_now_is_refused(words: dict[str, Any], held: float, is_refused: bool) -> None:
    nodes = gpus((4, 8), (2, 8))
    if not is_refused:
        placement.check(config(**words), nodes, held=held)
        return
    with pytest.raises(CapacityError, match=r"free are 10.0.0.1: 4 of 8, 10.0.0.2: 2 of 8; room for \d+: use"):
        placement.check(config(**words), nodes, held=held)


@pytest.mark.parametrize(
    ("words", "nodes", "expected"),
    [
        ({}, EIGHTS, "1 GPU"),
        ({"tp": 4}, EIGHTS, "4 GPUs on one node"),
        ({"tp": 4, "pp": 2, "nodes_per_replica": 2}, EIGHTS, "4 GPUs on each of 2 nodes"),
        ({"gpus_per_replica": 0.5}, EIGHTS, "0.5 GPU"),
        ({"pp": 2, "nodes_per_replica": 2}, cpus(2, 2), "1 CPU core on each of 2 nodes"),
    ],
)
def test_demand(words: dict[str, Any], nodes: list[NodeDevices], expected: str) -> None:
    assert placement.demand(config(**words), nodes) == expected


def test_a_shared_gpu_gives_each_its_part_of_the_memory() -> None:
    argv = config(gpus_per_replica=0.5).engine_argv
    assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.46"
    own = config(gpus_per_replica=0.5, engine_args={"gpu_memory_utilization": 0.3}).engine_argv
    assert own[own.index("--gpu-memory-utilization") + 1] == "0.3"
    assert "--gpu-memory-utilization" not in config().engine_argv


def test_a_replica_on_a_share_of_a_gpu_with_a_given_cache_asks_for_no_more_than_its_share_at_its_start() -> None:
    argv = config(gpus_per_replica=0.5, engine_args={"kv_cache_memory_bytes": 2**34}).engine_argv
    assert (
        argv[argv.index("--gpu-memory-utilization") + 1] == "0.46"
    )  # vLLM starts if so much is free, whatever it uses


@pytest.mark.parametrize(
    "words", [{"tp": 2, "gpus_per_replica": 0.5}, {"gpus_per_replica": 1.5}, {"gpus_per_replica": -1}]
)
def test_only_a_replica_on_one_gpu_can_share_it(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="gpus_per_replica"):
        config(**words)


def test_where_the_cluster_adds_nodes_a_replica_may_fit_on_none_that_is_there() -> None:
    growing = config(tp=4, adds_nodes=True, device="GPU")
    assert placement.spread(growing, gpus((2, 2))).nodes_per_replica == 1
    assert placement.spread(growing, []).nodes_per_replica == 1
    with pytest.raises(CapacityError, match="--device GPU"):
        placement.spread(config(adds_nodes=True), cpus(8))
