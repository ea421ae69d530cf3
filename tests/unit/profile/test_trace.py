"""Traces of torch's profiler: read, cut into steps, and the arithmetic of intervals."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.errors import EngineError
from kervan.profile import trace as traces
from kervan.profile.trace import Event

REAL = Path(__file__).parents[2] / "data" / "profile" / "cpu-vllm032.json.gz"
intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda t: (float(min(t)), float(max(t)))))


def test_a_real_trace_of_vllm_on_cpu_is_read_with_its_steps() -> None:
    found = traces.read(REAL.read_bytes())
    steps = traces.steps(found)
    assert found.gpu == "" and found.gpu_work == []
    assert len(steps) >= 2 and all(step.tokens > 0 and step.end_us > step.begin_us for step in steps)
    assert {event.name for event in found.of(traces.RANGE)} >= {"forward", "sampling", "prepare inputs", "bookkeeping"}


def test_what_is_no_trace_is_an_error_that_says_what_to_do() -> None:
    for data in (b"", b"{", b"[]", b"\x1f\x8bbroken", gzip.compress(b"{}")[:-9], b'{"traceEvents": 3}'):
        with pytest.raises(EngineError, match="profile fewer --steps"):
            traces.read(data)


@pytest.mark.parametrize(
    ("name", "kind", "tokens"),
    [
        ("execute_context_1(256)_generation_3(3)", "mixed", 259),
        ("execute_context_0(0)_generation_64(64)", "decode", 64),
        ("execute_context_2(2048)_generation_0(0)", "prefill", 2048),
        ("execute_context_2(sq2048sk2048)_generation_0(0)", None, 0),
    ],
)
def test_steps_are_what_vllm_calls_them(name: str, kind: str | None, tokens: int) -> None:
    events = [{"ph": "X", "cat": "user_annotation", "name": name, "ts": 1, "dur": 2}]
    found = traces.steps(traces.read(json.dumps({"traceEvents": events}).encode()))
    assert [(step.kind, step.tokens) for step in found] == ([(kind, tokens)] if kind else [])


def test_self_time_is_without_what_is_within_on_the_same_thread() -> None:
    # 0..10 holds 1..4 and 5..9, which holds 6..8; another thread's 2..3 is nobody's child.
    events = [Event("a", ts=0, dur=10), Event("b", ts=1, dur=3), Event("x", ts=2, dur=1, tid=7)]
    events += [Event("c", ts=5, dur=4), Event("d", ts=6, dur=2)]
    assert traces.self_times_us(events) == {0: 3, 1: 3, 2: 1, 3: 2, 4: 2}


def test_intervals_by_hand() -> None:
    assert traces.union([(3, 4), (1, 2), (1.5, 3), (9, 9)]) == [(1, 4)]
    assert traces.gaps([(1, 2), (4, 9)], (0, 5)) == [(0, 1), (2, 4)]
    assert traces.gaps([], (0, 5)) == [(0, 5)]
    assert traces.overlap([(0, 2), (3, 5)], [(1, 4)]) == 2


@given(intervals, intervals)
def test_overlap_and_gaps_count_every_moment_once(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    one, other, window = traces.union(first), traces.union(second), (10.0, 40.0)
    both = {t for t in range(50) if any(a <= t < b for a, b in one) and any(a <= t < b for a, b in other)}
    assert traces.overlap(one, other) == len(both)
    inside = traces.length(traces.within(one, window))
    assert inside + traces.length(traces.gaps(one, window)) == 30
