"""Calls of engine methods on toy replicas."""

import asyncio

import pytest
from harness.live import until
from harness.toy_fleet import Bench

from kervan.errors import EngineError

pytestmark = pytest.mark.usefixtures("quick")


async def test_a_call_gathers_the_answers_of_all_replicas(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    assert sorted(await bench.client.call("add_lora", (7, "x"))) == ["a did add_lora", "b did add_lora"]
    assert a.calls == b.calls == [("add_lora", (7, "x"))]


async def test_a_call_waits_for_the_first_replica(bench: Bench) -> None:
    call = asyncio.create_task(bench.client.call("get_supported_tasks", ()))
    await bench.start("a")
    assert await call == ["a did get_supported_tasks"]


async def test_a_call_after_the_fleet_was_lost_waits_for_the_next_replica(bench: Bench) -> None:
    await bench.kill(await bench.start("a"))
    call = asyncio.create_task(bench.client.call("is_sleeping", ()))
    await bench.start("b")
    assert await call == ["b did is_sleeping"]


async def test_a_failed_call_names_the_replica(bench: Bench) -> None:
    await bench.start("a")
    b = await bench.start("b")
    b.call_failure = "no such adapter"
    with pytest.raises(EngineError, match="replica b: no such adapter"):
        await bench.client.call("add_lora", (7,))
    await until(lambda: not any(link.calls for link in bench.client.links), "the other replica has answered")


async def test_a_replica_that_dies_meanwhile_needs_not_answer_a_call(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.start("b")
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("sleep", ()))
    await until(lambda: a.calls)
    await bench.kill(a)
    assert await call == ["b did sleep"]


async def test_a_call_whose_replicas_all_die_is_made_to_the_next(bench: Bench) -> None:
    """As when a gateway starts while the only replica is replaced."""
    a = await bench.start("a")
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("get_supported_tasks", ()))
    await until(lambda: a.calls)
    await bench.kill(a)
    await bench.start("b")
    assert await call == ["b did get_supported_tasks"]
