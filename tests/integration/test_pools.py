"""Pools of two market types: spot replicas go with their node, on-demand ones cover for them until they are back."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import START_S, Fleet, eventually, eventually_async
from ray_cluster import RayCluster
from shared_fleet import Models
from twin_load import kervan, load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

SPOT_NODE = "127.0.0.2"
SPOT_LABEL = "--labels=ray.io/market-type=spot"
# Gateways are placed where GPUs are, and twins anywhere: what is on the spot node is replicas of the spot pool.
AS_IF_GPU = ("--num-gpus=1", '--resources={"accelerator_type:H200": 1}')
HOLD_S = 5.0


@pytest.fixture
def cluster(scratch: Path) -> Iterator[RayCluster]:
    owned = RayCluster(scratch, "pools")
    try:
        owned.start_head(*AS_IF_GPU)
        yield owned
    finally:
        owned.close()


def ready(fleet: Fleet) -> dict[str, int]:
    return {pool: found["ready"] for pool, found in fleet.status()["pools"].items()}


def nodes(fleet: Fleet, pool: str) -> set[str]:
    replicas: list[dict[str, Any]] = fleet.status()["replicas"]
    return {replica["node"] for replica in replicas if replica["pool"] == pool}


async def test_spot_goes_and_comes_back(cluster: RayCluster, models: Models, scratch: Path) -> None:
    config = scratch / "pools.yaml"
    settings = {"engine": "twin", "gpu": "H200", "twin": {"base_s": 0.03}, "pools": {"on-demand": "1..3"}}
    config.write_text(json.dumps({**settings, "fallback_after_s": 1.0, "fallback_hold_s": HOLD_S}))
    cluster.start_node(SPOT_NODE, SPOT_LABEL)
    arguments = ("max_model_len=2048", "served_model_name=twin")
    options = ("--config", str(config), "--pool", "spot:0..2", "--gateways", "1", "--address", cluster.address)
    fleet = await asyncio.to_thread(cluster.home.up, models.demo, "mixed", arguments, *options)
    assert ready(fleet) == {"on-demand": 1, "spot": 2}  # both were waited for
    assert nodes(fleet, "spot") == {SPOT_NODE}
    assert SPOT_NODE not in nodes(fleet, "on-demand")
    assert "all is as it should be" in await kervan(fleet, "status", "--why")
    async with load(fleet, models) as running:
        await asyncio.sleep(1.0)
        cluster.kill_node(SPOT_NODE)
        await eventually_async(
            lambda: ready(fleet) == {"on-demand": 3, "spot": 0}, "on-demand covers for both", START_S
        )
        told = await kervan(fleet, "status", "--why")
        assert "pool spot: 2 of 2 replicas wait for a spot node" in told
        assert "pool on-demand: 2 more than its least cover for missing spot replicas" in told
        # Changes do not wait for what cannot be placed.
        await kervan(fleet, "scale", "--pool", "spot:0..1", "--pool", "on-demand:1..2")
        await eventually_async(lambda: ready(fleet) == {"on-demand": 2, "spot": 0}, "the new bounds hold", START_S)
        before = running.num_whole
        await asyncio.to_thread(cluster.start_node, SPOT_NODE, SPOT_LABEL)
        await eventually_async(lambda: ready(fleet)["spot"] == 1, "spot is back", START_S)
        await eventually_async(lambda: ready(fleet) == {"on-demand": 1, "spot": 1}, "cover ends", START_S)
        assert running.num_whole > before
    assert fleet.total("kervan_streams_given_up_total") == 0
    await asyncio.to_thread(
        eventually, lambda: "all is as it should be" in cluster.home.kervan("status", "--why", "--name", "mixed").stdout,
        "nothing is left to say", START_S,
    )  # fmt: skip
    await kervan(fleet, "down")
