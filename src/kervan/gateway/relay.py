"""Passes a request on to a gateway of another fleet, and its answer back to the client, chunk by chunk.

A small HTTP/1.1 client on httptools, the parser that uvicorn uses too: a chunk costs one read, one wake-up and one
write. What the client sent goes on as it came, its API key too, which is the other fleet's to check.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import httptools

from kervan.fleet import pinned_tls
from kervan.gateway.asgi import Message, Receive, Scope, Send, header

logger = logging.getLogger(__name__)

# Proves to the internal port of a gateway that a gateway of its Ray cluster asks (`fleet.auth.relay_key`).
RELAY_HEADER = b"x-kervan-relay"

# Whose request is passed on, by the name of the API key; the other gateway counts what it costs.
KEY_HEADER = b"x-kervan-key"
KEY_OF_SCOPE = "kervan.key"  # the same name in the scope

MISDIRECTED = 421  # the answer to a wrong key: another fleet's gateway got the address

CONNECT_TIMEOUT_S = 2.0
IDLE_S = 30.0  # uvicorn closes idle connections after 60 s
MAX_UNSENT_BYTES = 256 * 1024  # read from the other gateway, and not yet taken by the client
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # a dead host: 25 s
# Headers that belong to one connection, or that this side writes itself.
_NOT_FORWARDED = frozenset(
    {b"connection", b"content-length", b"expect", b"keep-alive", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", RELAY_HEADER}
)  # fmt: skip
_NOT_RETURNED = frozenset({b"connection", b"date", b"keep-alive", b"server", b"trailer", b"transfer-encoding"})


def is_relayed(scope: Scope) -> bool:
    """Whether a request says that a gateway has passed it on. Only the internal port may ask."""
    return bool(header(scope, RELAY_HEADER))


def named_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The headers of a request with whose it is, which a client cannot say itself."""
    headers = [pair for pair in scope["headers"] if pair[0] != KEY_HEADER]
    return [*headers, (KEY_HEADER, name.encode())] if (name := scope.get(KEY_OF_SCOPE)) else headers


class RelayFailedError(Exception):
    """No gateway began a response; nothing was sent to the client."""


class Relay:
    """Connections to other fleets' gateways, kept for further requests."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}

    async def forward(
        self, urls: Sequence[str], key: bytes, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Let the first of `urls` that answers do so; returns when the response has ended or the client has left.

        `receive` must have nothing more to give than the client's leave. A response that breaks off is left without an
        end, and the server breaks the client's connection then.

        Raises: RelayFailedError.
        """
        request = _encode(scope, body, key)
        connection: _Connection | None = None
        is_gone = False

        async def watch_client() -> None:
            nonlocal is_gone
            while (await receive())["type"] != "http.disconnect":
                pass
            is_gone = True
            if connection is not None:
                connection.close()  # uvicorn tells vLLM, and vLLM aborts the request

        watcher = asyncio.create_task(watch_client())
        failures = []
        try:
            for url in urls:
                is_new = False
                while not is_new and not is_gone:  # the other side may have closed an idle connection just now
                    connection = self._reuse(url)
                    is_new = connection is None
                    try:
                        connection = connection or await _open(url)
                    except OSError as error:  # TimeoutError is one
                        failures.append(f"{pinned_tls.split(url)[0]}: {str(error) or type(error).__name__}")
                        break
                    if is_gone:
                        return
                    connection.send(request)
                    if await connection.has_response() and connection.status != MISDIRECTED:
                        if await connection.forward(send):
                            self._keep(url, connection)
                            connection = None
                        elif not is_gone:
                            logger.warning("the response of %s broke off", pinned_tls.split(url)[0])
                        return
                    why = "not that fleet" if connection.status else "the connection was lost"
                    failures.append(f"{pinned_tls.split(url)[0]}: {why}")
                    connection.close()
                if is_gone:
                    return
        finally:
            watcher.cancel()
            if connection is not None:
                connection.close()
        raise RelayFailedError("; ".join(failures) or "there is none")

    def close(self) -> None:
        """Close the connections that are not in use."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    def _reuse(self, url: str) -> "_Connection | None":
        idle = self._idle.get(url, [])
        while idle:
            connection = idle.pop()
            if connection.is_reusable and time.monotonic() - connection.idle_since_s < IDLE_S:
                return connection
            connection.close()
        self._idle.pop(url, None)
        return None

    def _keep(self, url: str, connection: "_Connection") -> None:
        if connection.is_reusable:
            connection.idle_since_s = time.monotonic()
            self._idle.setdefault(url, []).append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """One request and its response at a time. `status`: 0 before a response; `is_complete`: it has come whole."""

    def __init__(self) -> None:
        self.idle_since_s = 0.0
        self.is_complete = False
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._is_kept_alive = False
        self._is_lost = False
        self._has_head = False
        self.status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._is_paused = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_reusable(self) -> bool:
        return self._is_kept_alive and not self._is_lost

    def send(self, request: bytes) -> None:
        self.is_complete = self._is_kept_alive = self._has_head = False
        self.status = 0
        self._headers = []
        self._transport.write(request)

    async def has_response(self) -> bool:
        """True as soon as the response's head has come; False when the connection is lost before."""
        while not self._has_head and not self._is_lost:
            await self._wait()
        return self._has_head

    async def forward(self, send: Send) -> bool:
        """Send the response on; False when it breaks off."""
        start: Message = {"type": "http.response.start", "status": self.status, "headers": self._headers}
        await send(start)
        while True:
            while not self._chunks and not self.is_complete:
                if self._is_lost:
                    return False
                await self._wait()
            body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._chunks.clear()
            self._num_bytes = 0
            if self._is_paused:
                self._is_paused = False
                self._transport.resume_reading()
            is_last = self.is_complete
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})
            if is_last:
                return True

    def close(self) -> None:
        self._transport.abort()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._is_lost = True
            self._transport.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._wake()

    # ---- what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if (lower := name.lower()) not in _NOT_RETURNED:
            self._headers.append((lower, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._num_bytes += len(body)
        if self._num_bytes > MAX_UNSENT_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self.is_complete = True
        self._is_kept_alive = self._parser.should_keep_alive()


async def _open(url: str) -> _Connection:
    """Raises: OSError when nobody answers there, or another than the one of the address's digest."""
    place, digest = pinned_tls.split(url)
    parts = urlsplit(place)
    assert parts.hostname is not None
    assert parts.port is not None
    tls = pinned_tls.unchecked_context() if digest else None
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        transport, connection = await asyncio.get_running_loop().create_connection(
            _Connection, parts.hostname, parts.port, ssl=tls
        )
    if not pinned_tls.is_pinned(transport, digest):
        transport.abort()
        raise ConnectionError("another certificate than that gateway's")
    return connection


def _encode(scope: Scope, body: bytes, key: bytes) -> bytes:
    """The request as HTTP/1.1. HEAD becomes GET: the parser would wait for a body, and the server drops it."""
    method = b"GET" if scope["method"] == "HEAD" else scope["method"].encode()
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    lines = [b"%b %b HTTP/1.1" % (method, target), b"%b: %b" % (RELAY_HEADER, key)]
    lines += [b"%b: %b" % (name, value) for name, value in scope["headers"] if name not in _NOT_FORWARDED]
    if body or method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])
