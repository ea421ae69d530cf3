"""The best number of micro-batches, and why: by hand, and for what two H200s did."""

import pytest

from kervan.pipeline import advice
from kervan.pipeline.advice import Point


def point(micro_batches: int, step_s: float, bubble: float = 0.1, busy_s: float | None = None) -> Point:
    return Point(
        micro_batches=micro_batches, step_s=step_s, bubble=bubble,
        busy_s=step_s * (1 - bubble) if busy_s is None else busy_s,
    )  # fmt: skip


# GPipe of the 1B shape on 2x H200, 32 x 1024 tokens, as printed on 2026-11-30.
H200 = [point(2, 0.408, 0.382), point(4, 0.352, 0.260), point(8, 0.330, 0.175), point(16, 0.428, 0.202),
        point(32, 0.815, 0.302)]  # fmt: skip


def test_what_was_measured_decides_although_a_line_through_the_times_says_four() -> None:
    assert advice.fastest(H200).micro_batches == 8
    assert advice.best(H200, batch=32, ranks=2, chunks=1) == 8
    for measured in H200:
        assert advice.step_s(H200, measured.micro_batches, batch=32, ranks=2, chunks=1) == pytest.approx(
            measured.step_s
        )


def test_between_two_that_were_measured_the_time_of_a_round_is_interpolated() -> None:
    # 2 ranks, 24 sequences. m=2: 12 of them, 3 rounds of 2 s; m=6: 4 of them, 7 rounds of 1 s.
    points = [point(2, 6.0), point(6, 7.0)]
    # m=3: 8 sequences are half way, 1.5 s, and 4 rounds; m=4: 6 are a quarter up, 1.25 s, and 5 rounds
    assert advice.step_s(points, 3, batch=24, ranks=2, chunks=1) == pytest.approx(6.0)
    assert advice.step_s(points, 4, batch=24, ranks=2, chunks=1) == pytest.approx(6.25)
    assert advice.best(points, batch=24, ranks=2, chunks=1) == 2  # of equal steps the fewest
    assert advice.best([point(2, 6.3), point(6, 7.0)], batch=24, ranks=2, chunks=1) == 3
    assert advice.best(points, batch=24, ranks=2, chunks=1, allowed=lambda m: m > 3) == 4


def test_nothing_is_said_beyond_what_was_measured() -> None:
    # by the trend, 16 would be faster still
    assert advice.best([point(2, 4.0), point(4, 2.0)], batch=16, ranks=2, chunks=1) == 4


def test_fewer_have_more_bubble_and_more_cost_time_of_their_own() -> None:
    fewer, more = advice.reasons(H200)
    assert fewer == "fewer (4) take 352 ms: a bubble of 26.0%, and of 17.5% with 8"
    # 0.428 x 0.798 = 342 ms; 0.330 x 0.825 = 272 ms; the difference over 8 micro-batches is 8.66 ms
    assert more.startswith(
        "more (16) take 428 ms: the busiest rank works 342 ms of it, and 272 ms with 8: each further micro-batch costs "
        "8.66 ms, whatever is in it (on a GPU: its kernels have to be launched"
    )
    assert advice.reasons(H200[:1]) == []
