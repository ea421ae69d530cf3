"""Profiles an engine that runs: torch's profiler in the place that vLLM has for one, made when it is asked for.

vLLM makes its profiler only in an engine that was started with `--profiler-config`. Its worker looks at its attribute
`profiler` in each step, so a profiler that is put there later works as well, and an engine that nobody profiles pays
nothing. What is named in the trace is wrapped when a profile begins, and put back when it ends.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kervan.config.profile import ENGINE_FILE, TRACE_FILE, ProfileAsk
from kervan.fleet.step_clock import StepClock
from kervan.fleet.wire import PING_PERIOD_S
from kervan.fleet.wrapped import Wrapped

logger = logging.getLogger(__name__)

# An engine stands still while torch's profiler starts (on a GPU, CUPTI is loaded) and while it writes its trace, maybe
# without a word to its gateways. They hear of it before, with the next PONG, and are patient until it is over.
STANDSTILL_S = 20.0
NOTICE_S = PING_PERIOD_S + 0.1
MAX_SPANS = 50_000  # of a profile; a step has four
# Methods of vLLM's model runners, V1 and V2, and what they do. Those that a runner does not have are left out.
RANGES = {
    "_prepare_inputs": "prepare inputs",
    "prepare_inputs": "prepare inputs",
    "_model_forward": "forward",
    "_sample": "sampling",
    "sample": "sampling",
    "_bookkeeping_sync": "bookkeeping",
}


# ---- in the worker of rank 0


class WorkerProfile:
    """Torch's profiler in a worker. The same thread begins and ends it, as torch wants."""

    def __init__(self, worker: Any, path: Path, *, has_ranges: bool) -> None:
        self._worker = worker
        self._path = path
        self._has_ranges = has_ranges
        self._wrapped = Wrapped()
        self._profiler: Any = None

    def begin(self) -> str:
        """Empty, or why there is none."""
        import torch
        from vllm.config.profiler import ProfilerConfig
        from vllm.profiler.wrapper import TorchProfilerWrapper

        if getattr(self._worker, "profiler", None) is not None:
            return "a profile that was begun with /start_profile is there already; end it with /stop_profile"
        config = ProfilerConfig(
            profiler="torch",
            torch_profiler_dir=str(self._path.parent),
            torch_profiler_with_stack=False,
            torch_profiler_use_gzip=False,
            torch_profiler_dump_cuda_time_total=False,
            ignore_frontend=True,
        )
        self._profiler = TorchProfilerWrapper(
            config,
            worker_name="kervan",
            local_rank=1,  # not 0: it would print tables to the log
            activities=["CPU", "CUDA"] if torch.cuda.is_available() else ["CPU"],
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(self._path)),
        )
        self._profiler.dump_cpu_time_total = False  # a table of all operations, which takes Python seconds
        self._profiler.start()
        if not self._profiler._running:
            return "torch's profiler did not start; the log of the replica says why"
        if self._has_ranges:
            for name, range_name in RANGES.items():
                self._wrapped.wrap(self._worker.model_runner, name, _named(range_name))
        self._worker.profiler = self._profiler
        return ""

    def end(self) -> str:
        """Write the trace; empty, or why there is none."""
        self._worker.profiler = None
        self._wrapped.restore()
        if self._profiler is None or not self._profiler._running:
            return "torch's profiler did not run"
        self._profiler.stop()
        self._profiler = None
        return "" if self._path.exists() else "torch's profiler wrote no trace; the log of the replica says why"


def _named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around a method: a range in torch's trace, and on a GPU an NVTX range for Nsight Systems."""
    import torch

    nvtx = torch.cuda.nvtx.range if torch.cuda.is_available() else (lambda _: nullcontext())

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(name), nvtx(name):
                return method(*args, **kwargs)

        return call

    return around


def _innermost(worker: Any) -> Any:
    """vLLM's executors call with a wrapper, whose steps look at the worker that it wraps."""
    return vars(worker).get("worker", worker)


def begin_in_worker(worker: Any, directory: str, has_ranges: bool) -> str:
    """For `collective_rpc`; only rank 0 records. Empty, or why it does not."""
    worker = _innermost(worker)
    if worker.rank != 0:
        return ""
    profile = WorkerProfile(worker, Path(directory) / TRACE_FILE, has_ranges=has_ranges)
    problem = profile.begin()
    if not problem:
        worker.kervan_profile = profile
    return problem


def end_in_worker(worker: Any) -> str:
    """For `collective_rpc`; the reverse."""
    worker = _innermost(worker)
    profile = getattr(worker, "kervan_profile", None)
    if profile is None:
        return ""
    worker.kervan_profile = None
    told: str = profile.end()
    return told


# ---- in the engine process


