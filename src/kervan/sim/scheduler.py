"""vLLM's scheduler on paper: which requests a step computes, and how many tokens of each. No clock, no randomness.

What is followed, from the source of vLLM 0.24 to 0.32 (V1 scheduler; `Scheduler.schedule`, `AsyncScheduler`):

- Each step has a budget of `max_num_batched_tokens`: running answers take one token each, prompts what is left, in the
  order of arrival, as many as fit, the last one in part.
- A prompt starts when all of it has room (`scheduler_reserve_full_isl`); its KV blocks are taken as its tokens are
  computed. When running requests need more blocks than there are, the youngest gives its own back, waits at the head of
  the queue, and is computed again later. `CachingScheduler` (`prefix_cache.py`) has vLLM's prefix cache, for requests
  with tokens; here `cached_tokens` says what is found.
- With pipeline stages and model runner V2, a sequence is in every p-th step (`next_decode_eligible_step`).

`tests/contract/test_scheduler.py` runs vLLM's own beside it.

Where it differs from vLLM: requests whose length is known give their blocks back when their last step is composed, and
not when its tokens come out; with pipeline stages only sequences of the batch that is composed are preempted.

Sequences that decode advance together, so their ends are kept as the number of their group's step, and a step costs the
same however many are in it. Equal steps in a row can be composed as one.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.step_time import Batch


@dataclass(slots=True, eq=False, kw_only=True)
class ScheduledRequest:
    """A request as the scheduler sees it.

    `number`: its place in the order of arrival. `context_tokens`: to prefill; the prompt, after a preemption with what
    was generated. `remaining_tokens`: still to come; infinite when only the tokens tell, and `Scheduler.remove` is the
    end. `cached_tokens`: of the beginning, found in the prefix cache; they need blocks, and no time. `computed_tokens`:
    of the context in the KV cache, when it joined its group at step `joined` of it.
    """

    number: int
    context_tokens: int
    remaining_tokens: float = math.inf
    cached_tokens: int = 0
    computed_tokens: int = 0
    joined: int = 0


R = TypeVar("R", bound=ScheduledRequest)


@dataclass(slots=True)
class DecodeGroup(Generic[R]):
    """Sequences that advance together. `ends`: a heap of (step of the group with the last token, number, request).

    `phases`: how many have `computed - steps` tokens modulo the block's size. `free_s`: end of its last step, kept by
    whoever has the clock.
    """

    block_tokens: int
    steps: int = 0
    ends: list[tuple[float, int, R]] = field(default_factory=list)
    context_tokens: float = 0.0
    phases: list[int] = field(init=False)
    free_s: float = 0.0

    def __post_init__(self) -> None:
        self.phases = [0] * self.block_tokens

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[R]:
        """In the order of arrival."""
        return iter(sorted((end[2] for end in self.ends), key=lambda request: request.number))

    def computed_tokens(self, request: R) -> int:
        """What a member has in the KV cache."""
        return request.computed_tokens + self.steps - request.joined

    def blocks_for(self, steps: int) -> int:
        """Blocks that so many further steps take."""
        size, phases = self.block_tokens, self.phases
        last = -self.steps % size  # the phase of those that need a block in the next step; then that below it
        if steps == 1:
            return phases[last]
        rounds, more = divmod(steps, size)
        first = last + 1 - more
        part = sum(phases[first : last + 1]) if first >= 0 else sum(phases[: last + 1]) + sum(phases[first:])
        return rounds * len(self.ends) + part

    def add(self, request: R) -> None:
        """A request whose context is computed becomes a member."""
        request.joined = self.steps
        heapq.heappush(self.ends, (self.steps + request.remaining_tokens, request.number, request))
        self.context_tokens += request.computed_tokens
        self.phases[(request.computed_tokens - self.steps) % self.block_tokens] += 1

    def take_in(self, other: "DecodeGroup[R]") -> None:
        """Members of another group join this one."""
        moved = self.steps - other.steps
        for end, number, request in other.ends:
            request.joined += moved
            heapq.heappush(self.ends, (end + moved, number, request))
        for phase, count in enumerate(other.phases):
            self.phases[(phase - moved) % self.block_tokens] += count
        self.context_tokens += other.context_tokens
        self.free_s = max(self.free_s, other.free_s)

    def advance(self, steps: int) -> list[R]:
        """So many tokens more for each member; those that have all of theirs leave, and are returned."""
        self.steps += steps
        self.context_tokens += steps * len(self.ends)
        over = []
        while self.ends and self.ends[0][0] <= self.steps:
            request = heapq.heappop(self.ends)[2]
            self._leave(request)
            over.append(request)
        return over

    def remove(self, request: R) -> bool:
        """Whether it was a member."""
        at = next((i for i, (_, _, member) in enumerate(self.ends) if member is request), None)
        if at is None:
            return False
        request.remaining_tokens = self.ends.pop(at)[0] - self.steps
        heapq.heapify(self.ends)
        self._leave(request)
        return True

    def _leave(self, request: R) -> None:
        request.computed_tokens = self.computed_tokens(request)
        request.joined = self.steps
        self.context_tokens -= request.computed_tokens
        self.phases[(request.computed_tokens - self.steps) % self.block_tokens] -= 1


@dataclass(slots=True, eq=False)
class ScheduledStep(Generic[R]):
    """What a step computes: a token of each sequence that decodes, and prompts.

    `group`: those that decode, and from the next step on `firsts`, whose prompt is complete. `lasts`: those that get
    their last token. `chunk`: the prompt that is computed in part. `repeats`: equal steps in a row, of sequences that
    decode. `places`: in the queue of batches: its own, and those of empty ones behind it.
    """

    batch: Batch
    group: DecodeGroup[R]
    firsts: list[R]
    lasts: list[R]
    chunk: R | None
    repeats: int = 1
    places: int = 1


class Scheduler(Generic[R]):
    """Composes steps from the requests that are added; `end` gives back the place of a step that is over."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_blocks: int,
        block_tokens: int = BLOCK_TOKENS,
        decode_distance: int = 1,
        max_under_way: int = 1,
    ) -> None:
        """`decode_distance`: steps from one token of a sequence to its next; more than 1 with pipeline stages.
        `max_under_way`: steps composed before the first of them is over; 2 with async scheduling.
        """
        # vLLM refuses a budget below `max_num_seqs`: one token of each sequence has to fit.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_blocks = self.free_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_preempted = 0
        self.waiting: deque[R] = deque()
        self._decode_distance = decode_distance
        self._max_under_way = max_under_way
        self._partial: R | None = None  # the prompt that is computed in part, the youngest that runs
        self._ready = self._new_group()
        self._resting: deque[tuple[int, DecodeGroup[R]]] = deque()  # (number of the step in which it runs again, group)
        self._under_way: deque[ScheduledStep[R]] = deque()
        self._places = 0  # taken in the queue of batches
        self._num_composed = 0

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return sum(map(len, self._groups)) + (self._partial is not None)

    @property
    def groups(self) -> list[DecodeGroup[R]]:
        """Sequences that decode, by the batch that they are in; with one stage, all in one."""
        return [group for group in self._groups if len(group)]

    def add(self, request: R) -> None:
        """To the end of the queue."""
        self.waiting.append(request)

    def add_running(self, requests: Iterable[R]) -> None:
        """Requests whose context has been computed before, while there are blocks for them and they are few enough.

        With pipeline stages they are dealt out over the batches.
        """
        groups = [self._ready, *(self._new_group() for _ in range(self._decode_distance - 1))]
        for place, request in enumerate(requests):
            blocks = self._blocks(request.context_tokens)
            if blocks > self.free_blocks or place >= self.max_num_seqs:
                break
            self.free_blocks -= blocks
            request.computed_tokens = request.context_tokens
            groups[place % len(groups)].add(request)
        for place, group in enumerate(groups[1:], 1):
            if len(group):
                self._resting.append((self._num_composed + 1 + place, group))

    def remove(self, request: R) -> None:
        """Forget a request, wherever it is, and take back its blocks.

        Raises: ValueError when it is not here.
        """
        if request is self._partial:
            self._partial = None
            self._release(request)
        elif any(group.remove(request) for group in self._groups):
            self._release(request)
        else:
            self.waiting.remove(request)

    def resize(self, num_blocks: int) -> list[R]:
        """Change the size of the pool; returns those that are preempted for it, the youngest first.

        The step under way may compute a token of them, which counts as generated: where it is thrown away,
        `context_tokens` is one less.
        """
        preempted = []
        while self.num_blocks - self.free_blocks > num_blocks:
            preempted.append(self._preempt_youngest())
        self._set_size(num_blocks)
        return preempted

    def compose(self, steps_alike: Callable[[Batch], int] | None = None) -> ScheduledStep[R] | None:
        """The next step; None when nothing can run or enough is under way.

        `steps_alike`: how many steps of a batch may be composed as one, as far as the clock goes; without it, one.
        """
        if self._places >= self._max_under_way:
            return None
        while True:
            while self._resting and self._resting[0][0] <= self._num_composed + 1:
                self._join_ready(self._resting.popleft()[1])
            step = self._fill(steps_alike)
            if step is not None:
                self._under_way.append(step)
                self._places += 1
            if step is not None or not self._resting:
                return step
            # Nothing may run in this step: vLLM composes empty ones until something may, each in a place of its queue.
            empty = self._resting[0][0] - self._num_composed - 1
            if self._places + empty + 1 > self._max_under_way:
                return None
            if self._under_way:
                self._under_way[-1].places += empty
                self._places += empty
            self._num_composed += empty

    def rounds_alike(self) -> int:
        """With pipeline stages: how many times each group may take its next step as it took its last one; 0 while
        a prompt waits or is under way, or the tokens of a prompt or the last ones of an answer are.
        """
        if self.waiting or self._partial is not None:
            return 0
        if any(step.firsts or step.lasts or step.chunk is not None for step in self._under_way):
            return 0
        groups = self.groups
        if not groups:
            return 0
        most = min(group.ends[0][0] - group.steps - 1 for group in groups)
        return max(0, int(min(most, self.block_tokens * (self.free_blocks // sum(map(len, groups))))))

    def skip_rounds(self, rounds: int) -> list[DecodeGroup[R]]:
        """All groups take so many steps, `rounds_alike` at most; what is under way stays so. Returns the groups."""
        groups = self.groups
        for group in groups:
            self.free_blocks -= group.blocks_for(rounds)
            group.advance(rounds)
        return groups

    def end(self, step: ScheduledStep[R]) -> None:
        """The oldest step under way is over."""
        assert self._under_way and self._under_way[0] is step, "steps end in the order in which they were composed"
        self._under_way.popleft()
        self._places -= step.places

    def check_integrity(self) -> None:
        """Raises: AssertionError when blocks were lost or given twice."""
        held = sum(self._blocks(group.computed_tokens(request)) for group in self._groups for request in group)
        held += self._blocks(self._partial.computed_tokens) if self._partial is not None else 0
        assert held + self.free_blocks == self.num_blocks, (
            f"{held} blocks held and {self.free_blocks} free are not the pool's {self.num_blocks}"
        )

    # ---- one step

    def _fill(self, steps_alike: Callable[[Batch], int] | None) -> ScheduledStep[R] | None:
        group, preempted_before = self._ready, self.num_preempted
        decode_blocks = self._take_for_decode(group)
        sequences = len(group)
        firsts: list[R] = []
        chunk, prefill, pairs = None, 0, 0.0
        has_preempted = self.num_preempted > preempted_before
        if self.waiting or self._partial is not None:
            firsts, chunk, prefill, pairs = self._fill_prompts(sequences, may_admit=not has_preempted)
        if not sequences and not prefill:
            return None
        self._num_composed += 1
        batch = Batch(sequences, group.context_tokens + sequences, prefill, pairs, sequences + len(firsts))
        is_alone = bool(prefill) or self.num_preempted > preempted_before or steps_alike is None
        repeats = 1 if is_alone or steps_alike is None else self._repeats(group, batch, steps_alike)
        if repeats > 1:
            self.free_blocks -= group.blocks_for(repeats) - decode_blocks
        lasts = group.advance(repeats)
        for request in firsts:
            request.remaining_tokens -= 1
            if request.remaining_tokens > 0:
                group.add(request)
            else:
                lasts.append(request)
        for request in lasts:
            self._release(request)
        if self._decode_distance > 1:
            self._ready = self._new_group()
            if len(group):
                self._resting.append((self._num_composed + self._decode_distance, group))
        return ScheduledStep(batch, group, firsts, lasts, chunk, repeats)

    def _fill_prompts(self, sequences: int, *, may_admit: bool) -> tuple[list[R], R | None, int, float]:
        """(prompts that are complete then, the one in part, tokens, pairs of tokens that their attention looks at)."""
        budget = self.max_num_batched_tokens - sequences
        running, prefill, pairs = self.num_running, 0, 0.0
        firsts: list[R] = []
        chunk: R | None = None
        while budget > 0 and chunk is None:
            is_new = self._partial is None
            if is_new and not (self.waiting and may_admit and running < self.max_num_seqs):
                break
            request = self.waiting[0] if self._partial is None else self._partial
            before = self._find_cached(request) if is_new else request.computed_tokens
            tokens = min(budget, request.context_tokens - before)
            if not self._fits(request, tokens, is_new=is_new):
                break
            if is_new:
                self.waiting.popleft()
            self._partial = None
            computed = before + tokens
            pairs += tokens * before + tokens * tokens / 2
            self._take_for_prompt(request, computed, is_new=is_new)
            request.computed_tokens = computed
            prefill += tokens
            budget -= tokens
            running += is_new
            if computed == request.context_tokens:
                firsts.append(request)
            else:
                chunk = self._partial = request
        return firsts, chunk, prefill, pairs

    def _fits(self, request: R, tokens: int, *, is_new: bool) -> bool:
        """Whether the next part of a prompt may be computed; of one that has not begun, whether all of it has room."""
        if is_new:
            return self._has_room_for(request)
        if self._blocks(request.computed_tokens + tokens) - self._blocks(request.computed_tokens) <= self.free_blocks:
            return True
        self._preempt_partial()  # the youngest that runs is the one that needs them
        return False

    def _repeats(self, group: DecodeGroup[R], batch: Batch, steps_alike: Callable[[Batch], int]) -> int:
        """How many steps like this one follow each other before anything ends, comes in, or fills the pool."""
        if self._resting:
            return 1
        if any(step.lasts or step.chunk is not None for step in self._under_way):
            return 1
        most = min(group.ends[0][0] - group.steps - 1, self.block_tokens * (self.free_blocks // len(group)))
        if not self.waiting:  # else what comes in waits behind one for which there was no room just now
            most = min(most, steps_alike(batch))
        return max(1, int(most))

    # ---- the pool of blocks

    def _set_size(self, num_blocks: int) -> None:
        self.free_blocks += num_blocks - self.num_blocks
        self.num_blocks = num_blocks

    def _take_for_decode(self, group: DecodeGroup[R]) -> int:
        """Blocks for one token of each sequence that decodes; the youngest are preempted while there are too few."""
        blocks = group.blocks_for(1)
        if blocks > self.free_blocks:
            if self._partial is not None and len(group):
                self._preempt_partial()
            while len(group) and group.blocks_for(1) > self.free_blocks:
                self._preempt_decoding(group)
            blocks = group.blocks_for(1)
        self.free_blocks -= blocks
        return blocks

    def _find_cached(self, request: R) -> int:
        """Tokens of a prompt that begins which need not be computed."""
        return request.cached_tokens

    def _has_room_for(self, request: R) -> bool:
        """Whether a prompt that begins fits as a whole."""
        return self._blocks(request.context_tokens) <= self.free_blocks

    def _take_for_prompt(self, request: R, computed_tokens: int, *, is_new: bool) -> None:
        """Blocks for a prompt up to the token to which this step computes it."""
        self.free_blocks -= self._blocks(computed_tokens) - self._blocks(request.computed_tokens)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _release(self, request: R) -> None:
        self.free_blocks += self._blocks(request.computed_tokens)

    # ---- who runs

    @property
    def _groups(self) -> list[DecodeGroup[R]]:
        return [self._ready, *(group for _, group in self._resting)]

    def _preempt_youngest(self) -> R:
        return self._preempt_decoding(self._ready) if self._partial is None else self._preempt_partial()

    def _preempt_partial(self) -> R:
        assert self._partial is not None
        request, self._partial = self._partial, None
        return self._preempt(request)

    def _preempt_decoding(self, group: DecodeGroup[R]) -> R:
        request = max(group.ends, key=lambda end: end[1])[2]
        group.remove(request)
        request.context_tokens = request.computed_tokens + 1
        return self._preempt(request)

    def _preempt(self, request: R) -> R:
        self._release(request)
        request.computed_tokens = 0
        self.waiting.appendleft(request)
        self.num_preempted += 1
        return request

    def _join_ready(self, group: DecodeGroup[R]) -> None:
        if len(self._ready):
            self._ready.take_in(group)
        else:
            self._ready = group

    def _new_group(self) -> DecodeGroup[R]:
        return DecodeGroup(self.block_tokens)
