"""One process of the client: sends its share of a load, measures, and reports to the process that started it."""

import asyncio
import contextlib
import functools
import gc
import itertools
import math
import signal
import ssl
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from kervan.bench import eventloop, pacer
from kervan.bench.channel import MAX_NAP_S, MIN_NAP_S, Channel, Poller
from kervan.bench.events import Chunk
from kervan.bench.exchange import Exchange
from kervan.bench.load import Endpoint, Load
from kervan.bench.prompts import Alphabet, Prompts, Request, http_request
from kervan.bench.sketch import Sketch
from kervan.bench.tally import RequestTally, block_of
from kervan.config.workload import Slo, TraceRow
from kervan.errors import KervanError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
REPORT_PERIOD_S = 0.5
SWEEP_PERIOD_S = 0.25
LAG_PERIOD_S = 0.05
PREPARED_JOBS = 2048
BATCH = 16  # requests sent, or ended, between two looks at the sockets
MIN_NAP_STREAMS = 16  # with fewer, reads seldom come together
LATE_ENOUGH_S = 0.002  # time before the next arrival in which a request may be built
_now = time.time


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a load that one of `num_workers` processes carries: jobs whose number modulo is `worker`."""

    load: Load
    target: Endpoint
    alphabet: Alphabet
    slo: Slo
    worker: int = 0
    num_workers: int = 1
    is_calibration: bool = False

    @property
    def streams(self) -> int | None:
        """This worker's streams of a closed loop."""
        if self.load.streams is None:
            return None
        return self.load.streams // self.num_workers + (self.worker < self.load.streams % self.num_workers)


@dataclass(slots=True)
class Progress:
    """What the live view shows of one worker. `ttft` and `gap` have what came since the last report."""

    worker: int
    ok: int = 0
    good: int = 0
    errors: int = 0
    in_flight: int = 0
    tokens: int = 0
    ttft: Sketch = field(default_factory=Sketch)
    gap: Sketch = field(default_factory=Sketch)


@dataclass(slots=True)
class FloorSketches:
    """What the client added to times that the calibration server knows."""

    ttft: Sketch = field(default_factory=Sketch)
    gap: Sketch = field(default_factory=Sketch)
    ttft_measured: Sketch = field(default_factory=Sketch)
    gap_measured: Sketch = field(default_factory=Sketch)


@dataclass(slots=True)
class Finished:
    """The last report of a worker."""

    worker: int
    tally: RequestTally
    cpu_s: float
    wall_s: float
    lag: Sketch  # how late this process' event loop ran its own timers
    loop: str
    floor: FloorSketches | None = None


class CalibrationExchange(Exchange):
    """Reads the stamps of `pacer.py` out of each chunk."""

    __slots__ = ("floor", "stamp_s")

    def __init__(self, index: int, arrival_s: float, exact_tokens: int | None, floor: FloorSketches) -> None:
        super().__init__(index, arrival_s, exact_tokens)
        self.floor = floor
        self.stamp_s = 0.0

    def _on_chunk(self, chunk: Chunk, event: bytes, at_s: float) -> None:
        is_first = self.first_s is None
        super()._on_chunk(chunk, event, at_s)
        stamps = pacer.read_stamps(event)
        if stamps is None:
            return
        sent_s, think_s = stamps
        if is_first:
            self.floor.ttft.add(max(0.0, at_s - self.sent_s - think_s))
            self.floor.ttft_measured.add(at_s - self.sent_s)
        elif self.gaps:
            self.floor.gap.add(abs(self.gaps[-1] - (sent_s - self.stamp_s)))
            self.floor.gap_measured.add(self.gaps[-1])
        self.stamp_s = sent_s


@dataclass(slots=True)
class Failed:
    """A worker that cannot go on."""

    worker: int
    message: str


