"""Which streams of a replica that must leave move now, where to, which stay, and when to ask again.

A moved stream is prefilled again at its target, and while n tokens are prefilled there, the streams that live there
wait n / prefill_tokens_per_s longer for their next token. So moves are paced: a target is given no more than its engine
can take within the bound on inter-token latency, and is given more when it has done that. Streams that wait for their
turn go on at the leaving replica meanwhile. When the time does not allow that, the bound goes first, then the pace; no
stream is left behind.

Nothing is remembered between calls: whoever executes a decision asks again with the state as it is then. A late or lost
move only makes the next decision more urgent. O(n log n) for n streams.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["paced", "hurried", "at once"]

# Decode speed is a mean of the last steps; a stream stays for certain only if it may be slower by this factor.
SLACK = 1.25
# A stream that is expected to end within this share of the time left may wait for it ...
LIKELY_SHARE = 0.5
# ... as long as all that wait could still be moved in pace this many times over.
RESERVE = 2.0
# A target needs room for what a stream will still write; of an unknown rest so much is counted.
UNKNOWN_GROWTH_TOKENS = 1024
MIN_PAUSE_S = 0.02
# Streams that stay or may end are looked at again after a quarter of the time left, and within a second.
RECHECK_SHARE = 0.25
MAX_RECHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class LeavingStream:
    """A stream of the replica that leaves.

    `context_tokens`: prompt and generated tokens, which a target must prefill. `max_remaining_tokens`: what it may
    still write at most (max_tokens, or the end of the context). `expected_remaining_tokens`: what it is likely to write
    (`output_length.LengthEstimate`), None if unknown. `gave_token`: False while it waits for its first token here.
    `cached_tokens`: by target, what its prefix cache has of the context; a stream goes there if it is ready sooner.
    """

    stream_id: str
    context_tokens: int
    max_remaining_tokens: int
    expected_remaining_tokens: float | None = None
    is_movable: bool = True
    gave_token: bool = True
    cached_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TargetReplica:
    """A replica that may take streams.

    `free_streams`, `free_kv_tokens`: room beyond all that was sent there. `queued_prefill_tokens`: sent there and not
    yet prefilled, the newest news and own moves since. `step_s`: a decode step of its present streams.
    `max_step_tokens`: the most tokens prefilled in one step (vLLM's max_num_batched_tokens), None where prompts are
    prefilled whole.
    """

    replica_id: str
    free_streams: int
    free_kv_tokens: int
    prefill_tokens_per_s: float
    queued_prefill_tokens: int = 0
    step_s: float = 0.0
    max_step_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvacuationLimits:
    """What is promised. `max_inter_token_s`: the bound on a target's time between two tokens of a stream.

    `margin_s` before a deadline all must have moved, and without one within `unhurried_s`. In a drain, streams that end
    within `stay_s` may do so, and all others move as soon as the bound allows. `window_s`: work that a target is given
    in advance.
    """

    max_inter_token_s: float = 0.2
    margin_s: float = 3.0
    stay_s: float = 3.0
    unhurried_s: float = 30.0
    window_s: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class EvacuationState:
    """All that is known. `deadline_s`: seconds left until the replica is lost, None for a drain without hurry.

    `may_linger`: nobody waits for the replica to be empty, so that it may be used until its deadline; ignored without
    one. `elapsed_s`: since it began to leave. `source_s_per_token`: time between two tokens of a stream there, None if
    it stands still or nobody knows.
    """

    streams: Sequence[LeavingStream]
    targets: Sequence[TargetReplica]
    deadline_s: float | None
    may_linger: bool = False
    elapsed_s: float = 0.0
    source_s_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """One stream goes to a target, which prefills `prefill_tokens` for it."""

    stream_id: str
    replica_id: str
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Evacuation:
    """What to do now. Every stream is in exactly one of `moves`, `waits`, `stays` and `stuck`.

    `moves` in this order. `waits`: move later. `stays`: finish here. `stuck`: cannot be moved, or there is no target,
    and may not end in time. `keeps_bound`: these moves hold the targets' inter-token latency. `remaining_s`: until the
    last stream is at its target and prefilled there, if all goes as planned. `ask_again_s`: when to decide again at the
    latest, None when nothing is left to decide.
    """

    moves: tuple[Move, ...]
    waits: tuple[str, ...]
    stays: tuple[str, ...]
    stuck: tuple[str, ...]
    mode: Mode
    keeps_bound: bool
    remaining_s: float
    ask_again_s: float | None
    reason: str


DEFAULT_LIMITS = EvacuationLimits()


@dataclass(slots=True)
class _Place:
    """A target while it is filled. `bound_tokens`: the most that one step may prefill within the bound."""

    replica_id: str
    free_streams: int
    free_kv_tokens: int
    queued_tokens: int
    tokens_per_s: float
    bound_tokens: float
    paced_tokens_per_s: float
    full_tokens_per_s: float
    # Steps longer than the bound are possible: then all that is queued must fit into it.
    is_strict: bool = field(default=False)


def decide(state: EvacuationState, *, limits: EvacuationLimits = DEFAULT_LIMITS) -> Evacuation:
    """The next step of an evacuation; ask again after `ask_again_s`, or when a stream or a target changes.

    Within the time, the bound is kept ("paced"): streams without a token first, because moving them interrupts nobody,
    then those with the most left to write; those that will soon end come last and may end meanwhile. If that takes too
    long, targets are given as much as they can prefill ("hurried"), cheapest first, so that as many as possible are on
    their way again at the deadline. What is still here when the time is over moves then, whatever it meets ("at once");
    not before, because until then it is answered here, and at a busy target it would stand in a queue.
    """
    left_s = _left_s(state, limits)
    places = [_place(target, limits) for target in state.targets if target.prefill_tokens_per_s > 0]
    stays, stuck, movers, patient = _sort(state, limits, left_s, can_move=bool(places))
    paced_s = _duration_s(movers + patient, places, [place.paced_tokens_per_s for place in places])
    full_s = _duration_s(movers + patient, places, [place.full_tokens_per_s for place in places])
    # The next decision may come half a window from now: the last one must come before the time is over.
    is_last = left_s <= limits.window_s / 2
    mode: Mode = "at once" if is_last else "paced" if paced_s <= left_s else "hurried"
    if mode != "paced" or paced_s * RESERVE > left_s:
        movers, patient = movers + patient, []
    order = sorted(movers, key=_by_need) if mode == "paced" else sorted(movers, key=_by_cost)
    moves, waits, num_over_bound, num_over_room = _fill(order, places, mode, limits)
    waiting = [*(stream.stream_id for stream in waits), *(stream.stream_id for stream in patient)]
    remaining_s = 0.0 if not (movers or patient) else paced_s if mode == "paced" else full_s
    return Evacuation(
        moves=tuple(moves),
        waits=tuple(waiting),
        stays=tuple(stays),
        stuck=tuple(stuck),
        mode=mode,
        keeps_bound=not moves or (mode == "paced" and not num_over_bound),
        remaining_s=remaining_s,
        ask_again_s=_pause_s(
            places, mode, limits, left_s, has_waiting=bool(waits), has_others=bool(patient or stays or stuck)
        ),
        reason=_reason(
            state,
            limits,
            mode,
            left_s=left_s,
            paced_s=paced_s,
            full_s=full_s,
            moves=moves,
            num_waits=len(waiting),
            num_stays=len(stays),
            num_stuck=len(stuck),
            num_over_bound=num_over_bound,
            num_over_room=num_over_room,
        ),
    )


def _left_s(state: EvacuationState, limits: EvacuationLimits) -> float:
    """Seconds in which all must have moved."""
    if state.deadline_s is None:
        return max(0.0, limits.unhurried_s - state.elapsed_s)
    return max(0.0, state.deadline_s - limits.margin_s)


def _sort(
    state: EvacuationState, limits: EvacuationLimits, left_s: float, *, can_move: bool
) -> tuple[list[str], list[str], list[LeavingStream], list[LeavingStream]]:
    """Streams that stay, that are stuck, that move, and that move unless they end before."""
    token_s = math.inf if state.source_s_per_token is None else state.source_s_per_token * SLACK
    certain_s, likely_s = left_s, LIKELY_SHARE * left_s
    if state.deadline_s is None or not state.may_linger:
        certain_s = min(left_s, limits.stay_s)
        # An expectation may be wrong again and again: it holds only for a while.
        likely_s = min(likely_s, limits.stay_s) if state.elapsed_s < 2 * limits.stay_s else 0.0
    stays: list[str] = []
    stuck: list[str] = []
    movers: list[LeavingStream] = []
    patient: list[LeavingStream] = []
    for stream in state.streams:
        expected = stream.expected_remaining_tokens
        if stream.gave_token and _times(stream.max_remaining_tokens, token_s) <= certain_s:
            stays.append(stream.stream_id)
        elif not (stream.is_movable and can_move):
            stuck.append(stream.stream_id)
        elif stream.gave_token and expected is not None and _times(expected, token_s) <= likely_s:
            patient.append(stream)
        else:
            movers.append(stream)
    return stays, stuck, movers, patient


def _times(tokens: float, token_s: float) -> float:
    return tokens * token_s if tokens > 0 else 0.0


def _place(target: TargetReplica, limits: EvacuationLimits) -> _Place:
    rate = target.prefill_tokens_per_s
    step_tokens = math.inf if target.max_step_tokens is None else float(max(1, target.max_step_tokens))
    bound_tokens = max(0.0, limits.max_inter_token_s - target.step_s) * rate
    return _Place(
        replica_id=target.replica_id,
        free_streams=target.free_streams,
        free_kv_tokens=target.free_kv_tokens,
        queued_tokens=max(0, target.queued_prefill_tokens),
        tokens_per_s=rate,
        bound_tokens=bound_tokens,
        paced_tokens_per_s=_sustained(min(step_tokens, bound_tokens), rate, target.step_s),
        full_tokens_per_s=_sustained(step_tokens, rate, target.step_s),
        is_strict=step_tokens > bound_tokens,
    )


def _sustained(step_tokens: float, rate: float, step_s: float) -> float:
    """Prefill tokens per second when each step prefills `step_tokens` and decodes for `step_s`."""
    if step_tokens <= 0:
        return 0.0
    return rate if math.isinf(step_tokens) else step_tokens / (step_tokens / rate + step_s)


def _duration_s(streams: Iterable[LeavingStream], places: Sequence[_Place], rates: Sequence[float]) -> float:
    """Seconds to prefill `streams` after what is queued, the work spread over all targets by their speed."""
    tokens = sum(stream.context_tokens for stream in streams)
    if not tokens:
        return 0.0
    rate = sum(rates)
    return (tokens + sum(place.queued_tokens for place in places)) / rate if rate > 0 else math.inf


def _by_need(stream: LeavingStream) -> tuple[bool, float, int, str]:
    expected = stream.expected_remaining_tokens
    rest = stream.max_remaining_tokens if expected is None else min(expected, stream.max_remaining_tokens)
    return stream.gave_token, -rest, stream.context_tokens, stream.stream_id


def _by_cost(stream: LeavingStream) -> tuple[int, str]:
    return stream.context_tokens, stream.stream_id


def _room_tokens(stream: LeavingStream) -> int:
    """KV cache that a stream will fill at its target."""
    expected = stream.expected_remaining_tokens
    growth = UNKNOWN_GROWTH_TOKENS if expected is None else math.ceil(expected)
    return stream.context_tokens + min(growth, stream.max_remaining_tokens)


def _allowed_tokens(place: _Place, mode: Mode, limits: EvacuationLimits) -> float:
    """How much may be queued at a target before the last stream that is sent there."""
    if mode == "at once":
        return math.inf
    if mode == "hurried":
        return limits.window_s * place.full_tokens_per_s
    return place.bound_tokens if place.is_strict else limits.window_s * place.paced_tokens_per_s


def _fill(
    order: Sequence[LeavingStream], places: Sequence[_Place], mode: Mode, limits: EvacuationLimits
) -> tuple[list[Move], list[LeavingStream], int, int]:
    """Moves for now, streams that wait, and how many moves break the bound, or exceed a target's room."""
    moves: list[Move] = []
    waits: list[LeavingStream] = []
    num_over_bound = num_over_room = 0
    allowed = [_allowed_tokens(place, mode, limits) for place in places]
    # A prompt that is longer than any target may prefill in a step breaks the bound wherever it goes.
    longest = max((place.bound_tokens if place.is_strict else math.inf for place in places), default=0.0)
    is_paced = mode == "paced"
    open_places = [
        (place.queued_tokens / place.tokens_per_s, number)
        for number, place in enumerate(places)
        if place.free_streams > 0 and place.queued_tokens < allowed[number]
    ]
    heapq.heapify(open_places)
    crowded: list[tuple[float, int]] = []
    numbers = {place.replica_id: number for number, place in enumerate(places)}
    rooms = [_room_tokens(stream) for stream in order]
    least_rooms = list(itertools.accumulate(reversed(rooms), min))[::-1]  # that a stream or a later one needs
    for stream, room, least_room in zip(order, rooms, least_rooms, strict=True):
        tokens = stream.context_tokens
        breaks_bound = is_paced and tokens > longest
        number = _take(
            open_places, places, allowed, tokens, room, least_room, is_paced=is_paced, breaks_bound=breaks_bound
        )
        is_on_heap = False
        if stream.cached_tokens:
            better = _with_prefix(stream, number, places, numbers, allowed, room, is_paced=is_paced)
            if better is not None:
                if number is not None and number != better:
                    heapq.heappush(open_places, (places[number].queued_tokens / places[number].tokens_per_s, number))
                is_on_heap, number = number != better, better
                tokens -= stream.cached_tokens[places[better].replica_id]
                breaks_bound = is_paced and tokens > longest
        if number is None and mode == "at once":
            number = _take_crowded(crowded, places)
            num_over_room += 1
        if number is None:
            waits.append(stream)
            continue
        place = places[number]
        place.queued_tokens += tokens
        place.free_streams -= 1
        place.free_kv_tokens -= room
        num_over_bound += breaks_bound
        moves.append(Move(stream.stream_id, place.replica_id, tokens))
        if not is_on_heap and place.free_streams > 0 and place.queued_tokens < allowed[number]:
            heapq.heappush(open_places, (place.queued_tokens / place.tokens_per_s, number))
    return moves, waits, num_over_bound, num_over_room


def _take(
    open_places: list[tuple[float, int]],
    places: Sequence[_Place],
    allowed: Sequence[float],
    tokens: int,
    room: int,
    least_room: int,
    *,
    is_paced: bool,
    breaks_bound: bool,
) -> int | None:
    """The target with the shortest queue that has room for a stream, taken off the heap.

    Targets without room for any stream from here on (`least_room`) leave the heap, so that full ones are not looked at
    for every stream. Those that were given streams for their prefixes since take their place in it again.
    """
    passed: list[tuple[float, int]] = []
    target = None
    while open_places:
        entry = heapq.heappop(open_places)
        place = places[entry[1]]
        now_s = place.queued_tokens / place.tokens_per_s
        if now_s != entry[0]:
            if place.free_streams > 0 and place.queued_tokens < allowed[entry[1]]:
                heapq.heappush(open_places, (now_s, entry[1]))
            continue
        fits = room <= place.free_kv_tokens
        if fits and is_paced and place.is_strict:
            # One that breaks the bound does so alone: not behind others, whose wait it would lengthen.
            queued_tokens = place.queued_tokens
            fits = queued_tokens == 0 if breaks_bound else queued_tokens + tokens <= place.bound_tokens
        if fits:
            target = entry[1]
            break
        if least_room <= place.free_kv_tokens:
            passed.append(entry)
    for entry in passed:
        heapq.heappush(open_places, entry)
    return target


def _with_prefix(
    stream: LeavingStream,
    found: int | None,
    places: Sequence[_Place],
    numbers: Mapping[str, int],
    allowed: Sequence[float],
    room: int,
    *,
    is_paced: bool,
) -> int | None:
    """A target whose prefix cache has some of a stream, that may take it, and where it is ready sooner than at `found`;
    `found` itself if it is the one."""
    best, best_s = None, math.inf
    if found is not None:
        best_s = (places[found].queued_tokens + stream.context_tokens) / places[found].tokens_per_s
    for replica_id, cached_tokens in stream.cached_tokens.items():
        number = numbers.get(replica_id)
        if number is None:
            continue
        place = places[number]
        queued_tokens = place.queued_tokens + stream.context_tokens - cached_tokens
        is_open = place.free_streams > 0 and place.queued_tokens < allowed[number] and room <= place.free_kv_tokens
        if is_paced and place.is_strict and queued_tokens > place.bound_tokens:
            is_open = False
        if is_open and queued_tokens / place.tokens_per_s < best_s:
            best, best_s = number, queued_tokens / place.tokens_per_s
    return best


def _take_crowded(crowded: list[tuple[float, int]], places: Sequence[_Place]) -> int:
    """The target with the shortest queue, whether it has room or not. `crowded` is a heap, filled at the first call."""
    if not crowded:
        crowded += [(place.queued_tokens / place.tokens_per_s, number) for number, place in enumerate(places)]
        heapq.heapify(crowded)
    while True:
        wait_s, number = crowded[0]
        now_s = places[number].queued_tokens / places[number].tokens_per_s
        if wait_s == now_s:
            return number
        heapq.heapreplace(crowded, (now_s, number))  # it was given streams since


def _pause_s(
    places: Sequence[_Place],
    mode: Mode,
    limits: EvacuationLimits,
    left_s: float,
    *,
    has_waiting: bool,
    has_others: bool,
) -> float | None:
    """When a target can take more, at the latest half of its window ahead, so that none runs dry."""
    if not has_waiting:
        if not has_others:
            return None
        return max(MIN_PAUSE_S, min(MAX_RECHECK_S, max(limits.window_s / 2, RECHECK_SHARE * left_s)))
    pauses_s = [limits.window_s / 2]
    for place in places:
        # One that has drained so far already waits for room, not for time.
        until_tokens = 0.0 if place.is_strict and mode == "paced" else limits.window_s / 2 * place.full_tokens_per_s
        if place.free_streams > 0 and place.queued_tokens > until_tokens:
            pauses_s.append((place.queued_tokens - until_tokens) / place.tokens_per_s)
    return max(MIN_PAUSE_S, min(pauses_s))


def _reason(
    state: EvacuationState,
    limits: EvacuationLimits,
    mode: Mode,
    *,
    left_s: float,
    paced_s: float,
    full_s: float,
    moves: Sequence[Move],
    num_waits: int,
    num_stays: int,
    num_stuck: int,
    num_over_bound: int,
    num_over_room: int,
) -> str:
    what = f"of {len(state.streams)} streams {len(moves)} move now, {num_waits} later, {num_stays} finish here"
    if state.deadline_s is None:
        when = f"no deadline; {left_s:.1f} s left of {limits.unhurried_s:g} s for a drain"
    else:
        when = f"{state.deadline_s:.1f} s to the deadline, {left_s:.1f} s without the margin of {limits.margin_s:g} s"
    parts = [what, when]
    if mode == "paced":
        if moves or num_waits:
            parts.append(f"about {paced_s:.1f} s within {limits.max_inter_token_s:g} s between tokens")
    elif mode == "hurried":
        parts.append(
            f"keeping {limits.max_inter_token_s:g} s between tokens would take {paced_s:.1f} s: the bound is not kept, "
            f"as fast as the targets prefill it takes {full_s:.1f} s, cheapest first"
        )
        if full_s > left_s:
            parts.append(f"{full_s - left_s:.1f} s of that are missing: the last streams stand still for a while")
    elif moves:
        parts.append(
            f"the time is over: all move at once, cheapest first, without the bound of {limits.max_inter_token_s:g} s "
            f"between tokens, and are prefilled in {full_s:.1f} s"
        )
    if num_over_bound:
        parts.append(
            f"{num_over_bound} have prompts too long for the bound of {limits.max_inter_token_s:g} s on any target; "
            "a smaller max_num_batched_tokens would keep it"
        )
    if num_over_room:
        parts.append(f"{num_over_room} exceed the room of the targets and wait there")
    if num_stuck:
        parts.append(f"{num_stuck} cannot be moved" if state.targets else f"{num_stuck} have no target to go to")
    return "; ".join(parts)
