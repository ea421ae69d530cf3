"""Which replica takes the next stream: the one with the fewest outstanding tokens, or one that has its prefix."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from kervan.policy.prefix import Match

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

# A replica with more outstanding tokens than so many times the mean, and so many requests like the one in question, is
# not chosen for a prefix: else one that all prompts share would bring them all to the first replica that had it. Nor is
# any while another has as much less than the mean, as a replica that has just started. What is queued there is not
# counted: it is over soon, and in the time to the first token already.
PREFIX_BOUND = 1.25
PREFIX_ROOM_REQUESTS = 3
PREFIX_CANDIDATES = 16  # looked at, of those with the most of the prompt: more would take longer and find little better
# Of what a prompt computes elsewhere, in addition: it takes time from the others there. So equal prompts that come at
# once go to one replica, where all but the first wait for what the first computes, instead of each computing it.
WORK_SHARE = 0.25
TRUST_WEIGHT = 1 / 16  # of the newest prompt, in how much of what a cache was expected to have it had

_tokens = attrgetter("outstanding_tokens")
_queued = attrgetter("queued_tokens")


@dataclass(slots=True)
class ReplicaLoad:
    """What routing sees of one live replica. Token counts are outstanding: queued prompt + remaining output.

    `outstanding_tokens` is an estimate: of the other gateways' streams only news that is half a second old comes in.
    Until the next news each of them is taken to do what this one does, because all see the same gap and would fill it
    at once: with 4 gateways, 4 replicas and 256 streams in a closed loop, replicas then differ by 4 streams on
    average instead of 14 (`tests/unit/policy/test_routing.py`). `own_tokens` is exact.

    `is_risky`: it is likelier to go soon than others (`risky_for_s`). `is_on_trial`: it stood still, and has made no
    step since its streams left it: it may have gone on, or be about to be ended.

    `queued_tokens`: of prompts that this gateway has sent and that are not computed yet, less what the prefix cache has
    of them. `prefill_tokens_per_s`: 0 while that is not known. `prefix_trust`: the share, 0 to 1, of tokens that were
    expected in its prefix cache and were there, lately.

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
    queued_tokens: int = 0
    num_queued: int = 0
    num_streams: int = 0
    prefill_tokens_per_s: float = 0.0
    prefix_trust: float = 1.0

    @property
    def is_doubtful(self) -> bool:
        """Whether another stream may wait there in vain: it stands still, or is on trial with a stream already."""
        return self.is_stalled or (self.is_on_trial and self.own_tokens > 0)

    def add(self, tokens: int) -> None:
        """Add `tokens` (negative: take off) to what this gateway's streams cost."""
        self.own_tokens += tokens
        self.outstanding_tokens += tokens * self.num_gateways

    def see_cached(self, cached_tokens: int, expected_tokens: int) -> None:
        """Take what the prefix cache had of a prompt of which it was expected to have `expected_tokens` (above 0)."""
        share = min(1.0, cached_tokens / expected_tokens)
        self.prefix_trust += TRUST_WEIGHT * (share - self.prefix_trust)

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


def ttft_s(load: ReplicaLoad, uncached_tokens: float, *, prefill_tokens_per_s: float) -> float:
    """Seconds until a prompt's first token there, the others' delay by it included: a score, not a forecast.

    The other gateways are taken to have as much queued there as this one. `prefill_tokens_per_s`: where no replica's
    own speed is known.
    """
    tokens = load.queued_tokens * load.num_gateways + (1 + WORK_SHARE) * uncached_tokens
    return tokens / (load.prefill_tokens_per_s or prefill_tokens_per_s)


def for_prefix(
    replicas: Sequence[ReplicaLoad],
    by_id: Mapping[str, ReplicaLoad],
    chosen: ReplicaLoad,
    match: Match,
    *,
    prompt_tokens: int,
    output_tokens: int,
    prefill_tokens_per_s: float,
    avoids_risky: bool = False,
) -> Placement | None:
    """A replica that gives the first token sooner than `chosen`, by `decide` or `safer`, for what it has of the prompt.

    None without one, or where it is loaded too much (`PREFIX_BOUND`). Of several, the one with the first token first
    (`ttft_s`, to the millisecond), then the one with the fewest outstanding tokens. `by_id`: `replicas` by their ids.
    `output_tokens`: as for `cost_tokens`. `avoids_risky`: it is a long answer.
    """
    rate, bit = prefill_tokens_per_s, match.bits.get(chosen.replica_id, 0)
    if not match.levels or match.levels[-1][1] & bit:
        return None
    best, best_tokens = chosen, 0
    best_key = _key(chosen, match.tokens(chosen.replica_id), prompt_tokens, rate)
    total_tokens = all_queued_tokens = -1
    num_left = PREFIX_CANDIDATES
    for num_spans, members in reversed(match.levels):
        if members & bit or not num_left:  # of those that have as much as `chosen` or less, none has less to do
            break
        if total_tokens < 0:
            total_tokens = sum(map(_tokens, replicas))
        cached_tokens = match.level_tokens(num_spans)
        room = PREFIX_ROOM_REQUESTS * cost_tokens(prompt_tokens - cached_tokens, output_tokens)
        for replica_id in islice(match.ids(members, bit), num_left):
            num_left -= 1
            load = by_id.get(replica_id)
            if load is None or load.is_draining or load.is_doubtful or (avoids_risky and load.is_risky):
                continue
            queued_tokens = load.queued_tokens * load.num_gateways
            mean_tokens = (total_tokens - queued_tokens) / len(replicas)
            if chosen.outstanding_tokens < mean_tokens / PREFIX_BOUND - room:
                if all_queued_tokens < 0:  # of the others too: seldom needed, and takes as long as the rest
                    all_queued_tokens = sum(map(_queued, replicas)) * chosen.num_gateways
                least_tokens = (total_tokens - all_queued_tokens) / len(replicas) / PREFIX_BOUND - room
                if chosen.outstanding_tokens < least_tokens:
                    continue
            if load.outstanding_tokens - queued_tokens > PREFIX_BOUND * mean_tokens + room:
                continue
            key = _key(load, cached_tokens, prompt_tokens, rate)
            if key < best_key:
                best, best_tokens, best_key = load, cached_tokens, key
    if best is chosen:
        return None
    return Placement(
        best.replica_id,
        f"its prefix cache has {best_tokens} of {prompt_tokens} prompt tokens, "
        f"and {best.outstanding_tokens} tokens are outstanding",
    )


def _key(load: ReplicaLoad, cached_tokens: int, prompt_tokens: int, prefill_tokens_per_s: float) -> tuple[float, int]:
    uncached = prompt_tokens - load.prefix_trust * cached_tokens
    return round(ttft_s(load, uncached, prefill_tokens_per_s=prefill_tokens_per_s), 3), load.outstanding_tokens


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
