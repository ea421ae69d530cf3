"""A node of a Ray cluster is lost with all that is on it, under load."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import Fleet
from ray_cluster import RayCluster
from shared_fleet import Models
from twin_load import NUM_STREAMS, kervan, load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

LOST = "127.0.0.2"
# Gateways are placed where GPUs are, alternating; twins, which take none, anywhere.
AS_IF_GPU = ("--num-gpus=1", '--resources={"accelerator_type:H200": 1}')


@pytest.fixture
def cluster(scratch: Path) -> Iterator[RayCluster]:
    owned = RayCluster(scratch, "nodes")
    try:
        owned.start_head(*AS_IF_GPU)
        owned.start_node(LOST, *AS_IF_GPU)
        yield owned
    finally:
        owned.close()


def on(fleet: Fleet, node: str) -> tuple[set[str], set[str]]:
    """Replicas and gateways there."""
    status = fleet.status()
    replicas, gateways = ({p["id"] for p in status[kind] if p["node"] == node} for kind in ("replicas", "gateways"))
    return replicas, gateways


async def test_a_lost_node(cluster: RayCluster, models: Models, scratch: Path) -> None:
    """Streams of its replicas move; its gateway's end, and new requests are taken; all that was there comes again."""
    config = scratch / "nodes.yaml"
    config.write_text(json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": 0.03}}))
    arguments = ("max_model_len=2048", "served_model_name=twin")
    options = ("--config", str(config), "--replicas", "4", "--gateways", "2", "--address", cluster.address)
    fleet = await asyncio.to_thread(cluster.home.up, models.demo, "spread", arguments, *options)
    replicas, gateways = 4, 2
    while not on(fleet, LOST)[0]:  # 1 in 16: Ray puts what takes no resources where it likes
        replicas += 2
        await kervan(fleet, "scale", str(replicas))
    while not 0 < len(on(fleet, LOST)[1]) < gateways:
        gateways += 1
        await kervan(fleet, "scale", "--gateways", str(gateways))
    lost_gateways = on(fleet, LOST)[1]
    kept_gateways = set(fleet.gateway_pids()) - lost_gateways
    async with load(fleet, models, may_be_cut=True) as running:
        await asyncio.sleep(3.0)
        before = running.num_whole
        scaled = asyncio.create_task(kervan(fleet, "scale", str(replicas + 1), "--json"))
        cluster.kill_node(LOST)
        told = await kervan(fleet, "status", "--why")
        while f"node {LOST} is dead; what was on it is started elsewhere" not in told:
            assert "all is as it should be" not in told
            told = await kervan(fleet, "status", "--why")
        assert len(json.loads(await scaled)["replicas"]) == replicas + 1
        await asyncio.to_thread(fleet.wait_until_whole, replicas + 1, gateways)
        assert running.num_whole > before
    assert on(fleet, LOST) == (set(), set())
    assert kept_gateways < set(fleet.gateway_pids())
    # Each client of the lost gateway lost its connection once; none was refused after that, though all asked on.
    assert 0 < len(running.cut) < NUM_STREAMS
    assert sum(fleet.total("kervan_streams_moved_total", gateway=gateway) for gateway in kept_gateways) > 0
    assert fleet.total("kervan_streams_given_up_total") == 0
    assert (await kervan(fleet, "status", "--why")).splitlines()[-1] == "all is as it should be"
    await kervan(fleet, "down")
