"""A cloud takes a node back: its watcher hears of it, the fleet leaves the node in time, and the node its account."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.clouds import Aws, Server, serving
from harness.live import START_S, Fleet, eventually_async
from harness.ray_cluster import RayCluster
from harness.shared_fleet import Models
from harness.twin_load import NUM_STREAMS, STEP_S, Load, kervan, load

from kervan.notices import state_file
from kervan.notices.state_file import NodeState
from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

SPOT = "127.0.0.2"
# Gateways go where a GPU is, and so not to the spot node.
AS_IF_GPU = ("--num-gpus=1", '--resources={"accelerator_type:H200": 1}')
LEAD_S = 15.0
LONG_TOKENS = 420  # 21 s: they cannot end before the node does


@pytest.fixture
def cluster(scratch: Path) -> Iterator[RayCluster]:
    owned = RayCluster(scratch, "spot")
    try:
        yield owned
    finally:
        owned.close()


def environment(server: Server, place: Path) -> dict[str, str]:
    return {
        "KERVAN_NOTICES_WATCH": "aws",
        "KERVAN_NOTICES_AWS_URL": server.url,
        "KERVAN_NOTICES_AWS_PERIOD_S": "0.5",
        "KERVAN_NOTICES_STATE_FILE": f"{place}/account-{{node}}.json",
    }


def utc(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def on_spot(status: dict[str, Any]) -> set[str]:
    return {replica["id"] for replica in status["replicas"] if replica["node"] == SPOT}


async def long_stream(running: Load, seed: int) -> bool:
    """Whether it is whole."""
    prompt = [random.Random(seed).randint(running.limits.first_token, running.limits.last_token) for _ in range(9)]
    async with httpx.AsyncClient(base_url=running.url, timeout=START_S) as client:
        tokens, finish = await running.stream(client, prompt, LONG_TOKENS)
    return (tokens, finish) == (answer(prompt, LONG_TOKENS, running.limits), "length")


async def test_a_spot_node_is_taken_back_under_load(cluster: RayCluster, models: Models, scratch: Path) -> None:
    """A recommendation is shown and changes nothing. The notice empties the node, whose Ray then ends by itself."""
    config = scratch / "spot.yaml"
    config.write_text(json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}}))
    words = ("max_model_len=2048", "served_model_name=twin")
    options = ("--config", str(config), "--replicas", "4", "--gateways", "1", "--address", cluster.address)
    left_before = NodeState(
        node="127.0.0.9", since_s=1.0, written_s=2.0, requests_served=77, streams_in_flight=3, streams_moved=5
    )
    place = scratch / f"account-{SPOT}.json"
    state_file.write(left_before, str(place))
    spot, head = Aws(), Aws()
    async with serving(spot) as spot_server, serving(head) as head_server:
        await asyncio.to_thread(cluster.start_head, *AS_IF_GPU, env=environment(head_server, scratch))
        await asyncio.to_thread(cluster.start_node, SPOT, env=environment(spot_server, scratch))
        fleet = await asyncio.to_thread(cluster.home.up, models.demo, "spot", words, *options)

        async def status() -> dict[str, Any]:
            return await asyncio.to_thread(fleet.status)

        replicas = 4
        while not (there := on_spot(await status())):  # 1 in 16: Ray puts what takes no resources where it likes
            replicas += 2
            await kervan(fleet, "scale", str(replicas))
        node = await eventually_async(lambda: told_of(fleet, SPOT), "the node's watcher tells of itself", START_S)
        assert (node["watches"], node["notices"], node["drained"]) == (["aws"], [], False)
        assert node["before"]["requests_served"] == left_before.requests_served
        begin_s = time.time()
        async with load(fleet, models) as running:
            await eventually_async(lambda: running.num_whole >= NUM_STREAMS, "streams have ended", START_S)
            spot.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": utc(begin_s)})
            asked = len(spot_server.asked) + 4  # two rounds
            await eventually_async(lambda: len(spot_server.asked) >= asked, "the cloud is asked", START_S)
            assert f"node {SPOT} may go: rebalance (aws)" in await kervan(fleet, "status")
            assert state_file.read(str(place)) == left_before
            streams = [asyncio.create_task(long_stream(running, seed)) for seed in range(2 * replicas)]
            await eventually_async(lambda: num_running(fleet) > NUM_STREAMS + replicas, "long streams run", START_S)
            end_s = time.time() + LEAD_S
            spot.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": utc(end_s)})
            await eventually_async(lambda: cluster.node_has_ended(SPOT), "Ray's node has ended by itself", START_S)
            await eventually_async(lambda: num_ready(fleet) == replicas, "replicas came up elsewhere", START_S)
            assert all(await asyncio.gather(*streams))
        await eventually_async(lambda: told_of(fleet, SPOT) is None, "the node is forgotten", START_S)
        found = await status()
        assert there.isdisjoint(replica["id"] for replica in found["replicas"])
        assert not on_spot(found)
        left = state_file.read(str(place))
        assert left is not None
        assert left.notice is not None
        assert (left.node, left.notice.kind, left.notice.deadline_s) == (SPOT, "preemption", int(end_s))
        assert left.streams_in_flight == 0
        assert left.streams_moved == fleet.total("kervan_streams_moved_total") > 0
        assert 0 < left.requests_served < running.num_whole
        assert left.since_s < begin_s < left.written_s
        assert fleet.total("kervan_streams_given_up_total") == 0
        assert [(node["watches"], node["notices"]) for node in found["nodes"]] == [(["aws"], [])]  # the other one's
        assert await kervan(fleet, "down") == "spot: stopped\n"
        asked = len(head_server.asked)
        await asyncio.sleep(2.0)
        assert len(head_server.asked) <= asked + 1, "the other node's watcher goes on"  # one may have been under way


def told_of(fleet: Fleet, ip: str) -> dict[str, Any] | None:
    """What the watcher of a node tells; None when there is none."""
    return next((node for node in fleet.status()["nodes"] if node["node"] == ip), None)


def num_running(fleet: Fleet) -> float:
    return fleet.total("kervan_replica_running")


def num_ready(fleet: Fleet) -> float:
    return fleet.total("kervan_replicas", state="ready")
