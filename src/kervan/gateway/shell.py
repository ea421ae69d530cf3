"""The ASGI shell around vLLM's OpenAI app: health, keys, body limits, admission, error bodies.

A request passes, in this order: health and metrics pages (open) -> API key -> body read whole (size, deadline)
-> vLLM attached? -> the key's models and limits -> admission -> vLLM. What the gateway answers itself,
`kervan.gateway.answers` sends.
A streamed chunk costs one plain call here, and something only in a fleet that keeps streams for clients that come back
(`kervan.gateway.reconnect`).
"""

import asyncio
import json
import logging
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

import msgspec

from kervan.gateway import request_size, session_hint, simple
from kervan.gateway.answers import BODY_METHODS, Answers
from kervan.gateway.asgi import ASGIApp, CollectedResponse, Receive, Scope, Send, header, replay
from kervan.gateway.key_guard import KeyGuard, KeyRefusal, models_of, unknown_model
from kervan.gateway.keys import Account, KeyRing
from kervan.gateway.paths import WORK_PATHS, is_docs, makes_work
from kervan.gateway.peers import Peers
from kervan.gateway.quotas import Quotas
from kervan.gateway.reconnect import STREAMS_PREFIX, Streams, with_id
from kervan.gateway.relay import KEY_OF_SCOPE
from kervan.gateway.remembered import RequestMemory
from kervan.gateway.request_size import RequestSize
from kervan.vendor import vllm_names

logger = logging.getLogger(__name__)

MIB = 1 << 20
RETRY_NOT_READY_S = 5

OPEN_PATHS = frozenset({"/health", "/health/ready", "/metrics"})
GATEWAY_METRICS_PREFIX = "/metrics/"  # before a gateway's id
STATUS_PATH = "/kervan/status"
REQUESTS_PREFIX = "/kervan/requests/"  # before a request's id
SIMPLE_PATHS = {"/generate": simple.generate, "/chat": simple.chat}
PAGE_METHODS = ("GET", "HEAD")

# A body with fewer cannot nest deeply enough to exhaust a JSON parser, whose limit is about 1,000 levels.
PLAIN_BRACKETS = 500
# vLLM 0.24 answers 500 to a body that is JSON but no object; 0.32 answers 400.
OBJECT_PATHS = WORK_PATHS | {vllm_names.TOKENIZE_PATH, vllm_names.DETOKENIZE_PATH}


@dataclass(frozen=True, slots=True)
class Shed:
    """The fleet is full: try again in `retry_after_s`. None: the request is too large for it, and will remain so."""

    retry_after_s: int | None
    reason: str


class GatewayView(Protocol):
    """What the shell needs to know of the fleet."""

    def readiness(self) -> str | None:
        """None when a replica can answer, else the reason."""

    def admit(self, size: RequestSize, session: str = "") -> Shed | AbstractContextManager[None]:
        """Room in the fleet for one more request, to be held while it is worked on; `session`: that it names."""

    def model_name(self) -> str:
        """The first served model name."""

    async def metrics(self, gateway: str | None = None) -> bytes | None:
        """The Prometheus text page of all gateways and the fleet, or of one gateway alone; None if there is no such."""

    async def status(self) -> dict[str, object]:
        """What `kervan status` shows; JSON types only."""

    async def explain(self, request_id: str) -> bytes | None:
        """Where the time of a request went, as JSON; None if no gateway remembers it."""

    def stream_opened(self) -> None:
        """One HTTP request more in flight."""

    def stream_closed(self) -> None:
        """One HTTP request fewer in flight."""


