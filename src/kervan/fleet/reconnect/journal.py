"""What lets a client come back to its stream: the journal of an answer, and where in the answer a client is.

A journal has the request as it came and all outputs of the engine for it since. Whoever has both can answer again: the
request goes through vLLM's app once more, the outputs are given to it one by one, and what the client has is left out.
What comes after the journal is generated as for a stream that moves.
"""

import asyncio
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

PATTERN = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})")
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """An event of an answer, as named in its SSE `id`.

    `count`: tokens that it and all before it tell, and 1 more when the end is among them. It does not depend on how
    many tokens an event has, which another gateway's pace decides. `ordinal`: of several events of one count.
    """

    count: int
    ordinal: int

    def __str__(self) -> str:
        return f"{self.count}.{self.ordinal}"

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """The position that `text` names; None if it names none."""
        match = PATTERN.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match is not None else None


@dataclass(slots=True, eq=False)
class Journal:
    """One client's stream. `key_digest`: of the API key that may read it. `headers`: those the app must see again.

    `outputs` are one after the other in `data`, each behind its length. `is_finished`: vLLM's app has taken all of them
    and ended the answer. `refusal`: why it cannot be given again. `attempt`: the one that is being made now.
    `ended_s`: when the last one ended. `is_own`: this gateway generates it; else it is the copy of another's.
    """

    stream_id: str
    key_digest: bytes
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    refusal: str = ""
    data: bytearray = field(default_factory=bytearray)
    num_tokens: int = 0
    is_finished: bool = False
    is_own: bool = True
    is_dropped: bool = False
    attempt: "Attempt | None" = None
    ended_s: float | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes of the store's limit."""
        return len(self.body) + len(self.data)

    @property
    def last_count(self) -> int:
        """The highest count that a client may have."""
        return self.num_tokens + self.is_finished

    def adopted(self) -> "Journal":
        """This copy as the journal of a gateway that goes on with the stream."""
        return replace(self, data=bytearray(self.data), is_own=True, ended_s=None)

    def record(self, output: bytes, num_tokens: int) -> None:
        """Add an output of the engine, encoded."""
        self.extend(len(output).to_bytes(_LENGTH_BYTES, "big") + output, num_tokens)

    def extend(self, data: bytes, num_tokens: int) -> None:
        """Add a piece of another journal's `data`, with so many tokens in it."""
        if not self.is_dropped:
            self.data += data
            self.num_tokens += num_tokens

    def outputs(self) -> Iterator[bytes]:
        """The outputs, encoded, in their order."""
        at, data = 0, bytes(self.data)
        while at < len(data):
            end = at + _LENGTH_BYTES + int.from_bytes(data[at : at + _LENGTH_BYTES], "big")
            yield data[at + _LENGTH_BYTES : end]
            at = end


class Attempt:
    """One attempt to give a client the answer: what vLLM's app has taken so far, and which event comes next.

    `after`: the last event that the client has, None if it has none.
    """

    def __init__(self, journal: Journal, after: Position | None = None):
        self.journal = journal
        self.after = after
        self.must_end = asyncio.Event()
        self.has_ended = asyncio.Event()
        self._count = 0
        self._ordinal = 0
        self._waiter: asyncio.Future[None] | None = None
        self._has_begun = False

    def begin(self) -> bool:
        """Whether this is the only request that the app makes for the answer; the journal has room for one."""
        is_first, self._has_begun = not self._has_begun, True
        if not is_first:
            self.journal.refusal = "its answer takes several requests to the model"
        return is_first

    def take(self, num_tokens: int, *, is_finished: bool) -> None:
        """The app has got so many tokens more; the next events tell them."""
        self._count += num_tokens + is_finished
        self._ordinal = 0
        self.journal.is_finished |= is_finished  # the engine does not know of a stop string
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def next_event(self) -> Position | None:
        """Where the next event is; None if the client has it."""
        self._ordinal += 1
        position = Position(self._count, self._ordinal)
        return position if self.after is None or position > self.after else None

    async def wait_for(self, count: int) -> None:
        """Return when the app has taken so many tokens."""
        while self._count < count:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def end(self) -> None:
        """Break the response off; returns when nothing is generated for it any more."""
        self.must_end.set()
        await self.has_ended.wait()


# The attempt for which the current task works.
current_attempt: ContextVar[Attempt | None] = ContextVar("current_attempt", default=None)
