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
from kervan.simulate.runs import CachingRunScheduler, RunScheduler
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
    """How long the steps of a replica take, and its limits. `context_token_s`: longer for each token of context.

    `composes_ahead`: a step is composed while the one before it runs (vLLM's async scheduling; a twin has none).
    """

    composes_ahead: bool
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    context_token_s: float

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step."""
        ...


class PlannedTimes:
    """The planner's, of all replicas of one kind: what was computed once is remembered."""

    composes_ahead = True

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
    """The engine of one replica. `end_s`: when its step under way, or the last of `repeats` equal ones, ends; infinite
    without work.

    Whoever has the clock calls `end` and then `begin` at that time, and `add` whenever a stream comes; each may change
    `end_s`.
    """

    __slots__ = (
        "_inbox", "_last_begin_s", "_times", "begin_s", "end_s", "first_step_s", "grows_s", "num_steps", "num_tokens",
        "repeats", "scheduler", "seen_preempted", "step", "steps_per_s",
    )  # fmt: skip

    def __init__(self, times: EngineTimes, *, caches_prefixes: bool = False) -> None:
        self._times = times
        kind: type[RunScheduler[SimulatedStream]] = CachingRunScheduler if caches_prefixes else RunScheduler
        self.scheduler = kind(
            max_num_seqs=times.max_num_seqs,
            max_num_batched_tokens=times.max_num_batched_tokens,
            num_blocks=times.num_blocks,
        )
        self.step: ScheduledStep[SimulatedStream] | None = None
        self.repeats = 1
        self.begin_s = 0.0
        self.end_s = math.inf
        self.first_step_s = self.grows_s = 0.0  # of the first step, and how much longer each next one is
        self.steps_per_s = 0.0  # of several, on average
        self.num_tokens = 0  # generated in steps that are over
        self.num_steps = 0  # that are over
        self._last_begin_s = 0.0
        self._inbox: list[tuple[float, SimulatedStream]] = []
        self.seen_preempted = 0

    # ---- streams

    def add(self, stream: SimulatedStream, now_s: float) -> None:
        """A stream comes in."""
        if self.step is None:
            self.scheduler.add(stream)
            self.begin(now_s)
            return
        self._inbox.append((now_s, stream))
        if self.repeats > 1 and now_s < self._last_begin_s and not self.scheduler.waiting:
            # The step under way and, if one is composed already, that come first.
            self._cut(self.steps_done(now_s) + 1 + self._times.composes_ahead)

    def remove(self, stream: SimulatedStream, now_s: float) -> bool:
        """A stream leaves; False for one that gets its last token in the step under way, which comes all the same."""
        for place, (_, waiting) in enumerate(self._inbox):
            if waiting is stream:
                del self._inbox[place]
                return True
        step = self.step
        if step is not None:
            self._cut(self.steps_done(now_s) + 1)
            self._take_over(step)
            if stream in step.lasts:
                return False
            if stream in step.firsts:
                step.firsts.remove(stream)
                self.scheduler.remove(stream)
                stream.remaining_tokens += 1  # its first token here never comes
                return True
            if step.chunk is stream:
                step.chunk = None
        self.scheduler.remove(stream)
        return True

    def _cut(self, repeats: int) -> None:
        """The step under way is repeated so often at most."""
        step = self.step
        if step is not None and repeats < self.repeats:
            self.repeats = max(step.repeats, repeats)
            self._set_end()

    def _take_over(self, step: ScheduledStep[SimulatedStream]) -> None:
        """Tell the scheduler of all repeats."""
        if self.repeats > step.repeats:
            self.scheduler.extend(step, self.repeats - step.repeats)

    # ---- what is so now

    def steps_done(self, now_s: float) -> int:
        """Of the `repeats` steps, how many are over."""
        if self.repeats == 1 or self.step is None:
            return 0
        passed_s, first_s, grows_s = now_s - self.begin_s, self.first_step_s, self.grows_s
        most = self.repeats - 1
        if grows_s * most < 1e-6 * first_s:
            return min(most, int(passed_s / first_s))
        linear_s = first_s - grows_s / 2
        return min(most, int((math.sqrt(linear_s * linear_s + 2 * grows_s * passed_s) - linear_s) / grows_s))

    def group_steps(self, now_s: float) -> int:
        """Steps that are over, of the sequences that decode: a stream's `end_step` is one of these numbers."""
        return self.begin_steps + self.steps_done(now_s)

    @property
    def begin_steps(self) -> int:
        """The same when the step under way began."""
        step = self.step
        return self.scheduler.num_group_steps - (0 if step is None else step.repeats)

    def step_s(self) -> float | None:
        """Seconds of the step under way; None without one."""
        return None if self.step is None else self.first_step_s

    def context_tokens(self, now_s: float) -> int:
        """In the KV cache, of sequences that decode."""
        size, tokens = self.scheduler.decoding
        undone = 0 if self.step is None else self.step.repeats - self.steps_done(now_s)
        return max(0, int(tokens) - undone * size)

    def tokens_until(self, now_s: float) -> int:
        """Generated since the start."""
        step = self.step
        return self.num_tokens if step is None else self.num_tokens + self.steps_done(now_s) * step.batch.samples

    def steps_until(self, now_s: float) -> float:
        """Made since the start, the share of the one under way included."""
        if self.step is None:
            return self.num_steps
        if self.repeats > 1:
            return self.num_steps + self.steps_done(now_s)
        return self.num_steps + min(1.0, (now_s - self.begin_s) / max(1e-9, self.end_s - self.begin_s))

    # ---- steps

    def end(self) -> ScheduledStep[SimulatedStream]:
        """The step under way and its repeats are over: what they gave. To be followed by `begin`."""
        step = self.step
        assert step is not None
        self._take_over(step)
        self.num_steps += step.repeats
        self.num_tokens += step.repeats * step.batch.samples
        self.step = None
        self.repeats = 1
        return step

    def begin(self, now_s: float) -> None:
        """Compose what comes next, if anything can."""
        if self._inbox:
            self._take_in(self._last_begin_s if self._times.composes_ahead else now_s)
        scheduler = self.scheduler
        step = scheduler.next_step()
        if step is None and self._inbox:
            self._take_in(now_s)
            step = scheduler.next_step()
        self.step = step
        if step is None:
            self.end_s, self.steps_per_s = math.inf, 0.0
            return
        self.begin_s = now_s
        batch = step.batch
        self.first_step_s = self._times.step_s(batch)
        self.grows_s = batch.sequences * self._times.context_token_s
        # What has come meanwhile is in the step after this one, unless something that has no room is before it.
        self.repeats = 1 if self._inbox and not scheduler.waiting else 1 + scheduler.num_alike(step)
        self._set_end()

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

    def _set_end(self) -> None:
        before = self.repeats - 1
        self._last_begin_s = self.begin_s + before * self.first_step_s + self.grows_s * before * (before - 1) / 2
        self.end_s = self._last_begin_s + self.first_step_s + before * self.grows_s
        self.steps_per_s = before / (self._last_begin_s - self.begin_s) if before else 0.0