class Driver:
    """Sends a share of a load on the running event loop."""

    def __init__(self, share: Share, start_s: float) -> None:
        self.share = share
        self.tally = RequestTally(start_s, share.slo, share.load.stall_s)
        self.lag = Sketch()
        self.floor = FloorSketches() if share.is_calibration else None
        self.fresh = Progress(share.worker)
        self._load, self._target = share.load, share.target
        parts = urlsplit(share.target.url)
        self._host, self._tls = parts.hostname or "", _tls(share.target) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._host_header = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/") + PATHS[share.target.api]
        self._prompts = Prompts(share.load, share.target, share.alphabet)
        self._poller = Poller()
        self._idle: list[Channel] = []
        self._flying: dict[Exchange, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: deque[asyncio.Future[None]] = deque()
        self._ended_chunks = 0
        self._num_open = 0
        self._is_ended = False
        self._loop = asyncio.get_running_loop()

    # ---- preparing

    def jobs(self) -> Iterator[tuple[int, float, TraceRow | None]]:
        """(number, arrival after the start, trace row) of this worker's jobs in an open loop."""
        for number, (at_s, row) in enumerate(self._load.arrivals()):
            if number % self.share.num_workers == self.share.worker:
                yield number, at_s, row

    def closed_numbers(self) -> Iterator[int]:
        bound = self._load.num_jobs
        number = self.share.worker
        while bound is None or number < bound:
            yield number
            number += self.share.num_workers

    def prepare(self) -> None:
        """Build the first requests, so that the start is not spent on it."""
        if self.share.streams is not None:
            self._numbers = self.closed_numbers()
            self._first = [
                (number, self._prompts.request(number, 0, None, ()))
                for number in itertools.islice(self._numbers, self.share.streams)
            ]
        else:
            self._jobs = self.jobs()
            self._ready: deque[tuple[int, float, TraceRow | None, Request]] = deque()
            while len(self._ready) < PREPARED_JOBS and self._build_one():
                pass

    def _build_one(self) -> bool:
        job = next(self._jobs, None)
        if job is None:
            return False
        number, at_s, row = job
        self._ready.append((number, at_s, row, self._prompts.request(number, 0, row, ())))
        return True

    async def connect_first(self) -> None:
        """Open the connections of a closed loop, so that their handshakes are not in the first TTFT."""
        if self.share.streams is None:
            return
        opened = await asyncio.gather(*(self._open() for _ in self._first), return_exceptions=True)
        self._idle = [channel for channel in opened if isinstance(channel, Channel)]

    # ---- running

    async def run(self) -> None:
        """Send the whole share; returns when everything has ended."""
        watch = self._loop.create_task(self._watch())
        try:
            await asyncio.sleep(self.tally.start_s - _now())
            if self.share.streams is not None:
                await self._closed()
            else:
                await self._open_loop()
        finally:
            watch.cancel()
            for channel in self._idle:
                channel.close()
            self._poller.close()

    def end(self) -> None:
        """Send nothing more and count what is in flight as unfinished."""
        self._is_ended = True
        self.tally.unfinished += len(self._flying)
        for channel in self._flying.values():
            channel.close()
        for task in self._tasks:
            task.cancel()

    async def _closed(self) -> None:
        await self._gather(self._stream(number, ask) for number, ask in self._first)

    async def _stream(self, number: int, ask: Request) -> None:
        """Jobs one after the other. The next one is built while this one's answer comes."""
        has_next = True
        while has_next and not self._is_over():
            upcoming: list[tuple[int, Request]] = []

            def build(upcoming: list[tuple[int, Request]] = upcoming) -> None:
                following = next(self._numbers, None)
                if following is not None:
                    upcoming.append((following, self._prompts.request(following, 0, None, ())))

            self._loop.call_later(0.001, build)
            await self._job(number, _now(), None, ask)
            if not upcoming:
                await asyncio.sleep(0.002)  # an answer within a millisecond: let the build happen
            has_next = bool(upcoming)
            if has_next:
                number, ask = upcoming[0]

    def _is_over(self) -> bool:
        bound_s = self._load.duration_s
        return self._is_ended or (bound_s is not None and _now() >= self.tally.start_s + bound_s)

    async def _open_loop(self) -> None:
        more, count = True, 0
        while not self._is_ended and (more or self._ready):
            wait_s = self._ready[0][1] + self.tally.start_s - _now() if self._ready else 0.0
            if self._ready and wait_s <= 0:
                number, at_s, row, ask = self._ready.popleft()
                self._start(self._job(number, self.tally.start_s + at_s, row, ask))
                count += 1
                if count % BATCH == 0:
                    await asyncio.sleep(0)
                    self._poller.read()
            elif more and len(self._ready) < PREPARED_JOBS and (not self._ready or wait_s > LATE_ENOUGH_S):
                more = self._build_one()
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(wait_s if wait_s < 0.01 else wait_s - 0.005)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, job: Any) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _gather(self, jobs: Any) -> None:
        for count, job in enumerate(jobs, 1):
            self._start(job)
            if count % BATCH == 0:
                await asyncio.sleep(0)
                self._poller.read()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _job(self, number: int, arrival_s: float, row: TraceRow | None, ask: Request) -> None:
        history: list[dict[str, Any]] = []
        for turn in range(self._load.turns):
            if turn:
                await asyncio.sleep(self._load.think_time_s)
                if self._is_over():
                    return
                ask = self._prompts.request(number, turn, None, history)
                arrival_s = _now()
            exchange = await self._exchange(number, arrival_s, ask)
            if exchange is None or exchange.error is not None:
                return
            if self._load.turns > 1:
                messages = _messages_of(ask)
                history = [*messages, {"role": "assistant", "content": "".join(exchange.text or [])}]

    async def _exchange(self, number: int, arrival_s: float, ask: Request) -> Exchange | None:
        """One request to its end; None when it could not be sent, which is counted."""
        if self._num_open * self.share.num_workers >= self._load.max_streams:
            self.tally.not_sent += 1
            self.tally.add_failure("not_sent", f"{self._load.max_streams} streams are in flight", arrival_s)
            return None
        self._num_open += 1
        try:
            return await self._sent(number, arrival_s, ask)
        finally:
            self._num_open -= 1

    async def _sent(self, number: int, arrival_s: float, ask: Request) -> Exchange | None:
        request = http_request(self._target, self._host_header, self._path, ask.body)
        while True:
            exchange = self._new_exchange(number, arrival_s, ask)
            try:
                channel = await self._channel(exchange)
            except (OSError, ssl.SSLError) as error:
                self.tally.add_failure("refused", f"no connection: {error}", _now())
                await asyncio.sleep(0.05)  # a closed loop would ask again at once, thousands of times a second
                return None
            ended = self._loop.create_future()
            exchange.on_ended = functools.partial(self._on_ended, ended)
            exchange.sent_s = channel.send(request, exchange)
            self._flying[exchange] = channel
            await ended
            del self._flying[exchange]
            if not (exchange.is_reused and exchange.error == "closed"):
                break
            self.tally.reconnected += 1  # the server had ended the idle connection; it has not seen this request
        self._ended_chunks += exchange.num_chunks
        block = block_of(number, self._load.num_jobs, arrival_s - self.tally.start_s, self._load.duration_s)
        self.tally.add(exchange, block=block, input_tokens=ask.input_tokens, has_kernel_time=channel.has_kernel_time)
        if exchange.error is None:
            self.fresh.ttft.add(exchange.ttft_s)
        if channel.is_open:
            self._idle.append(channel)
        return exchange

    def _on_ended(self, ended: "asyncio.Future[None]", _: Exchange) -> None:
        self._ended.append(ended)
        if len(self._ended) == 1:
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Let requests that ended be counted, and their streams send again: a few, then what came meanwhile is read.

        A thousand streams may end in one step of the server. All their work at once would take longer than the gaps of
        those that have already sent again: two of their tokens would come in one read, with one time.
        """
        for _ in range(min(BATCH, len(self._ended))):
            ended = self._ended.popleft()
            if not ended.done():
                ended.set_result(None)
        if self._ended:
            self._poller.read()
            self._loop.call_soon(self._go_on)

    def _nap_s(self, now_s: float) -> float:
        """How long reads may wait for each other: while streams are many and slow.

        Judged by the stream that has run the longest: a nap is at most 1% of its time, so the next request is not sent
        late, and 10% of its gaps, so that two of its tokens seldom come in one read.
        """
        if len(self._flying) < MIN_NAP_STREAMS:
            return 0.0
        exchange, channel = next(iter(self._flying.items()))
        channel.settle()
        mean_gap_s = sum(exchange.gaps) / len(exchange.gaps) if exchange.gaps else math.inf
        nap_s = min(MAX_NAP_S, (now_s - exchange.sent_s) / 100, mean_gap_s / 10)
        return nap_s if nap_s >= MIN_NAP_S else 0.0

    def _new_exchange(self, number: int, arrival_s: float, ask: Request) -> Exchange:
        if self.floor is None:
            return Exchange(number, arrival_s, ask.output_tokens, keeps_text=self._load.turns > 1)
        return CalibrationExchange(number, arrival_s, ask.output_tokens, self.floor)

    async def _channel(self, exchange: Exchange) -> Channel:
        while self._idle:
            channel = self._idle.pop()
            if channel.is_open:
                exchange.is_reused = True
                return channel
        return await self._open()

    async def _open(self) -> Channel:
        channel = Channel(self._host, self._port, self._tls)
        async with asyncio.timeout(min(30.0, self._load.timeout_s)):
            await channel.open(self._poller)
        return channel

    async def _watch(self) -> None:
        """End what takes too long, and notice how late this loop runs."""
        last_sweep_s = 0.0
        while True:
            before_s = self._loop.time()
            await asyncio.sleep(LAG_PERIOD_S)
            after_s = self._loop.time()
            self.lag.add(max(0.0, after_s - before_s - LAG_PERIOD_S))
            self._poller.nap_s = self._nap_s(_now())
            if after_s - last_sweep_s < SWEEP_PERIOD_S:
                continue
            last_sweep_s = after_s
            now_s = _now()
            for exchange, channel in list(self._flying.items()):
                if now_s - exchange.sent_s <= self._load.timeout_s:
                    continue
                channel.settle()
                if channel.is_open:
                    channel.close()
                    exchange.fail("timeout", f"not ended after {self._load.timeout_s:g} s")
                    exchange.on_end(now_s, None)

    def progress(self) -> Progress:
        """What happened, with the distributions since the last call."""
        found, self.fresh = self.fresh, Progress(self.share.worker)
        found.ok, found.good, found.errors = self.tally.ok, self.tally.good, self.tally.num_errors
        found.in_flight = len(self._flying)
        self.tally.settle()
        found.gap, self.tally.fresh_gap = self.tally.fresh_gap, Sketch()
        for channel in self._flying.values():
            channel.settle()
        found.tokens = self._ended_chunks + sum(exchange.num_chunks for exchange in self._flying)
        return found


def _messages_of(ask: Request) -> list[dict[str, Any]]:
    """The messages of a chat request's body."""
    import json

    messages: list[dict[str, Any]] = json.loads(ask.body)["messages"]
    return messages


