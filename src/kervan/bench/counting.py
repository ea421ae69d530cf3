"""What a load tester makes of its requests: counts and distributions, and its own floor when it calibrates itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kervan.bench import pacer
from kervan.bench.exchange import Exchange, OnChunk
from kervan.bench.load_client import Share
from kervan.bench.refusals import is_hopeless
from kervan.bench.sketch import Sketch
from kervan.bench.sse import Chunk
from kervan.bench.tally import RequestTally, block_of


@dataclass(slots=True)
class WorkerProgress:
    """What the live view shows of one worker. `ttft` and `gap` have what came since the last report."""

    worker: int
    ok: int = 0
    good: int = 0
    errors: int = 0
    hopeless: int = 0  # errors that the next request would have as well
    in_flight: int = 0
    tokens: int = 0
    ttft: Sketch = field(default_factory=Sketch)
    gap: Sketch = field(default_factory=Sketch)


@dataclass(slots=True)
class FloorSketches:
    """What the client added to times that the calibration server knows, in seconds."""

    ttft: Sketch = field(default_factory=Sketch)
    gap: Sketch = field(default_factory=Sketch)
    ttft_measured: Sketch = field(default_factory=Sketch)
    gap_measured: Sketch = field(default_factory=Sketch)

    def merge(self, other: "FloorSketches") -> None:
        """Count everything that `other` has counted."""
        self.ttft.merge(other.ttft)
        self.gap.merge(other.gap)
        self.ttft_measured.merge(other.ttft_measured)
        self.gap_measured.merge(other.gap_measured)


class RequestCounter:
    """Counts the requests of a client that starts at `start_s` (Unix time). A `RequestObserver`.

    `floor`: of a calibration only. Nobody looks at the chunks of another load: an exchange counts its own.
    """

    def __init__(self, share: Share, start_s: float) -> None:
        self.tally = RequestTally(start_s, share.slo, share.load.stall_s)
        self.floor = FloorSketches() if share.is_calibration else None
        self.on_chunk: OnChunk | None = self._compare_with_stamps if share.is_calibration else None
        self._share = share
        self._ttft = Sketch()  # since the last report
        self._written_s: dict[Exchange, float] = {}  # when the calibration server wrote the last chunk

    def on_sent(self, exchange: Exchange) -> None:
        """Does nothing: a request is counted when it has ended."""

    def on_done(self, exchange: Exchange) -> None:
        """Count a whole response."""
        self._ttft.add(exchange.ttft_s)
        self._add(exchange)

    def on_failed(self, exchange: Exchange) -> None:
        """Count a failure by its kind."""
        self._add(exchange)

    def _add(self, exchange: Exchange) -> None:
        load = self._share.load
        offset_s = exchange.arrival_s - self.tally.start_s
        self.tally.add(exchange, block=block_of(exchange.number, load.num_jobs, offset_s, load.duration_s))
        self._written_s.pop(exchange, None)

    def _compare_with_stamps(self, exchange: Exchange, chunk: Chunk, event: bytes, at_s: float) -> None:
        """Set a chunk's time against the stamps that `pacer.py` put into it."""
        stamps = pacer.read_stamps(event)
        if stamps is None or self.floor is None:
            return
        written_s, think_s = stamps
        if exchange.num_chunks == 1:
            self.floor.ttft.add(max(0.0, at_s - exchange.sent_s - think_s))
            self.floor.ttft_measured.add(at_s - exchange.sent_s)
        elif exchange.gaps:
            self.floor.gap.add(abs(exchange.gaps[-1] - (written_s - self._written_s[exchange])))
            self.floor.gap_measured.add(exchange.gaps[-1])
        self._written_s[exchange] = written_s

    def progress(self, in_flight: Sequence[Exchange]) -> WorkerProgress:
        """What has happened until now, with the distributions since the last call."""
        tally = self.tally
        tally.settle()
        report = WorkerProgress(
            self._share.worker,
            ok=tally.ok,
            good=tally.good,
            errors=tally.num_errors,
            hopeless=sum(count for kind, count in tally.errors.items() if is_hopeless(kind)),
            in_flight=len(in_flight),
            tokens=tally.num_chunks + sum(exchange.num_chunks for exchange in in_flight),
            ttft=self._ttft,
            gap=tally.fresh_gap,
        )
        self._ttft, tally.fresh_gap = Sketch(), Sketch()
        return report
