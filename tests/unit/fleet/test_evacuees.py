"""What the evacuation policy hears from a gateway, by hand-worked tables."""

import time
from typing import Any

import pytest

from kervan.fleet import evacuees, wire
from kervan.fleet.evacuees import DEFAULT_PREFILL_TOKENS_PER_S, MIN_PROMPTS, PrefillSpeed
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
    leaving = link("a", stream("s", 1000, 100), stream("t", 50, 0, gave_token=False))
    leaving.leaves_at_s = time.monotonic() + 30
    leaving.leaving_since_s = time.monotonic() - 2
    # 10 run and 2 wait there, a quarter of the KV cache is full, and another gateway evacuates too.
    busy = link("b", stream("u", 400, 8, gave_token=False), pong=wire.Pong(10, 2, 0.25, 0, False, num_gateways=2))
    found = evacuees.state(leaving, [busy], lengths=lengths, prefill_tokens_per_s=10_000)
    assert found.deadline_s == pytest.approx(30, abs=1)
    assert found.elapsed_s == pytest.approx(2, abs=1)
    assert found.source_s_per_token is None
    s, t = found.streams
    assert (s.stream_id, s.context_tokens, s.max_remaining_tokens, s.gave_token) == ("s", 1100, 200, True)
    assert s.expected_remaining_tokens == pytest.approx(100, rel=0.15)  # answers get about 200 tokens long
    assert t == LeavingStream("t", 50, 300, t.expected_remaining_tokens, gave_token=False)
    assert found.targets == [TargetReplica("b", 26, 5592, 5_000, 408, 0.0, 2048)]  # 52/2; 16,000*0.75/2 - 408


def test_a_replica_that_stands_still_has_no_pace() -> None:
    source = link("a")
    assert source.pace_s(time.monotonic()) is None
    source.stepped()
    for _ in range(30):
        source.stepped()
    now_s = time.monotonic()
    assert source.pace_s(now_s) == pytest.approx(0, abs=0.1)
    assert source.pace_s(now_s + 5) is None


def test_prefill_speed_is_that_of_prompts_that_did_not_wait() -> None:
    speed = PrefillSpeed()
    assert speed.tokens_per_s == DEFAULT_PREFILL_TOKENS_PER_S
    for _ in range(MIN_PROMPTS - 1):
        speed.observe(1000, 1.0)
    speed.observe(100, 0.001)  # too short to tell
    assert speed.tokens_per_s == DEFAULT_PREFILL_TOKENS_PER_S
    speed.observe(1000, 0.1)
    assert speed.tokens_per_s == 10_000
    speed.observe(1000, 5.0)
    assert speed.tokens_per_s == pytest.approx(9_800)
    for _ in range(500):
        speed.observe(1000, 0.5)
    assert speed.tokens_per_s == pytest.approx(2_000)
