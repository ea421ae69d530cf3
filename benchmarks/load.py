"""Closed-loop load over HTTP: `concurrency` streams, each sends its next request when the last one has ended.

A raw `asyncio.Protocol` on uvloop: general HTTP clients cost 40-240 us of CPU per token and so report their own
queue as TTFT at a few hundred streams. Nothing is retried and no failure is dropped: see `LoadResult.errors`.

    python benchmarks/load.py http://127.0.0.1:8000 --concurrency 64 --requests 256 --isl 64 --osl 64
"""

import argparse
import asyncio
import gc
import json
import random
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

Mode = Literal["completions", "generate"]


@dataclass(frozen=True)
class LoadResult:
    """One run. Tokens, TTFT and TPOT are over requests that ended whole; times in seconds, None without data."""

    mode: Mode
    concurrency: int
    num_requests: int
    isl: int
    osl: int
    seed: int
    num_completed: int
    errors: dict[str, int]
    first_error: str | None
    output_tokens: int
    duration_s: float
    out_tok_s: float
    tokens_per_chunk: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    longest_gap_s: float | None
    client_cpu_s: float
    loop: str


class ResponseError(ValueError):
    """The bytes are not one HTTP/1.1 response."""


class ResponseParser:
    """One HTTP/1.1 response from reads cut anywhere: `feed` returns the body bytes that became known."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.is_complete = False
        self._buffer = bytearray()
        self._state: Literal["head", "length", "close", "size", "chunk", "chunk_end", "trailer"] = "head"
        self._left = 0

    def feed(self, data: bytes) -> bytes:
        """Raises: ResponseError on malformed bytes, or bytes after the end."""
        if self.is_complete:
            raise ResponseError(f"{len(data)} bytes after the response's end")
        if self._state == "size" and not self._buffer and (chunk := whole_chunk(data)) is not None:
            return chunk
        self._buffer += data
        if self._state == "head" and not self._read_head():
            return b""
        if self._state == "close":
            return self._take(len(self._buffer))
        if self._state == "length":
            body = self._take(min(self._left, len(self._buffer)))
            self._left -= len(body)
            self.is_complete = self._left == 0
        else:
            body = b"".join(self._read_chunks())
        if self.is_complete and self._buffer:
            raise ResponseError(f"{len(self._buffer)} bytes after the response's end")
        return body

    def feed_eof(self) -> None:
        """The peer closed: completes a body that only the close delimits."""
        self.is_complete = self.is_complete or self._state == "close"

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        return None if end < 0 else self._take(end + 2)[:-2]

    def _read_head(self) -> bool:
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            status_line, *lines = self._take(end + 4)[:-4].split(b"\r\n")
            version, _, rest = status_line.partition(b" ")
            if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
                raise ResponseError(f"status line {status_line[:60]!r}")
            if rest[:1] == b"1":  # interim, as 100 Continue; the response follows
                continue
            self.status = int(rest[:3])
            for line in lines:
                name, _, value = line.partition(b":")
                self.headers[name.strip().lower()] = value.strip()
            if self.headers.get(b"transfer-encoding", b"").lower() == b"chunked":
                self._state = "size"
            elif (length := self.headers.get(b"content-length")) is not None:
                self._state, self._left = "length", int(length)
            else:
                self._state = "close"
            return True
        return False

    def _read_chunks(self) -> Iterator[bytes]:
        while True:
            if self._state == "chunk":
                piece = self._take(min(self._left, len(self._buffer)))
                self._left -= len(piece)
                if piece:
                    yield piece
                if self._left:
                    return
                self._state = "chunk_end"
            line = self._take_line()
            if line is None:
                return
            if self._state == "chunk_end":
                if line:
                    raise ResponseError(f"{line[:60]!r} where a chunk should end")
                self._state = "size"
            elif self._state == "size":
                try:
                    self._left = int(line.partition(b";")[0], 16)
                except ValueError:
                    raise ResponseError(f"chunk size {line[:60]!r}") from None
                self._state = "chunk" if self._left else "trailer"
            elif not line:  # the empty line after the trailers
                self.is_complete = True
                return


def whole_chunk(data: bytes) -> bytes | None:
    """The content if `data` is exactly one chunk that is not the last: what most reads are, at a sixth of the cost."""
    start = data.find(b"\r\n") + 2
    try:
        size = int(data[: start - 2], 16)
    except ValueError:
        return None
    is_whole = size > 0 and start >= 3 and len(data) == start + size + 2 and data.endswith(b"\r\n")
    return data[start:-2] if is_whole else None


class EventParser:
    """Server-sent events from pieces cut anywhere; lines end in LF or CRLF (a lone CR is not a line end here)."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The `data` of each event that became complete."""
        *lines, self._tail = (self._tail + piece).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class Exchange:
    """One request's life as the client sees it."""

    __slots__ = (
        "body",
        "chunks",
        "end",
        "error",
        "first",
        "is_done",
        "last",
        "longest_gap",
        "message",
        "mode",
        "osl",
        "start",
        "tokens",
    )

    def __init__(self, mode: Mode, osl: int, start: float) -> None:
        self.mode: Mode = mode
        self.osl = osl
        self.start = start
        self.first: float | None = None
        self.last = start
        self.end = start
        self.longest_gap = 0.0
        self.chunks = 0
        self.tokens: int | None = None
        self.is_done = False  # [DONE] was read
        self.error: str | None = None
        self.message = ""
        self.body: list[bytes] = []

    def on_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        # Content chunks are told apart without JSON: these keys cannot occur inside a JSON string, whose quotes are
        # escaped. Anything unusual is parsed.
        if b'"error"' in data or (b'"usage"' in data and b'"usage":null' not in data) or b'"choices"' not in data:
            event = json.loads(data)
            if "error" in event:
                self.fail("stream_error", data.decode(errors="replace"))
                return
            if event.get("usage"):
                self.tokens = event["usage"]["completion_tokens"]
            if not event.get("choices"):
                return
        if self.first is None:
            self.first = now
        else:
            self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now
        self.chunks += 1

    def fail(self, kind: str, message: str) -> None:
        if self.error is None:
            self.error, self.message = kind, message[:500]

    def finish(self, status: int | None, now: float) -> None:
        """The response has ended, or never will: settle what it was."""
        self.end = now
        if status != 200:
            self.fail(f"http_{status}", b"".join(self.body).decode(errors="replace"))
        elif self.mode == "generate":
            self.first = self.last = now
            self.chunks = 1
            try:
                self.tokens = json.loads(b"".join(self.body))["tokens"]
            except (ValueError, KeyError, TypeError) as error:
                self.fail("protocol", f"{error!r} in {b''.join(self.body)[:200]!r}")
        elif not self.is_done:
            self.fail("truncated", f"the body ended after {self.chunks} chunks without [DONE]")
        if self.error is None and self.tokens is None:
            self.fail("no_usage", "the stream had no usage")
        if self.error is None and self.tokens != self.osl:
            self.fail("wrong_length", f"{self.tokens} output tokens, {self.osl} asked for")