class StepProfile:
    """One profile of an engine core, begun and ended by the thread that steps.

    `wake`: from any thread, have that thread call `end`.
    """

    def __init__(self, core: Any, ask: ProfileAsk, clock: StepClock, wake: Callable[[], None]) -> None:
        self._core = core
        self._ask = ask
        self._clock = clock
        self._wrapped = Wrapped()
        self._spans: list[tuple[str, int, int, dict[str, int]]] = []
        self._timer = threading.Timer(ask.for_s, wake)
        self._timer.daemon = True
        self._began_ns = 0
        self._num_steps = 0
        self._problem = ""
        self._open: tuple[str, int] | None = None  # what the loop does between two steps, and since when
        self.is_over = False

    def begin(self) -> None:
        """Start the profiler in the worker, and name what this process does."""
        self._clock.hold(STANDSTILL_S)
        answers = self._core.model_executor.collective_rpc(
            begin_in_worker, args=(self._ask.directory, self._ask.has_ranges)
        )
        self._clock.stepped()
        self._problem = next(filter(None, answers), "")
        self._began_ns = time.time_ns()
        core = self._core
        self._open = self._between_steps(), self._began_ns  # vLLM's loop takes requests while it begins a profile
        if self._ask.has_ranges:
            self._wrapped.wrap(core.scheduler, "schedule", self._around_schedule)
            self._wrapped.wrap(core.scheduler, "update_from_output", self._timed("update requests"))
            self._wrapped.wrap(core, "_process_input_queue", self._around_input)
        self._wrapped.wrap(core, "_process_engine_step", self._around_step)
        self._timer.start()

    def end(self) -> None:
        """Stop, and write what was recorded. Once; further calls do nothing.

        Called within a step too, where an exception would end the engine: one of the worker is told to who asked.
        """
        if self.is_over:
            return
        self.is_over = True
        self._timer.cancel()
        ended_ns = time.time_ns()
        self._wrapped.restore()
        self._close_open()
        answers = []
        try:
            answers = self._core.model_executor.collective_rpc(end_in_worker)
        except Exception as error:
            logger.exception("the profiler could not be ended")
            self._problem = self._problem or f"it could not be ended: {error}"
        self._clock.stepped()
        self._clock.hold(0.0)
        written_ns = time.time_ns()
        self._problem = self._problem or next(filter(None, answers), "")
        threading.Thread(target=self._write, args=(ended_ns, written_ns), daemon=True, name="profile").start()

    def _write(self, ended_ns: int, written_ns: int) -> None:
        told = {
            "begin_ns": self._began_ns,
            "end_ns": ended_ns,
            "standstill_s": (written_ns - ended_ns) / 1e9,
            "num_steps": self._num_steps,
            "ended_by": "steps" if self._num_steps >= self._ask.max_steps else "time",
            "problem": self._problem,
            "pid": os.getpid(),
            "spans": self._spans,
        }
        _write(self._ask, told)

    def _note(self, name: str, begin_ns: int, facts: dict[str, int]) -> None:
        if len(self._spans) < MAX_SPANS:
            self._spans.append((name, begin_ns, time.time_ns(), facts))

    def _timed(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin_ns = time.time_ns()
                try:
                    return method(*args, **kwargs)
                finally:
                    self._note(name, begin_ns, {})

            return call

        return around

    def _around_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin_ns = time.time_ns()
            output = schedule(*args, **kwargs)
            try:
                facts = batch_of(output.num_scheduled_tokens, self._core.scheduler.requests)
            except AttributeError:  # a request of another kind than those known: an engine must not end for it
                facts = {}
            self._note("schedule", begin_ns, facts)
            return output

        return call

    def _around_input(self, process: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            self._open = self._between_steps(), time.time_ns()
            result = process()
            self._close_open()
            return result

        return call

    def _between_steps(self) -> str:
        return "take requests" if self._core.has_work() else "no work"

    def _close_open(self) -> None:
        if self._open is not None:
            (name, begin_ns), self._open = self._open, None
            self._note(name, begin_ns, {})

    def _around_step(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            self._close_open()
            begin_ns = time.time_ns()
            result = step()
            self._note("step", begin_ns, {})
            self._num_steps += 1
            if self._num_steps >= self._ask.max_steps:
                self.end()
            return result

        return call


def refuse(ask: ProfileAsk, problem: str) -> None:
    """Tell who asked why there is no profile."""
    now_ns = time.time_ns()
    told = {"begin_ns": now_ns, "end_ns": now_ns + 1, "standstill_s": 0.0, "num_steps": 0, "ended_by": "time"}
    _write(ask, told | {"problem": problem, "pid": os.getpid(), "spans": []})


def _write(ask: ProfileAsk, told: dict[str, Any]) -> None:
    directory = Path(ask.directory)
    try:
        part = directory / f"{ENGINE_FILE}.part"
        part.write_text(json.dumps(told))
        part.rename(directory / ENGINE_FILE)  # whoever waits for it sees it whole
    except OSError as error:  # who asked has gone, and its directory
        logger.warning("the profile could not be written: %s", error)


def batch_of(num_tokens: dict[str, int], requests: dict[str, Any]) -> dict[str, int]:
    """What a step computes: `sim.step_time.Batch` in numbers, of the requests as they are after it was scheduled."""
    sequences = context = prefill = pairs = 0
    for request_id, tokens in num_tokens.items():
        request = requests.get(request_id)
        if request is None:
            continue
        before = request.num_computed_tokens - tokens
        if tokens > 1 or before < request.num_prompt_tokens - 1:
            prefill += tokens
            pairs += tokens * before + tokens * (tokens + 1) // 2
        else:
            sequences += 1
            context += before + 1
    return {"sequences": sequences, "context_tokens": context, "prefill_tokens": prefill, "prefill_pairs": pairs}
