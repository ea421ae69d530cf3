"""Streams that a client can come back to: ids in the answers, and GET /v1/streams/{id} with Last-Event-ID.

The HTTP side of `kervan.fleet.reconnect`, which tells the whole way. An answer that can be given again has a journal
here and a copy of it at another gateway, and each of its events says where it stands
(`kervan.fleet.reconnect.journal.Position`). Who has the journal gives it again: the gateway that began it, or when that
one is gone, another that has a copy and goes on with it as its own.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from kervan.fleet.directory import GatewayEntry
from kervan.fleet.reconnect.journal import Attempt, Journal, Position, current_attempt
from kervan.fleet.reconnect.replicated_store import ReplicatedStore
from kervan.fleet.timeline import current_request
from kervan.gateway.answers import Answers
from kervan.gateway.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    error_body,
    header,
    replay,
    respond,
)
from kervan.gateway.relay import MISDIRECTED, Relay, RelayFailedError, named_headers
from kervan.gateway.remembered import REQUEST_ID_HEADER, TRACEPARENT, RequestMemory
from kervan.vendor.vllm_names import CHAT_PATH, COMPLETIONS_PATH

logger = logging.getLogger(__name__)

ID_HEADER = b"x-kervan-stream-id"
STREAMS_PREFIX = "/v1/streams/"
INTERNAL_PREFIX = "/kervan/streams/"
ID_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,100}")
REPLAYED_PATHS = frozenset({CHAT_PATH, COMPLETIONS_PATH})
# Of the client's connection, or of this very request; the journal keeps the others.
_NOT_KEPT = frozenset({b"authorization", b"connection", b"content-length", b"host", b"transfer-encoding"})
EVENT_STREAM = b"text/event-stream"
END_TIMEOUT_S = 10.0


class _BodyFields(msgspec.Struct):
    """All that is read of a body to know whether its answer can be given again."""

    stream: bool | None = False
    n: int | None = 1
    best_of: int | None = 1
    use_beam_search: bool | None = False
    stream_interval: int | None = 1
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    prompt_embeds: msgspec.Raw = msgspec.Raw(b"null")


_body_decoder = msgspec.json.Decoder(_BodyFields)


def refusal(body: bytes) -> str | None:
    """Why the answer to `body` could not be given again; "" if it can, None if it is no stream (or vLLM refuses it)."""
    try:
        fields = _body_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not fields.stream:
        return None
    if (fields.n or 1) > 1 or (fields.best_of or 1) > 1 or fields.use_beam_search:
        return "it has several choices (n, best_of or beam search)"
    if (fields.stream_interval or 1) > 1:
        return "its events come every few tokens (stream_interval)"
    if _num_prompts(bytes(fields.prompt)) > 1 or bytes(fields.prompt_embeds).startswith(b"["):
        return "it answers several prompts"
    return ""


def _num_prompts(prompt: bytes) -> int:
    """A list of texts or of lists is several prompts; a text, or a list of token ids, is one."""
    if not prompt.startswith(b"[") or prompt[1:].lstrip()[:1] not in (b'"', b"["):
        return 1
    prompts: list[Any] = json.loads(prompt)
    return len(prompts)


class Streams:
    """Gives answers their ids, and in a fleet with `replay_s`, whose `store` has their journals, gives them again.

    `gateways`: those that the directory lists. `key`: `auth.relay_key` of the fleet.
    """

    def __init__(
        self,
        gateway_id: str,
        gateways: Callable[[], Sequence[GatewayEntry]],
        key: bytes,
        answers: Answers | None = None,
    ) -> None:
        self.store: ReplicatedStore | None = None
        self.requests: RequestMemory | None = None
        self._answers = answers or Answers()
        self._gateway_id = gateway_id
        self._gateways = gateways
        self._key = key
        self._relay = Relay()
        self.num_fetched = 0

    def close(self) -> None:
        """Close the connections to other gateways that are not in use."""
        self._relay.close()

    def new_id(self) -> str:
        """An id that nobody can guess: without API keys, it is all that protects a stream."""
        return f"{self._gateway_id}-{secrets.token_hex(16)}"

    # ---- POST

    async def post(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Let `app` respond; `receive` gives the body first."""
        stream_id = self.new_id()
        is_plain = scope["path"] in REPLAYED_PATHS
        why_not = refusal(body) if self.store is not None and is_plain else None
        headers = list(scope["headers"])
        is_named = why_not is None and b'"request_id"' in body  # which vLLM takes, unless there is a header
        if is_plain and not is_named and not header(scope, REQUEST_ID_HEADER):
            # vLLM names the answer by it: the same name in all logs, and when it is given again. It is not the stream's
            # id, as that one opens the stream, and logs are for more eyes.
            headers.append((REQUEST_ID_HEADER, secrets.token_hex(16).encode()))
            scope = {**scope, "headers": headers}
        if (record := current_request.get()) is not None:
            record.request_id = header(scope, REQUEST_ID_HEADER).decode("latin-1")
        if self.store is None or why_not is None:
            await app(scope, receive, with_id(send, stream_id))
            return
        kept_headers = [pair for pair in headers if pair[0] not in _NOT_KEPT]
        kept_body = b"" if why_not else body
        journal = Journal(stream_id, _key_digest(scope), scope["path"], kept_headers, kept_body, why_not)
        self.store.journals.add(journal)
        if why_not:
            self.store.journals.end(journal)
            self.store.changed(journal)
            await app(scope, receive, with_id(send, stream_id))
        else:
            await self._respond(self.store, app, Attempt(journal), scope, receive, send)

    @staticmethod
    async def _respond(
        store: ReplicatedStore, app: ASGIApp, attempt: Attempt, scope: Scope, receive: Receive, send: Send
    ) -> None:
        journal = attempt.journal
        journal.attempt, journal.ended_s = attempt, None
        store.changed(journal)
        events = _Events(attempt, send, store.copy_sender.copied)
        token = current_attempt.set(attempt)
        try:
            await app(scope, _disconnect_when(attempt.must_end, receive), events.send)
        finally:
            current_attempt.reset(token)
            journal.attempt = None
            store.journals.end(journal)
            if not events.is_stream and attempt.after is None:
                store.journals.drop(journal)  # it was refused: there is nothing to come back to
            store.changed(journal)
            attempt.has_ended.set()

    # ---- GET

    async def get(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to GET /v1/streams/{id}: here, or through the gateway that has the stream."""
        if self.store is None:
            await self._answers.error(
                scope, send, 404, "this fleet keeps no streams; give it replay_s above 0 in its config file"
            )
            return
        stream_id = scope["path"].removeprefix(STREAMS_PREFIX)
        try:
            after = _last_event(scope)
        except ValueError as error:
            await self._answers.error(scope, send, 400, str(error))
            return
        if not ID_PATTERN.fullmatch(stream_id):  # nor may it reach another gateway as a part of a request
            await self._unknown(scope, send, stream_id)
            return
        journal = self.store.journals.get(stream_id)
        if journal is None or not journal.is_own:
            origin_id = stream_id.rpartition("-")[0]
            others = [gateway for gateway in self._gateways() if gateway.id != self._gateway_id]
            origin = [gateway.internal_url for gateway in others if gateway.id == origin_id]
            if await self._forward(origin, stream_id, scope, receive, send):
                return
            if journal is None or not _reaches(journal, after):
                rest = [gateway.internal_url for gateway in others if gateway.id != origin_id]
                if await self._forward(rest, stream_id, scope, receive, send):
                    return
        if journal is None:
            await self._unknown(scope, send, stream_id)
        else:
            await self._respond_again(self.store, app, journal, after, scope, receive, send)

    async def get_internal(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to another gateway, which has checked the request: with a stream that is here, or with 421."""
        stream_id = scope["path"].removeprefix(INTERNAL_PREFIX)
        journal = self.store.journals.get(stream_id) if self.store is not None else None
        after = _last_event(scope)
        if self.store is None or journal is None or (not journal.is_own and not _reaches(journal, after)):
            await respond(send, MISDIRECTED, error_body(MISDIRECTED, "the stream is not here"))
        else:
            await self._respond_again(self.store, app, journal, after, scope, receive, send)

    async def _forward(self, urls: Sequence[str], stream_id: str, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether one of the gateways at `urls` has answered."""
        if not urls:
            return False
        path = INTERNAL_PREFIX + stream_id
        headers = named_headers(scope)
        forwarded = {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        try:
            await self._relay.forward(urls, self._key, forwarded, b"", receive, send)
        except RelayFailedError:
            return False
        return True

    async def _respond_again(
        self,
        store: ReplicatedStore,
        app: ASGIApp,
        journal: Journal,
        after: Position | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        if not hmac.compare_digest(journal.key_digest, _key_digest(scope)):
            await self._unknown(scope, send, journal.stream_id)
            return
        if journal.refusal:
            await self._answers.error(
                scope, send, 410, f"stream {journal.stream_id} cannot be resumed: {journal.refusal}"
            )
            return
        if not _reaches(journal, after):
            had = f"it has {journal.num_tokens} tokens here, and Last-Event-ID says {after}"
            await self._answers.error(scope, send, 410, f"stream {journal.stream_id} cannot continue from there: {had}")
            return
        if not journal.is_own:
            kept = store.journals.get(journal.stream_id)
            if kept is None or not kept.is_own:  # else another request was faster
                kept = journal.adopted()
                store.journals.add(kept)
            journal = kept
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                while journal.attempt is not None:  # its client's old connection was not yet found broken
                    await journal.attempt.end()
        except TimeoutError:
            await self._answers.error(scope, send, 503, "the stream's earlier connection does not close; try again")
            return
        self.num_fetched += 1
        length = (b"content-length", b"%d" % len(journal.body))
        path = {"path": journal.path, "raw_path": journal.path.encode(), "query_string": b"", "method": "POST"}
        again = {**scope, **path, "headers": [*journal.headers, length]}
        attempt, receive = Attempt(journal, after or Position(0, 0)), replay(journal.body, _only_disconnect(receive))
        if self.requests is None:
            await self._respond(store, app, attempt, again, receive, send)
            return
        with self.requests.begin_again(again, journal.stream_id, header(scope, TRACEPARENT)) as remembering:
            await self._respond(store, app, attempt, remembering.scope, receive, send)

    async def _unknown(self, scope: Scope, send: Send, stream_id: str) -> None:
        message = f"no stream {stream_id[:80]!r} is kept; it is unknown or has expired"
        await self._answers.error(scope, send, 404, message)


def _key_digest(scope: Scope) -> bytes:
    return hashlib.sha256(header(scope, b"authorization").partition(b" ")[2].strip()).digest()


def _reaches(journal: Journal, after: Position | None) -> bool:
    return after is None or after.count <= journal.last_count


def _last_event(scope: Scope) -> Position | None:
    """The position in Last-Event-ID, None without one.

    Raises: ValueError when it tells none.
    """
    text = header(scope, b"last-event-id").decode("latin-1").strip()
    position = Position.parse(text)
    if text and position is None:
        raise ValueError(
            f"Last-Event-ID {text[:40]!r} is not an event id; send the last `id` of the stream, such as 12.1"
        )
    return position


def with_id(send: Send, stream_id: str) -> Send:
    """`send` that adds the id to the head of the answer; the rest passes through one plain call."""
    record = current_request.get()
    if record is not None:
        record.stream_id = stream_id

    def named(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            if record is not None:
                record.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (ID_HEADER, stream_id.encode())]}
        return send(message)

    return named


def _only_disconnect(receive: Receive) -> Receive:
    """`receive` without the body of a GET, which is empty: it only says that the client has left."""

    async def received() -> Message:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        return message

    return received


def _disconnect_when(must_end: asyncio.Event, receive: Receive) -> Receive:
    """`receive` that says that the client has left as soon as `must_end` is set."""
    is_first = True

    async def received() -> Message:
        nonlocal is_first
        if is_first:
            is_first = False
            return await receive()
        receiving, ending = asyncio.ensure_future(receive()), asyncio.ensure_future(must_end.wait())
        try:
            await asyncio.wait([receiving, ending], return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            ending.cancel()

    return received


class _Events:
    """Gives each event its id, and leaves out those that the client has. vLLM sends one event per message."""

    def __init__(self, attempt: Attempt, send: Send, copied: Callable[[], Awaitable[None]]) -> None:
        self._attempt = attempt
        self._send = send
        self._copied = copied
        self.is_stream = False
        self._record = current_request.get()
        if self._record is not None:
            self._record.stream_id = attempt.journal.stream_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._record is not None:
                self._record.status = message["status"]
            headers = list(message.get("headers", ()))
            self.is_stream = message["status"] == 200 and any(
                name.lower() == b"content-type" and value.startswith(EVENT_STREAM) for name, value in headers
            )
            if self.is_stream:
                await self._copied()  # so that the id can be used as soon as it is known
            message = {**message, "headers": [*headers, (ID_HEADER, self._attempt.journal.stream_id.encode())]}
        elif self.is_stream and (body := message.get("body", b"")):
            *events, rest = body.split(b"\n\n")
            body = b"".join(map(self._numbered, events)) + rest
            if not body and message.get("more_body", False):
                return
            message = {**message, "body": body}
        await self._send(message)

    def _numbered(self, event: bytes) -> bytes:
        if event.startswith(b":"):
            # A comment. After an id, OpenAI's client would take the empty line for an event without data.
            return event + b"\n"
        position = self._attempt.next_event()
        return b"id: %b\n%b\n\n" % (str(position).encode(), event) if position is not None else b""
