"""A cloud takes a node back: its watcher hears of it, the fleet leaves the node in time, and the node its account."""

import asyncio
import json
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.clouds import Aws, serving
from harness.live import START_S, Fleet, eventually_async
from harness.shared_fleet import Models
from harness.shared_nodes import Nodes, aws_environment
from harness.twin_load import NUM_STREAMS, Load, kervan, load

from kervan.notices import state_file
from kervan.notices.state_file import NodeState
from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

SPOT = "127.0.0.4"  # without a GPU, and so without a gateway
LEAD_S = 15.0
LONG_TOKENS = 210  # 21 s: they cannot end before the node does


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


async def test_a_spot_node_is_taken_back_under_load(nodes: Nodes, models: Models, scratch: Path) -> None:
    """A recommendation is shown and changes nothing. The notice empties the node, whose Ray then ends by itself."""
    left_before = NodeState(
        node="127.0.0.9", since_s=1.0, written_s=2.0, requests_served=77, streams_in_flight=3, streams_moved=5
    )
    place = scratch / f"account-{SPOT}.json"
    state_file.write(left_before, str(place))
    fleet, cluster, spot = nodes.fleet, nodes.cluster, Aws()
    async with (
        serving(spot) as server,
        nodes.another(SPOT, env=aws_environment(server, scratch), has_directory=True) as (replicas, _),
    ):
        there = nodes.on(SPOT)[0]
        node = await eventually_async(lambda: told_of(fleet, SPOT), "the node's watcher tells of itself", START_S)
        assert (node["watches"], node["notices"], node["drained"]) == (["aws"], [], False)
        assert node["before"]["requests_served"] == left_before.requests_served
        begin_s, moved = time.time(), fleet.total("kervan_streams_moved_total")
        async with load(fleet, models) as running:
            await eventually_async(lambda: running.num_whole >= NUM_STREAMS, "streams have ended", START_S)
            spot.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": utc(begin_s)})
            asked = len(server.asked) + 4  # two rounds
            await eventually_async(lambda: len(server.asked) >= asked, "the cloud is asked", START_S)
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
        found = await asyncio.to_thread(fleet.status)
        assert there.isdisjoint(replica["id"] for replica in found["replicas"])
        assert SPOT not in {replica["node"] for replica in found["replicas"]}
        left = state_file.read(str(place))
        assert left is not None
        assert left.notice is not None
        assert (left.node, left.notice.kind, left.notice.deadline_s) == (SPOT, "preemption", int(end_s))
        assert left.streams_in_flight == 0
        assert left.streams_moved == fleet.total("kervan_streams_moved_total") - moved > 0
        assert 0 < left.requests_served < running.num_whole
        assert left.since_s < begin_s < left.written_s
        assert fleet.total("kervan_streams_broken_total") == 0
        assert [(node["watches"], node["notices"]) for node in found["nodes"]] == [(["aws"], [])]  # the head's


def told_of(fleet: Fleet, ip: str) -> dict[str, Any] | None:
    """What the watcher of a node tells; None when there is none."""
    return next((node for node in fleet.status()["nodes"] if node["node"] == ip), None)


def num_running(fleet: Fleet) -> float:
    return fleet.total("kervan_replica_running")


def num_ready(fleet: Fleet) -> float:
    return fleet.total("kervan_replicas", state="ready")
