"""Which replica takes the next stream: the one with the fewest outstanding tokens, or one that has its prefix."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from kervan.policy.prefix import Match
from kervan.policy.session_ring import SessionRing

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

# A replica with more streams than so many times the mean, what chance adds to it, and some, is not chosen for a prefix:
# else one that all prompts share would bring them all to the first replica that had it. Nor is any while another has as
# much less than the mean, as a replica that has just started. Of n streams that go anywhere, chance brings some replica
# a few times sqrt(n) more; to send those away would cost more than it evens out (`benchmarks/prefix_policies.py`).
# Streams count and not their tokens: others' tokens are known with queued prompts, which come and go between two news.
PREFIX_BOUND = 1.25
CHANCE = 1.5
PREFIX_ROOM_STREAMS = 2
PREFIX_CANDIDATES = 8  # looked at, of those with the most of the prompt: more would take longer and find little better
# What a prompt computes takes time from others too: from all that wait when it comes and, as many come while a queue is
# worked off, from as many after them. So where requests queue, what a cache has is worth a longer wait; in an idle
# fleet it is not. A token that is computed twice is missing to the fleet, wherever that is: so the mean queue counts.
QUEUE_WEIGHT = 2.0
# Beside that, so that equal prompts that come at once to an idle fleet go to one replica, where all but the first wait
# for what the first computes, instead of each computing it.
WORK_SHARE = 0.25
# Of a prompt of which nobody is known to have any, and whose session has a home: how much may be there all the same.
SESSION_SHARE = 0.5
TRUST_WEIGHT = 1 / 16  # of the newest prompt, in how much of what a cache was expected to have it had

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

    `num_streams`: there, estimated like the tokens; `own_streams` of this gateway. `num_queued`: of these, those
    without a first token, and `queued_tokens`: of their prompts, less what the prefix cache has of them.
    `prefill_tokens_per_s`: 0 while that is not known. `prefix_trust`: the share, 0 to 1, of tokens that were expected
    in its prefix cache and were there, lately.

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
    num_streams: int = 0
    own_streams: int = 0
    num_queued: int = 0
    queued_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    prefix_trust: float = 1.0
    fleet: "FleetLoad | None" = field(default=None, repr=False, compare=False)

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

    def take(self, queued_tokens: int) -> None:
        """A stream was sent there, of whose prompt so much is to be computed."""
        self.queued_tokens += queued_tokens
        self.num_queued += 1
        self.own_streams += 1
        if self.fleet is not None:
            self.fleet.num_queued += 1
        self._set_streams(self.num_streams + self.num_gateways)

    def prefilled(self, queued_tokens: int) -> None:
        """A stream's prompt was computed, or is not to be: what `take` was told."""
        self.queued_tokens -= queued_tokens
        self.num_queued -= 1
        if self.fleet is not None:
            self.fleet.num_queued -= 1

    def release(self) -> None:
        """A stream has left."""
        self.own_streams -= 1
        self._set_streams(self.num_streams - self.num_gateways)

    def hear(self, other_tokens: int, num_gateways: int, num_streams: int = 0) -> None:
        """Take a PONG: what the others' streams cost, how many gateways the replica has, this one included, and how
        many streams."""
        self.outstanding_tokens = self.own_tokens + other_tokens
        self.num_gateways = num_gateways
        self._set_streams(num_streams if num_gateways > 1 else self.own_streams)

    def _set_streams(self, num_streams: int) -> None:
        num_streams = max(self.own_streams, num_streams)
        if self.fleet is not None:
            self.fleet.num_streams += num_streams - self.num_streams
        self.num_streams = num_streams


class FleetLoad:
    """The replicas of one client, in the order of their ids, so that ties go the same way everywhere.

    `num_streams`, `num_queued`: sums over them, which they keep up to date, so that a decision need not add them up.
    """

    __slots__ = ("_ring", "by_id", "num_queued", "num_streams", "replicas")

    def __init__(self, replicas: Iterable[ReplicaLoad] = ()) -> None:
        """They belong to this one from now on."""
        self.replicas = sorted(replicas, key=attrgetter("replica_id"))
        self.by_id = {load.replica_id: load for load in self.replicas}
        self.num_streams = sum(load.num_streams for load in self.replicas)
        self.num_queued = sum(load.num_queued for load in self.replicas)
        self._ring: SessionRing | None = None
        for load in self.replicas:
            load.fleet = self

    @property
    def ring(self) -> SessionRing:
        """Where sessions belong; made when it is first asked for."""
        if self._ring is None:
            self._ring = SessionRing(self.by_id)
        return self._ring


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
    tokens = [replica.outstanding_tokens for replica in replicas]  # faster than `min` with a key
    best = replicas[tokens.index(min(tokens))] if tokens else None
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


