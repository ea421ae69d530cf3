"""The share of time in which stages wait: by formula, by walking a schedule's order, and of measured spans."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kervan.errors import KervanError
from kervan.pipeline.schedules import Schedule, Work


@dataclass(frozen=True, slots=True)
class Span:
    """Work of a rank, from when to when, in seconds."""

    rank: int
    work: Work
    begin_s: float
    end_s: float


def formula(schedule: Schedule, *, ranks: int, chunks: int, micro_batches: int) -> float | None:
    """(p-1)/(m+p-1) for GPipe and 1F1B; with v stages a rank (p-1)/(v*m+p-1). None where no closed form holds.

    Source: Megatron-LM (arXiv 2104.04473, section 2.2), there as a share of the work, here of the whole time. Stages
    take equally long, and handing over takes nothing.
    """
    if schedule.name in {"gpipe", "1f1b", "interleaved"}:
        return (ranks - 1) / (chunks * micro_batches + ranks - 1)
    return None


def simulate(
    orders: Sequence[Sequence[Work]], seconds: Callable[[Work], float], *, hand_over_s: float = 0.0
) -> list[Span]:
    """Spans when each rank does its work in order, each piece as soon as what it needs is there.

    F needs the stage before, B and I the stage after and their own F, W its own I. Handing over to another rank takes
    `hand_over_s`. Raises: KervanError for orders that wait for each other.
    """
    last = max((work.stage for order in orders for work in order), default=0)
    done: dict[Work, tuple[int, float]] = {}
    spans: list[Span] = []
    next_of, free_s = [0] * len(orders), [0.0] * len(orders)
    total = sum(len(order) for order in orders)
    while len(spans) < total:
        before = len(spans)
        for rank, order in enumerate(orders):
            while next_of[rank] < len(order):
                work = order[next_of[rank]]
                ready_s = _ready(work, rank, last, done, hand_over_s)
                if ready_s is None:
                    break
                begin_s = max(free_s[rank], ready_s)
                free_s[rank] = begin_s + seconds(work)
                spans.append(Span(rank, work, begin_s, free_s[rank]))
                done[work] = rank, free_s[rank]
                next_of[rank] += 1
        if len(spans) == before:
            stuck = [order[next_of[rank]] for rank, order in enumerate(orders) if next_of[rank] < len(order)]
            raise KervanError(f"the order of work never ends: ranks wait at {', '.join(map(str, stuck[:4]))}")
    return spans


def _ready(work: Work, rank: int, last: int, done: dict[Work, tuple[int, float]], hand_over_s: float) -> float | None:
    """When all that `work` needs is there; None if some of it is not done."""
    kind, stage, m = work
    needs: list[tuple[Work, ...]] = []
    if kind == "F" and stage > 0:
        needs.append((Work("F", stage - 1, m),))
    if kind in {"B", "I"}:
        needs.append((Work("F", stage, m),))
        if stage < last:
            needs.append((Work("B", stage + 1, m), Work("I", stage + 1, m)))
    if kind == "W":
        needs.append((Work("I", stage, m),))
    ready_s = 0.0
    for either in needs:
        found = next((done[one] for one in either if one in done), None)
        if found is None:
            return None
        ready_s = max(ready_s, found[1] + (hand_over_s if found[0] != rank else 0.0))
    return ready_s


def bubble(spans: Iterable[Span], ranks: int) -> float:
    """The share of ranks' time, from the first begin to the last end, in which they did no work."""
    listed = list(spans)
    if not listed:
        return 0.0
    whole_s = max(span.end_s for span in listed) - min(span.begin_s for span in listed)
    busy_s = sum(span.end_s - span.begin_s for span in listed)
    return max(0.0, 1 - busy_s / (ranks * whole_s)) if whole_s > 0 else 0.0


def unit_seconds(work: Work) -> float:
    """Equal parts: a forward pass takes 1, a backward pass 1 for inputs and 1 for weights."""
    return 2.0 if work.kind == "B" else 1.0


def busy_s(spans: Iterable[Span], ranks: int) -> float:
    """How long the rank worked that worked most."""
    each = [0.0] * ranks
    for span in spans:
        each[span.rank] += span.end_s - span.begin_s
    return max(each)
