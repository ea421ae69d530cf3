"""A fleet on nodes that share no network stack: own addresses, labels, a node that is cut off and comes back, drain."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.live import START_S, Fleet, eventually_async
from harness.namespaces import HEAD, NamespaceCluster, namespace_cluster, why_not
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, kervan, load

pytestmark = [pytest.mark.fleet, pytest.mark.exhaustive, pytest.mark.timeout(1800)]

FAR = "far"
SPOT_LABEL = "--labels=ray.io/market-type=spot"
FINE = "no problems found"


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[NamespaceCluster]:
    """A head, and a spot node; gateways are placed on the head alone, which has what Ray takes for a GPU."""
    if reason := why_not():
        pytest.skip(reason)
    with namespace_cluster(scratch, "apart", "--num-gpus=1", '--resources={"accelerator_type:H200": 1}') as owned:
        owned.join_node(FAR, SPOT_LABEL)
        yield owned


@pytest.fixture(scope="module")
def fleet(cluster: NamespaceCluster, models: Models, scratch: Path) -> Iterator[Fleet]:
    config = scratch / "apart.yaml"
    settings: dict[str, Any] = {"engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}, "warm_start": False}
    settings |= {"pools": {"on-demand": "1", "spot": "1"}, "gateways": 1, "host": "0.0.0.0", "stall_timeout_s": 5}
    config.write_text(json.dumps(settings))
    arguments = ("max_model_len=2048", "served_model_name=twin")
    brought_up = cluster.home.up(models.demo, "apart", arguments, "--config", str(config), "--address", cluster.address)
    yield Fleet(cluster.home, "apart", f"http://{cluster.ip}:{brought_up.port}", brought_up.port)
    done = cluster.home.kervan("down", "--name", "apart")
    assert (done.returncode, done.stdout) == (0, "apart: stopped\n"), done.stderr


def replica(fleet: Fleet, ip: str) -> dict[str, Any]:
    """The one that is ready at an address, or nothing."""
    ready = [one for one in fleet.seen()["replicas"] if one["state"] == "ready"]
    return next((one for one in ready if one["node"] == ip), {})


async def whole(fleet: Fleet) -> None:
    await asyncio.to_thread(fleet.wait_until_whole, 2, 1, asks_directory=True)


async def test_pools_are_on_the_nodes_of_their_label(cluster: NamespaceCluster, fleet: Fleet) -> None:
    assert replica(fleet, cluster.network.address(HEAD))["pool"] == "on-demand"
    assert replica(fleet, cluster.network.address(FAR))["pool"] == "spot"
    assert FINE in await kervan(fleet, "status", "--why")


async def test_a_node_that_is_cut_off_for_seconds(cluster: NamespaceCluster, fleet: Fleet, models: Models) -> None:
    """Its streams continue elsewhere; when it is back it serves again, and Ray has not noticed."""
    await whole(fleet)
    far = cluster.network.address(FAR)
    before, moved = replica(fleet, far), fleet.total("kervan_streams_moved_total")
    async with load(fleet, models) as running:
        await eventually_async(lambda: fleet.total("kervan_replica_running", replica=before["id"]) > 1, "it works", 60)
        cluster.network.cut(FAR)
        await eventually_async(lambda: fleet.total("kervan_streams_moved_total") > moved, "streams move", START_S)
        whole_before = running.num_whole
        await eventually_async(lambda: running.num_whole > whole_before + 16, "all goes on without it", START_S)
        cluster.network.join(FAR)
        await whole(fleet)
        served = replica(fleet, far)
        await eventually_async(lambda: fleet.total("kervan_replica_running", replica=served["id"]) > 1, "it works", 60)
    assert fleet.total("kervan_streams_broken_total") == 0
    assert FINE in await kervan(fleet, "status", "--why")


async def test_a_node_that_is_cut_off_for_good(cluster: NamespaceCluster, fleet: Fleet, models: Models) -> None:
    """Ray gives it up, and `status` says so; a new node takes its place."""
    await whole(fleet)
    far = cluster.network.address(FAR)
    async with load(fleet, models) as running:
        cluster.network.cut(FAR)
        told = ""
        async with asyncio.timeout(START_S):
            while "1 of 1 replicas wait for a spot node" not in told:
                told = (await asyncio.to_thread(fleet.home.kervan, "status", "--why", "--name", fleet.name)).stdout
        whole_before = running.num_whole
        cluster.end_node(FAR)
        cluster.network.join(FAR)
        cluster.join_node(FAR, SPOT_LABEL)
        await eventually_async(lambda: replica(fleet, far), "the node serves again", START_S)
        assert running.num_whole > whole_before
    await whole(fleet)
    assert fleet.total("kervan_streams_broken_total") == 0
    assert FINE in await kervan(fleet, "status", "--why")


async def test_a_replica_on_another_node_is_drained(cluster: NamespaceCluster, fleet: Fleet, models: Models) -> None:
    await whole(fleet)
    leaving = replica(fleet, cluster.network.address(FAR))
    async with load(fleet, models):
        await eventually_async(lambda: fleet.total("kervan_replica_running", replica=leaving["id"]) > 1, "it works", 60)
        await kervan(fleet, "drain", leaving["id"])
        await eventually_async(lambda: replica(fleet, leaving["node"]).get("id") not in (None, leaving["id"]),
                               "another one takes its place", START_S)  # fmt: skip
    assert fleet.total("kervan_streams_broken_total") == 0
