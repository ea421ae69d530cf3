"""The last requests of a gateway, and those in flight, for `kervan explain`."""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from contextvars import Token

from kervan import logs
from kervan.fleet import stream_ids
from kervan.fleet.timeline import RequestRecord, current_request
from kervan.gateway.asgi import Scope, header
from kervan.gateway.tracing import Tracing

MAX_ID = 128
REQUEST_ID_HEADER = b"x-request-id"
TRACEPARENT = b"traceparent"
STREAMS_PATH = "/v1/streams/{id}"


class RequestMemory:
    """The latest `max_requests` that have ended, and all that are in flight. `tracing`: gets those that end."""

    def __init__(self, max_requests: int, tracing: Tracing | None = None) -> None:
        self._ended: deque[RequestRecord] = deque(maxlen=max_requests)
        self._open: dict[int, RequestRecord] = {}
        self.tracing = tracing

    def begin(self, scope: Scope, received_s: float) -> "Remembering":
        """To be used around the work of a request that has been admitted. `received_s`: when its head was here."""
        return Remembering(self, self._record(scope, received_s), scope)

    def begin_again(self, scope: Scope, stream_id: str, traceparent: bytes) -> "Remembering":
        """As `begin`, for a client that comes back to a stream: `scope` is that of the request that began it.

        `traceparent`: of the client's own trace now; the spans are in that of the first request.
        """
        record = self._record(scope, time.monotonic())
        record.method, record.path, record.stream_id = "GET", STREAMS_PATH, stream_id
        record.request_id = record.client_id
        return Remembering(self, record, scope, traceparent.decode("latin-1"))

    @staticmethod
    def _record(scope: Scope, received_s: float) -> RequestRecord:
        now_s = time.monotonic()
        client_id = header(scope, REQUEST_ID_HEADER)[:MAX_ID].decode("latin-1")
        record = RequestRecord(scope["path"], received_s, time.time() - (now_s - received_s), client_id)
        record.traceparent = header(scope, TRACEPARENT)[:MAX_ID].decode("latin-1")
        record.forwarded_s = now_s
        return record

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
        """The latest request with this id: vLLM's in the answer, X-Kervan-Stream-Id, or the client's X-Request-Id.

        One that came back to its stream is it only if the first is not remembered here.
        """
        named = [record for record in self._newest() if is_named(record, request_id)]
        return next((record for record in named if record.method == "POST"), next(iter(named), None))

    def later(self, record: RequestRecord) -> list[RequestRecord]:
        """Requests that came back to the stream of this one, in their order."""
        found = [r for r in self._newest() if r is not record and r.method == "GET" and r.stream_id == record.stream_id]
        return found[::-1] if record.stream_id else []

    def since(self, since_s: float, most: int) -> list[RequestRecord]:
        """The newest that were in flight at `since_s` (`time.monotonic`) or later, at most so many."""
        found = (record for record in self._newest() if not record.ended_s or record.ended_s >= since_s)
        return list(itertools.islice(found, most))

    def _newest(self) -> Iterator[RequestRecord]:
        yield from reversed(self._open.values())
        yield from reversed(self._ended)


class Remembering:
    """Within, streams that are opened belong to the request. `scope`: for vLLM's app, with the parent of its spans."""

    __slots__ = ("_about", "_memory", "_record", "_token", "scope")

    def __init__(self, memory: RequestMemory, record: RequestRecord, scope: Scope, caller: str = "") -> None:
        self._memory = memory
        self._record = record
        self._token: Token[RequestRecord | None] | None = None
        self._about = logs.about(record.ids)
        self.scope = scope if memory.tracing is None else memory.tracing.begin(record, scope, caller)

    def __enter__(self) -> "Remembering":
        self._memory.opened(self._record)
        self._token = current_request.set(self._record)
        self._about.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        self._about.__exit__()
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
    """Whether vLLM's id of a stream is of the answer, or of what the client sent (`kervan.fleet.stream_ids`)."""
    number, underscore, rest = engine_id.partition("_")
    names = [engine_id, *([rest] if underscore and number.isdecimal() else [])]
    names += [name.removeprefix(kind) for name in names for kind in stream_ids.PREFIXES if name.startswith(kind)]
    return any(name == given or name.startswith(given + "-") for name in names)
