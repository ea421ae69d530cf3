"""Parts of the fleet die under load, and no client can tell: texts are compared with those of an undisturbed run."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest
from harness.live import START_S, Fleet, Take, eventually, eventually_async, stopped, take_chat
from harness.undisturbed import Undisturbed, answers_undisturbed, long_body, under_load

from kervan.demo import PAIRS

pytestmark = pytest.mark.destructive

NUM_STREAMS = 16
NUM_SPREAD = 32  # the kernel spreads their connections over the gateways: 1 in 2**31 that one gets all
LONGEST = 1900
# ZMQ declares a silent peer dead after 2 s; the rest is the load of the machine.
NOTICE_S = 20.0


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> Undisturbed:
    fleet.wait_until_whole()
    return asyncio.run(answers_undisturbed(fleet))


@asynccontextmanager
async def steady_load(fleet: Fleet, expected: Undisturbed) -> AsyncIterator[None]:
    """Streams all the time, every one of which has far more to write than its client waits for.

    A client leaves once it has the text it knows, and asks again: so no stream is near its end.
    """
    is_over = False
    broken: list[str] = []

    async def ask_again(question: str) -> None:
        text = expected.texts[question]
        async with httpx.AsyncClient(base_url=fleet.url, timeout=START_S, verify=False) as client:
            while not is_over:
                take = await take_chat(client, Take(), long_body(question, LONGEST), max_chars=len(text))
                if take.text[: len(text)] != text:
                    broken.append(f"{take.finish_reason} after {take.num_pieces} pieces: {take.error}")

    questions = [list(expected.texts)[i % len(expected.texts)] for i in range(NUM_STREAMS)]
    tasks = [asyncio.create_task(ask_again(question)) for question in questions]
    try:
        await asyncio.sleep(2.0)  # so that they are under way
        yield
        is_over = True
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert broken == []


async def test_replica_killed(whole_fleet: Fleet, undisturbed: Undisturbed) -> None:
    fleet = whole_fleet
    victim, survivor = fleet.pids()
    moved = fleet.total("kervan_streams_moved_total")
    async with under_load(fleet, undisturbed, NUM_STREAMS) as load:
        os.kill(victim, signal.SIGKILL)
        await load.finish()
    load.assert_whole(undisturbed)
    assert fleet.total("kervan_streams_moved_total") > moved
    await asyncio.to_thread(fleet.wait_until_whole)
    assert survivor in fleet.pids()
    assert victim not in fleet.pids()


# State that a stream has beside its text. The seeded ones are short: each of their tokens may be a close call.
NUMBERS = {"type": "array", "items": {"type": "integer", "maximum": 999}, "minItems": 60, "maxItems": 60}
STATEFUL: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 1.0, "presence_penalty": 0.5, "max_tokens": 300},
    {"structured_outputs": {"json": NUMBERS}, "frequency_penalty": 0.5, "ignore_eos": False},
    {"temperature": 1.0, "seed": 5, "max_tokens": 150},
    {"min_tokens": 250, "ignore_eos": False, "max_tokens": 300},
)


async def test_a_killed_replicas_streams_keep_their_penalties_seeds_grammars_and_budgets(whole_fleet: Fleet) -> None:
    fleet = whole_fleet
    bodies = [long_body(question) | extra for question in list(PAIRS)[:4] for extra in STATEFUL]
    victim = fleet.pids()[0]
    async with httpx.AsyncClient(base_url=fleet.url, timeout=START_S) as client:
        undisturbed = await asyncio.gather(*(take_chat(client, Take(), one) for one in bodies))
        assert [take.error for take in undisturbed] == [""] * len(bodies)
        moved = fleet.total("kervan_streams_moved_total")
        takes = [Take() for _ in bodies]
        tasks = [asyncio.create_task(take_chat(client, *pair)) for pair in zip(takes, bodies, strict=True)]
        all_began = asyncio.gather(*(take.began.wait() for take in takes))
        await asyncio.wait([all_began, *tasks], return_when=asyncio.FIRST_COMPLETED)  # short ones may end first
        os.kill(victim, signal.SIGKILL)
        await asyncio.gather(*tasks)
    assert fleet.total("kervan_streams_moved_total") >= moved + len(bodies) / 4
    for one, take, expected in zip(bodies, takes, undisturbed, strict=True):
        assert take.text == expected.text, one
        assert (take.finish_reason, take.usage) == (expected.finish_reason, expected.usage), one
    await asyncio.to_thread(fleet.wait_until_whole)


async def test_replica_hangs(whole_fleet: Fleet, undisturbed: Undisturbed) -> None:
    """A stopped process keeps its connections open; only its silence tells."""
    fleet = whole_fleet
    victim = fleet.pids()[0]
    moved = fleet.total("kervan_streams_moved_total")
    async with under_load(fleet, undisturbed, NUM_STREAMS) as load:
        with stopped(victim):
            await eventually_async(
                lambda: fleet.total("kervan_streams_moved_total") > moved, "streams have moved", NOTICE_S
            )
            await load.finish()
    load.assert_whole(undisturbed)
    await asyncio.to_thread(fleet.wait_until_whole)


async def test_all_replicas_killed(whole_fleet: Fleet, undisturbed: Undisturbed) -> None:
    """Open streams wait for a replica; meanwhile the fleet lives, is not ready, and says why."""
    fleet = whole_fleet
    pids = fleet.pids()  # before the load: asking takes seconds, and streams must still be open
    async with under_load(fleet, undisturbed, 8) as load:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        ready = await eventually_async(
            lambda: (page := fleet.get("/health/ready")).status_code == 503 and page, "not ready", NOTICE_S
        )
        assert "no replica is ready" in ready.json()["reason"]
        assert fleet.get("/health").status_code == 200
        assert load.ended() == []
        await load.finish()
    load.assert_whole(undisturbed)
    await asyncio.to_thread(fleet.wait_until_whole)
    assert fleet.get("/health/ready").status_code == 200


async def test_gateway_killed(whole_fleet: Fleet, undisturbed: Undisturbed) -> None:
    """Its own streams end with it. The other gateway's go on, new ones are taken, and a new gateway comes."""
    fleet = whole_fleet
    gateways = fleet.gateway_pids()
    victim, survivor = gateways
    async with under_load(fleet, undisturbed, NUM_SPREAD) as load:
        assert set(load.gateways) == {victim, survivor}
        os.kill(gateways[victim], signal.SIGKILL)
        for _ in range(5):
            assert fleet.get("/health").status_code == 200
        await load.finish()
    load.assert_whole(undisturbed, besides_gateways=[victim])
    await asyncio.to_thread(fleet.wait_until_whole)
    assert survivor in fleet.gateway_pids()
    assert victim not in fleet.gateway_pids()
    # What the dead gateway had asked for is aborted by its lease: nobody computes for the dead.
    await asyncio.to_thread(eventually, fleet.is_idle, "all replicas are idle", 60)


