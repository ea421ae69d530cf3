"""One engine replica on a virtual clock: vLLM's scheduler on paper, and the step times of the planner.

Async scheduling is followed as the planner follows it: a step is composed while the one before it runs, so a request
that comes in meanwhile waits for two.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol

from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout
from kervan.sim.constants import Constants
from kervan.sim.limits import BLOCK_TOKENS, EngineLimits
from kervan.sim.scheduler import ScheduledStep
from kervan.sim.step_time import Batch, StepTime
from kervan.simulate.runs import RunScheduler
from kervan.simulate.stream import SimulatedStream


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What each replica of a fleet is. `scale`: its steps take so many times as long as the model of `spec` says.

    `kv_tokens`: of the KV cache of a replica.
    """

    spec: ModelSpec
    layout: Layout
    gpu: Gpu
    limits: EngineLimits
    constants: Constants
    kv_tokens: int
    network_bytes_s: float = 0.0
    scale: float = 1.0

    @staticmethod
    def of(times: StepTime, kv_tokens: int) -> "EngineFacts":
        """Those of a replica that the planner has looked at; they can be pickled."""
        return EngineFacts(
            spec=times.spec,
            layout=times.layout,
            gpu=dataclasses.replace(times.gpu, sources=dict(times.gpu.sources)),
            limits=times.limits,
            constants=times.constants,
            kv_tokens=kv_tokens,
            network_bytes_s=times.network_bytes_s,
        )

    def step_time(self) -> StepTime:
        """The planner's step times, unscaled."""
        return StepTime(
            self.spec, self.layout, self.gpu, self.limits, self.constants, network_bytes_s=self.network_bytes_s
        )

    def scaled(self, scale: float) -> "EngineFacts":
        """The same with other times."""
        return dataclasses.replace(self, scale=scale)