def work_weight(queued_per_replica: float) -> float:
    """What each token that a prompt computes costs, in tokens that it waits for itself: 1 for its own wait, and what
    the others wait. `queued_per_replica`: requests that wait for their first token, on average.
    """
    return 1 + WORK_SHARE + QUEUE_WEIGHT * queued_per_replica


def stream_bounds(streams_per_replica: float) -> tuple[float, float]:
    """Streams of a replica below which it is to be filled first, and above which no prefix draws more there."""
    room = CHANCE * math.sqrt(streams_per_replica) + PREFIX_ROOM_STREAMS
    return streams_per_replica / PREFIX_BOUND - room, streams_per_replica * PREFIX_BOUND + room


def for_prefix(
    fleet: FleetLoad,
    chosen: ReplicaLoad,
    match: Match,
    *,
    prompt_tokens: int,
    prefill_tokens_per_s: float,
    avoids_risky: bool = False,
) -> Placement | None:
    """A replica that gives the first token sooner than `chosen`, by `decide` or `safer`, for what it has of the prompt.

    None without one, or where it is loaded too much (`stream_bounds`). Of several, the one with the first token first
    (`_score_s`), then the one with the fewest outstanding tokens. `avoids_risky`: it is a long answer.
    """
    best, best_tokens, best_s = chosen, 0, math.inf
    bit, num_left = match.bits.get(chosen.replica_id, 0), PREFIX_CANDIDATES
    num_replicas = len(fleet.replicas)
    least_streams, most_streams = stream_bounds(fleet.num_streams / num_replicas)
    if chosen.num_streams < least_streams:
        return None
    weight = work_weight(fleet.num_queued * chosen.num_gateways / num_replicas)
    for num_spans, members in match.levels():
        if members & bit or not num_left:  # of those that have as much as `chosen` or less, none has less to do
            break
        if best is chosen:
            best_s = _score_s(chosen, prompt_tokens, match.tokens(chosen.replica_id), weight, prefill_tokens_per_s)
        cached_tokens = match.level_tokens(num_spans)
        for replica_id in islice(match.ids(members, bit), num_left):
            num_left -= 1
            load = fleet.by_id.get(replica_id)
            if load is None:
                continue
            its_s = _score_s(load, prompt_tokens, cached_tokens, weight, prefill_tokens_per_s)
            if its_s > best_s or (its_s == best_s and load.outstanding_tokens >= best.outstanding_tokens):
                continue
            if load.num_streams > most_streams or load.is_draining or load.is_doubtful:
                continue
            if not (avoids_risky and load.is_risky):
                best, best_tokens, best_s = load, cached_tokens, its_s
    if best is chosen:
        return None
    return Placement(
        best.replica_id,
        f"its prefix cache has {best_tokens} of {prompt_tokens} prompt tokens, and it has {best.num_streams} streams",
    )


def for_session(
    fleet: FleetLoad, chosen: ReplicaLoad, session: str, *, prompt_tokens: int, avoids_risky: bool = False
) -> Placement | None:
    """The home of a stream's session in place of `chosen`, for a prompt of which no cache is known to have any.

    What is there is not known, so it is worth little: the streams there must be within `stream_bounds`, as for a
    prefix, and what is queued no more than `SESSION_SHARE` of the prompt above what is queued at `chosen`.
    """
    home = fleet.by_id.get(fleet.ring.home(session) or "")
    if home is None or home is chosen or home.is_draining or home.is_doubtful or (avoids_risky and home.is_risky):
        return None
    least_streams, most_streams = stream_bounds(fleet.num_streams / len(fleet.replicas))
    if chosen.num_streams < least_streams or home.num_streams > most_streams:
        return None
    queued_tokens = (home.queued_tokens - chosen.queued_tokens) * home.num_gateways
    if queued_tokens > SESSION_SHARE * prompt_tokens:
        return None
    return Placement(home.replica_id, f"the home of its session, with {home.num_streams} streams")


def _score_s(
    load: ReplicaLoad, prompt_tokens: int, cached_tokens: int, work_weight: float, prefill_tokens_per_s: float
) -> float:
    """Seconds until a prompt's first token there, and what others wait for it, to the millisecond: no forecast.

    The other gateways are taken to have as much queued there as this one. `prefill_tokens_per_s`: where the replica's
    own speed is not known.
    """
    queued_tokens = load.queued_tokens * load.num_gateways
    tokens = queued_tokens + work_weight * (prompt_tokens - load.prefix_trust * cached_tokens)
    return round(tokens / (load.prefill_tokens_per_s or prefill_tokens_per_s), 3)


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
