"""`kervan drain`: a replica, or a node with all that is on it, goes; its streams go on."""

import asyncio
import json

import httpx
import pytest
from harness.live import START_S, Fleet, eventually
from harness.ray_cluster import AS_IF_GPU
from harness.shared_fleet import Models
from harness.shared_nodes import Nodes
from harness.twin_load import Load, kervan, load, streams_of

from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]


async def test_a_replica_is_drained_under_load(twins: Fleet, models: Models) -> None:
    """It ends in seconds, though its answers would take longer, and another one comes in its place."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    num_lost = twins.total("kervan_replicas_lost_total")
    async with load(twins, models) as running:
        await asyncio.sleep(1.0)
        leaving, *staying = (replica["id"] for replica in twins.status()["replicas"])
        told = json.loads(await kervan(twins, "drain", leaving, "--deadline", "30s", "--json"))
        assert set(told) == {"target", "replicas", "gateways", "moved", "took_s"}
        assert (told["target"], told["replicas"], told["gateways"]) == (leaving, [leaving], [])
        assert told["took_s"] < 30.0
        left = {replica["id"] for replica in twins.status()["replicas"]}
        assert leaving not in left
        assert left.issuperset(staying)
        before = running.num_whole
        await asyncio.to_thread(twins.wait_until_whole, 3, 1)
        assert running.num_whole > before
    assert twins.total("kervan_streams_broken_total") == 0
    assert twins.total("kervan_replicas_lost_total") - num_lost <= 1


async def test_a_drain_does_not_wait_for_long_answers(twins: Fleet, models: Models) -> None:
    """Its deadline would leave time for them; who drains wants the replica, and they end elsewhere."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    long = Load(twins.url, models.demo)
    async with httpx.AsyncClient(base_url=twins.url, timeout=START_S) as client:
        streams = [asyncio.create_task(long.stream(client, [7 + n], 300)) for n in range(4)]  # 30 s each
        await asyncio.to_thread(eventually, lambda: sum(streams_of(twins).values()) == 4, "all are placed", START_S)
        await asyncio.sleep(1.0)
        counts = streams_of(twins)
        leaving = max(counts, key=counts.__getitem__)
        told = json.loads(await kervan(twins, "drain", leaving, "--deadline", "90s", "--json"))
        assert told["moved"] >= 1
        assert not any(stream.done() for stream in streams)
        for n, stream in enumerate(streams):
            assert await stream == (answer([7 + n], 300, long.limits), "length")


async def test_a_graceful_end_that_takes_too_long_is_taken_back(twins: Fleet, models: Models) -> None:
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    long = Load(twins.url, models.demo)
    async with httpx.AsyncClient(base_url=twins.url, timeout=START_S) as client:
        stream = asyncio.create_task(long.stream(client, [7], 270))  # 27 s
        await asyncio.to_thread(eventually, lambda: sum(streams_of(twins).values()) == 1, "it is placed", START_S)
        words = ("down", "--graceful", "--deadline", "6s", "--name", "twins")
        ending = asyncio.create_task(asyncio.to_thread(twins.home.kervan, *words))
        ready = f"{twins.url}/health/ready"
        await asyncio.to_thread(eventually, lambda: httpx.get(ready).status_code == 503, "no more requests", START_S)
        tokens, refused = await long.stream(client, [8], 10)
        assert (tokens, (refused or "").partition(":")[0]) == ([], "503")
        assert "the fleet ends when its streams have ended" in (refused or "")
        failed = await ending
        assert (failed.returncode, "waiting for 1 stream after" in failed.stderr) == (1, True)
        assert await long.stream(client, [8], 10) == (answer([8], 10, long.limits), "length")
        assert await stream == (answer([7], 270, long.limits), "length")


def test_what_cannot_be_drained_is_refused(twins: Fleet) -> None:
    (node,) = {replica["node"] for replica in twins.status()["replicas"]}
    for words, status, why in (
        (("nobody",), 1, "'nobody' is neither a replica of fleet 'twins' (on-demand-"),
        ((node,), 1, f"node {node} is the only one, so nothing can move"),
        (("nobody", "--deadline", "soon"), 2, "--deadline 'soon' is not a duration"),
    ):
        refused = twins.home.kervan("drain", *words, "--name", "twins")
        assert refused.returncode == status
        assert why in refused.stderr


async def test_a_node_is_drained_under_load(nodes: Nodes, models: Models) -> None:
    """All that was there is gone, nothing comes back there, and clients have seen no more than a gateway's farewell."""
    fleet, node = nodes.fleet, "127.0.0.2"
    async with nodes.another(node, *AS_IF_GPU) as (replicas, gateways):
        leaving = nodes.on(node)
        async with load(fleet, models, may_be_cut=True) as running:
            await asyncio.sleep(1.0)
            told = json.loads(await kervan(fleet, "drain", node, "--deadline", "60s", "--json"))
            assert (set(told["replicas"]), set(told["gateways"])) == leaving
            await asyncio.to_thread(
                eventually,
                lambda: fleet.is_whole(replicas, gateways, asks_directory=True),
                "all is there again, elsewhere",
                START_S,
            )
            assert nodes.on(node) == (set(), set())
            assert not running.broken
        assert fleet.total("kervan_streams_broken_total") == 0
