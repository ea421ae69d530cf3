"""A replica under load, step by step: what clients see of vLLM's scheduler. Seeded, on a virtual clock.

What is followed, from the source of vLLM 0.24 to 0.32 (V1 scheduler):

- Each step has a budget of `max_num_batched_tokens`: running answers take one token each, prompts what is left, in the
  order of arrival, as many as fit, the last one in part.
- A step is composed while the one before it runs (async scheduling), so a request that comes in meanwhile waits for
  two.
- With p pipeline stages and model runner V2, p + 1 batches are under way, and a sequence is in every p-th of them.
- With stages and V1, p batches are under way, but one after the other: the first stage waits for the tokens that the
  last one draws (`_pp_receive_prev_sampled_token_ids_to_input_batch`, a broadcast on the stream that computes). Only
  after a batch that draws none, all of it parts of longer prompts, may the next one follow at once.
- KV blocks are taken as tokens come. A prompt waits until the pool has room; when running answers fill the pool, the
  youngest is preempted and computed again later.
- The frontend is one event loop per process: prompts pass it one after the other, and so do streamed tokens.

Answers of a batch advance together, so their ends are kept as the number of the batch's step, and a step costs the same
however many sequences are in it.
"""

import heapq
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kervan.sim.step_time import Batch, StepTime
from kervan.stats import quantile

