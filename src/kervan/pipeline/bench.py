"""A pipeline's run: bubble as measured, as the order of work and the measured times give it, and as theory has it."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kervan.errors import ConfigError, EngineError
from kervan.pipeline import advice, schedules
from kervan.pipeline import bubble as bubbles
from kervan.pipeline.bubble import Span
from kervan.pipeline.cut import imbalance
from kervan.pipeline.plan import PipelinePlan, Prepared, Ran
from kervan.ranks.rank import Doing, Keep, Nodes, Rank
from kervan.ranks.start import run

ONE_NODE = Nodes()
# Equal up to the order of sums: of the largest number, FP32's and BF16's rounding a few times over.
TOLERANCES = {"fp32": 1e-4, "bf16": 4e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of micro-batches. `bubble` is the median of the repeats; `theory` is of equal stages.

    `busy_s`: how long the busiest rank worked. `predicted`: the same order of work with the measured time of each
    piece, without handing over.
    """

    micro_batches: int
    bubble: float
    bubble_min: float
    bubble_max: float
    predicted: float
    theory: float
    step_s: float
    busy_s: float
    tokens_s: float
    output_error: float
    gradient_error: float
    equal_to_unsplit: bool | None
    peak_bytes: tuple[int, ...]
    spans: tuple[Span, ...]

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        names = [name for name in self.__slots__ if name != "spans"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows. `best`: the fastest number of micro-batches that was measured, and `reasons` why it is.

    `best_predicted`: of all that divide the batch, between the fewest and the most that were measured.
    """

    plan: PipelinePlan
    prepared: Prepared
    rows: tuple[Row, ...]
    imbalance: float
    best: int
    best_predicted: int | None
    reasons: tuple[str, ...]


def bench(
    plans: tuple[PipelinePlan, ...], *, ranks: int, nodes: Nodes = ONE_NODE, for_s: float, say: Callable[[str], None]
) -> Iterator[Result]:
    """Start the ranks, and give a result for each plan; all are of one device. Raises: EngineError, ConfigError."""
    total = ranks * nodes.count
    waiting = list(plans)
    prepared: Prepared | None = None
    rows: list[Row] = []
    for found in run(work, plans, ranks=ranks, nodes=nodes, for_s=for_s):
        plan = waiting[0]
        if isinstance(found, Prepared):
            prepared, rows = found, []
            layers = ", ".join(str(len(part)) for part in found.cut)
            say(f"{plan.schedule.name}, layers of the stages: {layers}")
            continue
        rows.append(_row(plan, found, total))
        say(f"{plan.schedule.name}, {found.micro_batches} micro-batches: bubble {100 * rows[-1].bubble:.1f}%")
        if len(rows) == len(plan.micro_batches):
            assert prepared is not None
            yield Result(
                plan=plan, prepared=prepared, rows=tuple(rows), imbalance=imbalance(prepared.costs, prepared.cut),
                best=advice.fastest(_points(rows)).micro_batches, best_predicted=_best_predicted(plan, rows, total),
                reasons=tuple(advice.reasons(_points(rows))),
            )  # fmt: skip
            waiting.pop(0)
    if len(waiting) == len(plans):
        raise EngineError("node 0 has the result; this node's ranks have ended")


def work(rank: Rank, plans: tuple[PipelinePlan, ...], keep: Keep) -> None:
    """Work of one rank; imports torch there."""
    keep(Doing("importing torch"))
    from kervan.pipeline import stage_work

    stage_work.work(rank, plans, keep)


def _row(plan: PipelinePlan, ran: Ran, ranks: int) -> Row:
    each = [bubbles.bubble(spans, ranks) for spans in ran.spans]
    lengths = [max(s.end_s for s in spans) - min(s.begin_s for s in spans) for spans in ran.spans]
    tolerance = TOLERANCES[plan.dtype]
    typical = ran.spans[each.index(statistics.median_low(each))]
    return Row(
        micro_batches=ran.micro_batches, bubble=statistics.median(each), bubble_min=min(each), bubble_max=max(each),
        predicted=_predicted(ran, ranks), theory=theory(plan, ran, ranks), step_s=statistics.median(lengths),
        busy_s=bubbles.busy_s(typical, ranks),
        tokens_s=plan.batch * plan.seq / statistics.median(lengths), output_error=ran.output_error,
        gradient_error=ran.gradient_error,
        equal_to_unsplit=max(ran.output_error, ran.gradient_error) <= tolerance if plan.is_checked else None,
        peak_bytes=ran.peak_bytes, spans=typical,
    )  # fmt: skip


def theory(plan: PipelinePlan, ran: Ran, ranks: int) -> float:
    """Of equal stages: the formula where one holds, else the order of work with equal times."""
    closed = bubbles.formula(plan.schedule, ranks=ranks, chunks=plan.chunks, micro_batches=ran.micro_batches)
    if closed is not None:
        return closed
    return bubbles.bubble(bubbles.simulate(ran.orders, bubbles.unit_seconds), ranks)


def _predicted(ran: Ran, ranks: int) -> float:
    """The order of work with the median of the measured times of its kind and stage."""
    times: dict[tuple[str, int], list[float]] = {}
    for spans in ran.spans:
        for span in spans:
            times.setdefault((span.work.kind, span.work.stage), []).append(span.end_s - span.begin_s)
    medians = {key: statistics.median(found) for key, found in times.items()}
    made = bubbles.simulate(ran.orders, lambda work: medians.get((work.kind, work.stage), 0.0))
    return bubbles.bubble(made, ranks)


def _points(rows: list[Row]) -> list[advice.Point]:
    return [
        advice.Point(micro_batches=row.micro_batches, step_s=row.step_s, busy_s=row.busy_s, bubble=row.bubble)
        for row in rows
    ]


def _best_predicted(plan: PipelinePlan, rows: list[Row], ranks: int) -> int | None:
    """Also of numbers that were not measured, between those that were."""
    if len(rows) < 2:
        return None

    def allowed(micro_batches: int) -> bool:
        try:
            schedules.check(plan.schedule, ranks=ranks, chunks=plan.chunks, micro_batches=micro_batches)
        except ConfigError:
            return False
        return True

    return advice.best(_points(rows), batch=plan.batch, ranks=ranks, chunks=plan.chunks, allowed=allowed)
