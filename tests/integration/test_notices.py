"""A cloud takes a node back: the fleet hears of it on that node, leaves it in time, and the node leaves its account."""

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from clouds import Aws, serving
from live import START_S, Fleet, eventually, eventually_async
from ray_cluster import RayCluster
from shared_fleet import Models
from twin_load import NUM_STREAMS, kervan, load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

SPOT = "127.0.0.2"
# Gateways go where a GPU is, and so not to the spot node.
AS_IF_GPU = ("--num-gpus=1", '--resources={"accelerator_type:H200": 1}')
LEAD_S = 60.0


@pytest.fixture
def cluster(scratch: Path) -> Iterator[RayCluster]:
    owned = RayCluster(scratch, "spot")
    try:
        owned.start_head(*AS_IF_GPU)
        yield owned
    finally:
        owned.close()


def on_spot(fleet: Fleet, kind: str) -> set[str]:
    return {part["id"] for part in fleet.status()[kind] if part["node"] == SPOT}


def notices(fleet: Fleet) -> list[str]:
    return [notice["kind"] for node in fleet.status()["nodes"] for notice in node["notices"]]


async def test_a_spot_node_is_taken_back_under_load(cluster: RayCluster, models: Models, scratch: Path) -> None:
    """A recommendation is shown and changes nothing; the notice empties the node, whose Ray then ends by itself."""
    config, account = scratch / "spot.yaml", scratch / "account.json"
    config.write_text(json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": 0.03}}))
    words = ("max_model_len=2048", "served_model_name=twin")
    options = ("--config", str(config), "--replicas", "4", "--gateways", "1", "--address", cluster.address)
    cloud = Aws()
    async with serving(cloud) as server:
        env = {
            "KERVAN_NOTICES_WATCH": "aws",
            "KERVAN_NOTICES_AWS_URL": server.url,
            "KERVAN_NOTICES_AWS_PERIOD_S": "0.5",
            "KERVAN_NOTICES_STATE_FILE": f"{account.parent}/{{node}}-{account.name}",
        }
        account = account.with_name(f"{SPOT}-{account.name}")
        await asyncio.to_thread(cluster.start_node, SPOT, env=env)
        fleet = await asyncio.to_thread(cluster.home.up, models.demo, "spot", words, *options)
        replicas = 4
        while not on_spot(fleet, "replicas"):  # 1 in 16: Ray puts what takes no resources where it likes
            replicas += 2
            await kervan(fleet, "scale", str(replicas))
        there = on_spot(fleet, "replicas")
        await eventually_async(lambda: fleet.status()["nodes"], "the node's watcher tells of itself", START_S)
        assert [(n["node"], n["watches"], n["problem"], n["notices"]) for n in fleet.status()["nodes"]] == [
            (SPOT, ["aws"], "", [])
        ]
        begin_s = time.time()
        async with load(fleet, models, may_be_cut=True) as running:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            cloud.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": now})
            await eventually_async(lambda: notices(fleet) == ["rebalance"], "the recommendation is shown", START_S)
            assert f"node {SPOT} may go: rebalance (aws)" in await kervan(fleet, "status")
            assert on_spot(fleet, "replicas") == there
            await eventually_async(lambda: running.num_whole >= NUM_STREAMS, "streams have ended", START_S)
            end_s = time.time() + LEAD_S
            end = datetime.fromtimestamp(end_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            cloud.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": end})
            await eventually_async(lambda: "preemption" in notices(fleet), "the notice is shown", START_S)
            assert f"node {SPOT} goes in " in await kervan(fleet, "status")
            await eventually_async(lambda: not on_spot(fleet, "replicas"), "the node is empty", START_S)
            assert time.time() < end_s
            await eventually_async(lambda: cluster.node_has_ended(SPOT), "Ray's node has ended by itself", START_S)
            await asyncio.to_thread(eventually, lambda: fleet.is_whole(replicas, 1), "all is elsewhere", START_S)
            assert on_spot(fleet, "replicas") == set()
        left = json.loads(account.read_text())
        assert (left["node"], left["streams_in_flight"], left["notice"]["deadline_s"]) == (SPOT, 0, int(end_s))
        assert left["streams_moved"] == fleet.total("kervan_streams_moved_total") > 0
        assert 0 < left["requests_served"] < running.num_whole
        assert left["since_s"] < begin_s
        assert fleet.total("kervan_streams_given_up_total") == 0
        # The node that comes in its place finds the account.
        cloud.items.clear()
        await asyncio.to_thread(cluster.start_node, SPOT, env=env)
        while not on_spot(fleet, "replicas"):
            replicas += 2
            await kervan(fleet, "scale", str(replicas))
        await eventually_async(lambda: fleet.status()["nodes"], "the new node's watcher tells of itself", START_S)
        (node,) = fleet.status()["nodes"]
        assert (node["before"]["requests_served"], node["notices"]) == (left["requests_served"], [])
        await kervan(fleet, "down")
        await asyncio.to_thread(eventually, lambda: server_is_left_alone(server), "nobody watches any more", 30)


def server_is_left_alone(server: object) -> bool:
    asked = getattr(server, "asked")
    before = len(asked)
    time.sleep(2.0)
    return len(asked) == before