class GatewayShell:
    """ASGI app in front of vLLM's; serves health pages before `attach`, and 503 for the rest.

    The lifespan protocol ends here: vLLM's app never sees it. `streams` gives answers their ids; `guard` knows the API
    keys, without it none is needed.
    """

    def __init__(
        self,
        view: GatewayView,
        guard: KeyGuard | None = None,
        max_body_bytes: int = 8 * MIB,
        body_timeout_s: float = 30.0,
        streams: Streams | None = None,
        answers: Answers | None = None,
        peers: Peers | None = None,
        requests: RequestMemory | None = None,
    ) -> None:
        self.view = view
        self.inner: ASGIApp | None = None
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.answers = answers or Answers()
        self._streams = streams
        self._peers = peers
        self._requests = requests
        self._deadlines = _Deadlines(body_timeout_s)
        self.guard = guard or KeyGuard(KeyRing(), Quotas("", tuple, b""))

    async def _refuse_shed(self, scope: Scope, send: Send, shed: Shed, size: RequestSize) -> None:
        if shed.retry_after_s is not None:
            await self.answers.unavailable(scope, send, shed.reason, shed.retry_after_s)
            return
        message = f"{size}, but {shed.reason}; split the request, or raise the fleet's max_queued_streams"
        await self.answers.error(scope, send, 400, message, size.param)

    def attach(self, app: ASGIApp) -> None:
        """Give all further requests to vLLM's app."""
        self.inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            try:
                await self._http(scope, receive, send)
            except Exception as exc:
                try:
                    message = "the gateway failed on this request; its log has the reason"
                    await self.answers.error(scope, send, 500, message)
                except RuntimeError:
                    # A server refuses a second start. Asking it is how we learn that the answer had begun
                    # without watching every chunk.
                    raise exc from None
                logger.exception("%s %s failed before its answer began", scope["method"], scope["path"])
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        elif kind == "lifespan":
            await _lifespan(receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        method: str = scope["method"]
        allowed = _own_methods(path)
        is_page = path in OPEN_PATHS or _asks_one_gateway(path)
        is_open = method == "OPTIONS" or is_page or (method in PAGE_METHODS and is_docs(path))
        account = None if is_open else self._account(scope)
        if isinstance(account, str):
            scheme = [(b"www-authenticate", b"Bearer")]
            await self.answers.refuse(scope, receive, send, 401, account, headers=scheme)
        elif allowed is not None and method not in allowed:  # a CORS preflight never comes as far as this answer
            await self.answers.refuse_method(scope, receive, send, ", ".join(allowed))
        elif is_page or path == STATUS_PATH or path.startswith(REQUESTS_PREFIX):
            await self._page(scope, send)
        else:
            self.view.stream_opened()
            try:
                await self._forward(path, method, scope, receive, send, account)
            finally:
                self.view.stream_closed()

    def _account(self, scope: Scope) -> Account | str:
        """Whose request it is, or why it may not enter."""
        keys = self.guard.keys
        account = keys.find(scope)
        if account is None:
            keys.refuse(None, "key")
            return "no valid API key; send the header 'Authorization: Bearer KEY'"
        if keys.is_expired(account):
            keys.refuse(account, "expired")
            return f"API key {account.name} has expired; ask for a new one"
        return account

    async def _forward(
        self, path: str, method: str, scope: Scope, receive: Receive, send: Send, account: Account | None
    ) -> None:
        """To vLLM's app, if the fleet and the key have room for it. `account`: None for what is open to all."""
        body, client = b"", receive
        received_s = time.monotonic()
        if method in BODY_METHODS:
            read = await self.read_body(scope, receive, send)
            if read is None:
                return
            body = read
            receive = replay(body, receive)
        inner = self.inner
        if inner is None:
            reason = self._not_ready() or "the gateway is starting"
            await self.answers.unavailable(scope, send, reason, RETRY_NOT_READY_S)
            return
        if account is None:
            await self._work(inner, scope, receive, send, body, client)
            return
        scope = {**scope, KEY_OF_SCOPE: account.name}
        if path.startswith(STREAMS_PREFIX) and self._streams is not None:
            with self.guard.resume(account):
                await self._streams.get(inner, scope, receive, send)
            return
        if method in BODY_METHODS:
            refusal = self.guard.check_model(account, path, body, self.view.model_name())
            if refusal is not None:
                await self._refuse_key(scope, send, refusal)
                return
        elif account.entry is not None and account.entry.models and path.startswith(vllm_names.MODELS_PATH):
            await self._models(inner, scope, receive, send, account.entry.models)
            return
        if method != "POST" or not makes_work(path):
            await self._work(inner, scope, receive, send, body, client)
            return
        size = request_size.read(path, body)
        permit = await self.guard.admit(account, path, body, size)
        if isinstance(permit, KeyRefusal):
            await self._refuse_key(scope, send, permit)
            return
        send = permit.named(send)
        with permit:
            room = self.view.admit(size, session_hint.read(scope, body))
            if isinstance(room, Shed):
                permit.shed()
                await self._refuse_shed(scope, send, room, size)
                return
            if self._requests is None:
                with room:
                    await self._work(inner, scope, receive, send, body, client)
                return
            with room, self._requests.begin(scope, received_s) as remembering:
                await self._work(inner, remembering.scope, receive, send, body, client)

    async def _refuse_key(self, scope: Scope, send: Send, refusal: KeyRefusal) -> None:
        await self.answers.error(scope, send, refusal.status, refusal.message, refusal.param, refusal.headers)

    async def _models(
        self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send, models: tuple[str, ...]
    ) -> None:
        """GET /v1/models, and of one model, for a key that may use `models` alone."""
        path = scope["path"]
        if path.startswith(vllm_names.MODELS_PATH + "/"):
            if path.removeprefix(vllm_names.MODELS_PATH + "/") in models:
                await inner(scope, receive, send)
            else:
                await self.answers.respond(scope, send, 404, unknown_model(path))
            return
        response = CollectedResponse()
        await inner(scope, receive, response.send)
        await response.forward(send, models_of(response, models))

    async def _work(
        self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send, body: bytes, client: Receive
    ) -> None:
        """To vLLM's app, or to the gateway that keeps what the request is about. `client`: tells when it is gone."""
        path, is_post = scope["path"], scope["method"] == "POST"
        if is_post and path in SIMPLE_PATHS:
            if self._streams is not None:
                send = with_id(send, self._streams.new_id())
            forward = SIMPLE_PATHS[path]
            await forward(inner, scope, receive, send, model=self.view.model_name(), body=body, answers=self.answers)
            return
        if is_post and (fault := _json_fault(path, body, scope)) is not None:
            await self.answers.error(scope, send, 400, fault)
            return
        if is_post and path == vllm_names.SCALE_PATH:
            await self.answers.error(scope, send, 400, f"{path} is not for fleets; use kervan scale")
            return
        if self._peers is not None and await self._peers.respond(scope, body, client, send):
            return
        if is_post and self._streams is not None and makes_work(path):
            await self._streams.post(inner, scope, receive, send, body)
            return
        await inner(scope, receive, send)

    async def _page(self, scope: Scope, send: Send) -> None:
        path = scope["path"]
        status, content_type = 200, b"application/json"
        if path == "/health":
            body = b'{"status":"live"}'
        elif path == "/metrics" or _asks_one_gateway(path):
            gateway = path.removeprefix(GATEWAY_METRICS_PREFIX) if path != "/metrics" else None
            page = await self.view.metrics(gateway)
            if page is None:
                message = f"no gateway {gateway!r} answers here; /metrics has those of all gateways, with their ids"
                await self.answers.error(scope, send, 404, message)
                return
            body, content_type = page, b"text/plain; version=0.0.4; charset=utf-8"
        elif path.startswith(REQUESTS_PREFIX):
            request_id = unquote(path.removeprefix(REQUESTS_PREFIX))
            told = await self.view.explain(request_id)
            if told is None:
                message = (
                    f"no gateway remembers a request {request_id[:80]!r}; give the `id` of its answer or the header "
                    "X-Kervan-Stream-Id; each gateway keeps the last remembered_requests"
                )
                await self.answers.error(scope, send, 404, message)
                return
            body = told
        elif path == STATUS_PATH:
            body = msgspec.json.encode(await self.view.status())
        elif (reason := self._not_ready()) is None:
            body = b'{"status":"ready"}'
        else:
            status, body = 503, msgspec.json.encode({"status": "not ready", "reason": reason})
        await self.answers.respond(scope, send, status, body, content_type)

    def _not_ready(self) -> str | None:
        reason = self.view.readiness()
        if reason is None and self.inner is None:
            return "vLLM's app is still being built"
        return reason

    async def read_body(self, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """The whole body; None when the client left or has been refused (413, 408)."""
        limit = self.max_body_bytes
        announced = header(scope, b"content-length")
        if announced.isdigit() and int(announced) > limit:
            await self._refuse_size(f"{int(announced)} bytes", scope, receive, send)
            return None
        chunks: list[bytes] = []
        size = 0
        task = self._deadlines.enter()
        try:
            while size <= limit:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                chunk = message.get("body", b"")
                size += len(chunk)
                chunks.append(chunk)
                if not message.get("more_body", False) and size <= limit:
                    return chunk if len(chunks) == 1 else b"".join(chunks)
        except asyncio.CancelledError:
            if not self._deadlines.is_over(task) or task.uncancel() > 0:
                raise
            text = f"{size} bytes of the body came in {self.body_timeout_s:g} s, and it is not complete; send it faster"
            await self.answers.error(scope, send, 408, text, headers=[(b"connection", b"close")])
            return None
        finally:
            self._deadlines.leave(task)
        chunks.clear()
        await self._refuse_size(f"over {limit} bytes ({size} read so far)", scope, receive, send)
        return None

    async def _refuse_size(self, size: str, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.max_body_bytes
        message = f"the body is {size}; this gateway accepts at most {limit} bytes ({limit / MIB:g} MiB)"
        await self.answers.refuse(scope, receive, send, 413, message)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Before the handshake a close is answered with HTTP 403. Code 1008: policy; 1013: try again later.
        account = self._account(scope)
        if isinstance(account, str):
            await _close(send, 1008, "no valid API key")
            return
        if account.entry is not None and account.entry.models:
            self.guard.keys.refuse(account, "model")
            await _close(send, 1008, "the key is for some models, and a websocket names its model too late")
            return
        if self.inner is None:
            await _close(send, 1013, "the fleet accepts no requests now")
            return
        permit = await self.guard.admit(account, scope["path"], b"", RequestSize())
        if isinstance(permit, KeyRefusal):
            await _close(send, 1013, permit.message[:120])
            return
        with permit:
            room = self.view.admit(RequestSize())
            if isinstance(room, Shed):
                permit.shed()
                await _close(send, 1013, "the fleet accepts no requests now")
                return
            self.view.stream_opened()
            try:
                with room:
                    await self.inner(scope, receive, send)
            finally:
                self.view.stream_closed()


async def _close(send: Send, code: int, reason: str) -> None:
    await send({"type": "websocket.close", "code": code, "reason": reason})


class _Deadlines:
    """Cancels tasks that stay inside for over `limit_s`.

    One timer serves all: an asyncio.timeout per request costs more than the rest of the shell.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._due: dict[asyncio.Task[object], float] = {}  # loop times, oldest first: all have the same limit
        self._timer: asyncio.TimerHandle | None = None

    def enter(self) -> asyncio.Task[object]:
        """The current task, which must `leave`."""
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._due[task] = due = loop.time() + self._limit_s
        if self._timer is None:
            self._timer = loop.call_at(due, self._check, loop)
        return task

    def is_over(self, task: asyncio.Task[object]) -> bool:
        """Whether it was this class that cancelled the task."""
        return task not in self._due

    def leave(self, task: asyncio.Task[object]) -> None:
        self._due.pop(task, None)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._timer = None
        for task, due in list(self._due.items()):
            if due > now:
                self._timer = loop.call_at(due, self._check, loop)
                return
            del self._due[task]
            task.cancel()


def _own_methods(path: str) -> tuple[str, ...] | None:
    """The methods of a path that is the gateway's own, None for vLLM's."""
    if path in OPEN_PATHS or path == STATUS_PATH or _asks_one_gateway(path) or path.startswith(REQUESTS_PREFIX):
        return PAGE_METHODS
    if path in SIMPLE_PATHS:
        return ("POST",)
    return ("GET",) if path.startswith(STREAMS_PREFIX) else None


def _asks_one_gateway(path: str) -> bool:
    """Whether it is the path of one gateway's metrics."""
    return path.startswith(GATEWAY_METRICS_PREFIX) and path != GATEWAY_METRICS_PREFIX


def _json_fault(path: str, body: bytes, scope: Scope) -> str | None:
    """What vLLM would answer with 500, or without an OpenAI-style body; for all other faults it has a 400 of its own.

    A JSON body that is no object (0.24), a nesting bomb, bytes that are not UTF-8, structured_outputs that is no
    object.
    """
    is_plain = (
        body.startswith(b"{")
        and path != "/invocations"
        and b'"structured_outputs"' not in body
        and body.count(b"{") + body.count(b"[") < PLAIN_BRACKETS
        and _is_utf8(body)
    )
    if is_plain or not body or not (path in OBJECT_PATHS or path.startswith(vllm_names.WORK_PREFIXES)):
        return None
    if b"json" not in header(scope, b"content-type").lower():
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        return f"the body is not valid JSON: {exc}; send one JSON object"
    if not isinstance(value, dict):
        return f'the body is a JSON {type(value).__name__}; send one JSON object, such as {{"model": ...}}'
    outputs = value.get("structured_outputs")
    if outputs is not None and not isinstance(outputs, dict):
        return (
            f'structured_outputs is a JSON {type(outputs).__name__}; send an object, such as {{"choice": ["a", "b"]}}'
        )
    return None


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        phase = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{phase}.complete"})
        if phase == "shutdown":
            return
