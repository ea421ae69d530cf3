"""Steps in a row that are one event of the simulation: they end with the first answer that ends, or are cut short.

`Scheduler.compose` may compose equal steps as one while it is known when the next request comes. Here a request may
come at any time, since routing decides at its arrival; so a run goes as far as it can, and `cut` ends it earlier.
"""

import heapq
from collections.abc import Callable
from typing import TypeVar

from kervan.sim.scheduler import DecodeGroup, ScheduledRequest, ScheduledStep, Scheduler
from kervan.sim.step_time import Batch

R = TypeVar("R", bound=ScheduledRequest)


class RunScheduler(Scheduler[R]):
    """Composes runs. One is under way at a time, and all sequences are in one batch (no pipeline stages)."""

    def next_run(self) -> ScheduledStep[R] | None:
        """The next step, or as many equal ones as there are until an answer ends or the pool is full."""
        return self.compose(_any_number)

    @property
    def num_group_steps(self) -> int:
        """Steps that the sequences that decode have made, those of the run under way included."""
        return self._ready.steps

    @property
    def decoding(self) -> tuple[int, float]:
        """Sequences that decode, and what they have in the KV cache when the run under way is over."""
        return len(self._ready.ends), self._ready.context_tokens

    def _repeats(self, group: DecodeGroup[R], batch: Batch, steps_alike: Callable[[Batch], int]) -> int:
        # The last tokens of an answer are in the run too: what is composed next waits for its end anyway.
        most = min(group.ends[0][0] - group.steps, self.block_tokens * (self.free_blocks // len(group)))
        return max(1, int(most))

    def cut(self, run: ScheduledStep[R], repeats: int) -> None:
        """The run under way, of sequences that decode, has so many steps and no more: at least 1, at most its own."""
        less = run.repeats - repeats
        if less <= 0:
            return
        group = run.group
        for request in run.lasts:  # they have not left after all
            self.free_blocks -= self._blocks(request.computed_tokens)
            group.context_tokens += request.computed_tokens
            group.phases[(request.computed_tokens - group.steps) % self.block_tokens] += 1
            request.joined = group.steps
            heapq.heappush(group.ends, (group.steps, request.number, request))
        run.lasts = []
        group.steps -= less
        group.context_tokens -= less * len(group.ends)
        self.free_blocks += group.blocks_for(less)
        run.repeats = repeats


def _any_number(_: Batch) -> int:
    return 1 << 30
