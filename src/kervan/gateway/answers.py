"""All answers that the gateway gives itself: health pages, refusals, errors.

They take the way of vLLM's own answers, through the middlewares of its app: CORS (`allowed_origins` and the like),
`enable_request_id_headers`, and the user's (`middleware`). A browser could not read a refusal otherwise.
"""

import asyncio
import logging

from kervan.gateway.asgi import (
    JSON,
    ASGIApp,
    CollectedResponse,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    error_body,
    replay,
    respond,
    response_start,
)

logger = logging.getLogger(__name__)

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
# How long a refused upload is read and thrown away. Closing with unread data makes TCP reset the connection,
# and the client would lose the answer that says why.
LINGER_S = 2.0

_ANSWER = "kervan.answer"  # a key of the scope: the ASGI app that answers in place of vLLM's


class OwnAnswer:
    """Middleware just inside of vLLM's CORS: lets the gateway answer where vLLM's routes would."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = scope.get(_ANSWER, self._app)
        await answer(scope, receive, send)


class Answers:
    """Gives the answers, through the middlewares of `pass_through`'s app as soon as there is one."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    def pass_through(self, app: ASGIApp) -> None:
        """Send all further answers through `app`, which has `OwnAnswer` among its middlewares."""
        self._app = app

    async def respond(
        self, scope: Scope, send: Send, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()
    ) -> None:
        """Send a whole response to the request of `scope`."""
        response = await self._response(scope, status, body, content_type, headers)
        await response.forward(send)

    async def error(
        self, scope: Scope, send: Send, status: int, message: str, param: str | None = None, headers: Headers = ()
    ) -> None:
        """Send an OpenAI-style error. The request's body has been read; else `refuse`."""
        await self.respond(scope, send, status, error_body(status, message, param), headers=headers)

    async def unavailable(self, scope: Scope, send: Send, reason: str, retry_after_s: int) -> None:
        """Answer 503 with Retry-After."""
        retry_after = (b"retry-after", b"%d" % retry_after_s)
        await self.error(scope, send, 503, f"{reason}; try again in {retry_after_s} s", headers=[retry_after])

    async def refuse(
        self, scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: Headers = ()
    ) -> None:
        """Answer before the body is read. With a body on its way: answer, throw it away for a while, close."""
        if scope["method"] not in BODY_METHODS:
            await self.error(scope, send, status, message, headers=headers)
            return
        closing = [*headers, (b"connection", b"close")]
        response = await self._response(scope, status, error_body(status, message), JSON, closing)
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        # The client has the whole answer now (content-length); the server closes after the last message.
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})

    async def refuse_method(self, scope: Scope, receive: Receive, send: Send, allowed: str) -> None:
        """Answer 405: the path is the gateway's own, and has `allowed` only."""
        message = f"{scope['path']} does not accept {scope['method']}; use {allowed}"
        await self.refuse(scope, receive, send, 405, message, headers=[(b"allow", allowed.encode())])

    async def _response(
        self, scope: Scope, status: int, body: bytes, content_type: bytes, headers: Headers
    ) -> CollectedResponse:
        async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
            await respond(send, status, body, content_type, headers)

        response = CollectedResponse()
        if self._app is None:
            await response.send(response_start(status, len(body), content_type, headers))
            await response.send({"type": "http.response.body", "body": body})
            return response
        try:
            # The middlewares get no body: it may be too large, or still on its way.
            await self._app({**scope, _ANSWER: answer}, replay(b"", silence), response.send)
        except Exception:
            if not response.status:
                raise
            logger.exception("a middleware failed on the gateway's answer to %s", scope["path"])
        return response


async def silence() -> Message:
    """A client that says nothing and stays."""
    await asyncio.Event().wait()
    raise AssertionError