async def test_client_leaves(whole_fleet: Fleet, undisturbed: Undisturbed) -> None:
    """The replica is free at once, not when the answer would have ended."""
    fleet = whole_fleet
    await asyncio.to_thread(eventually, fleet.is_idle, "the fleet is idle", 60)
    made = fleet.total("vllm:generation_tokens_total")
    async with under_load(fleet, undisturbed, 8, LONGEST) as load:
        assert load.ended() == []
        for task in load.tasks:
            task.cancel()
    await asyncio.to_thread(eventually, fleet.is_idle, "all replicas are idle", NOTICE_S)
    assert 0 < fleet.total("vllm:generation_tokens_total") - made < 8 * LONGEST


async def test_scale_down_and_up(whole_fleet: Fleet, undisturbed: Undisturbed) -> None:
    """The replica that leaves gives its streams away: it is gone before they would have ended on it."""
    fleet = whole_fleet
    before = set(fleet.pids())
    moved = fleet.total("kervan_streams_moved_total")
    # The command needs seconds, or many, to reach the cluster: there are streams whenever it does.
    async with steady_load(fleet, undisturbed):
        down = await asyncio.to_thread(fleet.home.kervan, "scale", "1", "--name", fleet.name)
    assert down.returncode == 0, down.stderr
    assert fleet.total("kervan_streams_moved_total") > moved
    (kept,) = fleet.pids()
    assert kept in before
    (gone,) = before - {kept}
    assert not psutil.pid_exists(gone)
    async with under_load(fleet, undisturbed, NUM_STREAMS) as load:
        up = await asyncio.to_thread(fleet.home.kervan, "scale", "2", "--name", fleet.name)
        assert up.returncode == 0, up.stderr
        await load.finish()
    load.assert_whole(undisturbed)
    await asyncio.to_thread(fleet.wait_until_whole)
    assert kept in fleet.pids()
