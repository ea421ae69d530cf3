"""The client of a load: sends requests when they are due, times their responses, and tells an observer what happens."""

import asyncio
import functools
import itertools
import json
import math
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from kervan.bench.channel import MAX_NAP_S, MIN_NAP_S, Channel, Poller
from kervan.bench.exchange import Exchange, OnChunk
from kervan.bench.load import PATHS, Endpoint, Load
from kervan.bench.prompts import Alphabet, Prompts, Request, http_request
from kervan.bench.refusals import MAX_PAUSE_S, MAX_RETRY_AFTER_S, pause_s
from kervan.bench.sketch import Sketch
from kervan.config.workload import Slo, TraceRow
from kervan.errors import KervanError

SWEEP_PERIOD_S = 0.25
LAG_PERIOD_S = 0.05
PREPARED_REQUESTS = 2048
BATCH = 16  # requests sent, or ended, between two looks at the sockets
MIN_NAP_STREAMS = 16  # with fewer, reads seldom come together
LATE_ENOUGH_S = 0.002  # time before the next arrival in which a request may be built
_now = time.time

# (number of the job, turn of its conversation, trace row, messages so far) -> what to send. `Prompts.request` is one.
BuildRequest = Callable[[int, int, TraceRow | None, Sequence[dict[str, Any]]], Request]
# (seconds after the start, trace row), in order of time.
Arrivals = Iterable[tuple[float, TraceRow | None]]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a load that one of `num_workers` processes carries: jobs whose number modulo is `worker`."""

    load: Load
    endpoint: Endpoint
    alphabet: Alphabet
    slo: Slo
    worker: int = 0
    num_workers: int = 1
    is_calibration: bool = False

    @property
    def streams(self) -> int | None:
        """This worker's streams of a closed loop; None in an open loop."""
        if self.load.streams is None:
            return None
        return self.load.streams // self.num_workers + (self.worker < self.load.streams % self.num_workers)


class RequestObserver(Protocol):
    """Told of each request: that it was sent, the chunks of its response, and then that it is done or has failed.

    A request that could not be sent is only told as failed (`Exchange.was_sent` is False then). One that is cut off by
    `LoadClient.end` is not told of again. What the other methods raise ends the load, and `LoadClient.run` raises it.
    """

    @property
    def on_chunk(self) -> OnChunk | None:
        """Called with each chunk when its exchange has counted it; must not raise. None costs nothing."""

    def on_sent(self, exchange: Exchange) -> None:
        """The request has left; one that must be sent again over a new connection comes again as another exchange."""

    def on_done(self, exchange: Exchange) -> None:
        """The response is whole."""

    def on_failed(self, exchange: Exchange) -> None:
        """`exchange.error` is the kind of failure, `exchange.message` says more."""


