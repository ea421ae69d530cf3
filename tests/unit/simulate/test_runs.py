"""Equal steps that are told of at once leave the scheduler as one that takes its steps one by one."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.sim.prefix_cache import CachingScheduler
from kervan.sim.scheduler import ScheduledRequest, Scheduler
from kervan.simulate.runs import CachingRunScheduler, RunScheduler, block_hashes
from kervan.simulate.stream import SimulatedStream

SIZES = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "num_blocks": 40, "block_tokens": 4}


def request(number: int, context: int, output: int) -> ScheduledRequest:
    return ScheduledRequest(number=number, context_tokens=context, remaining_tokens=output)


def test_steps_are_alike_to_the_end_of_the_first_answer_and_its_last_token_is_in_the_last_of_them() -> None:
    scheduler: RunScheduler[ScheduledRequest] = RunScheduler(**SIZES)
    first, second = request(0, 4, 5), request(1, 4, 9)
    scheduler.add(first)
    scheduler.add(second)
    prefill = scheduler.next_step()
    assert prefill is not None
    assert prefill.firsts == [first, second]
    assert scheduler.num_alike(prefill) == 0
    step = scheduler.next_step()
    assert step is not None
    assert scheduler.num_alike(step) == 3
    scheduler.extend(step, 3)
    assert (step.repeats, step.lasts) == (4, [first])
    rest = scheduler.next_step()
    assert rest is not None
    assert (scheduler.num_alike(rest), rest.lasts, rest.batch.sequences) == (3, [], 1)


def test_fewer_steps_than_are_alike_may_follow() -> None:
    scheduler: RunScheduler[ScheduledRequest] = RunScheduler(**SIZES)
    only = request(0, 4, 20)
    scheduler.add(only)
    assert scheduler.next_step() is not None
    free = scheduler.free_blocks
    step = scheduler.next_step()
    assert step is not None
    assert scheduler.num_alike(step) == 18
    scheduler.extend(step, 2)
    assert (step.repeats, step.lasts) == (3, [])
    assert free - scheduler.free_blocks == 1  # tokens 5 to 7 begin one block of 4
    scheduler.check_integrity()


def streams(lengths: list[tuple[int, int]], numbers: list[tuple[int, ...]]) -> list[SimulatedStream]:
    return [
        SimulatedStream(
            number=place, id=place, context_tokens=context, remaining_tokens=output, prompt_tokens=context,
            output_tokens=output, sent_s=0.0, hashes=block_hashes(numbers[place], 16, context, output, place),
        )
        for place, (context, output) in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("caches_prefixes", [False, True])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_repeats_at_random_end_each_answer_at_the_step_at_which_single_steps_end_it(
    caches_prefixes: bool, seed: int
) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 100), rng.randint(1, 60)) for _ in range(12)]
    numbers = [tuple(rng.randint(1, 2) for _ in range(7)) for _ in lengths]
    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "num_blocks": 30}

    def add_due(scheduler: Scheduler[SimulatedStream], step: int, left: list[SimulatedStream]) -> None:
        while left and len(left) > len(lengths) - 1 - step // 7:
            scheduler.add(left.pop(0))

    kinds = (CachingScheduler, CachingRunScheduler) if caches_prefixes else (Scheduler, RunScheduler)
    single: Scheduler[SimulatedStream] = kinds[0](**sizes)
    ended: dict[int, int] = {}
    left, step = streams(lengths, numbers), 0
    while len(ended) < len(lengths):
        add_due(single, step, left)
        composed = single.compose()
        step += 1
        if composed is not None:
            single.end(composed)
            ended |= {one.number: step for one in composed.lasts}

    runs = kinds[1](**sizes)
    assert isinstance(runs, RunScheduler)
    ended_in_runs: dict[int, int] = {}
    left, step = streams(lengths, numbers), 0
    while len(ended_in_runs) < len(lengths):
        add_due(runs, step, left)
        taken = runs.next_step()
        if taken is None:
            step += 1
            continue
        # Nothing goes past the next arrival.
        more = min(runs.num_alike(taken), 6 - step % 7) if left else runs.num_alike(taken)
        if more and rng.random() < 0.5:
            more = rng.randint(0, more)
        if more:
            runs.extend(taken, more)
        step += taken.repeats
        runs.check_integrity()
        ended_in_runs |= {one.number: step for one in taken.lasts}
    assert ended_in_runs == ended
    if isinstance(runs, CachingRunScheduler):
        assert isinstance(single, CachingScheduler)
        assert runs.counts == single.counts