class EngineTimes(Protocol):
    """How long the steps of a replica take, and its limits. `context_token_s`: longer for each token of context."""

    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    context_token_s: float

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step."""
        ...


class PlannedTimes:
    """The planner's, of all replicas of one kind: what was computed once is remembered."""

    def __init__(self, facts: EngineFacts) -> None:
        times = facts.step_time()
        self.num_blocks = facts.kv_tokens // BLOCK_TOKENS
        self.max_num_seqs, self.max_num_batched_tokens = times.max_num_seqs, times.max_num_batched_tokens
        self.context_token_s = facts.scale * sum(times.context_token_s(index) for index in range(facts.layout.pp))
        self._scale = facts.scale
        self._total_s = times.stages[0].total_s if facts.layout.pp == 1 else times.total_s

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step."""
        return self._scale * self._total_s(batch)


class SimulatedEngine:
    """The engine of one replica. `end_s`: when its step or run under way ends; infinite without work.

    Whoever has the clock calls `end` and then `begin` at that time, and `add` whenever a stream comes; each may change
    `end_s`.
    """

    __slots__ = (
        "_inbox",
        "_last_begin_s",
        "_times",
        "begin_s",
        "end_s",
        "first_step_s",
        "grows_s",
        "num_steps",
        "num_tokens",
        "run",
        "scheduler",
        "seen_preempted",
    )  # fmt: skip

    def __init__(self, times: EngineTimes) -> None:
        self._times = times
        self.scheduler: RunScheduler[SimulatedStream] = RunScheduler(
            max_num_seqs=times.max_num_seqs,
            max_num_batched_tokens=times.max_num_batched_tokens,
            num_blocks=times.num_blocks,
        )
        self.run: ScheduledStep[SimulatedStream] | None = None
        self.begin_s = 0.0
        self.end_s = math.inf
        self.first_step_s = self.grows_s = 0.0  # of the run: its first step, and how much longer each next one is
        self.num_tokens = 0  # generated in steps that are over
        self.num_steps = 0  # that are over
        self._last_begin_s = 0.0
        self._inbox: list[tuple[float, SimulatedStream]] = []
        self.seen_preempted = 0

    # ---- streams

    def add(self, stream: SimulatedStream, now_s: float) -> None:
        """A stream comes in."""
        run = self.run
        if run is None:
            self.scheduler.add(stream)
            self.begin(now_s)
            return
        self._inbox.append((now_s, stream))
        if run.repeats > 1 and now_s < self._last_begin_s and not self.scheduler.waiting:
            # The step under way and the one that is composed already come first.
            self.cut(self.steps_done(now_s) + 2)

    def remove(self, stream: SimulatedStream, now_s: float) -> bool:
        """A stream leaves; False for one that gets its last token in the step under way, which comes all the same."""
        for place, (_, waiting) in enumerate(self._inbox):
            if waiting is stream:
                del self._inbox[place]
                return True
        run = self.run
        if run is not None:
            self.cut(self.steps_done(now_s) + 1)
            if stream in run.lasts:
                return False
            if stream in run.firsts:
                run.firsts.remove(stream)
                self.scheduler.remove(stream)
                stream.remaining_tokens += 1  # its first token here never comes
                return True
            if run.chunk is stream:
                run.chunk = None
        self.scheduler.remove(stream)
        return True

    def cut(self, repeats: int) -> None:
        """The run under way has so many steps at most."""
        run = self.run
        if run is not None and repeats < run.repeats:
            self.scheduler.cut(run, max(1, repeats))
            self._set_end(run)

    # ---- what is so now

    def steps_done(self, now_s: float) -> int:
        """Steps of the run under way that are over."""
        run = self.run
        if run is None or run.repeats == 1:
            return 0
        passed_s, first_s, grows_s = now_s - self.begin_s, self.first_step_s, self.grows_s
        if grows_s * run.repeats < 1e-6 * first_s:
            return min(run.repeats - 1, int(passed_s / first_s))
        linear_s = first_s - grows_s / 2
        return min(run.repeats - 1, int((math.sqrt(linear_s * linear_s + 2 * grows_s * passed_s) - linear_s) / grows_s))

    def group_steps(self, now_s: float) -> int:
        """Steps that are over, of the sequences that decode: a stream's `end_step` is one of these numbers."""
        run = self.run
        steps = self.scheduler.num_group_steps
        return steps if run is None else steps - run.repeats + self.steps_done(now_s)

    def step_s(self) -> float | None:
        """Seconds of the step under way; None without one."""
        return None if self.run is None else self.first_step_s

    def context_tokens(self, now_s: float) -> int:
        """In the KV cache, of sequences that decode."""
        run = self.run
        size, tokens = self.scheduler.decoding
        undone = 0 if run is None else run.repeats - self.steps_done(now_s)
        return max(0, int(tokens) - undone * size)

    def tokens_until(self, now_s: float) -> int:
        """Generated since the start."""
        run = self.run
        return self.num_tokens if run is None else self.num_tokens + self.steps_done(now_s) * run.batch.samples

    def steps_until(self, now_s: float) -> float:
        """Made since the start, the share of the one under way included."""
        run = self.run
        if run is None:
            return self.num_steps
        if run.repeats > 1:
            return self.num_steps + self.steps_done(now_s)
        return self.num_steps + min(1.0, (now_s - self.begin_s) / max(1e-9, self.end_s - self.begin_s))

    # ---- steps

    def end(self) -> ScheduledStep[SimulatedStream]:
        """The run under way is over: what it gave. To be followed by `begin`."""
        run = self.run
        assert run is not None
        self.scheduler.end(run)
        self.num_steps += run.repeats
        self.num_tokens += run.repeats * run.batch.samples
        self.run = None
        return run

    def begin(self, now_s: float) -> None:
        """Compose what comes next, if anything can."""
        if self._inbox:
            self._take_in(self._last_begin_s)
        run = self.scheduler.next_run()
        if run is None and self._inbox:
            self._take_in(now_s)
            run = self.scheduler.next_run()
        self.run = run
        if run is None:
            self.end_s = math.inf
            return
        self.begin_s = now_s
        batch = run.batch
        self.first_step_s = self._times.step_s(batch)
        self.grows_s = batch.sequences * self._times.context_token_s
        self._set_end(run)
        if self._inbox and run.repeats > 1 and not self.scheduler.waiting:
            self.cut(1)

    def newly_preempted(self) -> list[SimulatedStream]:
        """Streams that lost their KV cache since the last call, and wait to be computed again."""
        count = self.scheduler.num_preempted - self.seen_preempted
        if not count:
            return []
        self.seen_preempted = self.scheduler.num_preempted
        waiting = self.scheduler.waiting
        return [waiting[place] for place in range(min(count, len(waiting)))]

    def _take_in(self, until_s: float) -> None:
        count = 0
        for at_s, stream in self._inbox:
            if at_s > until_s:
                break
            self.scheduler.add(stream)
            count += 1
        if count:
            del self._inbox[:count]

    def _set_end(self, run: ScheduledStep[SimulatedStream]) -> None:
        before = run.repeats - 1
        self._last_begin_s = self.begin_s + before * self.first_step_s + self.grows_s * before * (before - 1) / 2
        self.end_s = self._last_begin_s + self.first_step_s + before * self.grows_s
