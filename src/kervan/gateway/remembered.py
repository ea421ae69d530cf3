"""The last requests of a gateway, and those in flight, for `kervan explain`."""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from contextvars import Token

from kervan.fleet.timeline import RequestRecord, current_request
from kervan.gateway.asgi import Scope, header
from kervan.gateway.tracing import Tracing

MAX_ID = 128
REQUEST_ID_HEADER = b"x-request-id"
# What vLLM puts before the id of a request, by endpoint.
ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "embd-", "score-", "rerank-", "generate-", "generate-tokens-", "pool-")


class RequestMemory:
    """The latest `max_requests` that have ended, and all that are in flight. `tracing`: gets those that end."""

    def __init__(self, max_requests: int, tracing: Tracing | None = None) -> None:
        self._ended: deque[RequestRecord] = deque(maxlen=max_requests)
        self._open: dict[int, RequestRecord] = {}
        self.tracing = tracing

    def begin(self, scope: Scope, received_s: float) -> "Remembering":
        """To be used around the work of a request that has been admitted. `received_s`: when its head was here."""
        now_s = time.monotonic()
        client_id = header(scope, REQUEST_ID_HEADER)[:MAX_ID].decode("latin-1")
        record = RequestRecord(scope["path"], received_s, time.time() - (now_s - received_s), client_id)
        record.forwarded_s = now_s
        return Remembering(self, record, scope)

    def opened(self, record: RequestRecord) -> None:
        """A request is being worked on."""
        self._open[id(record)] = record

    def closed(self, record: RequestRecord) -> None:
        """It is over."""
        self._open.pop(id(record), None)
        record.ended_s = time.monotonic()
        self._ended.append(record)
        if self.tracing is not None:
            self.tracing.end(record)

    def find(self, request_id: str) -> RequestRecord | None:
        """The latest request with this id: vLLM's in the answer, X-Kervan-Stream-Id, or the client's X-Request-Id."""
        return next((record for record in self._newest() if is_named(record, request_id)), None)

    def since(self, since_s: float, most: int) -> list[RequestRecord]:
        """The newest that were in flight at `since_s` (`time.monotonic`) or later, at most so many."""
        found = (record for record in self._newest() if not record.ended_s or record.ended_s >= since_s)
        return list(itertools.islice(found, most))

    def _newest(self) -> Iterator[RequestRecord]:
        yield from reversed(self._open.values())
        yield from reversed(self._ended)


class Remembering:
    """Within, streams that are opened belong to the request. `scope`: for vLLM's app, with the parent of its spans."""

    __slots__ = ("_memory", "_record", "_token", "scope")

    def __init__(self, memory: RequestMemory, record: RequestRecord, scope: Scope) -> None:
        self._memory = memory
        self._record = record
        self._token: Token[RequestRecord | None] | None = None
        self.scope = scope if memory.tracing is None else memory.tracing.begin(record, scope)

    def __enter__(self) -> "Remembering":
        self._memory.opened(self._record)
        self._token = current_request.set(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        current_request.reset(self._token)
        self._memory.closed(self._record)


def is_named(record: RequestRecord, request_id: str) -> bool:
    """Whether it is one of the names of a request."""
    if not request_id:
        return False
    if request_id in (record.stream_id, record.client_id):
        return True
    return any(_is_of(timeline.request_id, request_id) for timeline in record.streams)


def _is_of(engine_id: str, given: str) -> bool:
    """vLLM's id of a stream is that of the answer, with `1_` before it for a second choice, `-0` behind it for a prompt
    of several, and in newer versions eight characters more; the answer's has its kind before what the client sent."""
    number, underscore, rest = engine_id.partition("_")
    names = [engine_id, *([rest] if underscore and number.isdecimal() else [])]
    names += [name.removeprefix(kind) for name in names for kind in ID_PREFIXES if name.startswith(kind)]
    return any(name == given or name.startswith(given + "-") for name in names)
