"""A replica under load, step by step: what clients see of vLLM's scheduler. Seeded, on a virtual clock.

What is followed beside the scheduler (`kervan.sim.scheduler`), from the source of vLLM 0.24 to 0.32:

- A step is composed while the one before it runs (async scheduling), so a request that comes in meanwhile waits for
  two.
- With p pipeline stages and model runner V2, p + 1 batches are under way, and a sequence is in every p-th of them.
- With stages and V1, p batches are under way, but one after the other: the first stage waits for the tokens that the
  last one draws (`_pp_receive_prev_sampled_token_ids_to_input_batch`, a broadcast on the stream that computes). Only
  after a batch that draws none, all of it parts of longer prompts, may the next one follow at once.
- The frontend is one event loop per process: prompts pass it one after the other, and so do streamed tokens.
"""

import bisect
import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.scheduler import ScheduledRequest, ScheduledStep, Scheduler
from kervan.sim.step_time import Batch, StepTime
from kervan.stats import quantile

MAX_STEPS = 400_000  # after so many a load counts as one that is never served
# Requests that wait for their first token may become so many more between two moments of a load that is served: a share
# of those that came in between, and what chance makes of as many as wait.
MAX_GROWTH_SHARE = 0.05
MAX_GROWTH_SIGMAS = 2.0
LEAST_ROUNDS = 2  # of a pipeline that are worth a skip
LATE_S = 3600.0  # what an open loop measures is given up when it is not over so long after the last of it was sent


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request: when it is sent (closed loop: ignored), and its lengths in tokens.

    `cached_tokens`: of its prompt, found in the prefix cache; fewer than the prompt has.
    """

    sent_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadResponse:
    """What the client of a request saw: times in seconds from the start of the load."""

    sent_s: float
    first_s: float
    last_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds from one token to the next; 0 for one token."""
        return (self.last_s - self.first_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """One that runs already when an open loop begins: `context_tokens` are in the KV cache."""

    context_tokens: int
    remaining_tokens: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What came of a load.

    In a closed loop all requests count, from the first one sent to the last one over. In an open loop those that are
    measured: `duration_s` is from the first of them sent to the last one sent, so that neither the first requests,
    which find an empty replica, nor the last ones, which are alone in the end, make the rates smaller.

    `output_tokens`: in that time, of all requests. `mean_batch`: sequences in a step, mean over it. `is_stable`: all
    were served, and no more and more were waiting.
    """

    responses: tuple[LoadResponse, ...]
    duration_s: float
    output_tokens: float
    mean_batch: float
    preemptions: int
    is_stable: bool = True

    @property
    def out_tok_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.duration_s

    @property
    def requests_s(self) -> float:
        """Requests per second, of the mean length."""
        mean_tokens = sum(response.output_tokens for response in self.responses) / max(1, len(self.responses))
        return self.out_tok_s / max(1.0, mean_tokens)

    @property
    def in_flight(self) -> float:
        """Requests that are queued or run, mean over time (Little's law)."""
        return sum(response.last_s - response.sent_s for response in self.responses) / self.duration_s

    def ttft_s(self, q: float) -> float:
        """A quantile of the seconds to the first token. The median is the mean of the middle fifth: prompts that are
        prefilled in one step have the same time, and which of two such groups holds the median is chance.
        """
        times_s = sorted(response.ttft_s for response in self.responses)
        if q != 0.5:
            return quantile(times_s, q)
        cut = int(0.4 * len(times_s))
        return statistics.fmean(times_s[cut : len(times_s) - cut])

    def tpot_s(self, q: float) -> float:
        """A quantile of the requests' mean seconds per token, of those with more than one."""
        return quantile([response.tpot_s for response in self.responses if response.output_tokens > 1] or [0.0], q)

    def e2e_s(self, q: float) -> float:
        """A quantile of the seconds from sending a request to its last token."""
        return quantile([response.last_s - response.sent_s for response in self.responses] or [0.0], q)


def mean_of(runs: Sequence[LoadResult]) -> dict[str, float]:
    """The means over several runs of what a table has: keys as in `kervan.plan.calibration.MeasuredPoint`."""
    return {
        "out_tok_s": statistics.fmean(run.out_tok_s for run in runs),
        "ttft_p50_s": statistics.fmean(run.ttft_s(0.5) for run in runs),
        "ttft_p99_s": statistics.fmean(run.ttft_s(0.99) for run in runs),
        "tpot_p50_s": statistics.fmean(run.tpot_s(0.5) for run in runs),
        "tpot_p99_s": statistics.fmean(run.tpot_s(0.99) for run in runs),
    }


@dataclass(slots=True, eq=False, kw_only=True)
class _ReplicaRequest(ScheduledRequest):
    output_tokens: int
    sent_s: float
    first_s: float = -1.0


def closed_loop(
    step_time: StepTime,
    requests: Sequence[LoadRequest],
    *,
    streams: int,
    kv_tokens: int,
    frontends: int = 1,
    seed: int = 0,
) -> LoadResult:
    """`streams` clients that start at once, each sending its next request when its last one has ended."""
    streams = min(streams, len(requests))
    return _Replica(step_time, requests, kv_tokens, frontends, streams, seed, range(len(requests))).run()


def open_loop(
    step_time: StepTime,
    requests: Iterable[LoadRequest],
    *,
    kv_tokens: int,
    measured: range | None = None,
    running: Sequence[RunningRequest] = (),
    frontends: int = 1,
    seed: int = 0,
) -> LoadResult:
    """Requests at the times they are sent, in order, whatever becomes of those before.

    `measured`: which of them count, by their number (all that there are, without it); those behind keep coming until
    these are over, so `requests` may have no end. `running`: those that the replica has at the start.
    """
    if measured is None:
        requests = list(requests)
        measured = range(len(requests))
    return _Replica(step_time, requests, kv_tokens, frontends, 0, seed, measured, running).run()


@dataclass(frozen=True, slots=True)
class _Span:
    """Steps of one batch: when they began and ended, and the tokens of each that clients get."""

    begin_s: float
    end_s: float
    samples: int
    repeats: int

    def within(self, begin_s: float, end_s: float) -> float:
        """The share of it that is in this time."""
        return max(0.0, min(end_s, self.end_s) - max(begin_s, self.begin_s)) / max(1e-12, self.end_s - self.begin_s)


class _Replica:
    def __init__(
        self,
        step_time: StepTime,
        requests: Iterable[LoadRequest],
        kv_tokens: int,
        frontends: int,
        streams: int,
        seed: int,
        measured: range,
        running: Sequence[RunningRequest] = (),
    ) -> None:
        self.rng = random.Random(seed)
        self.step_time = step_time
        self.requests: Iterator[tuple[int, LoadRequest]] = iter(enumerate(requests))
        self.measured = measured
        self.num_left = len(measured)
        self.streams = streams
        self.frontends = frontends
        self.stages = step_time.layout.pp
        self.is_pipelined = step_time.is_pipelined
        self.scheduler: Scheduler[_ReplicaRequest] = Scheduler(
            max_num_seqs=step_time.max_num_seqs,
            max_num_batched_tokens=step_time.max_num_batched_tokens,
            num_blocks=kv_tokens // BLOCK_TOKENS,
            decode_distance=self.stages if self.is_pipelined else 1,
            max_under_way=self.stages + (1 if self.stages == 1 or self.is_pipelined else 0),
        )
        self.scheduler.add_running(
            _ReplicaRequest(
                number=number - len(running), context_tokens=one.context_tokens, remaining_tokens=one.remaining_tokens,
                output_tokens=one.remaining_tokens, sent_s=0.0, first_s=0.0,
            )
            for number, one in enumerate(running)
        )  # fmt: skip
        self.now_s = 0.0
        self.entry_free_s = self.exit_s = 0.0  # when the first stage is free, when the last batch leaves the last one
        self.context_token_s = sum(step_time.context_token_s(index) for index in range(self.stages))
        self.prompts_free_s = self.outputs_free_s = 0.0
        self.arrivals: list[tuple[float, int, _ReplicaRequest]] = []
        self.under_way: deque[tuple[ScheduledStep[_ReplicaRequest], float]] = deque()  # and when it ends
        self.responses: list[LoadResponse] = []
        self.spans: list[_Span] = []
        self.sent_s: list[float] = []
        self.first_s: list[float] = []
        self.over_s: list[float] = []

    def run(self) -> LoadResult:
        for _ in range(self.streams or 1):
            self._send(0.0)
        num_steps = next_skip = 0
        while self.num_left and num_steps < MAX_STEPS and self.now_s < self._give_up_s:
            while self.arrivals and self.arrivals[0][0] <= self.now_s:
                self.scheduler.add(heapq.heappop(self.arrivals)[2])
                if not self.streams:
                    self._send(self.now_s)
            if self.is_pipelined and num_steps >= next_skip:
                self._skip_rounds()
                next_skip = num_steps + self.stages
            while (step := self.scheduler.compose(self._steps_before_arrival)) is not None:
                self.under_way.append((step, self._end_s(step)))
                num_steps += 1
            if self.under_way:
                step, end_s = self.under_way.popleft()
                self.scheduler.end(step)
                self.now_s = max(self.now_s, end_s)
                self._deliver(step, end_s)
            elif self.arrivals:
                self.now_s = max(self.now_s, self.arrivals[0][0])
            else:
                break
        return self._result()

    @property
    def _give_up_s(self) -> float:
        has_sent_all = not self.streams and len(self.sent_s) >= self.measured.stop
        return self.sent_s[self.measured.stop - 1] + LATE_S if has_sent_all and self.measured else math.inf

    def _result(self) -> LoadResult:
        first, last = self.measured.start, self.measured.stop - 1
        if self.streams:
            begin_s, end_s = 0.0, max(self.over_s, default=0.0)
        else:
            begin_s = self.sent_s[first] if first < len(self.sent_s) else 0.0
            end_s = self.sent_s[last] if last < len(self.sent_s) else self.now_s
        if end_s <= begin_s:  # a single request, or all at once
            end_s = max([begin_s, *self.over_s])
        duration_s = max(1e-9, end_s - begin_s)
        shares = [(span, span.within(begin_s, end_s)) for span in self.spans]
        busy_s = sum(share * (span.end_s - span.begin_s) for span, share in shares)
        batch_s = sum(share * (span.end_s - span.begin_s) * span.samples for span, share in shares)
        tokens = sum(share * span.samples * span.repeats for span, share in shares)
        if self.streams:
            tokens = sum(response.output_tokens for response in self.responses)
        return LoadResult(
            tuple(self.responses),
            duration_s,
            tokens,
            batch_s / max(busy_s, 1e-9),
            self.scheduler.num_preempted,
            not self.num_left and (bool(self.streams) or not self._piles_up(begin_s, end_s)),
        )

    def _piles_up(self, begin_s: float, end_s: float) -> bool:
        """Whether more and more requests waited for their first token."""
        before, after = self._num_waiting(begin_s), self._num_waiting(end_s)
        bound = MAX_GROWTH_SHARE * len(self.measured) + MAX_GROWTH_SIGMAS * math.sqrt(max(1, (before + after) / 2))
        return after - before > bound

    def _num_waiting(self, at_s: float) -> int:
        return bisect.bisect_right(self.sent_s, at_s) - bisect.bisect_right(self.first_s, at_s)

    # ---- what comes in

    def _send(self, now_s: float) -> None:
        """The next request: now in a closed loop, else when it says."""
        following = next(self.requests, None)
        if following is not None:
            self._arrive(*following, now_s if self.streams else following[1].sent_s)

    def _arrive(self, number: int, arriving: LoadRequest, sent_s: float) -> None:
        """Through the frontend, one prompt after the other, each of a length that nobody knows."""
        self.sent_s.append(sent_s)
        c = self.step_time.constants
        begin_s = max(self.prompts_free_s, sent_s)
        work_s = self.rng.expovariate(1.0) * (c.prompt_s + c.prompt_token_s * arriving.prompt_tokens) / self.frontends
        self.prompts_free_s = begin_s + work_s
        request = _ReplicaRequest(
            number=number, context_tokens=arriving.prompt_tokens, remaining_tokens=arriving.output_tokens,
            output_tokens=arriving.output_tokens, sent_s=sent_s, cached_tokens=arriving.cached_tokens,
        )  # fmt: skip
        heapq.heappush(self.arrivals, (self.prompts_free_s, number, request))

    def _steps_before_arrival(self, batch: Batch) -> int:
        """How many steps of a batch are over before the next prompt comes in."""
        if not self.arrivals:
            return MAX_STEPS
        begin_s = max(self.now_s, self.exit_s)
        return int((self.arrivals[0][0] - begin_s) / (self.step_time.total_s(batch) * 1.05))

    def _skip_rounds(self) -> None:
        """A pipeline goes on as it does until a request comes in or ends: all times move by whole rounds. In a round
        each of the batches has a step.
        """
        most = self.scheduler.rounds_alike()
        if most < LEAST_ROUNDS:
            return
        until_s = (self.arrivals[0][0] if self.arrivals else math.inf) - max(self.now_s, self.exit_s)
        rounds = int(min(most, until_s / self._round_s(0)))
        if rounds >= LEAST_ROUNDS and not math.isinf(until_s):  # steps become longer with their contexts
            rounds = int(min(most, until_s / self._round_s(rounds)))
        if rounds < LEAST_ROUNDS:
            return
        skipped_s = rounds * self._round_s(rounds / 2)
        for group in self.scheduler.skip_rounds(rounds):
            group.free_s += skipped_s
            self.spans.append(_Span(self.now_s, self.now_s + skipped_s, len(group), rounds))
            self.outputs_free_s += rounds * len(group) * self.step_time.constants.output_s / self.frontends
        self.now_s += skipped_s
        self.entry_free_s += skipped_s
        self.exit_s += skipped_s
        self.under_way = deque((step, end_s + skipped_s) for step, end_s in self.under_way)

    def _round_s(self, rounds: float) -> float:
        """Seconds of a round, so many rounds from now: each batch waits for its own tokens, and the slowest stage does
        one batch after the other.
        """
        longest_s = busy_s = 0.0
        for group in self.scheduler.groups:
            size = len(group)
            batch = Batch(size, group.context_tokens + rounds * size, 0, 0.0, size)
            whole_s, slowest_s, _ = self.step_time.pass_s(batch)
            longest_s = max(longest_s, whole_s)
            busy_s += slowest_s
        return max(longest_s, busy_s)

    # ---- what goes out

    def _end_s(self, step: ScheduledStep[_ReplicaRequest]) -> float:
        """When a step that is composed now ends."""
        at_s, batch, again = self.now_s, step.batch, step.repeats - 1
        if self.stages > 1 and batch.sequences:  # the first stage needs the tokens that the last one drew
            at_s = max(at_s, step.group.free_s)
        # Each of the equal steps reads the tokens that the ones before it have added.
        added = batch.sequences * again * (again + 1) / 2
        begin_s = max(at_s, self.entry_free_s)
        if self.stages == 1:
            busy_s = whole_s = self.step_time.stage_s(0, batch)
            last_s = 0.0
        else:
            # As if all stages took what the slowest takes: the next batch follows at its distance, and none overtakes.
            whole_s, busy_s, last_s = self.step_time.pass_s(batch)
            if not self.is_pipelined and batch.samples:
                busy_s = whole_s
        if again:
            busy_s = whole_s = whole_s * step.repeats + added * self.context_token_s
        end_s = max(begin_s + whole_s, self.exit_s + last_s)
        step.group.free_s = self.exit_s = end_s
        self.entry_free_s = begin_s + busy_s
        self.spans.append(_Span(begin_s, max(end_s, begin_s + 1e-9), batch.samples, step.repeats))
        return end_s

    def _deliver(self, step: ScheduledStep[_ReplicaRequest], end_s: float) -> None:
        c = self.step_time.constants
        if not step.batch.samples:
            return
        work_s = step.batch.samples * c.output_s / self.frontends
        self.outputs_free_s = max(self.outputs_free_s + step.repeats * work_s, end_s + work_s)
        seen_s = self.outputs_free_s - work_s / 2 + c.delivery_s
        for request in step.firsts:
            if request.first_s < 0:
                request.first_s = seen_s
                self.first_s.append(seen_s)
        for request in step.lasts:
            self.over_s.append(seen_s)
            if request.number in self.measured:
                self.num_left -= 1
                self.responses.append(LoadResponse(request.sent_s, request.first_s, seen_s, request.output_tokens))
            if self.streams:
                self._send(seen_s)


def fixed(count: int, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> list[LoadRequest]:
    """So many requests of the same lengths, for a closed loop."""
    return [LoadRequest(0.0, prompt_tokens, output_tokens, cached_tokens)] * count


def poisson(count: int, rate: float, prompt_tokens: int, output_tokens: int, *, seed: int = 0) -> list[LoadRequest]:
    """Requests of the same lengths at exponentially distributed distances of mean `1/rate` seconds."""
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        requests.append(LoadRequest(at_s, prompt_tokens, output_tokens))
    return requests
