"""Which replica takes the next stream: the one with the fewest outstanding tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

# A request without `max_tokens` may run to the end of the context. Charging all of it would let one such
# request outweigh hundreds of short ones, so the remaining output is capped for routing (only).
OUTPUT_CAP_TOKENS = 1024

# Spot nodes are lost most often when they are young: in 45 days of nine AWS zones half of the runs ended within 0.3 to
# 1.4 hours, while the mean run was 0.7 to 10 hours. A long answer is likelier to be caught by that than a short one.
YOUNG_S = 20 * 60.0
LONG_OUTPUT_TOKENS = 1024
# How much more a safer replica may have to do and still be as good: waiting there costs for certain what a move costs
# now and then, the prefill of what was generated.
SIMILAR = 1.1
ROOM_TOKENS = 2 * OUTPUT_CAP_TOKENS

_tokens = attrgetter("outstanding_tokens")


@dataclass(slots=True)
class ReplicaLoad:
    """What routing sees of one live replica. Token counts are outstanding: queued prompt + remaining output.

    `outstanding_tokens` is an estimate: of the other gateways' streams only news that is half a second old comes in.
    Until the next news each of them is taken to do what this one does, because all see the same gap and would fill it
    at once: with 4 gateways, 4 replicas and 256 streams in a closed loop, replicas then differ by 4 streams on
    average instead of 14 (`tests/unit/policy/test_routing.py`). `own_tokens` is exact.

    `is_risky`: it is likelier to go soon than others (`risky_for_s`). `is_on_trial`: it stood still, and has made no
    step since its streams left it: it may have gone on, or be about to be ended.

    Kept up to date in place by its owner: making one for each replica at each placement would cost more than deciding.
    """

    replica_id: str
    outstanding_tokens: int
    is_draining: bool = False
    num_suspects: int = 0
    own_tokens: int = 0
    num_gateways: int = 1
    is_stalled: bool = False
    is_risky: bool = False
    is_on_trial: bool = False

    @property
    def is_doubtful(self) -> bool:
        """Whether another stream may wait there in vain: it stands still, or is on trial with a stream already."""
        return self.is_stalled or (self.is_on_trial and self.own_tokens > 0)

    def add(self, tokens: int) -> None:
        """Add `tokens` (negative: take off) to what this gateway's streams cost."""
        self.own_tokens += tokens
        self.outstanding_tokens += tokens * self.num_gateways

    def hear(self, other_tokens: int, num_gateways: int) -> None:
        """Take a PONG: what the others' streams cost, and how many gateways the replica has, this one included."""
        self.outstanding_tokens = self.own_tokens + other_tokens
        self.num_gateways = num_gateways


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stream goes; `replica_id` None means it must be held."""

    replica_id: str | None
    reason: str


def cost_tokens(prompt_tokens: int, remaining_output_tokens: int) -> int:
    """Outstanding tokens that one queued stream adds to its replica (at least 1)."""
    return max(1, prompt_tokens + min(remaining_output_tokens, OUTPUT_CAP_TOKENS))


def decide(replicas: Sequence[ReplicaLoad], *, is_suspect: bool = False) -> Placement:
    """The replica with the fewest outstanding tokens; of several, the first.

    A suspect (its last replica died before it gave a token) is tried alone: only a replica that hosts no
    other suspect takes it, so that a second death leads to one stream and not to its neighbours. One that stands still
    takes streams only if all do, and one that stood still takes one stream of this gateway until it has made a step.
    """
    best = min(replicas, key=_tokens, default=None)
    if best is None or best.is_draining or best.is_doubtful or (is_suspect and best.num_suspects):
        live = [replica for replica in replicas if not replica.is_draining]
        able = [replica for replica in live if not (is_suspect and replica.num_suspects)]
        best = min((replica for replica in able if not replica.is_doubtful), key=_tokens, default=None)
        if best is None:
            best = min(able, key=_tokens, default=None)
        if best is None:
            if live:
                return Placement(None, f"each of {len(live)} replicas already tries a suspect")
            return Placement(None, "no live replica that is not draining")
    return Placement(
        best.replica_id, f"fewest outstanding tokens ({best.outstanding_tokens}) of {len(replicas)} replicas"
    )


def risky_for_s(*, is_spot: bool, age_s: float, is_called_likely: bool = False) -> float:
    """For how long from now a replica is likelier to go than others; infinite while its cloud calls that likely."""
    if is_called_likely:
        return math.inf
    return max(0.0, YOUNG_S - age_s) if is_spot else 0.0


def safer(replicas: Sequence[ReplicaLoad], chosen: ReplicaLoad, *, is_suspect: bool = False) -> Placement | None:
    """For a long answer that `decide` has given to a risky replica: one that is not, and has hardly more to do.

    None without one: a loaded fleet is not loaded more for what may not happen.
    """
    able = [r for r in replicas if not (r.is_risky or r.is_draining or r.is_doubtful)]
    if is_suspect:
        able = [r for r in able if not r.num_suspects]
    best = min(able, key=_tokens, default=None)
    if best is None or best.outstanding_tokens > SIMILAR * chosen.outstanding_tokens + ROOM_TOKENS:
        return None
    return Placement(
        best.replica_id,
        f"a long answer, and {chosen.replica_id} ({chosen.outstanding_tokens}) may go soon: "
        f"fewest outstanding tokens ({best.outstanding_tokens}) of {len(able)} others",
    )
