"""`kervan drain`: a replica, or a node with all that is on it, goes; its streams go on."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from harness.live import START_S, Fleet, Home, eventually
from harness.ray_cluster import AS_IF_GPU, SECOND, RayCluster, ray_cluster
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, Load, kervan, load

from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]


def settings(scratch: Path) -> tuple[str, str]:
    config = scratch / "drained.yaml"
    config.write_text(json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}}))
    return "--config", str(config)


@pytest.fixture(scope="module")
def pair(home: Home, models: Models, scratch: Path) -> Iterator[Fleet]:
    words = ("max_model_len=2048", "served_model_name=twin")
    running = home.up(models.demo, "pair", words, *settings(scratch), "--replicas", "2", "--gateways", "1")
    yield running
    asyncio.run(a_graceful_end(running, models))


async def a_graceful_end(fleet: Fleet, models: Models) -> None:
    """The last stream ends whole, and then the fleet is gone."""
    last = Load(fleet.url, models.demo)
    async with httpx.AsyncClient(base_url=fleet.url, timeout=START_S) as client:
        stream = asyncio.create_task(last.stream(client, [7], 200))  # 10 s
        await asyncio.to_thread(eventually, lambda: sum(streams_of(fleet).values()) == 1, "it is placed", START_S)
        told = await kervan(fleet, "down", "--graceful")
        assert await stream == (answer([7], 200, last.limits), "length")
    assert told.startswith("pair: stopped")


def streams_of(fleet: Fleet) -> dict[str, int]:
    return dict(httpx.get(f"{fleet.url}/kervan/status").json()["replicas"])


async def test_a_replica_is_drained_under_load(pair: Fleet, models: Models) -> None:
    """It ends in seconds, though its answers would take longer, and another one comes in its place."""
    await asyncio.to_thread(pair.wait_until_whole, 2, 1)
    num_lost = pair.total("kervan_replicas_lost_total")
    async with load(pair, models) as running:
        await asyncio.sleep(1.0)
        leaving, staying = (replica["id"] for replica in pair.status()["replicas"])
        told = json.loads(await kervan(pair, "drain", leaving, "--deadline", "30s", "--json"))
        assert set(told) == {"target", "replicas", "gateways", "moved", "took_s"}
        assert (told["target"], told["replicas"], told["gateways"]) == (leaving, [leaving], [])
        assert told["took_s"] < 30.0
        left = {replica["id"] for replica in pair.status()["replicas"]}
        assert (leaving in left, staying in left) == (False, True)
        before = running.num_whole
        await asyncio.to_thread(pair.wait_until_whole, 2, 1)
        assert running.num_whole > before
    assert pair.total("kervan_streams_given_up_total") == 0
    assert pair.total("kervan_replicas_lost_total") - num_lost <= 1


async def test_a_drain_does_not_wait_for_long_answers(pair: Fleet, models: Models) -> None:
    """Its deadline would leave time for them; who drains wants the replica, and they end elsewhere."""
    await asyncio.to_thread(pair.wait_until_whole, 2, 1)
    long = Load(pair.url, models.demo)
    async with httpx.AsyncClient(base_url=pair.url, timeout=START_S) as client:
        streams = [asyncio.create_task(long.stream(client, [7 + n], 600)) for n in range(4)]  # 30 s each
        await asyncio.to_thread(eventually, lambda: sum(streams_of(pair).values()) == 4, "all are placed", START_S)
        await asyncio.sleep(1.0)
        counts = streams_of(pair)
        leaving = max(counts, key=counts.__getitem__)
        told = json.loads(await kervan(pair, "drain", leaving, "--deadline", "90s", "--json"))
        assert told["moved"] >= 1
        assert not any(stream.done() for stream in streams)
        for n, stream in enumerate(streams):
            assert await stream == (answer([7 + n], 600, long.limits), "length")


async def test_a_graceful_end_that_takes_too_long_is_taken_back(pair: Fleet, models: Models) -> None:
    await asyncio.to_thread(pair.wait_until_whole, 2, 1)
    long = Load(pair.url, models.demo)
    async with httpx.AsyncClient(base_url=pair.url, timeout=START_S) as client:
        stream = asyncio.create_task(long.stream(client, [7], 540))  # 27 s
        await asyncio.to_thread(eventually, lambda: sum(streams_of(pair).values()) == 1, "it is placed", START_S)
        words = ("down", "--graceful", "--deadline", "6s", "--name", "pair")
        ending = asyncio.create_task(asyncio.to_thread(pair.home.kervan, *words))
        ready = f"{pair.url}/health/ready"
        await asyncio.to_thread(eventually, lambda: httpx.get(ready).status_code == 503, "no more requests", START_S)
        tokens, refused = await long.stream(client, [8], 10)
        assert (tokens, (refused or "").partition(":")[0]) == ([], "503")
        assert "the fleet ends when its streams have ended" in (refused or "")
        failed = await ending
        assert (failed.returncode, "waiting for 1 stream after" in failed.stderr) == (1, True)
        assert await long.stream(client, [8], 10) == (answer([8], 10, long.limits), "length")
        assert await stream == (answer([7], 540, long.limits), "length")


def test_what_cannot_be_drained_is_refused(pair: Fleet) -> None:
    (node,) = {replica["node"] for replica in pair.status()["replicas"]}
    for words, status, why in (
        (("nobody",), 1, "'nobody' is neither a replica of fleet 'pair' (on-demand-"),
        ((node,), 1, f"node {node} is the only one, so nothing can move"),
        (("nobody", "--deadline", "soon"), 2, "--deadline 'soon' is not a duration"),
    ):
        refused = pair.home.kervan("drain", *words, "--name", "pair")
        assert refused.returncode == status
        assert why in refused.stderr


@pytest.fixture
def cluster(scratch: Path) -> Iterator[RayCluster]:
    with ray_cluster(scratch, "drain", *AS_IF_GPU, second=AS_IF_GPU) as owned:
        yield owned


async def test_a_node_is_drained_under_load(cluster: RayCluster, models: Models, scratch: Path) -> None:
    """All that was there is gone, nothing comes back there, and clients have seen no more than a gateway's farewell."""
    words = ("max_model_len=2048", "served_model_name=twin")
    options = (*settings(scratch), "--replicas", "4", "--gateways", "2", "--address", cluster.address)
    fleet = await asyncio.to_thread(cluster.home.up, models.demo, "spread", words, *options)

    def there(kind: str) -> set[str]:
        return {p["id"] for p in fleet.status()[kind] if p["node"] == SECOND}

    replicas = 4
    while not there("replicas"):  # 1 in 16: Ray puts what takes no resources where it likes
        replicas += 2
        await kervan(fleet, "scale", str(replicas))
    leaving, gateways = there("replicas"), there("gateways")
    async with load(fleet, models, may_be_cut=True) as running:
        await asyncio.sleep(1.0)
        told = json.loads(await kervan(fleet, "drain", SECOND, "--deadline", "60s", "--json"))
        assert (set(told["replicas"]), set(told["gateways"])) == (leaving, gateways)
        await asyncio.to_thread(
            eventually, lambda: fleet.is_whole(replicas, 2), "all is there again, elsewhere", START_S
        )
        assert (there("replicas"), there("gateways")) == (set(), set())
        assert not running.broken
    assert fleet.total("kervan_streams_given_up_total") == 0
    await kervan(fleet, "down")
