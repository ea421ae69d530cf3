"""A server whose times are known: the client measures itself against it before it measures anyone else.

All streams get a chunk at each tick, as from an engine that steps. Each chunk says when it was written and how long
the server had the request before that, so the server's own delays are not mistaken for the client's.
"""

import asyncio
import contextlib
import signal
import socket
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from kervan.bench import eventloop
from kervan.bench.channel import SO_TIMESTAMPNS, TIMESPEC

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"cmpl-00000000000000000000000000000000","object":"text_completion","created":1700000000,'
    b'"model":"pacer","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%s,"stop_reason":null}],'
    b'"usage":null,"stamps":"%020d %020d"}\n\n'
)
_USAGE = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":1700000000,"model":"pacer","choices":[],'
    b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}\n\n'
)
_MARK = b'"stamps":"'
_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Schedule:
    """The truth: the first chunk comes at the first tick `ttft_s` after the request, then one at each tick."""

    ttft_s: float = 0.1
    tick_s: float = 0.02
    tokens: int = 24


def read_stamps(event: bytes) -> tuple[float, float] | None:
    """(time of writing, seconds between reading the request and writing) of a chunk; None if it has none."""
    at = event.rfind(_MARK)
    if at < 0:
        return None
    at += len(_MARK)
    return int(event[at : at + _DIGITS]) * 1e-9, int(event[at + _DIGITS + 1 : at + 2 * _DIGITS + 1]) * 1e-9


def _chunked(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


@dataclass(slots=True, eq=False)
class _Client:
    link: socket.socket
    pending: bytes = b""
    read_ns: int = 0
    left: int = 0
    unsent: bytearray = field(default_factory=bytearray)


class Pacer:
    """Serves on 127.0.0.1 within the running event loop."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._loop = asyncio.get_running_loop()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self._clients: dict[_Client, None] = {}
        self._loop.add_reader(self._server, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                link, _ = self._server.accept()
                link.setblocking(False)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(OSError):
                    link.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                client = _Client(link)
                self._loop.add_reader(link, self._read, client)

    def _drop(self, client: _Client) -> None:
        self._loop.remove_reader(client.link)
        client.link.close()
        self._clients.pop(client, None)

    def _read(self, client: _Client) -> None:
        try:
            data, extra, _, _ = client.link.recvmsg(262_144, 32)
        except BlockingIOError:
            return
        except OSError:
            data, extra = b"", []
        if not data:
            self._drop(client)
            return
        client.read_ns = time.time_ns()
        for level, kind, value in extra:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = TIMESPEC.unpack(value)
                client.read_ns = seconds * 1_000_000_000 + nanoseconds
        client.pending += data
        head, separator, body = client.pending.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if separator and len(body) >= int(length or 0):
            client.pending = b""
            client.left = self._schedule.tokens
            self._clients[client] = None

    async def tick_forever(self) -> None:
        """The engine: write one chunk to each stream whose time has come, then wait for the next tick."""
        schedule, due_s = self._schedule, self._loop.time()
        wait_ns = int(schedule.ttft_s * 1e9)
        while True:
            due_s = max(due_s + schedule.tick_s, self._loop.time())
            await asyncio.sleep(due_s - self._loop.time())
            now_ns = time.time_ns()
            for client in list(self._clients):
                if client.left < schedule.tokens or now_ns - client.read_ns >= wait_ns:
                    self._write(client)

    def _write(self, client: _Client) -> None:
        is_first, is_last = client.left == self._schedule.tokens, client.left == 1
        now_ns = time.time_ns()
        piece = _chunked(_EVENT % (b'"length"' if is_last else b"null", now_ns, now_ns - client.read_ns))
        if is_first:
            piece = _HEAD + piece
        client.left -= 1
        if is_last:
            tokens = self._schedule.tokens
            piece += _chunked(_USAGE % (1, tokens + 1, tokens)) + _chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
            self._clients.pop(client, None)
        try:
            client.link.sendall(piece)  # far below the socket's buffer
        except OSError:
            self._drop(client)

    def close(self) -> None:
        """Drop all connections and take no more."""
        self._loop.remove_reader(self._server)
        self._server.close()
        for client in list(self._clients):
            self._drop(client)


def run(schedule: Schedule, link: Connection) -> None:
    """Serve until `link` closes or says anything; its first message is the port."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def main() -> None:
        pacer = Pacer(schedule)
        link.send(pacer.port)
        ticking = asyncio.create_task(pacer.tick_forever())
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(link.fileno(), ended.set)
        await ended.wait()
        loop.remove_reader(link.fileno())
        ticking.cancel()
        pacer.close()

    with asyncio.Runner(loop_factory=eventloop.factory()[0]) as runner:
        runner.run(main())
