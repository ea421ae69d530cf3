"""Pools of two market types: spot replicas go with their node, on-demand ones cover for them until they are back."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from harness.live import START_S, Fleet, eventually_async
from harness.shared_fleet import Models
from harness.shared_nodes import Nodes
from harness.twin_load import STEP_S, kervan, load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

SPOT_NODE = "127.0.0.5"
SPOT_LABEL = "--labels=ray.io/market-type=spot"
HOLD_S = 5.0


def sizes(fleet: Fleet) -> tuple[int, int]:
    """On-demand and spot replicas that can be reached, as the gateway tells: sooner than a command."""
    told = [labels["pool"] for labels, _ in fleet.metrics().get("kervan_replica_running", ())]
    return told.count("on-demand"), told.count("spot")


async def test_spot_goes_and_comes_back(nodes: Nodes, models: Models, scratch: Path) -> None:
    config = scratch / "pools.yaml"
    settings: dict[str, Any] = {"engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}, "policy": "fill"}
    settings["pools"] = {"on-demand": "1..3"}
    config.write_text(json.dumps({**settings, "fallback_after_s": 1.0, "fallback_hold_s": HOLD_S}))
    # Gateways are placed where GPUs are, and twins anywhere: what is on the spot node is replicas of the spot pool.
    cluster = nodes.cluster
    await asyncio.to_thread(cluster.start_node, SPOT_NODE, SPOT_LABEL)
    arguments = ("max_model_len=2048", "served_model_name=twin")
    options = ("--config", str(config), "--pool", "spot:0..2", "--gateways", "1", "--address", cluster.address)
    fleet = await asyncio.to_thread(cluster.home.up, models.demo, "mixed", arguments, *options)
    # On a busy machine the spot replicas are late, and on-demand covers for them until they are there.
    await eventually_async(lambda: sizes(fleet) == (1, 2), "each pool has its own", START_S)
    status = fleet.status()
    assert {r["pool"] for r in status["replicas"] if r["node"] == SPOT_NODE} == {"spot"}
    assert {r["pool"] for r in status["replicas"] if r["node"] != SPOT_NODE} == {"on-demand"}
    assert "no problems found" in await kervan(fleet, "status", "--why")
    async with load(fleet, models) as running:
        await asyncio.sleep(1.0)
        cluster.kill_node(SPOT_NODE)
        await eventually_async(lambda: sizes(fleet) == (3, 0), "on-demand covers for both", START_S)
        told = await kervan(fleet, "status", "--why")
        assert "pool spot: 2 of 2 replicas wait for a spot node" in told
        assert "pool on-demand: 2 above its minimum cover for missing spot replicas" in told
        # Changes do not wait for what cannot be placed.
        await kervan(fleet, "scale", "--pool", "spot:0..1", "--pool", "on-demand:1..2")
        await eventually_async(lambda: sizes(fleet) == (2, 0), "the new bounds hold", START_S)
        before = running.num_whole
        await asyncio.to_thread(cluster.start_node, SPOT_NODE, SPOT_LABEL)
        await eventually_async(lambda: sizes(fleet)[1] == 1, "spot is back", START_S)
        await eventually_async(lambda: sizes(fleet) == (1, 1), "cover ends", START_S)
        assert running.num_whole > before
    assert fleet.total("kervan_streams_broken_total") == 0
    assert "no problems found" in await kervan(fleet, "status", "--why")
    await kervan(fleet, "down")
    cluster.end_node(SPOT_NODE)
