"""How many nodes a fleet needs, and how long the end of one may take."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.cluster import grace, nodes
from kervan.cluster.clouds import CLOUDS, MARGIN_S
from kervan.cluster.request import check_image
from kervan.config import fleet as fleets
from kervan.errors import ConfigError


def fleet(**settings: Any) -> fleets.FleetConfig:
    return fleets.from_mapping({"model": "m", **settings}, "test")


@pytest.mark.parametrize(
    ("settings", "gpus", "replicas", "expected"),
    [
        ({}, 8, 0, 0),
        ({}, 8, 8, 1),
        ({}, 8, 9, 2),
        ({"tp": 2}, 8, 5, 2),  # 4 on a node
        ({"tp": 3}, 8, 4, 2),  # 2 on a node: 2 GPUs stay free
        ({"tp": 8, "pp": 2}, 8, 3, 6),  # a stage on each of two nodes
        ({"tp": 2, "pp": 4}, 4, 2, 4),  # 8 GPUs on two nodes of 4
        ({"tp": 2, "pp": 2, "nodes_per_replica": 2}, 8, 4, 2),  # 2 GPUs on each of two nodes, 4 such halves on a node
        ({"gpus_per_replica": 0.5}, 8, 17, 2),  # 16 on a node
        ({"gpus_per_replica": 0.4}, 1, 4, 2),  # as 0.5
        ({"device": "CPU"}, 0, 3, 3),
    ],
)
def test_the_nodes_of_so_many_replicas(settings: dict[str, Any], gpus: int, replicas: int, expected: int) -> None:
    assert nodes.count(fleet(**settings), gpus, replicas) == expected


def test_a_layout_that_no_node_holds_is_refused_with_one_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"a node has 8; use --gpus-per-node 16, or --tp 8"):
        nodes.groups(fleet(tp=16), 8)
    with pytest.raises(ConfigError, match=r"are 8 on each, and a node has 4; leave nodes_per_replica out"):
        nodes.groups(fleet(tp=4, pp=2, nodes_per_replica=1), 4)


@given(tp=st.integers(1, 8), gpus=st.integers(8, 16), replicas=st.integers(0, 64))
def test_nodes_are_enough_and_no_more_than_one_for_each_replica(tp: int, gpus: int, replicas: int) -> None:
    count = nodes.count(fleet(tp=tp), gpus, replicas)
    assert count * (gpus // tp) >= replicas
    assert count <= replicas


@given(drain_s=st.floats(0, 10_000), cloud=st.sampled_from(sorted(CLOUDS)))
def test_a_spot_node_has_drained_and_ended_before_its_cloud_ends_it(drain_s: float, cloud: Any) -> None:
    found = grace.spot(drain_s, CLOUDS[cloud])
    assert found.period_s <= CLOUDS[cloud].notice_s - MARGIN_S
    assert found.drain_s + grace.AFTER_DRAIN_S <= found.period_s + 1  # rounded
    assert found.period_s <= grace.on_demand(drain_s).period_s


@pytest.mark.parametrize("image", ["a/b:1", "reg.example:5000/kervan:0.1.0-gpu", "kervan@sha256:" + "0" * 64])
def test_an_image_with_a_version(image: str) -> None:
    check_image(image)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("", "build one from deploy/gpu.Dockerfile"),
        ("kervan", "names no version"),
        ("reg.example:5000/kervan", "names no version"),
        ("kervan:latest", "nodes that join later could run another one"),
        ("Kervan:1", "is not in the form NAME:TAG"),
        ("kervan:1 2", "is not in the form NAME:TAG"),
    ],
)
def test_an_image_that_may_change_is_refused(image: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_image(image)
