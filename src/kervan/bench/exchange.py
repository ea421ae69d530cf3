"""One request and its streamed response, as the client saw it."""

import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from kervan.bench.prompts import Request
from kervan.bench.refusals import retry_after_s
from kervan.bench.sse import Chunk, EventParser, carries_token, decode, decode_all, is_reasoning

# (exchange, chunk, the chunk's bytes, Unix time at which it reached this machine).
OnChunk = Callable[["Exchange", Chunk, bytes, float], None]

MAX_ERROR_BYTES = 500
MAX_BODY_BYTES = 64 * 1024  # kept of a response that is no stream


class Exchange:
    """A listener of a channel. When it has ended, `error` is None or the kind of failure, with `message`.

    Kinds: `http_STATUS`, `no_stream` (200, but no events), `garbage` (no HTTP, or events that are no JSON),
    `server_error` (an error event), `truncated` (the response stopped before its end), `wrong_length` (another number
    of tokens than asked for with `ignore_eos`), `duplicated` (more pieces than tokens, or an end that came twice),
    `empty` (no token at all), `timeout`, `refused` (no connection), `closed` (dropped before any response), `not_sent`
    (too many streams were in flight).

    `number`: of its job in the load. `arrival_s`: when it should have been sent, `sent_s`: when it was.
    """

    __slots__ = (
        "arrival_s",
        "body",
        "cached_tokens",
        "chunk_tokens",
        "closing_s",
        "done",
        "end_s",
        "error",
        "events",
        "finished",
        "first_answer_s",
        "first_s",
        "gaps",
        "has_kernel_time",
        "history_tokens",
        "is_between_events",
        "is_reused",
        "last_s",
        "message",
        "num_chunks",
        "number",
        "on_chunk",
        "on_ended",
        "only_choice",
        "output_tokens",
        "per_choice_last_s",
        "prompt_tokens",
        "request",
        "retry_after_s",
        "sent_s",
        "status",
        "text",
        "usage_tokens_seen",
        "was_sent",
    )  # fmt: skip

    def __init__(self, number: int, arrival_s: float, request: Request, *, keeps_text: bool = False) -> None:
        self.number = number
        self.arrival_s = arrival_s
        self.request = request
        self.sent_s = arrival_s
        self.was_sent = False
        self.has_kernel_time = False  # of its chunks; else their times are those of the reads
        self.status = 0
        self.retry_after_s: float | None = None  # that a status of an error asks to wait
        self.events = EventParser()
        self.is_between_events = False  # in a stream, and the next piece begins an event
        self.first_s: float | None = None
        self.first_answer_s: float | None = None
        self.last_s = 0.0
        self.end_s = 0.0
        self.gaps: list[float] = []  # between chunks that carry tokens, per choice
        self.chunk_tokens: list[int] = []  # of the chunk that ended each gap; only with usage in every chunk
        self.per_choice_last_s: dict[int, float] = {}  # not kept while there is an `only_choice`
        self.only_choice: int | None = None
        self.usage_tokens_seen = 0
        self.num_chunks = 0
        self.closing_s: float | None = None  # a chunk with a finish reason and nothing else
        self.output_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None  # of the prompt, as the server says
        self.history_tokens: int | None = 0  # of the prompt, those that its conversation had before; None: not known
        self.finished: set[int] = set()
        self.done = False
        self.error: str | None = None
        self.message = ""
        self.body = b""
        self.text: list[str] | None = [] if keeps_text else None
        self.is_reused = False
        self.on_ended: Callable[[], None] | None = None
        self.on_chunk: OnChunk | None = None

    # ---- as a listener

    def on_status(self, status: int, headers: dict[str, str]) -> None:
        """The response has begun."""
        self.status = status
        if status != 200:
            self.message = f"status {status}" + (f", location {headers['location']}" if "location" in headers else "")
            self.retry_after_s = retry_after_s(headers, time.time())
        self.is_between_events = status == 200 and "event-stream" in headers.get("content-type", "")
        if status == 200 and not self.is_between_events:
            self.fail("no_stream", f"200 with content-type {headers.get('content-type', 'none')!r}")

    def on_body(self, piece: bytes, at_s: float) -> None:
        """The next bytes of the body, of any length."""
        # Nearly always a piece is one whole event: one line, and the empty one that ends it.
        if self.is_between_events and piece.startswith(b"data: {") and piece.find(b"\n") == len(piece) - 2:
            self._on_event(piece[6:-2], at_s)
            return
        if self.status != 200 or self.error == "no_stream":
            if len(self.body) < MAX_BODY_BYTES:
                self.body += piece
            return
        for event in self.events.feed(piece):
            if event == b"[DONE]":
                if self.done:
                    self.fail("duplicated", "[DONE] came twice")
                self.done = True
            else:
                self._on_event(event, at_s)
        self.is_between_events = self.events.is_between_events

    def on_bodies(self, pieces: list[bytes], at_s: list[float]) -> None:
        """As `on_body` for each; events of one line each are decoded at once, which costs less."""
        events = [
            piece[6:-2] for piece in pieces if piece.startswith(b"data: {") and piece.find(b"\n") == len(piece) - 2
        ]
        if self.is_between_events and len(events) == len(pieces):
            chunks: list[Chunk] = []
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                chunks = decode_all(b"[%s]" % b",".join(events))
            if len(chunks) == len(events):
                on_chunk = self.on_chunk
                for chunk, event, chunk_at_s in zip(chunks, events, at_s, strict=True):
                    self._count(chunk, event, chunk_at_s)
                    if on_chunk is not None:
                        on_chunk(self, chunk, event, chunk_at_s)
                return
        for piece, piece_at_s in zip(pieces, at_s, strict=True):
            self.on_body(piece, piece_at_s)

    def _on_event(self, event: bytes, at_s: float) -> None:
        try:
            chunk = decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.fail("garbage", f"{error} in {event[:200]!r}")
        else:
            self._count(chunk, event, at_s)
            if self.on_chunk is not None:
                self.on_chunk(self, chunk, event, at_s)

    def _count(self, chunk: Chunk, event: bytes, at_s: float) -> None:
        # Nearly always: one more token of the only choice, in a response that has begun. The client's cost is here.
        if self.only_choice is not None and chunk.usage is None and len(chunk.choices) == 1 and chunk.error is None:
            choice = chunk.choices[0]
            text = choice.text if choice.delta is None else choice.delta.content
            if text and choice.finish_reason is None and choice.token_ids is None and choice.index == self.only_choice:
                self.gaps.append(at_s - self.last_s)
                self.last_s = at_s
                self.num_chunks += 1
                return
        self._count_any(chunk, event, at_s)

    def _count_any(self, chunk: Chunk, event: bytes, at_s: float) -> None:
        if self.only_choice is not None:
            self.per_choice_last_s[self.only_choice] = self.last_s
            self.only_choice = None
        if chunk.error is not None:
            self.fail("server_error", event.decode(errors="replace"))
            return
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            if (details := chunk.usage.prompt_tokens_details) is not None and details.cached_tokens is not None:
                self.cached_tokens = details.cached_tokens
            if chunk.usage.completion_tokens is not None:
                self.output_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.index in self.finished:
                self.fail("duplicated", f"choice {choice.index} went on after its finish_reason")
            if carries_token(choice):
                self._count_token(choice.index, at_s, len(choice.token_ids or ()))
                if self.first_answer_s is None and not is_reasoning(choice):
                    self.first_answer_s = at_s
            elif choice.finish_reason is not None:
                self.closing_s = at_s
            if self.text is not None:
                self.text.append(choice.text or (choice.delta.content if choice.delta else None) or "")
            if choice.finish_reason is not None:
                self.finished.add(choice.index)
        is_plain = self.first_answer_s is not None and self.output_tokens is None and self.text is None
        if is_plain and not self.finished and len(self.per_choice_last_s) == 1:
            (self.only_choice,) = self.per_choice_last_s

    def _count_token(self, choice: int, at_s: float, num_tokens: int) -> None:
        if not num_tokens and self.output_tokens is not None:  # usage in every chunk
            num_tokens = self.output_tokens - self.usage_tokens_seen
        if self.output_tokens is not None:
            self.usage_tokens_seen = self.output_tokens
        before = self.per_choice_last_s.get(choice)
        if self.first_s is None:
            self.first_s = at_s
        if before is not None:
            self.gaps.append(at_s - before)
            if num_tokens > 0:
                self.chunk_tokens.append(num_tokens)
        self.per_choice_last_s[choice] = self.last_s = at_s
        self.num_chunks += 1

    def on_end(self, at_s: float, fault: str | None) -> None:
        """The response is whole (`fault` None), or will never be."""
        self.end_s = at_s
        self._settle(fault)
        if self.on_ended is not None:
            self.on_ended()

    # ---- the verdict

    def fail(self, kind: str, message: str) -> None:
        """The first failure counts."""
        if self.error is None:
            self.error, self.message = kind, message[:MAX_ERROR_BYTES]

    def _settle(self, fault: str | None) -> None:
        if self.status == 0:
            self.fail("garbage" if fault and fault.startswith("no HTTP") else "closed", fault or "no answer")
        elif self.status != 200:
            self.fail(f"http_{self.status}", self.body.decode(errors="replace").strip() or self.message)
        elif self.error == "no_stream":
            self.message += ": " + self.body[:200].decode(errors="replace")
        elif fault is not None:
            self.fail("garbage" if fault.startswith("no HTTP") else "truncated", f"{fault}, {self.num_chunks} chunks")
        elif not self.done and not self.finished:
            self.fail("truncated", f"the answer ended after {self.num_chunks} chunks without an end")
        if self.error is not None:
            return
        tokens = self.output_tokens
        if tokens is None:
            tokens = self.output_tokens = self.num_chunks  # the best there is; reported as such
        elif self.closing_s is not None and self.num_chunks < tokens and len(self.finished) == 1:
            self._count_token(next(iter(self.finished)), self.closing_s, 0)  # an end-of-text token that has no text
        if self.num_chunks > tokens:
            self.fail("duplicated", f"{self.num_chunks} chunks with tokens, and usage says {tokens} tokens")
        if self.first_s is None:
            self.fail("empty", "the answer has no token")
        elif self.request.output_tokens is not None and tokens != self.request.output_tokens:
            self.fail("wrong_length", f"{tokens} output tokens, {self.request.output_tokens} asked for")

    # ---- times of a whole response, in seconds

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        assert self.first_s is not None
        return self.first_s - self.sent_s

    @property
    def ttft_from_arrival_s(self) -> float:
        """From the moment the request should have been sent."""
        assert self.first_s is not None
        return self.first_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """From the moment the request should have been sent to the last token."""
        return max(self.last_s, self.first_s or 0.0) - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None of one token."""
        assert self.first_s is not None and self.output_tokens is not None
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None
