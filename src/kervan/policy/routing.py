"""Which replica takes the next stream: the one with the fewest outstanding tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

# A request without `max_tokens` may run to the end of the context. Charging all of it would let one such
# request outweigh hundreds of short ones, so the remaining output is capped for routing (only).
OUTPUT_CAP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What routing sees of one live replica. Token counts are outstanding: queued prompt + remaining output."""

    replica_id: str
    outstanding_tokens: int
    is_draining: bool = False
    has_suspect: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stream goes; `replica_id` None means it must be held."""

    replica_id: str | None
    reason: str


def cost_tokens(prompt_tokens: int, remaining_output_tokens: int) -> int:
    """Outstanding tokens that one queued stream adds to its replica (at least 1)."""
    return max(1, prompt_tokens + min(remaining_output_tokens, OUTPUT_CAP_TOKENS))


def decide(replicas: Iterable[ReplicaLoad], *, is_suspect: bool = False) -> Placement:
    """The replica with the fewest outstanding tokens; ties go to the smallest id.

    A suspect (its last replica died before it gave a token) is tried alone: only a replica that hosts no
    other suspect takes it, so that a second death convicts one stream and not its neighbours.
    """
    best: ReplicaLoad | None = None
    live = 0
    for replica in replicas:
        if replica.is_draining:
            continue
        live += 1
        if is_suspect and replica.has_suspect:
            continue
        if best is None or (replica.outstanding_tokens, replica.replica_id) < (
            best.outstanding_tokens,
            best.replica_id,
        ):
            best = replica
    if best is not None:
        return Placement(best.replica_id, f"fewest outstanding tokens ({best.outstanding_tokens}) of {live}")
    if live:
        return Placement(None, f"each of {live} replicas already tries a suspect")
    return Placement(None, "no live replica that is not draining")
