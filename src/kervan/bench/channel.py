"""One keep-alive HTTP/1.1 connection that says when each piece of an answer reached this machine.

Without TLS the time is the kernel's (SO_TIMESTAMPNS): the moment the packet came in, not the moment this process got
round to it. So a busy client does not report its own queue as the server's latency. With TLS, or where the kernel
gives no time, it is the moment of the read.
"""

import asyncio
import contextlib
import errno
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import httptools

SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python has no name for it
READ_BYTES = 4096
MIN_NAP_S, MAX_NAP_S = 0.001, 0.005
MAX_WAITING = 64  # reads of a stream that are looked at together
TIMESTAMP_BYTES = 32  # room for a control message with a time
TIMESPEC = struct.Struct("qq")
_now = time.time  # the kernel stamps with the real-time clock


class ResponseListener(Protocol):
    """Whom a channel tells about the answer to its request. All times are `time.time()`."""

    def on_status(self, status: int, headers: dict[str, str]) -> None:
        """The response has begun; names of headers are in small letters."""

    def on_body(self, piece: bytes, at_s: float) -> None:
        """The next bytes of the body, of any length, and when they reached this machine."""

    def on_bodies(self, pieces: list[bytes], at_s: list[float]) -> None:
        """As `on_body` for each."""

    def on_end(self, at_s: float, fault: str | None) -> None:
        """The response is whole (`fault` None), or will never be."""


