"""A replica under load: nothing is lost, the pool holds, and shortcuts change no time."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.facts.layout import Layout
from kervan.plan import engine, serving
from kervan.plan.constants import Constants
from kervan.plan.serving import Ask
from kervan.plan.step_time import StepTime

MODELS = Path(__file__).parents[2] / "benchmarks/models"


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


GPU = hardware.gpu("H200")
SPEC = parse(config("llama3-8b"), "8b")
LIMITS = engine.limits(SPEC, GPU, {})
TIMES = {pp: StepTime(SPEC, Layout(pp=pp), GPU, LIMITS, Constants()) for pp in (1, 2, 4)}
ROOM = 900_000


def closed(
    streams: int, *, pp: int = 1, count: int = 64, room: int = ROOM, seed: int = 0, **more: int
) -> serving.Served:
    return serving.closed_loop(
        TIMES[pp], serving.fixed(count, 512, 64), streams=streams, kv_tokens=room, seed=seed, **more
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 60)), min_size=1, max_size=30),
    st.integers(1, 30), st.sampled_from([1, 2, 4]), st.integers(3100, 9000),
)  # fmt: skip
def test_every_request_is_answered_in_any_pool(
    lengths: list[tuple[int, int]], streams: int, pp: int, room: int
) -> None:
    asks = [Ask(0.0, prompt, answer) for prompt, answer in lengths]
    found = serving.closed_loop(TIMES[pp], asks, streams=streams, kv_tokens=room)
    assert found.is_stable
    assert sorted(a.output_tokens for a in found.answers) == sorted(answer for _, answer in lengths)
    assert all(a.sent_s < a.first_s <= a.last_s for a in found.answers)


def test_a_full_pool_preempts_and_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    compose = serving._Replica._compose

    def watched(self: serving._Replica, now_s: float) -> object:
        step = compose(self, now_s)
        most.append(self.held_tokens)
        assert self.held_tokens >= 0
        return step

    monkeypatch.setattr(serving._Replica, "_compose", watched)
    asks = serving.fixed(24, 100, 400)
    found = serving.closed_loop(TIMES[1], asks, streams=24, kv_tokens=3000)
    assert found.is_stable
    assert found.preemptions > 0
    assert len(found.answers) == 24
    assert max(most) <= 3000


def test_more_streams_give_more_tokens_while_nothing_is_full() -> None:
    rates = [closed(streams, count=4 * streams).out_tok_s for streams in (1, 4, 16, 64)]
    assert rates == sorted(rates)
    assert rates[-1] < 64 * rates[0]


def test_a_seed_fixes_the_run() -> None:
    assert closed(8, seed=3) == closed(8, seed=3)
    assert closed(8, seed=3) != closed(8, seed=4)


@pytest.mark.parametrize("pp", [1, 2])
def test_steps_taken_together_change_no_time(pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together = closed(16, pp=pp)
    monkeypatch.setattr(serving._Replica, "_repeats", lambda *_: 1)
    single = closed(16, pp=pp)
    assert together.out_tok_s == pytest.approx(single.out_tok_s, rel=1e-3)
    assert together.tpot_s(0.5) == pytest.approx(single.tpot_s(0.5), rel=2e-3)
    assert together.ttft_s(0.5) == pytest.approx(single.ttft_s(0.5), rel=2e-2)


def test_stages_do_nothing_for_one_stream() -> None:
    assert closed(1, pp=4, count=4).out_tok_s < 1.01 * closed(1, count=4).out_tok_s
    assert closed(1, pp=2, count=4).tpot_s(0.5) > 0.95 * closed(1, count=4).tpot_s(0.5)


def test_an_open_loop_waits_above_its_capacity() -> None:
    slow, fast = (
        serving.open_loop(TIMES[1], serving.poisson(200, rate, 512, 64), kv_tokens=ROOM) for rate in (5.0, 5000.0)
    )
    assert len(slow.answers) == len(fast.answers) == 200
    assert slow.requests_s == pytest.approx(5.0, rel=0.2)
    assert fast.requests_s < 500
    assert fast.ttft_s(0.5) > 5 * slow.ttft_s(0.5)


def test_frontends_share_the_prompts() -> None:
    many, one = closed(64, frontends=8), closed(64)
    assert many.ttft_s(0.0) < one.ttft_s(0.0)  # the first prompt passes sooner
    assert many.duration_s < one.duration_s
