"""A profile of an engine: what it wraps and puts back, when it ends, and what it tells of a step."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness.live import eventually

from kervan.config.profile import ENGINE_FILE, ProfileAsk
from kervan.fleet.step_clock import StepClock
from kervan.fleet.vllm import profiling
from kervan.fleet.wrapped import Wrapped
from kervan.profile import summary


class Engine:
    """As much of vLLM's core as a profile touches: each step takes one request's next token."""

    def __init__(self) -> None:
        self.requests = {"a": SimpleNamespace(num_computed_tokens=4, num_prompt_tokens=4)}
        self.scheduler = SimpleNamespace(
            requests=self.requests,
            schedule=lambda: SimpleNamespace(num_scheduled_tokens={"a": 1}),
            update_from_output=lambda: None,
        )
        self.model_executor = SimpleNamespace(collective_rpc=self._call_workers)
        self.answers = {profiling.begin_in_worker: ["", ""], profiling.end_in_worker: ["", ""]}
        self.calls: list[Callable[..., Any]] = []
        self.expected_s: list[float] = []
        self.clock = StepClock()
        self.num_handled = 0

    def _call_workers(self, method: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[str]:
        self.calls.append(method)
        self.expected_s.append(self.clock.expected_s())
        return self.answers[method]

    def has_work(self) -> bool:
        return bool(self.requests)

    def _process_input_queue(self) -> None:
        self.num_handled += 1

    def _process_engine_step(self) -> bool:
        self.scheduler.schedule()
        self.scheduler.update_from_output()
        return True


def begun(engine: Engine, directory: Path, **changes: Any) -> profiling.StepProfile:
    ask = ProfileAsk(str(directory), **{"for_s": 60.0, "max_steps": 3, **changes})
    profile = profiling.StepProfile(engine, ask, engine.clock, lambda: None)
    profile.begin()
    return profile


def told(directory: Path) -> dict[str, Any]:
    eventually((directory / ENGINE_FILE).exists, "the engine's record is there", 10, 0.01)
    found: dict[str, Any] = json.loads((directory / ENGINE_FILE).read_text())
    return found


def test_a_profile_ends_after_its_steps_and_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    engine = Engine()
    before = dict(vars(engine.scheduler))
    profile = begun(engine, tmp_path)
    for _ in range(5):
        engine._process_input_queue()
        engine._process_engine_step()
    assert profile.is_over and engine.calls == [profiling.begin_in_worker, profiling.end_in_worker]
    assert vars(engine.scheduler) == before
    assert not {"_process_input_queue", "_process_engine_step"} & vars(engine).keys()
    found = told(tmp_path)
    assert (found["num_steps"], found["ended_by"], found["problem"], engine.num_handled) == (3, "steps", "", 5)
    names = [name for name, *_ in found["spans"]]
    assert (names.count("schedule"), names.count("step"), names.count("update requests")) == (3, 3, 3)
    assert all(found["begin_ns"] <= begin <= end for _, begin, end, _ in found["spans"])
    assert found["spans"][names.index("schedule")][3] == {
        "sequences": 1, "context_tokens": 4, "prefill_tokens": 0, "prefill_pairs": 0
    }  # fmt: skip


def test_until_the_trace_is_written_a_long_step_is_expected_and_not_after(tmp_path: Path) -> None:
    engine = Engine()
    profile = begun(engine, tmp_path)
    profile.end()
    profile.end()
    assert engine.expected_s == [profiling.STANDSTILL_S] * 2 and engine.clock.expected_s() == 0
    assert told(tmp_path)["ended_by"] == "time"


def test_an_engine_without_work_is_told_as_such(tmp_path: Path) -> None:
    engine = Engine()
    engine.requests.clear()
    profile = begun(engine, tmp_path)
    time.sleep(0.01)
    profile.end()
    (span,) = told(tmp_path)["spans"]
    assert span[0] == "no work" and span[2] - span[1] >= 10_000_000


def test_the_time_is_over_without_a_step_too(tmp_path: Path) -> None:
    engine, woken = Engine(), []
    profile = profiling.StepProfile(engine, ProfileAsk(str(tmp_path), 0.01, 9), engine.clock, lambda: woken.append(1))
    profile.begin()
    eventually(lambda: woken, "the timer has gone off", 10, 0.01)
    profile.end()


def test_what_a_worker_says_is_told_and_the_rest_is_recorded(tmp_path: Path) -> None:
    engine = Engine()
    engine.answers[profiling.begin_in_worker] = ["", "no profiler here"]
    profile = begun(engine, tmp_path, has_ranges=False)
    engine._process_engine_step()
    profile.end()
    found = told(tmp_path)
    assert found["problem"] == "no profiler here" and [name for name, *_ in found["spans"]] == ["take requests", "step"]


def test_nothing_that_goes_wrong_in_a_profile_ends_the_engine(tmp_path: Path) -> None:
    engine = Engine()
    engine.requests["a"] = SimpleNamespace()
    del engine.answers[profiling.end_in_worker]
    begun(engine, tmp_path, max_steps=1)
    assert engine._process_engine_step() and engine._process_engine_step()
    found = told(tmp_path)
    assert found["problem"].startswith("it could not be ended: ")
    assert [facts for name, *_, facts in found["spans"] if name == "schedule"] == [{}]
    assert engine.clock.expected_s() == 0


def test_whoever_asked_may_be_gone_when_it_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    begun(engine, tmp_path / "gone").end()
    eventually(lambda: "could not be written" in caplog.text, "it is logged", 10, 0.01)


def test_who_is_refused_hears_why(tmp_path: Path) -> None:
    profiling.refuse(ProfileAsk(str(tmp_path), 1.0, 1), "another one runs")
    found = told(tmp_path)
    assert (found["problem"], found["num_steps"], found["spans"]) == ("another one runs", 0, [])
    engine = summary.engine_summary(found, None)  # of an engine that recorded nothing, the rest can be told
    assert engine.batch.num_steps == 0 and engine.host_shares == {"other": 1.0}


@pytest.mark.parametrize(
    ("computed", "prompt", "tokens", "expected"),
    [
        (11, 10, 1, (1, 11, 0, 0)),  # the 11th is computed now: it looks at itself and the 10 before
        (10, 10, 10, (0, 0, 10, 55)),  # 1 + 2 + ... + 10
        (8, 10, 4, (0, 0, 4, 26)),  # the second chunk of a prompt: 5 + 6 + 7 + 8
        (14, 10, 14, (0, 0, 14, 105)),  # moved here with 4 generated tokens: a prefill of all
        (10, 10, 1, (1, 10, 0, 0)),  # the last of a prompt whose rest was cached: one token, like a decode
    ],
)
def test_what_a_step_computes(computed: int, prompt: int, tokens: int, expected: tuple[int, ...]) -> None:
    request = SimpleNamespace(num_computed_tokens=computed, num_prompt_tokens=prompt)
    assert tuple(profiling.batch_of({"a": tokens, "gone": 3}, {"a": request}).values()) == expected


def test_methods_are_wrapped_on_the_object_and_come_back() -> None:
    class Owner:
        def of_class(self) -> int:
            return 1

    owner = Owner()
    owner.own = lambda: 2  # type: ignore[attr-defined]
    wrapped = Wrapped()
    for name in ("of_class", "own", "missing"):
        wrapped.wrap(owner, name, lambda method: lambda: method() + 10)
    wrapped.wrap(owner, "own", lambda method: lambda: method() + 100)
    assert (owner.of_class(), owner.own(), Owner().of_class()) == (11, 112, 1)  # type: ignore[attr-defined]
    wrapped.restore()
    assert (owner.of_class(), owner.own(), vars(owner).keys()) == (1, 2, {"own"})  # type: ignore[attr-defined]
