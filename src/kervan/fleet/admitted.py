"""Requests that a gateway has admitted: the room that each holds, and the turns of those that open many streams.

A request is admitted before vLLM has opened its streams, and others come in between. So its room is taken at once, and
turns into streams one by one. Streams of bulk requests (`kervan.policy.admission`) go to replicas only while few others
of their kind are there; the rest waits here, and bulk requests take turns.
"""

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass

from kervan.fleet.stream import Stream


class Admitted:
    """The admitted requests of one client. `bulk_slots`: how many streams of bulk requests may be on replicas now."""

    def __init__(self, bulk_slots: Callable[[], int]) -> None:
        self.num_unopened = 0
        self.num_bulk = 0
        self._bulk_slots = bulk_slots
        self._bulk_placed: set[Stream] = set()
        self._bulk_waiting: dict[Ticket, deque[Stream]] = {}  # whose turn is next comes first

    def take(self, num_streams: int, *, is_bulk: bool, session: str = "") -> "Ticket":
        """Room for a request, given back when its ticket is closed."""
        return Ticket(self, num_streams, is_bulk=is_bulk, session=session)

    def open(self, stream: Stream) -> bool:
        """A stream has come, maybe of an admitted request; whether it may be placed now."""
        ticket = stream.ticket = current_ticket.get()
        if ticket is None:
            return True
        stream.session = ticket.session
        if ticket.num_unopened:
            ticket.give_back(1)
        if not ticket.is_bulk:
            return True
        self.num_bulk += 1
        if len(self._bulk_placed) < self._bulk_slots() and not self._bulk_waiting:
            self._bulk_placed.add(stream)
            return True
        self._bulk_waiting.setdefault(ticket, deque()).append(stream)
        return False

    def close(self, stream: Stream) -> None:
        """A stream is over."""
        ticket = stream.ticket
        if ticket is None or not ticket.is_bulk:
            return
        stream.ticket = None
        self.num_bulk -= 1
        self._bulk_placed.discard(stream)
        waiting = self._bulk_waiting.get(ticket)
        if waiting is not None and stream in waiting:
            waiting.remove(stream)
            if not waiting:
                del self._bulk_waiting[ticket]

    @property
    def has_next(self) -> bool:
        """Whether a stream that waits for its turn may be placed."""
        return bool(self._bulk_waiting) and len(self._bulk_placed) < self._bulk_slots()

    @property
    def num_waiting(self) -> int:
        """Streams of bulk requests that wait for their turn."""
        return sum(map(len, self._bulk_waiting.values()))

    def next(self) -> Stream:
        """The next that may be placed, if `has_next`."""
        ticket = next(iter(self._bulk_waiting))
        waiting = self._bulk_waiting.pop(ticket)
        stream = waiting.popleft()
        if waiting:
            self._bulk_waiting[ticket] = waiting  # at the end
        self._bulk_placed.add(stream)
        return stream


@dataclass(frozen=True, slots=True)
class StreamFailure:
    """Why a stream ended with an error. `is_transient`: the same request may succeed later."""

    reason: str
    is_transient: bool


class Ticket:
    """The room of one request, which its streams take; use it around the work of the request.

    `failure`: why one of its streams ended with an error. `session`: the name of what the request belongs to, as far as
    it says so.
    """

    def __init__(self, admitted: Admitted, num_streams: int, *, is_bulk: bool, session: str) -> None:
        self.num_unopened = 0
        self.is_bulk = is_bulk
        self.failure: StreamFailure | None = None
        self.session = session
        self._admitted = admitted
        self._token: Token[Ticket | None] | None = None
        self.give_back(-num_streams)

    def give_back(self, num_streams: int) -> None:
        """Hold room for so many fewer streams."""
        self.num_unopened -= num_streams
        self._admitted.num_unopened -= num_streams
        if self.is_bulk:
            self._admitted.num_bulk -= num_streams

    def __enter__(self) -> None:
        self._token = current_ticket.set(self)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        current_ticket.reset(self._token)
        self.give_back(self.num_unopened)


current_ticket: ContextVar[Ticket | None] = ContextVar("current_ticket", default=None)
