"""A client's connection: uvicorn's HTTP protocol, with bounds on what comes before a request's body.

uvicorn (0.54, with httptools) waits without an end for a request line or headers, takes any number and size of them,
drops the body of a request that offers an upgrade which it does not make (Java's HttpClient offers h2c on every first
POST), and never answers an upgrade to WebSocket that the websockets library refuses to parse.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kervan.gateway.answers import LINGER_S
from kervan.gateway.asgi import JSON, error_body

MAX_HEAD_BYTES = 64 * 1024
"""Of a request line and its headers; h11, uvicorn's other parser, has the same default."""
MAX_HEADERS = 256
HEAD_TIMEOUT_S = 30.0
"""From the first byte of a request to the end of its headers."""
# The websockets library refuses more: MAX_NUM_HEADERS and MAX_LINE_LENGTH of its http11.py, with ": " and line ends.
_MAX_WEBSOCKET_HEADERS = 128
_MAX_WEBSOCKET_LINE_BYTES = 8000


class Connection(HttpToolsProtocol):
    """For uvicorn's option `http`. What it refuses itself has an OpenAI-style body, and closes the connection."""

    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = False
        self._head_bytes = 0  # of an unfinished head, as far as it came in earlier reads
        self._head_timer: asyncio.TimerHandle | None = None
        self._has_refused = False
        self._refusal: tuple[int, str] | None = None  # why a callback below stopped the parser

    # ---- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """One that sends nothing is closed as an idle one is."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timer too."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it; requests begin in the callbacks below."""
        if self._has_refused:
            return
        was_idle, cycle = self.timeout_keep_alive_task is not None, self.cycle
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                data = self._without_upgrade() + data[upgrade.args[0] :]
            except httptools.HttpParserError as error:
                self._refuse(*self._refusal or (400, f"the request is not valid HTTP/1.1: {error}"))
                return
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, _too_large(f"over {MAX_HEAD_BYTES} bytes"))
                return
        # Otherwise: line ends before a request, or the rest of a body that nobody waits for.
        if self._is_in_head or (was_idle and self.cycle is cycle):
            self._start_head_timer()

    # ---- called by the parser

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._is_in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Start the request, if its head keeps the bounds and no upgrade has to be taken out of it."""
        self._is_in_head = False
        self._stop_head_timer()
        num_bytes = len(self.url) + sum([len(name) + len(value) for name, value in self.headers])
        if num_bytes > MAX_HEAD_BYTES:
            self._refusal = 431, _too_large(f"{num_bytes} bytes")
        elif len(self.headers) > MAX_HEADERS:
            text = f"the request has {len(self.headers)} headers; this gateway accepts at most {MAX_HEADERS}"
            self._refusal = 431, text
        elif self.parser.get_method() == b"CONNECT":
            self._refusal = 405, "this gateway is no proxy: it does not accept CONNECT"
        if self._refusal is not None:
            raise ValueError(self._refusal)
        if not self._is_to_be_repeated():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole."""
        if not self._is_to_be_repeated():
            super().on_message_complete()

    # ---- upgrades

    def _is_to_be_repeated(self) -> bool:
        """Whether this is the first of two passes over a request, whose upgrade is left out of the second.

        The parser skips the body of what may become another protocol.
        """
        return self.parser.should_upgrade() and not self._should_upgrade()

    def _should_upgrade(self) -> bool:
        """Whether it is an upgrade to WebSocket that the library will answer."""
        if not super()._should_upgrade():
            return False
        lines = [len(self.url), *(len(name) + len(value) for name, value in self.headers)]
        return (
            self.parser.get_method() == b"GET"
            and self.parser.get_http_version() == "1.1"
            and len(self.headers) <= _MAX_WEBSOCKET_HEADERS
            and max(lines) <= _MAX_WEBSOCKET_LINE_BYTES
            and not any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)
        )

    def _without_upgrade(self) -> bytes:
        """The head that was just parsed, as a server reads it that does not know the protocol; for a new parser."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            kept = value
            if name == b"connection":
                kept = b",".join(word for word in value.split(b",") if word.strip().lower() != b"upgrade")
            if name != b"upgrade" and (kept or name != b"connection"):
                lines.append(name + b": " + kept)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([*lines, b"", b""])

    # ---- refusals

    def send_400_response(self, msg: str) -> None:
        """In uvicorn's own words; for those that it may call itself."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close; requests that came whole before this one are answered first."""
        self._has_refused = True  # and throw away what comes
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            is_its_body = cycle.more_body and not cycle.response_started and not self.pipeline
            if not is_its_body:
                cycle.keep_alive = False
                return
        body = error_body(status, message)
        head = [STATUS_LINE[status], b"content-type: ", JSON, b"\r\ncontent-length: %d\r\n" % len(body)]
        self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", body]))
        # Closing with unread data makes TCP reset the connection, and the client would lose the answer.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_head_timer()  # the next request's; the answer to this one goes on
        elif self._is_in_head:
            self._refuse(408, f"the request's headers are not complete after {self.head_timeout_s:g} s; send it faster")
        else:
            self.transport.close()


def _too_large(size: str) -> str:
    limit = f"{MAX_HEAD_BYTES} bytes ({MAX_HEAD_BYTES // 1024} KiB)"
    return f"the request line and headers have {size}; this gateway accepts at most {limit}"
