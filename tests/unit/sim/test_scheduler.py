"""The scheduler: its groups against one sequence at a time, and steps as one."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.scheduler import ScheduledRequest, Scheduler
from kervan.sim.step_time import Batch

# A step: tokens by request (the number of the request, in the order of arrival), and how many were preempted for it.
Step = tuple[dict[int, int], int]
Lengths = list[tuple[int, int]]  # of a request: prompt and output tokens

LOADS = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 30)), min_size=1, max_size=12)


def scheduler(
    num_blocks: int, block_tokens: int = BLOCK_TOKENS, *, seqs: int = 8, budget: int = 64
) -> Scheduler[ScheduledRequest]:
    return Scheduler(max_num_seqs=seqs, max_num_batched_tokens=budget, num_blocks=num_blocks, block_tokens=block_tokens)


def added(to: Scheduler[ScheduledRequest], lengths: Lengths) -> list[ScheduledRequest]:
    """Requests whose length the scheduler knows."""
    requests = [
        ScheduledRequest(number=number, context_tokens=prompt, remaining_tokens=output)
        for number, (prompt, output) in enumerate(lengths)
    ]
    for request in requests:
        to.add(request)
    return requests


def steps(on: Scheduler[ScheduledRequest], lengths: Lengths) -> list[Step]:
    """All steps, one after the other."""
    requests = added(on, lengths)
    found: list[Step] = []
    while on.waiting or on.num_running:
        held = {request.number: request.computed_tokens for request in requests}
        preempted = on.num_preempted
        step = on.compose()
        assert step is not None
        on.check_integrity()
        decoding = [r for r in (*step.group, *step.lasts) if not any(r is first for first in step.firsts)]
        tokens = {request.number: 1 for request in decoding}
        tokens |= {
            r.number: r.computed_tokens - (held[r.number] if r.computed_tokens > held[r.number] else 0)
            for r in (*step.firsts, *([step.chunk] if step.chunk is not None else []))
        }
        assert sum(tokens.values()) == step.batch.tokens
        found.append((tokens, on.num_preempted - preempted))
        on.end(step)
    return found


@dataclass(eq=False)
class Plain:
    """A sequence of the plain scheduler below."""

    number: int
    tokens: int  # prompt, and output so far
    output: int  # tokens still to come
    computed: int = 0
    blocks: int = 0


def plain_steps(lengths: Lengths, num_blocks: int, block_tokens: int, *, seqs: int = 8, budget: int = 64) -> list[Step]:
    """vLLM's `Scheduler.schedule`, one sequence after the other."""
    waiting = [Plain(number, prompt, output) for number, (prompt, output) in enumerate(lengths)]
    running: list[Plain] = []
    free = num_blocks
    found: list[Step] = []

    def blocks(tokens: int) -> int:
        return -(-tokens // block_tokens)

    def preempt() -> Plain:
        nonlocal free
        victim = running.pop()
        free += victim.blocks
        victim.computed = victim.blocks = 0
        waiting.insert(0, victim)
        return victim

    while waiting or running:
        left, tokens, preempted, position = budget, dict[int, int](), 0, 0
        work: list[Plain] = []
        while position < len(running) and left:
            one = running[position]
            count = min(one.tokens - one.computed, left)
            while (needed := blocks(one.computed + count) - one.blocks) > free and one in running:
                preempt()
                preempted += 1
            if one not in running:
                break
            free, one.blocks, left, position = free - needed, one.blocks + needed, left - count, position + 1
            tokens[one.number] = count
            work.append(one)
        while waiting and left and not preempted and len(running) < seqs:
            one = waiting[0]
            count = min(one.tokens, left)
            if blocks(one.tokens) > free:
                break
            running.append(waiting.pop(0))
            one.blocks = blocks(count)
            free, left = free - one.blocks, left - count
            tokens[one.number] = count
            work.append(one)
        for one in work:
            one.computed += tokens[one.number]
            if one.computed == one.tokens:
                one.tokens, one.output = one.tokens + 1, one.output - 1
                if not one.output:
                    running.remove(one)
                    free += one.blocks
        found.append((tokens, preempted))
    return found


@settings(max_examples=200, deadline=None)
@given(LOADS, st.integers(10, 60), st.sampled_from([1, 4, 16]), st.integers(1, 12), st.integers(12, 80))
def test_groups_take_the_steps_that_single_sequences_would(
    lengths: Lengths, spare: int, block_tokens: int, seqs: int, budget: int
) -> None:
    num_blocks = (150 + 10 * spare) // block_tokens  # one request of full length fits, and a few more
    assert steps(scheduler(num_blocks, block_tokens, seqs=seqs, budget=budget), lengths) == plain_steps(
        lengths, num_blocks, block_tokens, seqs=seqs, budget=budget
    )


def test_a_prompt_waits_until_all_of_it_has_room() -> None:
    """100 tokens, 64 a step: `0` has 60, so 40 are left for `1`, of 70, which waits until `0` is over."""
    assert steps(scheduler(100, 1), [(60, 4), (70, 2)]) == [
        ({0: 60}, 0), ({0: 1}, 0), ({0: 1}, 0), ({0: 1}, 0), ({1: 64}, 0), ({1: 6}, 0), ({1: 1}, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_blocks", "queued"),
    [(80, []), (4000, []), (27, [(300, 5), (20, 5)])],
    ids=["little room", "much room", "some wait for room"],
)
def test_equal_steps_composed_as_one_are_the_same_steps(num_blocks: int, queued: Lengths) -> None:
    lengths = [(40, 90), (30, 120), (50, 60), *queued]

    def run(steps_alike: Callable[[Batch], int] | None) -> tuple[int, int, int]:
        on = scheduler(num_blocks)
        added(on, lengths)
        composed = steps_taken = 0
        while (step := on.compose(steps_alike)) is not None:
            on.check_integrity()
            on.end(step)
            composed, steps_taken = composed + 1, steps_taken + step.repeats
        return composed, steps_taken, on.num_preempted

    one_by_one, as_one = run(None), run(lambda _: 10**6)
    assert as_one[1:] == one_by_one[1:]
    assert as_one[0] < one_by_one[0] / 5


def test_those_that_run_already_go_on_with_the_next_token() -> None:
    on = scheduler(10)
    running = [ScheduledRequest(number=n, context_tokens=40, remaining_tokens=3) for n in (-4, -3, -2, -1)]
    on.add_running(running)  # three of 3 blocks fit
    assert (on.num_running, on.free_blocks) == (3, 1)
    batch = None
    while (step := on.compose()) is not None:
        on.check_integrity()
        batch = batch or step.batch
        on.end(step)
    assert batch == Batch(3, 3 * 41, 0, 0.0, 3)
    assert (on.num_running, on.free_blocks) == (0, 10)


def test_with_pipeline_stages_a_sequence_is_in_every_pth_step() -> None:
    on: Scheduler[ScheduledRequest] = Scheduler(
        max_num_seqs=8, max_num_batched_tokens=64, num_blocks=100, decode_distance=3, max_under_way=4
    )
    added(on, [(10, 3)])
    first, second = on.compose(), on.compose()
    assert first is not None
    assert second is not None
    assert (first.batch.prefill_tokens, second.batch.sequences) == (10, 1)
    assert first.places == 3  # two empty batches are between them
    assert on.compose() is None  # all four places are taken
    on.end(first)
    third = on.compose()
    assert third is not None
    assert third.batch.sequences == 1


def test_a_request_is_removed_wherever_it_is() -> None:
    on = scheduler(100)
    decoding, partial, queued = added(on, [(10, 9), (200, 9), (10, 9)])
    step = on.compose()
    assert step is not None
    assert (step.firsts, step.chunk, list(on.waiting)) == ([decoding], partial, [queued])
    for request in (queued, partial, decoding):
        on.remove(request)
        on.check_integrity()
    assert (on.num_running, len(on.waiting), on.free_blocks) == (0, 0, 100)
    with pytest.raises(ValueError, match="not in"):
        on.remove(queued)
