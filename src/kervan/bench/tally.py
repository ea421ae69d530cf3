"""What a run has measured: counts, distributions and a timeline, in constant memory, mergeable over processes."""

import itertools
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kervan.bench.exchange import Exchange
from kervan.bench.prefix_reuse import PrefixReuse
from kervan.bench.sketch import Sketch, binned, merged
from kervan.config.workload import Slo

NUM_BLOCKS = 32
FIRST_BUCKET_S = 0.125
MAX_BUCKETS = 600
PENDING_GAPS = 4096
Floats = npt.NDArray[np.float64]
NUM_FIRST_ERRORS = 3  # messages kept of each kind

METRICS = {
    "ttft_s": "first token after sending",
    "ttft_from_arrival_s": "first token after the intended arrival",
    "gap_s": "time between two chunks of a stream",
    "token_gap_s": "the same, divided by the tokens in the later chunk",
    "tpot_s": "(last token - first token) / (tokens - 1), per request",
    "e2e_s": "last token after the intended arrival",
    "answer_s": "first token of the answer after sending; differs from TTFT for reasoning models",
    "late_s": "sent after the intended arrival",
}


@dataclass(slots=True)
class Cell:
    """One bucket of the timeline. Requests count where they ended, tokens where they came."""

    started: int = 0
    ok: int = 0
    good: int = 0
    errors: int = 0
    tokens: float = 0.0
    ttft_sum_s: float = 0.0
    ttft_max_s: float = 0.0
    gap_max_s: float = 0.0

    def merge(self, other: "Cell") -> None:
        """Count everything that `other` has counted."""
        self.started += other.started
        self.ok += other.ok
        self.good += other.good
        self.errors += other.errors
        self.tokens += other.tokens
        self.ttft_sum_s += other.ttft_sum_s
        self.ttft_max_s = max(self.ttft_max_s, other.ttft_max_s)
        self.gap_max_s = max(self.gap_max_s, other.gap_max_s)


