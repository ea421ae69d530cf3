"""One keep-alive HTTP/1.1 connection that says when each piece of an answer reached this machine.

Without TLS the time is the kernel's (SO_TIMESTAMPNS): the moment the packet came in, not the moment this process got
round to it. So a busy client does not report its own queue as the server's latency. With TLS, or where the kernel
gives no time, it is the moment of the read.
"""

import asyncio
import errno
import socket
import ssl
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import httptools

SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python has no name for it
READ_BYTES = 256 * 1024
TIMESPEC = struct.Struct("qq")
_now = time.time  # the kernel stamps with the real-time clock


class Listener(Protocol):
    """Whom a channel tells about the answer to its request. All times are `time.time()`."""

    def on_status(self, status: int, headers: dict[str, str]) -> None: ...
    def on_body(self, piece: bytes, at_s: float) -> None: ...
    def on_end(self, at_s: float, fault: str | None) -> None:
        """The answer is whole (`fault` None), or will never be."""


@dataclass(slots=True)
class Channel:
    """At most one request in flight. `is_open` says whether another may follow on the same connection."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    is_open: bool = False
    has_kernel_time: bool = False
    _listener: Listener | None = None
    _parser: Any = None
    _at_s: float = 0.0
    _status: int = 0
    _headers: dict[str, str] = field(default_factory=dict)
    _socket: socket.socket | None = None
    _transport: asyncio.WriteTransport | None = None
    _unsent: bytes = b""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _buffer: bytearray = field(default_factory=lambda: bytearray(0))

    async def open(self, buffer: bytearray) -> None:
        """Connect. `buffer` may be shared by all channels of a loop.

        Raises: OSError.
        """
        if self.tls is not None:
            self._transport, _ = await self._loop.create_connection(
                lambda: _TlsProtocol(self), self.host, self.port, ssl=self.tls
            )
            self.is_open = True
            return
        found = await self._loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        last: OSError | None = None
        for family, kind, protocol, _, address in found:
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
            try:
                link.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                self.has_kernel_time = True
            except OSError:
                self.has_kernel_time = False
            self._socket, self._buffer = link, buffer
            self.is_open = True
            self._loop.add_reader(link, self._on_readable)
            return
        raise last or OSError(errno.EADDRNOTAVAIL, f"{self.host} has no address")

    def send(self, request: bytes, listener: Listener) -> float:
        """Send a whole request; the answer goes to `listener`. Returns the time just before the first byte left."""
        assert self.is_open and self._listener is None
        self._listener = listener
        self._status, self._headers = 0, {}
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
        """Drop the connection; nothing is told to a listener any more."""
        self._listener = None
        self.is_open = False
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
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
        assert self._socket is not None
        try:
            size, extra, _, _ = self._socket.recvmsg_into((self._buffer,), 32)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(f"the connection closed: {error.strerror or error}")
            return
        if not size:
            self._on_eof()
            return
        at_s = 0.0
        for level, kind, data in extra:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = TIMESPEC.unpack(data)
                at_s = seconds + nanoseconds * 1e-9
        self.received(bytes(memoryview(self._buffer)[:size]), at_s or _now())

    def received(self, data: bytes, at_s: float) -> None:
        if self._listener is None:
            self.close()  # bytes nobody asked for: the next request takes a new connection
            return
        self._at_s = at_s
        try:
            self._parser.feed_data(data)
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

    # ---- from the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._listener is not None and self._status >= 200:
            self._listener.on_status(self._status, self._headers)

    def on_body(self, piece: bytes) -> None:
        if self._listener is not None:
            self._listener.on_body(piece, self._at_s)

    def on_message_complete(self) -> None:
        listener = self._listener
        if listener is None or self._status < 200:
            return
        if self._parser.should_keep_alive():
            self._listener = None
        else:
            self.close()
        listener.on_end(self._at_s, None)


@dataclass(slots=True)
class _TlsProtocol(asyncio.Protocol):
    channel: Channel

    def data_received(self, data: bytes) -> None:
        self.channel.received(data, _now())

    def connection_lost(self, exc: Exception | None) -> None:
        if self.channel.is_open:
            self.channel._on_eof()
