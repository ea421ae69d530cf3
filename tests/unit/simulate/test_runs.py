"""Runs of equal steps: cut anywhere, they leave the scheduler as one that takes its steps one by one."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.sim.scheduler import ScheduledRequest, Scheduler
from kervan.simulate.runs import RunScheduler

SIZES = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "num_blocks": 40, "block_tokens": 4}


def request(number: int, context: int, output: int) -> ScheduledRequest:
    return ScheduledRequest(number=number, context_tokens=context, remaining_tokens=output)


def test_a_run_goes_to_the_end_of_the_first_answer_and_holds_its_last_token() -> None:
    scheduler: RunScheduler[ScheduledRequest] = RunScheduler(**SIZES)
    first, second = request(0, 4, 5), request(1, 4, 9)
    scheduler.add(first)
    scheduler.add(second)
    prefill = scheduler.next_run()
    assert prefill is not None
    assert prefill.firsts == [first, second]
    scheduler.end(prefill)
    run = scheduler.next_run()
    assert run is not None
    assert run.repeats == 4
    assert run.lasts == [first]
    scheduler.end(run)
    rest = scheduler.next_run()
    assert rest is not None
    assert (rest.repeats, rest.lasts, rest.batch.sequences) == (4, [second], 1)


def test_a_run_that_is_cut_gives_back_what_it_has_not_done() -> None:
    scheduler: RunScheduler[ScheduledRequest] = RunScheduler(**SIZES)
    only = request(0, 4, 20)
    scheduler.add(only)
    prefill = scheduler.next_run()
    assert prefill is not None
    scheduler.end(prefill)
    free = scheduler.free_blocks
    run = scheduler.next_run()
    assert run is not None
    assert (run.repeats, run.lasts) == (19, [only])
    scheduler.cut(run, 3)
    assert (run.repeats, run.lasts) == (3, [])
    assert free - scheduler.free_blocks == 1  # tokens 5 to 7 begin one block of 4
    scheduler.check_integrity()
    scheduler.end(run)
    rest = scheduler.next_run()
    assert rest is not None
    assert (rest.repeats, rest.lasts) == (16, [only])


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_runs_cut_at_random_end_each_answer_at_the_step_at_which_single_steps_end_it(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 40), rng.randint(1, 30)) for _ in range(12)]

    def add_due(scheduler: Scheduler[ScheduledRequest], step: int, left: list[tuple[int, int]]) -> None:
        while left and len(left) > len(lengths) - 1 - step // 7:
            number = len(lengths) - len(left)
            scheduler.add(request(number, *left.pop(0)))

    single: Scheduler[ScheduledRequest] = Scheduler(**SIZES)
    ended: dict[int, int] = {}
    left, step = list(lengths), 0
    while len(ended) < len(lengths):
        add_due(single, step, left)
        composed = single.compose()
        step += 1
        if composed is not None:
            single.end(composed)
            ended |= {one.number: step for one in composed.lasts}

    runs: RunScheduler[ScheduledRequest] = RunScheduler(**SIZES)
    ended_in_runs: dict[int, int] = {}
    left, step = list(lengths), 0
    while len(ended_in_runs) < len(lengths):
        add_due(runs, step, left)
        run = runs.next_run()
        if run is None:
            step += 1
            continue
        # No run goes past the next arrival.
        if left:
            runs.cut(run, max(1, min(run.repeats, 7 - step % 7)))
        if rng.random() < 0.5:
            runs.cut(run, rng.randint(1, run.repeats))
        step += run.repeats
        runs.end(run)
        runs.check_integrity()
        ended_in_runs |= {one.number: step for one in run.lasts}
    assert ended_in_runs == ended
