"""Where the time of one request went, from its record. Pure: what is unknown now is told up to `now_s`."""

import time
from collections.abc import Iterator

import msgspec

from kervan.fleet.timeline import RequestRecord, Step, StreamTimeline

MS = 1e3


class Part(msgspec.Struct, omit_defaults=True):
    """A part of the time; parts of a stream follow each other without a gap.

    `start_s`: since the request was received. `tokens`: that were computed in it, or given; `cached_tokens`: that were
    in the prefix cache. `is_open`: it goes on.
    """

    part: str
    start_s: float
    seconds: float
    replica: str = ""
    why: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    is_open: bool = False


class Move(msgspec.Struct):
    """The stream went from one replica to another. `pause_s`: without a token, 0 if it had none before.

    `prefilled_tokens`: prompt and answer so far that the other replica had to compute, less what its cache had.
    """

    reason: str
    source: str
    target: str
    after_tokens: int
    start_s: float
    pause_s: float
    prefilled_tokens: int


class StreamExplained(msgspec.Struct):
    """`ended`: vLLM's finish reason, or why it ended with an error; empty while it runs."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    ended: str
    parts: list[Part]
    moves: list[Move]
    steps_left_out: int


class RequestExplained(msgspec.Struct):
    """One request as `kervan explain` tells it. `before`: what came before its streams, `delivery_s`: what came after.

    `num_streams`: it may have more than are told of. `later`: requests of clients that came back to its stream.
    """

    gateway: str
    path: str
    status: int
    received: str
    seconds: float
    is_open: bool
    stream_id: str
    client_id: str
    before: list[Part]
    num_streams: int
    streams: list[StreamExplained]
    delivery_s: float
    method: str = "POST"
    later: list["RequestExplained"] = []


def explained(record: RequestRecord, *, gateway: str, now_s: float) -> RequestExplained:
    """The request at `now_s`."""
    end_s = record.ended_s or now_s
    zero_s = record.received_s
    streams = [_stream(timeline, zero_s, end_s) for timeline in record.streams]
    arrived_s = min((timeline.arrived_s for timeline in record.streams), default=end_s)
    before = [
        Part("admission", 0.0, record.forwarded_s - zero_s),
        Part("tokenisation", record.forwarded_s - zero_s, max(0.0, arrived_s - record.forwarded_s)),
    ]
    if not record.streams and (record.ended_s or record.method != "POST"):  # another may be about to open its stream
        before[1].part = "answered without a stream"
    last_s = max((t.steps[-1].at_s for t in record.streams if t.steps and t.steps[-1].what == "ended"), default=end_s)
    received = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.received_unix_s))
    return RequestExplained(
        gateway=gateway,
        path=record.path,
        status=record.status,
        received=f"{received}.{int(record.received_unix_s % 1 * MS):03d}Z",
        seconds=end_s - zero_s,
        is_open=not record.ended_s,
        stream_id=record.stream_id,
        client_id=record.client_id,
        before=before,
        num_streams=record.num_streams,
        streams=streams,
        delivery_s=max(0.0, end_s - last_s) if record.ended_s and record.streams else 0.0,
        method=record.method,
    )


def _stream(timeline: StreamTimeline, zero_s: float, end_s: float) -> StreamExplained:
    walk = _Walk(timeline.arrived_s, zero_s)
    for step in timeline.steps:
        walk.take(step)
    last = timeline.steps[-1] if timeline.steps else None
    is_over = last is not None and last.what == "ended"
    if not is_over:
        walk.close(end_s, is_open=True)
    return StreamExplained(
        request_id=timeline.request_id,
        prompt_tokens=timeline.prompt_tokens,
        output_tokens=last.tokens if last is not None and is_over else walk.output_tokens,
        ended=last.why if last is not None and is_over else "",
        parts=walk.parts,
        moves=walk.moves,
        steps_left_out=timeline.num_left_out,
    )


class _Walk:
    """Goes through the steps of a stream; `at_s` is where the parts so far end."""

    def __init__(self, arrived_s: float, zero_s: float) -> None:
        self.parts: list[Part] = []
        self.moves: list[Move] = []
        self.output_tokens = 0
        self._zero_s = zero_s
        self._at_s = arrived_s
        self._placed: Step | None = None
        self._has_token = False
        self._causes: list[str] = []
        self._move: Move | None = None  # not yet at its end

    def take(self, step: Step) -> None:
        """The next step."""
        if step.what in ("waits", "held"):
            self._causes.append(step.why)
        elif step.what == "replayed":
            self._add("replay", step.at_s, tokens=step.tokens)
        elif step.what == "placed":
            self._place(step)
        elif step.what == "first token":
            self._first_token(step)
        elif step.what == "moved":
            self._leave(step)
        else:
            self.output_tokens = step.tokens
            self.close(step.at_s)

    def _place(self, step: Step) -> None:
        if self._move is not None:
            self._move.target = step.replica
            self._move.prefilled_tokens = step.tokens
        if not self._is_paused:
            self._add("queue", step.at_s, why="; ".join(dict.fromkeys(self._causes)) or "routing")
        self._causes.clear()
        self._placed, self._has_token = step, False

    def _first_token(self, step: Step) -> None:
        placed = self._placed
        replica, tokens, why = ("", 0, "") if placed is None else (placed.replica, placed.tokens, placed.why)
        if self._is_paused:
            assert self._move is not None
            self._move.pause_s = step.at_s - self._at_s
            self._add("move", step.at_s, replica=replica, why=self._move.reason, tokens=tokens)
        else:
            waited_s = min(max(0.0, step.queue_s), step.at_s - self._at_s)
            if step.queue_s >= 0:
                self._add("replica queue", self._at_s + waited_s, replica=replica, why="in the engine's queue")
            self._add("prefill", step.at_s, replica=replica, why=why, tokens=tokens, cached=max(0, step.cached_tokens))
        self._move, self._has_token = None, True

    def _leave(self, step: Step) -> None:
        source = self._placed.replica if self._placed is not None else ""
        if self._is_paused:  # again, before the first one had brought a token
            self._start_move(step, source, self._at_s)
            return
        if self._has_token:
            since_s = step.since_s or step.at_s
            self._add("decode", max(self._at_s, since_s), replica=source, tokens=step.tokens - self.output_tokens)
        else:
            self._add("lost prefill", step.at_s, replica=source, why=step.why)
        self.output_tokens = step.tokens
        self._start_move(step, source, self._at_s)

    def _start_move(self, step: Step, source: str, since_s: float) -> None:
        self._move = Move(step.why, source, "", step.tokens, since_s - self._zero_s, 0.0, 0)
        self.moves.append(self._move)

    @property
    def _is_paused(self) -> bool:
        """Whether a client that had tokens waits for the first one of another replica."""
        return self._move is not None and self._move.after_tokens > 0

    def close(self, at_s: float, *, is_open: bool = False) -> None:
        """Nothing more is known."""
        replica = self._placed.replica if self._placed is not None else ""
        if self._is_paused:
            assert self._move is not None
            self._move.pause_s = at_s - self._at_s
            self._add("move", at_s, replica=replica, why=self._move.reason, is_open=is_open)
        elif self._has_token:
            tokens = max(0, self.output_tokens - sum(p.tokens for p in self.parts if p.part == "decode"))
            self._add("decode", at_s, replica=replica, tokens=tokens, is_open=is_open)
        elif self._placed is not None and self._move is None:
            self._add("prefill", at_s, replica=replica, why=self._placed.why, is_open=is_open)
        else:
            self._add("queue", at_s, why="; ".join(dict.fromkeys(self._causes)), is_open=is_open)

    def _add(
        self,
        part: str,
        until_s: float,
        *,
        replica: str = "",
        why: str = "",
        tokens: int = 0,
        cached: int = 0,
        is_open: bool = False,
    ) -> None:
        start_s, self._at_s = self._at_s, until_s
        seconds = until_s - start_s
        self.parts.append(Part(part, start_s - self._zero_s, seconds, replica, why, tokens, cached, is_open))


def spans(record: RequestRecord, told: RequestExplained) -> Iterator[tuple[Part, StreamExplained | None]]:
    """All parts of a request, with the stream that each belongs to."""
    for part in told.before:
        yield part, None
    for stream in told.streams:
        for part in stream.parts:
            yield part, stream
