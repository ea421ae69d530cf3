"""When what happened to a request and its streams: what `kervan explain` tells and traces show.

A stream notes a step when it is placed, held, moved, gets its first token or ends: a few for each request, none for a
token. Times are of `time.monotonic`.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

# A stream that moves more often, and a request of more streams, are told in part: what is kept of a request is bounded.
MAX_STEPS = 24
MAX_STREAMS = 8

What = Literal["waits", "held", "replayed", "placed", "first token", "moved", "ended"]


class Step(msgspec.Struct, gc=False):
    """Something that happened to a stream. What has a meaning depends on `what`.

    waits, held: `why`. placed: `replica`, `why`, `tokens` that it has to compute. first token: `cached_tokens` that it
    had (-1: not told), `queue_s` that the stream waited in its engine (-1: not told). moved: `why`, `tokens` generated
    so far, `since_s` of the last of them (0: none). ended: `why`, `tokens` generated. replayed: `tokens`.
    """

    at_s: float
    what: What
    replica: str = ""
    why: str = ""
    tokens: int = 0
    cached_tokens: int = -1
    queue_s: float = -1.0
    since_s: float = 0.0


@dataclass(slots=True, eq=False)
class StreamTimeline:
    """The steps of one stream. `request_id`: the engine's; `num_left_out`: steps that were too many."""

    request_id: str
    prompt_tokens: int
    arrived_s: float
    steps: list[Step] = field(default_factory=list)
    num_left_out: int = 0

    def note(
        self,
        what: What,
        replica: str = "",
        why: str = "",
        tokens: int = 0,
        cached_tokens: int = -1,
        queue_s: float = -1.0,
        since_s: float = 0.0,
    ) -> None:
        """It happens now. Of too many steps, those in the middle are left out."""
        if len(self.steps) >= MAX_STEPS and what != "ended":
            self.num_left_out += 1
            return
        self.steps.append(Step(time.monotonic(), what, replica, why, tokens, cached_tokens, queue_s, since_s))


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One HTTP request; its `method` is GET where a client comes back to the stream of another one.

    `stream_id`: that the client got as X-Kervan-Stream-Id; `client_id`: its own X-Request-Id.
    `forwarded_s`: when vLLM's app got it. `num_streams`: that it opened, of which the first few have a timeline.
    `request_id`: that vLLM's names of it have in them. `traceparent`: W3C's, of its own span where it is traced, else
    the client's; `span`: of its trace, if it is traced.
    """

    path: str
    received_s: float
    received_unix_s: float
    client_id: str = ""
    method: str = "POST"
    request_id: str = ""
    traceparent: str = ""
    stream_id: str = ""
    status: int = 0
    forwarded_s: float = 0.0
    ended_s: float = 0.0
    num_streams: int = 0
    streams: list[StreamTimeline] = field(default_factory=list)
    span: Any = None

    def ids(self) -> dict[str, str]:
        """What its log lines have; none once it is over, as tasks that it began may go on for others."""
        if self.ended_s:
            return {}
        return {"request_id": self.request_id or self.client_id, "trace_id": trace_id(self.traceparent)}

    def open(self, request_id: str, prompt_tokens: int, arrived_s: float) -> StreamTimeline | None:
        """A stream has come; None if it is one too many to be told of."""
        self.num_streams += 1
        if len(self.streams) >= MAX_STREAMS:
            return None
        timeline = StreamTimeline(request_id, prompt_tokens, arrived_s)
        self.streams.append(timeline)
        return timeline


def trace_id(traceparent: str) -> str:
    """The trace of W3C's header `traceparent`; empty if it names none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""


current_request: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)