def _tls(target: Endpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not target.verify_tls:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def run(share: Share, link: Connection) -> None:
    """A worker's life: say ready, wait for the start time, send, report; `stop` ends it early.

    `link` gives ("start", time) and ("stop",), and gets "ready", Progress, and last Finished or Failed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that shows the report
    factory, name = eventloop.factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            runner.run(_serve(share, link, name))
        except KervanError as error:
            with contextlib.suppress(OSError):
                link.send(Failed(share.worker, str(error)))


async def _serve(share: Share, link: Connection, loop_name: str) -> None:
    loop = asyncio.get_running_loop()
    driver = Driver(share, time.time())
    driver.prepare()
    await driver.connect_first()
    gc.collect()
    gc.freeze()  # the prebuilt requests are no garbage: keep collections short
    gc.set_threshold(50_000)  # and few: what a token leaves behind has no cycles
    link.send("ready")
    command = await loop.run_in_executor(None, link.recv)
    if command[0] == "stop":
        return
    driver.tally.start_s = command[1]
    running = loop.create_task(driver.run())

    def on_command() -> None:
        with contextlib.suppress(EOFError, OSError):
            link.recv()
        loop.remove_reader(link.fileno())  # "stop", or the starter is gone
        driver.end()

    loop.add_reader(link.fileno(), on_command)
    cpu_s, wall_s = time.process_time(), time.monotonic()
    while not running.done():
        await asyncio.wait({running}, timeout=REPORT_PERIOD_S)
        with contextlib.suppress(OSError):
            link.send(driver.progress())
    await running
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
    with contextlib.suppress(OSError):
        link.send(Finished(share.worker, driver.tally, cpu_s, wall_s, driver.lag, loop_name, driver.floor))
