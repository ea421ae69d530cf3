"""Streams of replicas that drain, and what the evacuation policy hears of them."""

import dataclasses
import time
from typing import Any

import pytest
from harness.live import until
from harness.toy_fleet import Bench

from kervan.fleet import wire
from kervan.fleet.evacuation import evacuation_state
from kervan.fleet.link import Member, ReplicaLink
from kervan.fleet.stream import Stream
from kervan.policy.evacuation import LeavingStream, TargetReplica
from kervan.policy.output_length import MIN_ANSWERS, LengthEstimate
from kervan.policy.routing import ReplicaLoad

FACTS = wire.EngineFacts(
    max_model_len=4096, num_gpu_blocks=1000, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048
)


def link(name: str, *streams: Stream, pong: wire.Pong | None = None) -> ReplicaLink:
    unused: Any = None
    made = ReplicaLink(Member(name, "tcp://h:1"), unused, unused, (), FACTS, 0.0, ReplicaLoad(name, 0))
    made.streams = {stream.wire_id: stream for stream in streams}
    made.pong = pong or made.pong
    return made


def stream(name: str, prompt_tokens: int, generated: int, *, gave_token: bool = True) -> Stream:
    return Stream(name, None, prompt_tokens, 300, generated=[1] * generated, wire_id=name, gave_token=gave_token)


def test_streams_and_targets_as_a_gateway_knows_them() -> None:
    lengths = LengthEstimate()
    for _ in range(MIN_ANSWERS):
        lengths.observe(200)
    draining = link("a", stream("s", 1000, 100), stream("t", 50, 0, gave_token=False))
    draining.drain_deadline_s = time.monotonic() + 30
    draining.draining_since_s = time.monotonic() - 2
    # 10 run and 2 wait there, a quarter of the KV cache is full, and another gateway evacuates too.
    busy = link("b", stream("u", 400, 8, gave_token=False), pong=wire.Pong(10, 2, 0.25, 0, False, num_gateways=2))
    busy.load.queued_tokens = 300  # the prefix cache has the rest, which needs room all the same
    state = evacuation_state(draining, [busy], lengths=lengths, prefill_tokens_per_s=10_000)
    assert state.deadline_s == pytest.approx(30, abs=1)
    assert state.elapsed_s == pytest.approx(2, abs=1)
    assert state.source_s_per_token is None
    s, t = state.streams
    assert (s.stream_id, s.context_tokens, s.max_remaining_tokens, s.gave_token) == ("s", 1100, 200, True)
    assert s.expected_remaining_tokens == pytest.approx(100, rel=0.15)  # answers get about 200 tokens long
    assert t == LeavingStream("t", 50, 300, t.expected_remaining_tokens, gave_token=False)
    assert state.targets == [TargetReplica("b", 26, 5592, 5_000, 300, 0.0, 2048)]  # 52/2; 16,000*0.75/2 - 408


def test_a_replica_that_stands_still_has_no_pace() -> None:
    source = link("a")
    assert source.pace_s(time.monotonic()) is None
    source.stepped()
    for _ in range(30):
        source.stepped()
    now_s = time.monotonic()
    assert source.pace_s(now_s) == pytest.approx(0, abs=0.1)
    assert source.pace_s(now_s + 5) is None


# ---- in the fleet client


async def test_a_draining_replicas_streams_move_and_are_aborted_there(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await a.drain()
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    assert bench.link(a).load.own_tokens == 0
    await bench.add("t")
    await bench.placed(b, "s~1", "t")
    await bench.finished("s", "t")
    counts = bench.client.counts
    assert (counts.broken_links, counts.moves["drained"]) == (0, 1)
    await until(lambda: counts.drain_s.buckets()[-1][1] == 1)


async def test_streams_of_a_draining_replica_go_where_their_prefix_is(bench: Bench) -> None:
    a, b, c = [await bench.start(name) for name in "abc"]
    await bench.add("s", prompt=[7 + n % 50 for n in range(500)], max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    spans = bench.link(a).streams["s"].spans
    assert spans is not None
    bench.link(c).told(spans.hashes[::-1].tobytes())  # another gateway has sent the same prompt there
    await a.drain()
    await bench.placed(c, "s~1")
    assert bench.link(c).load.queued_tokens == 503 - 448
    assert not b.added
    await bench.finished("s")


async def test_the_directory_may_know_of_a_drain_before_the_replica(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    bench.client.set_members([dataclasses.replace(a.member, is_draining=True), b.member])
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await a.drain(is_draining=False)  # an older answer of the replica changes nothing
    await bench.add("t")
    await bench.placed(b, "s~1", "t")
    await bench.finished("s", "t")


async def test_if_only_a_draining_replica_is_left_its_streams_stay_and_new_ones_wait(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 1)
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    await bench.add("new")
    assert bench.client.num_held == 1
    await bench.finished("s")
    assert a.aborted == []
    b = await bench.start("b")
    await bench.placed(b, "new")
    await bench.finished("new")


async def test_streams_move_off_a_draining_replica_when_a_replacement_links(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await bench.finished("s")


async def test_a_stream_that_cannot_move_stays_on_its_draining_replica(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("audio", is_resumable=True)
    await bench.add("s")
    await bench.placed(a, "audio")
    await bench.placed(b, "s")
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    await bench.finished("s", "audio")
    assert a.aborted == []
