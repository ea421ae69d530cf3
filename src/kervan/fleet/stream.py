"""What is needed to move a stream: the original request and the token ids generated so far."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kervan.fleet.reconnect.journal import Attempt
from kervan.fleet.timeline import RequestRecord, StreamTimeline
from kervan.policy.prefix import Spans

if TYPE_CHECKING:
    from kervan.fleet.admitted import Ticket
    from kervan.fleet.usage import Charge


@dataclass(slots=True, eq=False)
class Stream:
    """One request in flight.

    `request` is the engine's own request object; only the codec looks inside. `wire_id` is the id the current
    replica knows the stream by: `request_id` at first, `request_id~epoch` after a move, so that late outputs of
    an earlier placement (even on the same replica, A -> B -> A) match nothing. `attempt`: to give a client the answer,
    if that can be given again (`kervan.fleet.reconnect`); `replaying`: gives it what was generated before. `ticket`: of
    the request that opened it, as long as its end matters there.

    `spans`: hashes of its prompt and of what it has generated, once they were asked for. Of its prompt at its present
    replica: `queued_tokens` are still to be computed, `expected_cached_tokens` are expected to be in the prefix cache,
    and `possible_cached_tokens` would be where the most of it is. `session`: the name of the one it belongs to, if any.

    `charge`: who pays for it. `model`: an adapter's name, "" for the model itself. `cached_tokens`: of its prompt, at
    its first replica. `num_replayed`: of its tokens, those that were generated before its client came back to it.
    """

    request_id: str
    request: Any
    prompt_tokens: int
    max_output_tokens: int
    is_movable: bool = True
    generated: list[int] = field(default_factory=list)
    epoch: int = 0
    wire_id: str = ""
    replica_id: str | None = None
    cost_tokens: int = 0
    spans: Spans | None = None
    is_queued: bool = False
    queued_tokens: int = 0
    expected_cached_tokens: int = 0
    possible_cached_tokens: int = 0
    gave_token: bool = False
    losses: list[str] = field(default_factory=list)  # replicas lost before it gave a token, once each was proven alive
    unproven_losses: int = 0
    num_stalls: int = 0  # replicas that stood still in a step before it gave a token there
    is_rejection_pending: bool = False
    arrived_s: float = 0.0
    first_token_s: float | None = None
    placed_s: float = 0.0
    came_late: bool = False  # others there waited for a step for too long when it was placed (`ReplicaLink.is_late`)
    began_s: float = 0.0  # its first token from where it is placed, if it gave one
    num_before: int = 0  # tokens that it had before that one
    held_since_s: float | None = None
    paused_since_s: float | None = None  # its last token before a move, until the first one after it
    attempt: Attempt | None = None
    replaying: asyncio.Task[None] | None = None
    ticket: "Ticket | None" = None
    session: str = ""
    charge: "Charge | None" = None
    model: str = ""
    cached_tokens: int = 0
    num_replayed: int = 0
    timeline: StreamTimeline | None = None  # of a request that is remembered
    record: RequestRecord | None = None  # that request

    def ids(self) -> dict[str, str]:
        """What log lines about it have."""
        return {"stream": self.request_id, **({} if self.record is None else self.record.ids())}

    @property
    def is_suspect(self) -> bool:
        """Whether its last replica was lost before it gave a token."""
        return bool(self.losses) or self.unproven_losses > 0

    @property
    def remaining_output_tokens(self) -> int:
        """What it may still write at most."""
        return max(0, self.max_output_tokens - len(self.generated))