class Stream(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] | None = None

    async def send(self, request: bytes, mode: Mode, osl: int, timeout_s: float) -> Exchange:
        """The ended exchange; never raises for what the server does."""
        assert self._transport is not None and self._ended is None
        self._ended = asyncio.get_running_loop().create_future()
        self._response, self._events = ResponseParser(), EventParser()
        exchange = self._exchange = Exchange(mode, osl, time.perf_counter())
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._ended, timeout_s)
        except TimeoutError:
            exchange.fail("timeout", f"not ended after {timeout_s} s")
            exchange.end = time.perf_counter()
            self.close()
        self._exchange = self._ended = None
        return exchange

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        exchange = self._exchange
        if exchange is None:
            self.close()  # bytes nobody asked for: the next request takes a new connection
            return
        try:
            body = self._response.feed(data)
            if self._response.status == 200 and exchange.mode == "completions":
                for event in self._events.feed(body):
                    exchange.on_event(event, now)
            else:
                exchange.body.append(body)
        except (ValueError, KeyError, TypeError) as error:
            exchange.fail("protocol", repr(error))
            self.close()
            self._end(now)
            return
        if self._response.is_complete:
            if self._response.headers.get(b"connection", b"").lower() == b"close":
                self.close()
            self._end(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        exchange = self._exchange
        if exchange is None:
            return
        self._response.feed_eof()
        if not self._response.is_complete:
            exchange.fail("truncated", f"the connection closed after {exchange.chunks} chunks: {exc!r}")
        self._end(time.perf_counter())

    def _end(self, now: float) -> None:
        if self._exchange is not None and self._ended is not None and not self._ended.done():
            self._exchange.finish(self._response.status, now)
            self._ended.set_result(None)


def prompt_ids(seed: int, index: int, isl: int, vocab: int) -> list[int]:
    """`isl` token ids in [min(10, vocab - 1), vocab): low ids are often special tokens."""
    return random.Random(seed * 1_000_003 + index).choices(range(min(10, vocab - 1), vocab), k=isl)


def request_bytes(mode: Mode, host: str, model: str, prompt: Sequence[int], osl: int) -> bytes:
    """The request as sent, with head."""
    sampling = {"max_tokens": osl, "temperature": 0, "ignore_eos": True}
    if mode == "completions":
        path = "/v1/completions"
        content = {"model": model, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
    else:
        path, content = "/generate", {"prompt_token_ids": prompt}
    body = json.dumps(content | sampling, separators=(",", ":")).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def closed_loop(
    connect: Callable[[], Awaitable[Stream]],
    requests: Sequence[bytes],
    *,
    concurrency: int,
    mode: Mode,
    osl: int,
    timeout_s: float,
) -> list[Exchange]:
    """Every request's exchange; all connections are open before the first request is sent."""
    pending = iter(requests)
    exchanges: list[Exchange] = []

    async def open_stream() -> Stream | OSError:
        try:
            return await connect()
        except OSError as error:
            return error

    async def run(stream: Stream | OSError) -> None:
        for request in pending:
            if isinstance(stream, OSError) or not stream.is_open:
                stream = await open_stream()
            if isinstance(stream, OSError):
                exchange = Exchange(mode, osl, time.perf_counter())
                exchange.fail("connect", repr(stream))
            else:
                exchange = await stream.send(request, mode, osl, timeout_s)
            exchanges.append(exchange)
        if isinstance(stream, Stream):
            stream.close()

    streams = await asyncio.gather(*(open_stream() for _ in range(min(concurrency, len(requests)))))
    await asyncio.gather(*(run(stream) for stream in streams))
    return exchanges


def quantile(values: Sequence[float], q: float) -> float | None:
    """Linear between the two nearest; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarize(
    exchanges: Sequence[Exchange],
    *,
    mode: Mode,
    concurrency: int,
    isl: int,
    osl: int,
    seed: int,
    cpu_s: float,
    loop: str,
) -> LoadResult:
    """Failed requests count in `errors` and in the duration, and nowhere else."""
    whole = [e for e in exchanges if e.error is None]
    failed = [e for e in exchanges if e.error is not None]
    errors: dict[str, int] = {}
    for e in failed:
        errors[str(e.error)] = errors.get(str(e.error), 0) + 1
    tokens = sum(e.tokens or 0 for e in whole)
    chunks = sum(e.chunks for e in whole)
    duration = max((e.end for e in exchanges), default=0.0) - min((e.start for e in exchanges), default=0.0)
    ttft = [e.first - e.start for e in whole if e.first is not None]
    streamed = [e for e in whole if mode == "completions"]
    tpot = [(e.last - e.first) / (e.tokens - 1) for e in streamed if e.first is not None and e.tokens and e.tokens > 1]
    return LoadResult(
        mode=mode,
        concurrency=concurrency,
        num_requests=len(exchanges),
        isl=isl,
        osl=osl,
        seed=seed,
        num_completed=len(whole),
        errors=errors,
        first_error=f"{failed[0].error}: {failed[0].message}" if failed else None,
        output_tokens=tokens,
        duration_s=duration,
        out_tok_s=tokens / duration if duration > 0 else 0.0,
        tokens_per_chunk=tokens / chunks if chunks else None,
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p90_s=quantile(ttft, 0.9),
        ttft_p99_s=quantile(ttft, 0.99),
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p99_s=quantile(tpot, 0.99),
        longest_gap_s=max((e.longest_gap for e in streamed), default=None),
        client_cpu_s=cpu_s,
        loop=loop,
    )


def run_load(
    url: str,
    model: str,
    *,
    concurrency: int,
    num_requests: int,
    isl: int,
    osl: int,
    seed: int,
    vocab: int,
    mode: Mode = "completions",
    warmup_requests: int = 0,
    timeout_s: float = 600.0,
) -> LoadResult:
    """Load `url` and measure. Blocks; make one call per process, so that no run inherits another's heap.

    Warm-up requests have their own prompts and connections, and count nowhere. A request that has not ended after
    `timeout_s` is an error.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80

    def build(seed: int, count: int) -> list[bytes]:
        return [
            request_bytes(mode, f"{host}:{port}", model, prompt_ids(seed, i, isl, vocab), osl) for i in range(count)
        ]

    warmup, requests = build(-1 - seed, warmup_requests), build(seed, num_requests)

    async def drive() -> LoadResult:
        loop = asyncio.get_running_loop()

        async def connect() -> Stream:
            return (await loop.create_connection(Stream, host, port))[1]

        if warmup:
            await closed_loop(connect, warmup, concurrency=concurrency, mode=mode, osl=osl, timeout_s=timeout_s)
        gc.collect()
        gc.freeze()  # the prebuilt requests are not garbage: keep collections short
        cpu_s = time.process_time()
        exchanges = await closed_loop(
            connect, requests, concurrency=concurrency, mode=mode, osl=osl, timeout_s=timeout_s
        )
        cpu_s = time.process_time() - cpu_s
        name = type(loop).__module__.partition(".")[0]
        return summarize(
            exchanges, mode=mode, concurrency=concurrency, isl=isl, osl=osl, seed=seed, cpu_s=cpu_s, loop=name
        )

    return _loop_run()(drive())


def _loop_run() -> Callable[[Coroutine[Any, Any, LoadResult]], LoadResult]:
    try:
        import uvloop
    except ModuleNotFoundError:
        print("load: no uvloop, results carry loop=asyncio (dearer client)", file=sys.stderr)
        return asyncio.run
    return uvloop.run  # type: ignore[no-any-return]


def first_model(url: str) -> str:
    """The first id of `/v1/models`."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="http://host:port, without /v1")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--mode", choices=["completions", "generate"], default="completions")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--isl", type=int, default=64, help="prompt tokens, exact")
    parser.add_argument("--osl", type=int, default=64, help="output tokens, exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=1000, help="prompt ids are below this")
    parser.add_argument("--warmup", type=int, default=0, help="requests sent first and not counted")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    args = parser.parse_args()
    url = args.url.rstrip("/")
    model = args.model or (first_model(url) if args.mode == "completions" else "")
    result = run_load(
        url,
        model,
        concurrency=args.concurrency,
        num_requests=args.requests,
        isl=args.isl,
        osl=args.osl,
        seed=args.seed,
        vocab=args.vocab,
        mode=args.mode,
        warmup_requests=args.warmup,
        timeout_s=args.timeout_s,
    )
    print(json.dumps(asdict(result)))
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
