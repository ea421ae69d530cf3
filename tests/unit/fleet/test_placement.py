"""Where the fleet client places streams, and when it holds them."""

import dataclasses
import math

import pytest
from harness.live import until
from harness.toy_fleet import Bench, make_bench

from kervan.fleet import wire
from kervan.fleet.link import Member
from kervan.policy.output_length import MIN_ANSWERS

pytestmark = pytest.mark.usefixtures("quick")


def replace_risky(member: Member) -> Member:
    return dataclasses.replace(member, risky_for_s=math.inf)


async def test_streams_go_where_the_fewest_tokens_are_outstanding(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    # tokens (a, b):     (0, 0)        (100, 0)      (100, 40)      (100, 80)      (100, 120)
    for i, (length, output) in enumerate([(90, 10), (30, 10), (30, 10), (30, 10), (10, 5)]):
        await bench.add(f"s{i}", prompt=[1] * length, max_tokens=output)
    await bench.placed(a, "s0", "s4")
    await bench.placed(b, "s1", "s2", "s3")
    await bench.finished(*(f"s{i}" for i in range(5)))


async def test_other_gateways_load_counts(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    a.other_tokens = 500
    await until(lambda: bench.link(a).pong.other_tokens == 500)
    await bench.add("s")
    await bench.placed(b, "s")
    await until(lambda: b.last_ping == wire.Ping(9), "the replica learns what is outstanding: 3 prompt + 6 output")
    await bench.finished("s")


async def test_long_answers_pass_a_risky_replica_over_for_as_long_as_it_is_one(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    bench.client.set_members([replace_risky(a.member), b.member])
    before_s = bench.link(a).pong_s
    await until(lambda: bench.link(a).pong_s > before_s + 0.05, "signs of life do not end it")
    await bench.add("short", max_tokens=1023)
    await bench.placed(a, "short")
    await bench.add("short2", prompt=[1] * 200, max_tokens=1023)
    await bench.placed(b, "short2")  # a: 1026, b: 1223
    await bench.add("long", max_tokens=1024)
    await bench.placed(b, "short2", "long")
    bench.client.set_members([dataclasses.replace(a.member, risky_for_s=0.01), b.member])
    await until(lambda: not bench.link(a).load.is_risky)
    await bench.add("long2", max_tokens=1024)
    await bench.placed(a, "short", "long2")
    await bench.finished("short", "short2", "long", "long2")


async def test_answers_that_may_be_long_and_never_are_go_anywhere(bench: Bench) -> None:
    a = await bench.start("a")
    for i in range(MIN_ANSWERS):
        await bench.add(f"s{i}", max_tokens=4)
    await bench.finished(*(f"s{i}" for i in range(MIN_ANSWERS)))
    await bench.start("b")
    bench.client.set_members([replace_risky(a.member), bench.replicas["b"].member])
    await bench.add("s", max_tokens=2000)  # as many as there may be; those before it had 4
    await bench.placed(a, "s")
    await bench.finished("s")


async def test_without_a_replica_a_stream_is_held_and_placed_when_one_links(bench: Bench) -> None:
    for name in ("s", "t"):
        await bench.add(name)
    assert bench.client.num_held == 2
    a = await bench.start("a")
    await bench.placed(a, "s", "t")
    assert bench.client.num_held == 0
    await bench.finished("s", "t")


async def test_a_lost_fleet_holds_its_streams_for_the_next_replica(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await bench.kill(a)
    await until(lambda: bench.client.num_held == 1)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await bench.finished("s")


async def test_a_stream_held_too_long_is_failed() -> None:
    async with make_bench(hold_timeout_s=0.0) as bench:
        await bench.add("s")
        await bench.ended("s")
        assert bench.failed("s")
        assert bench.client.counts.expired == 1
        assert bench.client.num_held == 0


async def test_a_held_stream_can_be_aborted(bench: Bench) -> None:
    await bench.add("s")
    await bench.client.abort(["s"])
    assert (bench.client.num_held, bench.client.num_streams) == (0, 0)
    a = await bench.start("a")
    await bench.add("t")
    await bench.placed(a, "t")
    await bench.finished("t")
    assert [request.request_id for request in a.added] == ["t"]