class Poller:
    """Calls back when sockets can be read. One reader of the event loop for all of them costs less than one each.

    While `nap_s` is above 0, it looks as often as that instead of at each arrival: fewer wake-ups, warmer caches, and
    no loss of precision, because the kernel has stamped what arrived. Event loops have timers of a millisecond, so
    that is the least. Where there is no epoll (macOS), each socket is a reader of the loop.
    """

    def __init__(self) -> None:
        self.nap_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            self._loop.add_reader(self._epoll.fileno(), self._on_ready)

    def add(self, link: socket.socket, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `link` can be read."""
        if self._epoll is None:
            self._loop.add_reader(link, callback)
            return
        self._callbacks[link.fileno()] = callback
        self._epoll.register(link.fileno(), select.EPOLLIN)

    def remove(self, link: socket.socket) -> None:
        """Stop watching `link`; does nothing if it is not watched."""
        if self._epoll is None:
            self._loop.remove_reader(link)
        elif self._callbacks.pop(link.fileno(), None) is not None:
            self._epoll.unregister(link.fileno())

    def close(self) -> None:
        """Stop watching all sockets."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _on_ready(self) -> None:
        self.read()
        if self.nap_s and self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._loop.call_later(self.nap_s, self._on_time)

    def _on_time(self) -> None:
        self.read()
        if self._epoll is None:
            return
        if self.nap_s:
            self._loop.call_later(self.nap_s, self._on_time)
        else:
            self._loop.add_reader(self._epoll.fileno(), self._on_ready)

    def read(self) -> None:
        """Call back for each socket that can be read now."""
        if self._epoll is None:
            return
        callbacks = self._callbacks
        for number, _ in self._epoll.poll(0):
            callback = callbacks.get(number)
            if callback is not None:  # else removed by a callback before it
                callback()


@dataclass(slots=True)
class Channel:
    """At most one request in flight. `is_open` says whether another may follow on the same connection."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    is_open: bool = False
    has_kernel_time: bool = False
    _listener: ResponseListener | None = None
    _parser: Any = None
    _at_s: float = 0.0
    _status: int = 0
    _headers: dict[str, str] = field(default_factory=dict)
    _socket: socket.socket | None = None
    _transport: asyncio.WriteTransport | None = None
    _unsent: bytes = b""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _poller: Poller | None = None
    _is_between_chunks: bool = False  # of a chunked body, as far as the parser has been told
    _waiting: list[bytes] = field(default_factory=list)
    _stamps: list[bytes] = field(default_factory=list)
    _recvmsg: Any = None

    async def open(self, poller: Poller) -> None:
        """Connect.

        Raises: OSError.
        """
        if self.tls is not None:
            self._transport, _ = await self._loop.create_connection(
                lambda: _TlsProtocol(self), self.host, self.port, ssl=self.tls
            )
            self.is_open = True
            return
        addresses = await self._loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        last: OSError | None = None
        for family, kind, protocol, _, address in addresses:
            link = socket.socket(family, kind, protocol)
            link.setblocking(False)
            try:
                await self._loop.sock_connect(link, address)
            except OSError as error:
                link.close()
                last = error
                continue
            except BaseException:
                link.close()
                raise
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                with contextlib.suppress(OSError):
                    link.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                    self.has_kernel_time = True
            self._socket, self._poller, self._recvmsg = link, poller, link.recvmsg
            self.is_open = True
            poller.add(link, self._on_readable)
            return
        raise last or OSError(errno.EADDRNOTAVAIL, f"{self.host} has no address")

    def send(self, request: bytes, listener: ResponseListener) -> float:
        """Send a whole request; the answer goes to `listener`. Returns the time just before the first byte left."""
        assert self.is_open and self._listener is None
        self._listener = listener
        self._status, self._headers = 0, {}
        self._is_between_chunks = False
        self._parser = httptools.HttpResponseParser(self)
        at_s = _now()
        if self._socket is None:
            assert self._transport is not None
            self._transport.write(request)
            return at_s
        try:
            sent = self._socket.send(request)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._loop.call_soon(self._fail, f"the connection closed before the request was sent: {error}")
            return at_s
        if sent < len(request):
            self._unsent = request[sent:]
            self._loop.add_writer(self._socket, self._on_writable)
        return at_s

    def close(self) -> None:
        """Drop the connection; the listener of an open request is not called again."""
        self._listener = None
        self._waiting, self._stamps = [], []
        self.is_open = False
        if self._socket is not None and self._poller is not None:
            self._poller.remove(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = self._recvmsg = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # ---- from the socket

    def _on_writable(self) -> None:
        assert self._socket is not None
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._unsent)  # the reader tells what happened
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            data, stamps, _, _ = self._recvmsg(READ_BYTES, TIMESTAMP_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.settle()
            self._fail(f"the connection closed: {error.strerror or error}")
            return
        # A chunk that ends in an empty line is an event and not the end of the answer, so nobody waits for it: it
        # is looked at together with others of its stream, which costs half, as what they touch is in the cache then.
        if self._is_between_chunks and stamps and data.endswith(b"\n\n\r\n") and len(self._waiting) < MAX_WAITING:
            self._waiting.append(data)
            self._stamps.append(stamps[0][2])
            return
        self.settle()
        if data:
            self.received(data, _seconds(stamps[0][2]) if stamps else _now())
        else:
            self._on_eof()

    def settle(self) -> None:
        """Look at what has been read and waits."""
        if not self._waiting:
            return
        waiting, stamps = self._waiting, self._stamps
        self._waiting, self._stamps = [], []
        pieces: list[bytes] = []
        times_s: list[float] = []
        for data, stamp in zip(waiting, stamps, strict=True):
            piece = _whole_chunk(data) if self._is_between_chunks else None
            if piece is not None:
                pieces.append(piece)
                times_s.append(_seconds(stamp))
            else:
                self._give(pieces, times_s)
                pieces, times_s = [], []
                self.received(data, _seconds(stamp))
        self._give(pieces, times_s)

    def _give(self, pieces: list[bytes], times_s: list[float]) -> None:
        if pieces and self._listener is not None:
            self._listener.on_bodies(pieces, times_s)

    def received(self, data: bytes, at_s: float) -> None:
        """Take what came in one read at `at_s`."""
        if self._listener is None:
            self.close()  # bytes nobody asked for: the next request takes a new connection
            return
        if self._is_between_chunks:  # and nearly always this is exactly one: the parser need not see it
            piece = _whole_chunk(data)
            if piece is not None:
                self._listener.on_body(piece, at_s)
                return
        self._at_s = at_s
        try:
            self._parser.feed_data(data)
            self._is_between_chunks = self._is_between_chunks and data.endswith(b"\r\n")
        except httptools.HttpParserUpgrade:
            self._fail("the server wants another protocol")
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")

    def _on_eof(self) -> None:
        listener = self._listener
        until_close = "content-length" not in self._headers and "transfer-encoding" not in self._headers
        if listener is not None and self._status and until_close:
            self.close()
            listener.on_end(_now(), None)  # HTTP/1.0 style: the end of the connection is the end of the body
        else:
            self._fail("the connection closed before the answer was whole")

    def _fail(self, fault: str) -> None:
        listener = self._listener
        self.close()
        if listener is not None:
            listener.on_end(_now(), fault)

    # ---- from the parser, by httptools' names

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._is_between_chunks = "chunked" in self._headers.get("transfer-encoding", "").lower()
        if self._listener is not None and self._status >= 200:
            self._listener.on_status(self._status, self._headers)

    def on_body(self, piece: bytes) -> None:
        if self._listener is not None:
            self._listener.on_body(piece, self._at_s)

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_message_complete(self) -> None:
        self._is_between_chunks = False
        listener = self._listener
        if listener is None or self._status < 200:
            return
        if self._parser.should_keep_alive():
            self._listener = None
        else:
            self.close()
        listener.on_end(self._at_s, None)


def _seconds(stamp: bytes) -> float:
    seconds, nanoseconds = TIMESPEC.unpack(stamp)
    return float(seconds + nanoseconds * 1e-9)


def _whole_chunk(data: bytes) -> bytes | None:
    """What is in one chunk of a body; None of anything else, also of the last chunk, and of one with extensions."""
    end = data.find(b"\r\n", 0, 18)
    try:
        size = int(data[:end], 16) if end > 0 else 0
    except ValueError:
        return None
    return data[end + 2 : -2] if size == len(data) - end - 4 > 0 and data.endswith(b"\r\n") else None


@dataclass(slots=True)
class _TlsProtocol(asyncio.Protocol):
    channel: Channel

    def data_received(self, data: bytes) -> None:
        self.channel.received(data, _now())

    def connection_lost(self, exc: Exception | None) -> None:
        if self.channel.is_open:
            self.channel._on_eof()
