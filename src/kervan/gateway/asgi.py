"""The few ASGI words that the gateway's modules share."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON = b"application/json"
BODY_HEADERS = frozenset({b"content-type", b"content-length"})

# vLLM's names for the same statuses, so that one client-side check covers both.
_TYPES = {
    400: "BadRequestError",
    401: "authentication_error",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    410: "GoneError",
    413: "RequestTooLargeError",
    421: "MisdirectedRequestError",
    429: "rate_limit_exceeded",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class Error(msgspec.Struct):
    """What was wrong, as OpenAI's API tells it. `code`: the HTTP status; `param`: the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    """The body of an error."""

    error: Error


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """An OpenAI-style error as JSON."""
    return msgspec.json.encode(ErrorResponse(Error(message, _TYPES[status], param, status)))


def header(scope: Scope, name: bytes) -> bytes:
    """The first value of a header (lower-case name), or b"" without one."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def response_start(status: int, length: int, content_type: bytes = JSON, headers: Headers = ()) -> Message:
    """The message that opens a response of `length` bytes."""
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", content_type), (b"content-length", b"%d" % length), *headers],
    }


async def respond(send: Send, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()) -> None:
    """Send a whole response."""
    await send(response_start(status, len(body), content_type, headers))
    await send({"type": "http.response.body", "body": body})


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once, then whatever the server says (in the end: http.disconnect)."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replayed() -> Message:
        nonlocal first
        if first is None:
            return await receive()
        message, first = first, None
        return message

    return replayed


class CollectedResponse:
    """A response held back until it is whole; `send` takes its messages."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""

    async def send(self, message: Message) -> None:
        """Take a message of the response; for an app to call."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", ()))
        else:
            self.body += message.get("body", b"")

    async def forward(self, send: Send, body: bytes | None = None) -> None:
        """Send it on, as it is or with another JSON body.

        Raises: RuntimeError when the app ended before it began a response.
        """
        if not self.status:
            raise RuntimeError("the app ended without a response")
        headers = self.headers
        if body is not None:
            kept = [pair for pair in headers if pair[0].lower() not in BODY_HEADERS]
            headers = [*kept, (b"content-type", JSON), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body if body is None else body})