class LoadClient:
    """Sends a share of a load on the running event loop.

    `build`: what requests are made by, those of the load by default. `arrivals`: of an open loop, those of the load by
    default. `lag`: how late this loop ran its own timers, in seconds. `unfinished`: requests that `end` cut off.
    `reconnected`: requests sent again because the server had closed the idle connection before it saw them.
    `sent_away`: streams of a closed loop that ended early, because the server asked them to come back after the end.
    """

    def __init__(self, share: Share, *, build: BuildRequest | None = None, arrivals: Arrivals | None = None) -> None:
        self.share = share
        self.lag = Sketch()
        self.unfinished = 0
        self.reconnected = 0
        self.sent_away = 0
        self._load, self._endpoint = share.load, share.endpoint
        parts = urlsplit(share.endpoint.url)
        self._host, self._tls = parts.hostname or "", _tls(share.endpoint) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._host_header = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/") + PATHS[share.endpoint.api]
        self._build = build or Prompts(share.load, share.endpoint, share.alphabet).request
        self._arrivals = arrivals
        self._poller = Poller()
        self._idle: list[Channel] = []
        self._in_flight: dict[Exchange, Channel] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: BaseException | None = None
        self._ended: deque[asyncio.Future[None]] = deque()
        self._num_open = 0
        self._ending = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._start_s = 0.0
        self._observer: RequestObserver

    # ---- preparing

    def prepare(self) -> None:
        """Build the first requests, so that the start is not spent on it.

        Raises: ConfigError for requests that cannot be built.
        """
        if self.share.streams is not None:
            self._numbers = self._closed_loop_numbers()
            self._first = [
                (number, self._build(number, 0, None, ()))
                for number in itertools.islice(self._numbers, self.share.streams)
            ]
        else:
            self._jobs = self._open_loop_jobs()
            self._ready: deque[tuple[int, float, TraceRow | None, Request]] = deque()
            while len(self._ready) < PREPARED_REQUESTS and self._build_next():
                pass

    def _closed_loop_numbers(self) -> Iterator[int]:
        bound = self._load.num_jobs
        number = self.share.worker
        while bound is None or number < bound:
            yield number
            number += self.share.num_workers

    def _open_loop_jobs(self) -> Iterator[tuple[int, float, TraceRow | None]]:
        """(number, arrival after the start, trace row) of this worker's jobs."""
        for number, (at_s, row) in enumerate(self._load.arrivals() if self._arrivals is None else self._arrivals):
            if number % self.share.num_workers == self.share.worker:
                yield number, at_s, row

    def _build_next(self) -> bool:
        job = next(self._jobs, None)
        if job is None:
            return False
        number, at_s, row = job
        self._ready.append((number, at_s, row, self._build(number, 0, row, ())))
        return True

    async def connect_first(self) -> None:
        """Open the connections of a closed loop, so that their handshakes are not in the first TTFT."""
        if self.share.streams is None:
            return
        opened = await asyncio.gather(*(self._open() for _ in self._first), return_exceptions=True)
        self._idle = [channel for channel in opened if isinstance(channel, Channel)]

    # ---- running

    async def run(self, start_s: float, observer: RequestObserver) -> None:
        """Send the whole share from `start_s` (Unix time) on; returns when everything has ended.

        Raises: ConfigError for a request that cannot be built; what `observer` raised. Nothing more is sent then.
        """
        self._start_s, self._observer = start_s, observer
        watch = self._loop.create_task(self._watch())
        try:
            await asyncio.sleep(start_s - _now())
            if self.share.streams is not None:
                await self._run_closed_loop()
            else:
                await self._run_open_loop()
        finally:
            watch.cancel()
            for channel in self._idle:
                channel.close()
            self._poller.close()
        if self._failure is not None:
            raise self._failure

    def stop_sending(self) -> None:
        """Send no more requests; those in flight run to their end."""
        self._ending.set()

    def end(self) -> None:
        """Send no more requests, and cut off those in flight, which count as unfinished."""
        self._ending.set()
        self.unfinished += len(self._in_flight)
        for channel in self._in_flight.values():
            channel.close()
        for task in self._tasks:
            task.cancel()

    def in_flight(self) -> list[Exchange]:
        """Requests that were sent and have not ended, with what has come of their responses."""
        for channel in self._in_flight.values():
            channel.settle()
        return list(self._in_flight)

    async def _run_closed_loop(self) -> None:
        for count, (number, request) in enumerate(self._first, 1):
            self._start(self._stream(number, request))
            if count % BATCH == 0:
                await asyncio.sleep(0)
                self._poller.read()
        await self._wait_for_tasks()

    async def _stream(self, number: int, request: Request) -> None:
        """Jobs one after the other, after a failure with a pause. The next one is built while the response comes."""
        has_next, failures = True, 0
        while has_next and not self._is_over():
            upcoming: list[tuple[int, Request]] = []

            def build(upcoming: list[tuple[int, Request]] = upcoming) -> None:
                following = next(self._numbers, None)
                if following is None:
                    return
                try:
                    upcoming.append((following, self._build(following, 0, None, ())))
                except KervanError as error:
                    self._fail(error)

            self._loop.call_later(0.001, build)
            last = await self._job(number, _now(), None, request)
            failures = failures + 1 if last.error is not None else 0
            if failures and not await self._pause(pause_s(failures, last.retry_after_s)):
                return
            if not upcoming:
                await asyncio.sleep(0.002)  # a response within a millisecond: let the build happen
            has_next = bool(upcoming)
            if has_next:
                number, request = upcoming[0]

    async def _pause(self, pause_s: float) -> bool:
        """Wait for so long, or until the end; false when the end comes first, and so there is nothing to wait for."""
        bound_s = self._load.duration_s
        left_s = MAX_RETRY_AFTER_S if bound_s is None else self._start_s + bound_s - _now()
        if pause_s > left_s:
            self.sent_away += pause_s > MAX_PAUSE_S
            return False
        await self._wait(pause_s)
        return not self._ending.is_set()

    async def _wait(self, wait_s: float) -> None:
        """Sleep for so long, or until the load is ended by hand."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._ending.wait()

    def _is_over(self) -> bool:
        bound_s = self._load.duration_s
        return self._ending.is_set() or (bound_s is not None and _now() >= self._start_s + bound_s)

    async def _run_open_loop(self) -> None:
        more, count = True, 0
        while not self._ending.is_set() and (more or self._ready):
            wait_s = self._ready[0][1] + self._start_s - _now() if self._ready else 0.0
            if self._ready and wait_s <= 0:
                number, at_s, row, request = self._ready.popleft()
                self._start(self._job(number, self._start_s + at_s, row, request))
                count += 1
                if count % BATCH == 0:
                    await asyncio.sleep(0)
                    self._poller.read()
            elif more and len(self._ready) < PREPARED_REQUESTS and (not self._ready or wait_s > LATE_ENOUGH_S):
                more = self._build_next()
                await asyncio.sleep(0)
            else:
                await (asyncio.sleep(wait_s) if wait_s < 0.01 else self._wait(wait_s - 0.005))
        await self._wait_for_tasks()

    def _start(self, job: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The first failure counts; `run` raises it."""
        if self._failure is None:
            self._failure = error
            self.end()

    async def _wait_for_tasks(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _job(self, number: int, arrival_s: float, row: TraceRow | None, request: Request) -> Exchange:
        """A conversation up to its last turn, or to the first that fails; the last exchange.

        It goes on from the first of the calls that are made at once.
        """
        exchange = await self._exchange(number, arrival_s, request)
        calls = range(self._load.calls)
        for turn in range(1, self._load.turns):
            if exchange.error is not None:
                break
            messages: list[dict[str, Any]] = json.loads(request.body)["messages"]
            history = [*messages, {"role": "assistant", "content": "".join(exchange.text or [])}]
            await self._wait(self._load.think_time_s)
            if self._is_over():
                break
            before = _history_tokens(exchange)
            requests = [self._build(number, turn + call * self._load.turns, None, history) for call in calls]
            request, now_s = requests[0], _now()
            ended = await asyncio.gather(*(self._exchange(number, now_s, each, before) for each in requests))
            exchange = next((one for one in ended if one.error is not None), ended[0])
        return exchange

    async def _exchange(
        self, number: int, arrival_s: float, request: Request, history_tokens: int | None = 0
    ) -> Exchange:
        """One request to its end, told to the observer."""
        exchange = self._new_exchange(number, arrival_s, request, history_tokens)
        if self._num_open * self.share.num_workers >= self._load.max_streams:
            exchange.fail("not_sent", f"{self._load.max_streams} streams are in flight")
            exchange.end_s = arrival_s
        else:
            self._num_open += 1
            try:
                exchange = await self._send(exchange)
            finally:
                self._num_open -= 1
        if exchange.error is None:
            self._observer.on_done(exchange)
        else:
            self._observer.on_failed(exchange)
        return exchange

    async def _send(self, exchange: Exchange) -> Exchange:
        """Send it, and wait for its end. It comes back as another one if it had to be sent again."""
        payload = http_request(self._endpoint, self._host_header, self._path, exchange.request.body)
        while True:
            try:
                channel = await self._channel(exchange)
            except (OSError, ssl.SSLError) as error:
                exchange.fail("refused", f"no connection: {error}")
                exchange.end_s = _now()
                return exchange
            ended = self._loop.create_future()
            exchange.on_ended = functools.partial(self._on_ended, ended)
            exchange.on_chunk = self._observer.on_chunk
            exchange.sent_s = channel.send(payload, exchange)
            exchange.was_sent, exchange.has_kernel_time = True, channel.has_kernel_time
            self._in_flight[exchange] = channel
            self._observer.on_sent(exchange)
            await ended
            del self._in_flight[exchange]
            if channel.is_open:
                self._idle.append(channel)
            if not (exchange.is_reused and exchange.error == "closed"):
                return exchange
            self.reconnected += 1  # the server had ended the idle connection; it has not seen this request
            exchange = self._new_exchange(
                exchange.number, exchange.arrival_s, exchange.request, exchange.history_tokens
            )

    def _new_exchange(self, number: int, arrival_s: float, request: Request, history_tokens: int | None) -> Exchange:
        exchange = Exchange(number, arrival_s, request, keeps_text=self._load.turns > 1)
        exchange.history_tokens = history_tokens
        return exchange

    def _on_ended(self, ended: "asyncio.Future[None]") -> None:
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

    # ---- watching

    async def _watch(self) -> None:
        """End what takes too long, and notice how late this loop runs."""
        last_sweep_s = 0.0
        while True:
            before_s = self._loop.time()
            await asyncio.sleep(LAG_PERIOD_S)
            after_s = self._loop.time()
            self.lag.add(max(0.0, after_s - before_s - LAG_PERIOD_S))
            self._poller.nap_s = self._nap_s(_now())
            if after_s - last_sweep_s >= SWEEP_PERIOD_S:
                last_sweep_s = after_s
                self._end_overdue(_now())

    def _end_overdue(self, now_s: float) -> None:
        for exchange, channel in list(self._in_flight.items()):
            if now_s - exchange.sent_s <= self._load.timeout_s:
                continue
            channel.settle()
            if channel.is_open:
                channel.close()
                exchange.fail("timeout", f"not ended after {self._load.timeout_s:g} s")
                exchange.on_end(now_s, None)

    def _nap_s(self, now_s: float) -> float:
        """How long reads may wait for each other: while streams are many and slow.

        Judged by the stream that has run the longest: a nap is at most 1% of its time, so the next request is not sent
        late, and 10% of its gaps, so that two of its tokens seldom come in one read.
        """
        if len(self._in_flight) < MIN_NAP_STREAMS:
            return 0.0
        exchange, channel = next(iter(self._in_flight.items()))
        channel.settle()
        mean_gap_s = sum(exchange.gaps) / len(exchange.gaps) if exchange.gaps else math.inf
        nap_s = min(MAX_NAP_S, (now_s - exchange.sent_s) / 100, mean_gap_s / 10)
        return nap_s if nap_s >= MIN_NAP_S else 0.0


def _history_tokens(exchange: Exchange) -> int | None:
    """What the next prompt of a conversation begins with: prompt and answer, whose last token was not computed."""
    if exchange.prompt_tokens is None or exchange.output_tokens is None or len(exchange.per_choice_last_s) > 1:
        return None
    return exchange.prompt_tokens + exchange.output_tokens - 1


def _tls(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not endpoint.verify_tls:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
