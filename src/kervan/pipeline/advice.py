"""Which number of micro-batches to take, from the steps that were measured, and why neither fewer nor more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kervan.units import format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A number of micro-batches, measured: a step, what of it the busiest rank worked, and the bubble of all ranks."""

    micro_batches: int
    step_s: float
    busy_s: float
    bubble: float


def best(
    points: Sequence[Point], *, batch: int, ranks: int, chunks: int, allowed: Callable[[int], bool] = lambda m: True
) -> int:
    """Of the numbers that divide `batch`, from the fewest to the most that were measured, the one with the least step.

    Between two that were measured, the time of a round is interpolated by the sequences of a micro-batch. Beyond them
    nothing is said: a micro-batch does not get shorter in proportion, so that a line through the points would be wrong.
    """
    least, most = min(p.micro_batches for p in points), max(p.micro_batches for p in points)
    numbers = [m for m in range(least, most + 1) if batch % m == 0 and allowed(m)]
    return min(
        numbers or [fastest(points).micro_batches],
        key=lambda m: (step_s(points, m, batch=batch, ranks=ranks, chunks=chunks), m),
    )


def fastest(points: Sequence[Point]) -> Point:
    """The least measured step."""
    return min(points, key=lambda point: (point.step_s, point.micro_batches))


def step_s(points: Sequence[Point], micro_batches: int, *, batch: int, ranks: int, chunks: int) -> float:
    """Of a number of micro-batches between those measured: rounds times the time of one; what was measured stays."""

    def rounds(number: int) -> float:
        return (chunks * number + ranks - 1) / chunks

    known = sorted((batch / p.micro_batches, p.step_s / rounds(p.micro_batches)) for p in points)
    size = batch / micro_batches
    for (low, low_s), (high, high_s) in pairwise(known):
        if low <= size <= high:
            share = (size - low) / (high - low)
            return rounds(micro_batches) * (low_s + share * (high_s - low_s))
    return rounds(micro_batches) * min(known, key=lambda pair: abs(pair[0] - size))[1]


def reasons(points: Sequence[Point]) -> list[str]:
    """Why the next fewer and the next more that were measured are slower than the fastest; a line each."""
    chosen = fastest(points)
    fewer = max((p for p in points if p.micro_batches < chosen.micro_batches), key=_number, default=None)
    more = min((p for p in points if p.micro_batches > chosen.micro_batches), key=_number, default=None)
    said = []
    if fewer is not None:
        said.append(f"fewer ({fewer.micro_batches}) take {format_duration(fewer.step_s)}" + _bubble(fewer, chosen))
    if more is not None:
        said.append(f"more ({more.micro_batches}) take {format_duration(more.step_s)}" + _fixed(more, chosen))
    return said


def _number(point: Point) -> int:
    return point.micro_batches


def _bubble(fewer: Point, chosen: Point) -> str:
    if fewer.bubble <= chosen.bubble:
        return ""
    return f": a bubble of {100 * fewer.bubble:.1f}%, and of {100 * chosen.bubble:.1f}% with {chosen.micro_batches}"


def _fixed(more: Point, chosen: Point) -> str:
    extra_s = more.busy_s - chosen.busy_s
    if extra_s <= 0:
        return ""
    each_s = extra_s / (more.micro_batches - chosen.micro_batches)
    return (
        f": the busiest rank works {format_duration(more.busy_s)} of it, and {format_duration(chosen.busy_s)} with "
        f"{chosen.micro_batches}: each further micro-batch costs {format_duration(each_s)}, whatever is in it (on a "
        "GPU: its kernels have to be launched, and small ones run no longer than that)"
    )