@dataclass(slots=True)
class Timeline:
    """Cells of equal width from the start of the run; the width doubles when there would be too many."""

    width_s: float = FIRST_BUCKET_S
    cells: dict[int, Cell] = field(default_factory=dict)

    def at(self, offset_s: float) -> Cell:
        """The cell of a moment, made if need be."""
        number = int(max(0.0, offset_s) / self.width_s)
        while number >= MAX_BUCKETS:
            self._coarsen(self.width_s * 2)
            number = int(max(0.0, offset_s) / self.width_s)
        cell = self.cells.get(number)
        if cell is None:
            cell = self.cells[number] = Cell()
        return cell

    def add_tokens(self, at_s: Floats, gaps_s: Floats) -> None:
        """Count a token at each of the moments, with the gap before it; both have shape [tokens], in any order."""
        self.at(float(at_s.max()))  # makes the width such that all have a cell
        numbers = (np.maximum(at_s, 0.0) / self.width_s).astype(np.int64)
        first = int(numbers.min())
        tokens = np.bincount(numbers - first)
        longest_s = np.zeros(len(tokens))
        np.maximum.at(longest_s, numbers - first, gaps_s)
        for number in tokens.nonzero()[0].tolist():
            cell = self.cells.get(first + number) or self.cells.setdefault(first + number, Cell())
            cell.tokens += int(tokens[number])
            cell.gap_max_s = max(cell.gap_max_s, float(longest_s[number]))

    def _coarsen(self, width_s: float) -> None:
        factor = round(width_s / self.width_s)
        cells: dict[int, Cell] = {}
        for number, cell in self.cells.items():
            cells.setdefault(number // factor, Cell()).merge(cell)
        self.width_s, self.cells = width_s, cells

    def to_dict(self) -> dict[str, object]:
        """One list per quantity, one entry per bucket."""
        cells = [self.cells.get(number) for number in range(max(self.cells, default=-1) + 1)]
        names = ("started", "ok", "good", "errors", "tokens", "gap_max_s", "ttft_max_s")
        lists = {name: [round(getattr(cell, name), 6) if cell else 0 for cell in cells] for name in names}
        return {"bucket_s": self.width_s, **lists}

    def merge(self, other: "Timeline") -> None:
        """Count everything that `other` has counted; both have the same start."""
        width_s = max(self.width_s, other.width_s)
        if self.width_s < width_s:
            self._coarsen(width_s)
        factor = round(width_s / other.width_s)
        for number, cell in other.cells.items():
            self.cells.setdefault(number // factor, Cell()).merge(cell)


@dataclass(slots=True)
class RequestTally:
    """Everything that a worker counts. Times are seconds; `start_s` is `time.time()` of the run's start.

    `blocks[b][metric]`: the requests are cut by their order into 32 stretches, for intervals.
    """

    start_s: float
    slo: Slo = field(default_factory=Slo)
    stall_s: float = 1.0
    ok: int = 0
    good: int = 0
    unfinished: int = 0  # in flight when the run was ended by hand
    not_sent: int = 0  # arrivals beyond --max-streams
    sent_away: int = 0  # streams that ended early, because Retry-After was after the end
    told_to_wait: int = 0  # failed requests whose response had a Retry-After
    longest_retry_after_s: float = 0.0
    reconnected: int = 0  # requests sent again because the server had closed the idle connection
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)
    output_tokens: int = 0
    input_tokens: int = 0
    failed_output_tokens: int = 0  # that reached the client in requests which then failed
    wrong_input_tokens: int = 0  # requests whose prompt the server counts differently
    without_usage: int = 0  # requests whose tokens had to be counted as chunks
    prefix_reuse: PrefixReuse = field(default_factory=PrefixReuse)
    num_chunks: int = 0
    stalls: int = 0
    stalled_streams: int = 0
    longest_gap_s: float = 0.0
    estimated_token_gaps: int = 0
    first_send_s: float = math.inf
    last_end_s: float = 0.0
    busy_s: float = 0.0  # summed time of requests in flight
    with_kernel_time: int = 0
    fresh_gap: Sketch = field(default_factory=Sketch)  # whoever shows a live view takes it, and puts a new one
    _blocks: list[dict[str, Sketch]] = field(
        default_factory=lambda: [{name: Sketch() for name in METRICS} for _ in range(NUM_BLOCKS)]
    )
    _timeline: Timeline = field(default_factory=Timeline)
    # Gaps of chunks with one token each wait here, because counting thousands at once costs a fraction for each.
    _pending: list["array[float]"] = field(default_factory=lambda: [array("d") for _ in range(NUM_BLOCKS)])
    _pending_at_s: "array[float]" = field(default_factory=lambda: array("d"))
    _pending_gaps_s: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def blocks(self) -> list[dict[str, Sketch]]:
        """The distributions of values in seconds, by stretch of the run and by metric."""
        self.settle()
        return self._blocks

    @property
    def timeline(self) -> Timeline:
        """Counts by time, in cells of equal width."""
        self.settle()
        return self._timeline

    @property
    def num_errors(self) -> int:
        """Requests that failed, in any way."""
        return sum(self.errors.values())

    def _add_failure(self, kind: str, message: str, at_s: float) -> None:
        self.errors[kind] = self.errors.get(kind, 0) + 1
        first = self.messages.setdefault(kind, [])
        if len(first) < NUM_FIRST_ERRORS and message not in first:
            first.append(message)
        self._timeline.at(at_s - self.start_s).errors += 1

    def add(self, exchange: Exchange, *, block: int) -> None:
        """Count a request that has ended, in one of `NUM_BLOCKS` stretches; or one that could not be sent."""
        # A server that is away is in the time that the run took.
        self.first_send_s = min(self.first_send_s, exchange.sent_s)
        self.last_end_s = max(self.last_end_s, exchange.end_s)
        if not exchange.was_sent:
            assert exchange.error is not None
            self.not_sent += exchange.error == "not_sent"
            self._add_failure(exchange.error, exchange.message, exchange.end_s)
            return
        self.busy_s += exchange.end_s - exchange.sent_s
        self._timeline.at(exchange.sent_s - self.start_s).started += 1
        self.num_chunks += exchange.num_chunks
        block = min(max(block, 0), NUM_BLOCKS - 1)
        sketches = self._blocks[block]
        sketches["late_s"].add(max(0.0, exchange.sent_s - exchange.arrival_s))
        if exchange.error is not None:
            self.failed_output_tokens += exchange.num_chunks
            if exchange.retry_after_s is not None:
                self.told_to_wait += 1
                self.longest_retry_after_s = max(self.longest_retry_after_s, exchange.retry_after_s)
            self._add_failure(exchange.error, exchange.message, exchange.end_s)
            return
        assert exchange.first_s is not None and exchange.output_tokens is not None
        self.ok += 1
        self.with_kernel_time += exchange.has_kernel_time
        self.output_tokens += exchange.output_tokens
        input_tokens = exchange.request.input_tokens
        self.input_tokens += exchange.prompt_tokens or input_tokens or 0
        self.without_usage += exchange.prompt_tokens is None
        pieces = exchange.request.pieces
        self.prefix_reuse.add(
            prompt_tokens=exchange.prompt_tokens or input_tokens or 0,
            cached_tokens=exchange.cached_tokens,
            pieces=pieces or (),
            history_tokens=exchange.history_tokens if pieces is not None else None,
        )
        if input_tokens is not None and exchange.prompt_tokens not in (None, input_tokens):
            self.wrong_input_tokens += 1
        ttft_s, arrival_ttft_s, tpot_s = exchange.ttft_s, exchange.ttft_from_arrival_s, exchange.tpot_s
        sketches["ttft_s"].add(ttft_s)
        sketches["ttft_from_arrival_s"].add(arrival_ttft_s)
        sketches["e2e_s"].add(exchange.e2e_s)
        if exchange.first_answer_s is not None:
            sketches["answer_s"].add(exchange.first_answer_s - exchange.sent_s)
        if tpot_s is not None:
            sketches["tpot_s"].add(tpot_s)
        is_good = self.slo.is_met(ttft_s=arrival_ttft_s, tpot_s=tpot_s or 0.0, e2e_s=exchange.e2e_s)
        self.good += is_good
        if exchange.num_chunks == exchange.output_tokens and len(exchange.per_choice_last_s) == 1:
            self._add_single_tokens(exchange, block)
        else:
            self._add_gaps(exchange, sketches)
        cell = self._timeline.at(exchange.end_s - self.start_s)
        cell.ok += 1
        cell.good += is_good
        cell = self._timeline.at(exchange.first_s - self.start_s)
        cell.ttft_sum_s += ttft_s
        cell.ttft_max_s = max(cell.ttft_max_s, ttft_s)

    def _add_single_tokens(self, exchange: Exchange, block: int) -> None:
        """Count the gaps of one choice whose chunks have one token each: the case in which speed matters."""
        gaps = exchange.gaps
        assert exchange.first_s is not None
        first_s = exchange.first_s - self.start_s
        self._timeline.at(first_s).tokens += 1
        if not gaps:
            return
        pending = self._pending[block]
        pending.extend(gaps)
        if len(pending) >= PENDING_GAPS:
            self._settle_block(block)
        self._pending_gaps_s.extend(gaps)
        moments_s = itertools.accumulate(gaps, initial=first_s)
        next(moments_s)
        self._pending_at_s.extend(moments_s)
        if len(self._pending_at_s) >= PENDING_GAPS:
            self._settle_timeline()
        self._add_longest(gaps)

    def _add_gaps(self, exchange: Exchange, sketches: dict[str, Sketch]) -> None:
        """Count gaps between chunks of any number of tokens, of any number of choices."""
        gaps = exchange.gaps
        assert exchange.first_s is not None and exchange.output_tokens is not None
        sketches["gap_s"].extend(gaps)
        self.fresh_gap.extend(gaps)
        if len(exchange.chunk_tokens) == len(gaps):
            for gap_s, num_tokens in zip(gaps, exchange.chunk_tokens, strict=True):
                sketches["token_gap_s"].add(gap_s / num_tokens, num_tokens)
        elif exchange.num_chunks == exchange.output_tokens:
            sketches["token_gap_s"].extend(gaps)
        else:  # only the mean number of tokens in a chunk is known
            mean_tokens = exchange.output_tokens / max(1, exchange.num_chunks)
            sketches["token_gap_s"].extend(gap_s / mean_tokens for gap_s in gaps)
            self.estimated_token_gaps += len(gaps)
        at_s = exchange.first_s - self.start_s
        num_choices = max(1, len(exchange.per_choice_last_s))  # their gaps overlap: the timeline takes their mean pace
        share = exchange.output_tokens / max(1, exchange.num_chunks)
        self._timeline.at(at_s).tokens += share
        for gap_s in gaps:
            at_s += gap_s / num_choices
            cell = self._timeline.at(at_s)
            cell.tokens += share
            cell.gap_max_s = max(cell.gap_max_s, gap_s)
        self._add_longest(gaps)

    def _add_longest(self, gaps: list[float]) -> None:
        longest_s = max(gaps, default=0.0)
        if longest_s >= self.stall_s:
            self.stalls += sum(gap_s >= self.stall_s for gap_s in gaps)
            self.stalled_streams += 1
        self.longest_gap_s = max(self.longest_gap_s, longest_s)

    def settle(self) -> None:
        """Add what has been buffered to the distributions and the timeline."""
        for block in range(NUM_BLOCKS):
            self._settle_block(block)
        self._settle_timeline()

    def _settle_block(self, block: int) -> None:
        pending = self._pending[block]
        if pending:
            counts = binned(np.array(pending))
            for sketch in (self._blocks[block]["gap_s"], self._blocks[block]["token_gap_s"], self.fresh_gap):
                sketch.add_counts(counts)
            self._pending[block] = array("d")

    def _settle_timeline(self) -> None:
        if self._pending_at_s:
            self._timeline.add_tokens(np.array(self._pending_at_s), np.array(self._pending_gaps_s))
            self._pending_at_s, self._pending_gaps_s = array("d"), array("d")

    def merge(self, other: "RequestTally") -> None:
        """Count everything that `other` has counted; both have the same start."""
        for name in (
            "ok", "good", "unfinished", "not_sent", "sent_away", "told_to_wait", "reconnected", "output_tokens",
            "input_tokens", "failed_output_tokens", "wrong_input_tokens", "without_usage", "num_chunks", "stalls",
            "stalled_streams", "estimated_token_gaps", "busy_s", "with_kernel_time",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count
            first = self.messages.setdefault(kind, [])
            first += [m for m in other.messages.get(kind, ()) if m not in first][: NUM_FIRST_ERRORS - len(first)]
        self.prefix_reuse.merge(other.prefix_reuse)
        self.first_send_s = min(self.first_send_s, other.first_send_s)
        self.last_end_s = max(self.last_end_s, other.last_end_s)
        self.longest_gap_s = max(self.longest_gap_s, other.longest_gap_s)
        self.longest_retry_after_s = max(self.longest_retry_after_s, other.longest_retry_after_s)
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            for name, sketch in mine.items():
                sketch.merge(theirs[name])
        self.timeline.merge(other.timeline)

    def whole(self, metric: str) -> Sketch:
        """The distribution of one metric over the run."""
        return merged(block[metric] for block in self.blocks)

    def wholes(self) -> dict[str, Sketch]:
        """The distributions of all metrics."""
        return {metric: self.whole(metric) for metric in METRICS}

    @property
    def duration_s(self) -> float:
        """Seconds from the first request to the end of the last one, also of those that failed; 0 without requests."""
        return max(0.0, self.last_end_s - self.first_send_s) if self.first_send_s < math.inf else 0.0


def merge_all(tallies: Iterable[RequestTally]) -> RequestTally:
    """One tally of several; they share a start.

    Raises: ValueError of none.
    """
    first, *rest = tallies
    for tally in rest:
        first.merge(tally)
    return first


def block_of(job: int, num_jobs: int | None, offset_s: float, duration_s: float | None) -> int:
    """The stretch of the run that a job belongs to: by its number where the number of jobs is known, else by time."""
    if num_jobs is not None:
        return job * NUM_BLOCKS // max(1, num_jobs)
    if duration_s is not None:
        return int(offset_s / duration_s * NUM_BLOCKS)
    return job % NUM_BLOCKS
