"""Steps in a row that are one event of the simulation.

`Scheduler.compose` may compose equal steps as one while it is known when the next request comes. Here a request may
come at any time, since routing decides at its arrival. So one step is composed, and when it and others like it are
over, `extend` tells the scheduler how many they were.
"""

import itertools
from array import array
from typing import TypeVar

from kervan.policy import prefix
from kervan.policy.prefix import PromptContent, Spans
from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.prefix_cache import BlockHashes, CachedRequest, CachingScheduler
from kervan.sim.scheduler import DecodeGroup, ScheduledRequest, ScheduledStep, Scheduler

R = TypeVar("R", bound=ScheduledRequest)
C = TypeVar("C", bound=CachedRequest)


class RunScheduler(Scheduler[R]):
    """One step is under way at a time, and all sequences are in one batch (no pipeline stages)."""

    def next_step(self) -> ScheduledStep[R] | None:
        """The next step; None without work that can run. The one before it is over."""
        return self._fill(None)

    def num_alike(self, step: ScheduledStep[R]) -> int:
        """How many steps like this one may follow it: to the last token of the first answer, or until the pool is full;
        0 after one with prompts or last tokens.
        """
        group = step.group
        if step.batch.prefill_tokens or step.lasts or not group.ends:
            return 0
        return int(min(group.ends[0][0] - group.steps, self.block_tokens * (self.free_blocks // len(group))))

    def extend(self, step: ScheduledStep[R], more: int) -> None:
        """So many steps like this one, at most `num_alike`, have followed it."""
        group = step.group
        self._take_for_run(group, more)
        step.lasts = group.advance(more)
        step.repeats += more
        for request in step.lasts:
            self._release(request)

    def _take_for_run(self, group: DecodeGroup[R], steps: int) -> None:
        self.free_blocks -= group.blocks_for(steps)

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return len(self._ready.ends) + (self._partial is not None)

    @property
    def num_group_steps(self) -> int:
        """Steps that the sequences that decode have made, the one that was composed last included."""
        return self._ready.steps

    @property
    def decoding(self) -> tuple[int, float]:
        """Sequences that decode, and what they have in the KV cache after those steps."""
        return len(self._ready.ends), self._ready.context_tokens


class CachingRunScheduler(RunScheduler[C], CachingScheduler[C]):
    """The same with vLLM's prefix cache."""

    def _take_for_run(self, group: DecodeGroup[C], steps: int) -> None:
        size = self.block_tokens
        for _, _, request in sorted(group.ends, key=lambda end: end[1]):
            tokens = group.computed_tokens(request) + steps
            more = -(-tokens // size) - len(request.blocks) - request.num_partial
            if more > 0:
                self.pool.take(more)
                request.num_partial += more
            if tokens // size > len(request.blocks):
                self._fill_blocks(request, tokens // size)
        self.free_blocks = self.pool.num_free


def block_hashes(
    prompt: tuple[int, ...], trace_tokens: int, prompt_tokens: int, output_tokens: int, stream: int
) -> BlockHashes:
    """The contents of a stream's blocks: those of its prompt by the trace's numbers, of which each stands for
    `trace_tokens`; those of its answer are like no other.
    """
    hashes = BlockHashes((), BLOCK_TOKENS)
    each = trace_tokens // BLOCK_TOKENS
    of_prompt = itertools.islice(
        (number * each + part for number in prompt for part in range(each)), prompt_tokens // BLOCK_TOKENS
    )
    hashes.values = [*of_prompt]
    answer = (prompt_tokens + output_tokens) // BLOCK_TOKENS - len(hashes.values)
    hashes.values += [-((stream << 22) + part + 1) for part in range(answer)]
    return hashes


def prompt_spans(prompt: tuple[int, ...], trace_tokens: int, prompt_tokens: int) -> Spans:
    """The same of its prompt, in the spans that gateways know."""
    span_tokens = prefix.span_tokens(BLOCK_TOKENS)
    spans = Spans(PromptContent(()), span_tokens, b"")
    each = trace_tokens // span_tokens
    values = (number * each + part for number in prompt for part in range(each))
    spans.hashes = array("Q", itertools.islice(values, prompt_tokens // span_tokens))
    return spans