MAX_STEPS = 400_000


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: when it is sent (closed loop: ignored), and its lengths in tokens."""

    sent_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What its client saw."""

    sent_s: float
    first_s: float
    last_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a load. `mean_batch`: sequences that run, mean over time. `is_stable`: all were served."""

    answers: tuple[Answer, ...]
    duration_s: float
    mean_batch: float
    preemptions: int
    is_stable: bool = True

    @property
    def out_tok_s(self) -> float:
        return sum(answer.output_tokens for answer in self.answers) / self.duration_s

    @property
    def requests_s(self) -> float:
        return len(self.answers) / self.duration_s

    def ttft_s(self, q: float) -> float:
        """A quantile of the seconds to the first token. The median is the mean of the middle fifth: prompts that are
        prefilled in one step have the same time, and which of two such groups holds the median is chance.
        """
        found = sorted(answer.ttft_s for answer in self.answers)
        if q != 0.5:
            return quantile(found, q)
        cut = int(0.4 * len(found))
        return statistics.fmean(found[cut : len(found) - cut])

    def tpot_s(self, q: float) -> float:
        return quantile([answer.tpot_s for answer in self.answers if answer.output_tokens > 1] or [0.0], q)


def mean_of(runs: Sequence[Served]) -> dict[str, float]:
    """The means over several runs of what a table has: keys as in `kervan.plan.calibration.Point`."""
    return {
        "out_tok_s": statistics.fmean(run.out_tok_s for run in runs),
        "ttft_p50_s": statistics.fmean(run.ttft_s(0.5) for run in runs),
        "ttft_p99_s": statistics.fmean(run.ttft_s(0.99) for run in runs),
        "tpot_p50_s": statistics.fmean(run.tpot_s(0.5) for run in runs),
        "tpot_p99_s": statistics.fmean(run.tpot_s(0.99) for run in runs),
    }


@dataclass(slots=True)
class _Request:
    ask: Ask
    number: int
    sent_s: float
    computed: int = 0  # tokens of the context in the KV cache
    context: int = 0  # tokens to prefill: the prompt, after a preemption with what was generated
    remaining: int = 0  # tokens still to come
    first_s: float = -1.0
    holds: int = 0  # tokens of the pool


@dataclass(slots=True)
class _Group:
    """Sequences that advance together: `ends` has (step of the group in which it gets its last token, request)."""

    steps: int = 0
    ends: list[tuple[int, int, _Request]] = field(default_factory=list)
    context_tokens: float = 0.0
    free_s: float = 0.0  # end of its last step

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, request: _Request) -> None:
        heapq.heappush(self.ends, (self.steps + request.remaining, request.number, request))
        self.context_tokens += request.computed

    def take_in(self, other: "_Group") -> None:
        for end, number, request in other.ends:
            heapq.heappush(self.ends, (end - other.steps + self.steps, number, request))
        self.context_tokens += other.context_tokens
        self.free_s = max(self.free_s, other.free_s)

    def remove_youngest(self) -> _Request:
        at = max(range(len(self.ends)), key=lambda i: self.ends[i][1])
        end, _, request = self.ends.pop(at)
        heapq.heapify(self.ends)
        request.remaining = end - self.steps
        self.context_tokens -= request.computed
        return request


@dataclass(slots=True)
class _Step:
    batch: Batch
    group: _Group
    firsts: list[_Request]
    lasts: list[_Request]
    chunks: list[_Request]
    repeats: int = 1  # equal steps in a row, of running sequences only
    places: int = 1  # in the queue of batches: its own, and those of empty ones behind it
    end_s: float = 0.0


def closed_loop(
    time: StepTime, asks: Sequence[Ask], *, streams: int, kv_tokens: int, frontends: int = 1, seed: int = 0
) -> Served:
    """`streams` clients that start at once, each sending its next request when its last one has ended."""
    place = _Replica(time, asks, kv_tokens, frontends, min(streams, len(asks)), seed)
    return place.run()


def open_loop(time: StepTime, asks: Sequence[Ask], *, kv_tokens: int, frontends: int = 1, seed: int = 0) -> Served:
    """Requests at the times they are sent, in order, whatever becomes of those before."""
    return _Replica(time, asks, kv_tokens, frontends, 0, seed).run()


class _Replica:
    def __init__(
        self, time: StepTime, asks: Sequence[Ask], kv_tokens: int, frontends: int, streams: int, seed: int
    ) -> None:
        self.rng = random.Random(seed)
        self.time = time
        self.limits = time.limits
        self.asks: Iterator[tuple[int, Ask]] = iter(enumerate(asks))
        self.num_asks = len(asks)
        self.streams = streams
        self.kv_tokens = kv_tokens
        self.frontends = frontends
        self.stages = time.layout.pp
        self.is_pipelined = time.is_pipelined
        self.max_under_way = self.stages + (1 if self.stages == 1 or self.is_pipelined else 0)
        self.num_composed = 0
        self.resting: deque[tuple[int, _Group]] = deque()  # (number of the step in which it may run again, group)
        self.entry_free_s = self.exit_s = 0.0  # when the first stage is free, when the last batch leaves the last one
        self.places = 0  # taken in the queue of batches
        self.context_token_s = sum(time.context_token_s(index) for index in range(self.stages))
        self.prompts_free_s = self.outputs_free_s = 0.0
        self.arrivals: list[tuple[float, int, _Request]] = []
        self.waiting: deque[_Request] = deque()
        self.partial: _Request | None = None
        self.ready = _Group()
        self.under_way: deque[_Step] = deque()
        self.held_tokens = 0
        self.answers: list[Answer] = []
        self.preemptions = 0
        self.busy_s = self.batch_s = 0.0
        self.last_delivery_s = 0.0

    def run(self) -> Served:
        if self.streams:
            for _ in range(self.streams):
                self._send(0.0)
        else:
            for number, ask in self.asks:
                self._arrive(number, ask, ask.sent_s)
        now_s, num_steps = 0.0, 0
        while len(self.answers) < self.num_asks and num_steps < MAX_STEPS:
            while self.places < self.max_under_way and (step := self._compose(now_s)) is not None:
                self._run(step, now_s)
                num_steps += 1
            if self.under_way:
                step = self.under_way.popleft()
                self.places -= step.places
                now_s = max(now_s, step.end_s)
                self._deliver(step)
            elif self.arrivals:
                now_s = max(now_s, self.arrivals[0][0])
            else:
                break
        return Served(
            tuple(self.answers),
            max(self.last_delivery_s, 1e-9),
            self.batch_s / max(self.busy_s, 1e-9),
            self.preemptions,
            len(self.answers) == self.num_asks,
        )

    # ---- what comes in

    def _send(self, now_s: float) -> None:
        following = next(self.asks, None)
        if following is not None:
            self._arrive(*following, now_s)

    def _arrive(self, number: int, ask: Ask, sent_s: float) -> None:
        """Through the frontend, one prompt after the other, each of a length that nobody knows."""
        c = self.time.constants
        begin_s = max(self.prompts_free_s, sent_s)
        work_s = self.rng.expovariate(1.0) * (c.prompt_s + c.prompt_token_s * ask.prompt_tokens) / self.frontends
        self.prompts_free_s = begin_s + work_s
        request = _Request(ask, number, sent_s, context=ask.prompt_tokens, remaining=ask.output_tokens)
        heapq.heappush(self.arrivals, (self.prompts_free_s, number, request))

    def _compose(self, now_s: float) -> _Step | None:
        """The next batch of what is ready, or nothing."""
        while self.arrivals and self.arrivals[0][0] <= now_s:
            self.waiting.append(heapq.heappop(self.arrivals)[2])
        while True:
            while self.resting and self.resting[0][0] <= self.num_composed + 1:
                self._is_ready(self.resting.popleft()[1])
            step = self._fill(now_s)
            if step is not None or not self.resting:
                return step
            # Nothing may run in this step: vLLM composes empty ones until something may, each in a place of its queue.
            empty = self.resting[0][0] - self.num_composed - 1
            if self.places + empty + 1 > self.max_under_way:
                return None
            if self.under_way:
                self.under_way[-1].places += empty
                self.places += empty
            self.num_composed += empty

    def _fill(self, now_s: float) -> _Step | None:
        group = self.ready
        self._make_room(group)
        sequences = len(group)
        if not sequences and not self.waiting and self.partial is None:
            return None
        budget = self.limits.max_num_batched_tokens - sequences
        context = group.context_tokens + sequences
        prefill, pairs = 0, 0.0
        firsts: list[_Request] = []
        chunks: list[_Request] = []
        running = sequences
        while budget > 0 and running < self.limits.max_num_seqs:
            request = self.partial if self.partial is not None else (self.waiting[0] if self.waiting else None)
            if request is None or request in chunks:
                break
            tokens = min(budget, request.context - request.computed)
            room = self.kv_tokens - self.held_tokens - sequences  # those running take one each
            if tokens > room:
                if room <= 0 or (self.partial is None and request.context > room and (sequences or self.under_way)):
                    break
                tokens = min(tokens, room)
            if self.partial is None:
                self.waiting.popleft()
            self.partial = None
            pairs += tokens * request.computed + tokens * tokens / 2
            request.computed += tokens
            request.holds += tokens
            self.held_tokens += tokens
            prefill += tokens
            budget -= tokens
            running += 1
            if request.computed == request.context:
                firsts.append(request)
            else:
                chunks.append(request)
                self.partial = request
        if not sequences and not prefill:
            return None
        self.num_composed += 1
        batch = Batch(sequences, context, prefill, pairs, sequences + len(firsts))
        repeats = self._repeats(group, batch, now_s) if not prefill else 1
        if repeats > 1:
            group.steps += repeats - 1
            group.context_tokens += (repeats - 1) * sequences
            self.held_tokens += (repeats - 1) * sequences
        lasts = self._advance(group, sequences)
        step = _Step(batch, group, firsts, lasts, chunks, repeats)
        self.ready = _Group()
        self._requeue(step)
        return step

    def _repeats(self, group: _Group, batch: Batch, now_s: float) -> int:
        """How many steps like this one follow each other before anything ends, comes in, or fills the pool."""
        if self.waiting or self.resting:
            return 1
        if any(step.lasts or step.chunks for step in self.under_way):
            return 1
        most = group.ends[0][0] - group.steps - 1
        most = min(most, int((self.kv_tokens - self.held_tokens) / len(group)) - 1)
        if self.arrivals:
            begin_s = max(now_s, self.exit_s)
            most = min(most, int((self.arrivals[0][0] - begin_s) / (self.time.total_s(batch) * 1.05)))
        return max(1, most)

    def _advance(self, group: _Group, sequences: int) -> list[_Request]:
        """One token more for each of the group; those that get their last one leave it."""
        group.steps += 1
        group.context_tokens += sequences
        self.held_tokens += sequences
        lasts = []
        while group.ends and group.ends[0][0] <= group.steps:
            request = heapq.heappop(group.ends)[2]
            grown = request.ask.prompt_tokens + request.ask.output_tokens - 1
            group.context_tokens -= grown
            self.held_tokens -= grown
            lasts.append(request)
        return lasts

    def _make_room(self, group: _Group) -> None:
        """Preempt the youngest: the prompt that is prefilled in part, if there is one, then running answers."""
        if self.partial is not None and len(group) and self.held_tokens + len(group) > self.kv_tokens:
            request, self.partial = self.partial, None
            if not any(request in step.chunks for step in self.under_way):
                self.held_tokens -= request.computed
                request.computed = request.holds = 0
                self.waiting.appendleft(request)
                self.preemptions += 1
            else:
                self.partial = request  # its tokens are being computed
        while len(group) > 1 and self.held_tokens + len(group) > self.kv_tokens:
            request = group.remove_youngest()
            generated = request.ask.output_tokens - request.remaining
            request.context = request.ask.prompt_tokens + generated
            self.held_tokens -= request.context - 1
            group.context_tokens -= request.context - 1 - request.computed
            request.computed = request.holds = 0
            self.waiting.appendleft(request)
            self.preemptions += 1

    def _requeue(self, step: _Step) -> None:
        """The sequences of a step can be scheduled again."""
        for request in step.firsts:
            request.remaining -= 1
            if request.remaining > 0:
                step.group.add(request)
            else:
                self.held_tokens -= request.computed
                step.lasts.append(request)
        if self.is_pipelined:
            if len(step.group):
                self.resting.append((self.num_composed + self.stages, step.group))
        else:
            self._is_ready(step.group)

    def _is_ready(self, group: _Group) -> None:
        if len(self.ready):
            self.ready.take_in(group)
        else:
            self.ready = group

    # ---- what goes out

    def _run(self, step: _Step, now_s: float) -> None:
        at_s, batch, again = now_s, step.batch, step.repeats - 1
        if self.stages > 1 and batch.sequences:  # the first stage needs the tokens that the last one drew
            at_s = max(at_s, step.group.free_s)
        # Each of the equal steps reads the tokens that the ones before it have added.
        added = batch.sequences * again * (again + 1) / 2
        begin_s = max(at_s, self.entry_free_s)
        if self.stages == 1:
            busy_s = whole_s = self.time.stage_s(0, batch)
            last_s = 0.0
        else:
            # As if all stages took what the slowest takes: the next batch follows at its distance, and none overtakes.
            whole_s, busy_s, last_s = self.time.pass_s(batch)
            if not self.is_pipelined and batch.samples:
                busy_s = whole_s
        if again:
            busy_s = whole_s = whole_s * step.repeats + added * self.context_token_s
        step.end_s = max(begin_s + whole_s, self.exit_s + last_s)
        step.group.free_s = self.exit_s = step.end_s
        self.entry_free_s = begin_s + busy_s
        self.busy_s += busy_s
        self.batch_s += busy_s * batch.samples
        self.under_way.append(step)
        self.places += 1

    def _deliver(self, step: _Step) -> None:
        c = self.time.constants
        if not step.batch.samples:
            return
        work_s = step.batch.samples * c.output_s / self.frontends
        self.outputs_free_s = max(self.outputs_free_s + step.repeats * work_s, step.end_s + work_s)
        seen_s = self.outputs_free_s - work_s / 2 + c.delivery_s
        for request in step.firsts:
            if request.first_s < 0:
                request.first_s = seen_s
        for request in step.lasts:
            self.answers.append(Answer(request.sent_s, request.first_s, seen_s, request.ask.output_tokens))
            self.last_delivery_s = max(self.last_delivery_s, seen_s)
            if self.streams:
                self._send(seen_s)


def fixed(count: int, prompt_tokens: int, output_tokens: int) -> list[Ask]:
    """So many requests of the same lengths, for a closed loop."""
    return [Ask(0.0, prompt_tokens, output_tokens)] * count


def poisson(count: int, rate: float, prompt_tokens: int, output_tokens: int, *, seed: int = 0) -> list[Ask]:
    """Requests of the same lengths at exponentially distributed distances of mean `1/rate` seconds."""
    rng = random.Random(seed)
    at_s, asks = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        asks.append(Ask(at_s, prompt_tokens, output_tokens))
    return asks
