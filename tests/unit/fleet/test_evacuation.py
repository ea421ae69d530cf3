"""What the evacuation policy hears from a gateway, by hand-worked tables."""

import time
from typing import Any

import pytest

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
    state = evacuation_state(draining, [busy], lengths=lengths, prefill_tokens_per_s=10_000)
    assert state.deadline_s == pytest.approx(30, abs=1)
    assert state.elapsed_s == pytest.approx(2, abs=1)
    assert state.source_s_per_token is None
    s, t = state.streams
    assert (s.stream_id, s.context_tokens, s.max_remaining_tokens, s.gave_token) == ("s", 1100, 200, True)
    assert s.expected_remaining_tokens == pytest.approx(100, rel=0.15)  # answers get about 200 tokens long
    assert t == LeavingStream("t", 50, 300, t.expected_remaining_tokens, gave_token=False)
    assert state.targets == [TargetReplica("b", 26, 5592, 5_000, 408, 0.0, 2048)]  # 52/2; 16,000*0.75/2 - 408


def test_a_replica_that_stands_still_has_no_pace() -> None:
    source = link("a")
    assert source.pace_s(time.monotonic()) is None
    source.stepped()
    for _ in range(30):
        source.stepped()
    now_s = time.monotonic()
    assert source.pace_s(now_s) == pytest.approx(0, abs=0.1)
    assert source.pace_s(now_s + 5) is None
