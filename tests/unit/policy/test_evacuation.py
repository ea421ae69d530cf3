import gc
import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.policy import evacuation
from kervan.policy.evacuation import (
    SLACK,
    Evacuation,
    EvacuationLimits,
    EvacuationState,
    LeavingStream,
    TargetReplica,
)

LIMITS = EvacuationLimits()  # 0.2 s between tokens, 3 s margin, stay 3 s, 30 s for a drain, 0.5 s window
URGENCY = ("paced", "hurried", "at once")


def stream(name: str, context: int = 1000, most: int = 100_000, expected: float | None = None, **more: bool):  # type: ignore[no-untyped-def]
    return LeavingStream(name, context, most, expected, **more)


def target(name: str = "t", *, rate: float = 10_000, queued: int = 0, **more: object) -> TargetReplica:
    """10k prefill tokens/s, 20 ms a decode step, 1,024 tokens a step: 122 ms a step at most, within the bound."""
    values: dict[str, object] = {"free_streams": 100, "free_kv_tokens": 10**7, "step_s": 0.02, "max_step_tokens": 1024}
    return TargetReplica(
        name,
        prefill_tokens_per_s=rate,
        queued_prefill_tokens=queued,
        **{**values, **more},  # type: ignore[arg-type]
    )


def decide(
    streams: list[LeavingStream],
    targets: list[TargetReplica],
    deadline_s: float | None,
    *,
    elapsed_s: float = 0.0,
    token_s: float | None = 0.03,
    may_linger: bool = True,
    limits: EvacuationLimits = LIMITS,
) -> Evacuation:
    """As at a notice, with a deadline, unless `may_linger` is False."""
    state = EvacuationState(
        streams=streams,
        targets=targets,
        deadline_s=deadline_s,
        may_linger=may_linger,
        elapsed_s=elapsed_s,
        source_s_per_token=token_s,
    )
    return evacuation.decide(state, limits=limits)


def moved(decision: Evacuation) -> list[str]:
    return [move.stream_id for move in decision.moves]


# ---- who stays


@pytest.mark.parametrize(
    ("most", "deadline_s", "token_s", "may_linger", "stays"),
    [
        # 1,000 tokens at 30 ms, 1.25 times as slow: 37.5 s
        pytest.param(1000, 41.0, 0.03, True, True, id="notice, 38 s are left without the margin"),
        pytest.param(1000, 40.0, 0.03, True, False, id="notice, 37 s are not enough"),
        pytest.param(1000, 41.0, None, True, False, id="unknown speed"),
        pytest.param(0, 3.0, None, True, True, id="nothing more to write"),
        # who drains waits: 3 s, that is 80 tokens
        pytest.param(80, None, 0.03, True, True, id="no deadline, 3 s"),
        pytest.param(81, None, 0.03, True, False, id="no deadline, a little more"),
        pytest.param(80, 90.0, 0.03, False, True, id="drain, 3 s"),
        pytest.param(81, 90.0, 0.03, False, False, id="drain, a little more"),
        pytest.param(26, 4.0, 0.03, False, True, id="drain, 1 s is left without the margin"),
        pytest.param(27, 4.0, 0.03, False, False, id="drain, 1 s is not enough"),
    ],
)
def test_a_stream_stays_if_it_ends_for_certain(
    most: int, deadline_s: float | None, token_s: float | None, may_linger: bool, stays: bool
) -> None:
    decision = decide([stream("a", most=most)], [target()], deadline_s, token_s=token_s, may_linger=may_linger)
    assert (decision.stays, moved(decision)) == ((("a",), []) if stays else ((), ["a"]))


def test_a_stream_without_a_token_does_not_stay() -> None:
    assert moved(decide([stream("a", most=1, gave_token=False)], [target()], 100)) == ["a"]


@pytest.mark.parametrize(
    ("expected", "num_others", "deadline_s", "elapsed_s", "waits"),
    [
        # 400 tokens: 15 s; half of the 37 s that are left
        pytest.param(400, 0, 40, 0, True, id="likely to end before"),
        pytest.param(500, 0, 40, 0, False, id="18.75 s are more than half of 37 s"),
        pytest.param(None, 0, 40, 0, False, id="nothing is known of it"),
        # 200 others of 1,000 tokens at 8,366 tokens/s: 24 s, twice of which are not left
        pytest.param(400, 200, 40, 0, False, id="too much to move to wait"),
        pytest.param(70, 0, None, 0, True, id="drain: 2.6 s"),
        pytest.param(70, 0, None, 6, False, id="drain: expected to end for 6 s by now"),
    ],
)
def test_a_stream_that_is_likely_to_end_may_wait(
    expected: float | None, num_others: int, deadline_s: float | None, elapsed_s: float, waits: bool
) -> None:
    others = [stream(f"o{n}") for n in range(num_others)]
    decision = decide([stream("a", expected=expected), *others], [target()], deadline_s, elapsed_s=elapsed_s)
    if num_others:  # it waits for its turn, which comes last
        assert decision.waits[-1] == "a"
        assert "200 later" in decision.reason or len(moved(decision)) > 0
    else:
        assert (decision.waits == ("a",), moved(decision) == ["a"]) == (waits, not waits)
    assert decision.ask_again_s is None or decision.ask_again_s <= 1.0


@pytest.mark.parametrize(("left_s", "waits"), [(2.5, True), (2.3, False)])
def test_it_waits_as_long_as_there_is_time_to_move_it_twice(left_s: float, waits: bool) -> None:
    # 1,000 tokens at 100 in 0.1 + 0.02 s: 1.2 s; to end it is expected to take 0.75 s
    slow = target(rate=1000, max_step_tokens=100)
    decision = decide([stream("a", expected=20)], [slow], LIMITS.margin_s + left_s)
    assert (decision.waits == ("a",), moved(decision) == ["a"]) == (waits, not waits)


def test_what_cannot_be_moved_is_told() -> None:
    decision = decide([stream("a", is_movable=False), stream("b", most=1, is_movable=False)], [target()], 30)
    assert (decision.stuck, decision.stays, decision.moves) == (("a",), ("b",), ())
    assert "1 cannot be moved" in decision.reason
    assert decision.ask_again_s == 1.0


@pytest.mark.parametrize("targets", [[], [target(rate=0)]])
def test_without_a_target_nothing_moves_and_the_question_comes_again(targets: list[TargetReplica]) -> None:
    decision = decide([stream("a")], targets, 30)
    assert (decision.moves, decision.stuck, decision.ask_again_s) == ((), ("a",), 1.0)


def test_nothing_is_left_to_ask_when_all_have_moved() -> None:
    decision = decide([stream("a")], [target()], 30)
    assert (moved(decision), decision.ask_again_s, decision.keeps_bound) == (["a"], None, True)
    assert decide([], [target()], 30).ask_again_s is None


# ---- pace


def test_a_target_is_given_its_window_and_more_when_it_has_drained() -> None:
    # 1,024 tokens in 0.1024 + 0.02 s: 8,366 tokens/s, 4,183 in the window of 0.5 s; the fifth thousand is begun
    streams = [stream(f"s{n}") for n in range(20)]
    decision = decide(streams, [target()], 100)
    assert (decision.mode, len(decision.moves), len(decision.waits)) == ("paced", 5, 15)
    assert decision.keeps_bound
    # 5,000 queued, asked again at half a window (2,092): 2,908 tokens at 10,000/s, but at the latest in 0.25 s
    assert decision.ask_again_s == pytest.approx(0.25)
    assert decide(streams[5:], [target(queued=4200)], 100).moves == ()
    assert len(decide(streams[5:], [target(queued=3000)], 100).moves) == 2


def test_a_target_that_prefills_whole_prompts_is_given_what_fits_into_the_bound() -> None:
    # (0.2 - 0.02) s at 10,000 tokens/s: 1,800 tokens in a step
    whole = target(max_step_tokens=None)
    decision = decide([stream(f"s{n}", 700) for n in range(5)], [whole], 100)
    assert (decision.mode, len(decision.moves), decision.keeps_bound) == ("paced", 2, True)
    assert decision.ask_again_s == pytest.approx(0.14)  # 1,400 tokens
    decision = decide([stream("s", 700)], [replace(whole, queued_prefill_tokens=1101)], 100)
    assert (moved(decision), decision.waits) == ([], ("s",))


def test_a_prompt_that_fits_into_no_step_breaks_the_bound_alone_and_says_so() -> None:
    whole = target(max_step_tokens=None)
    decision = decide([stream("long", 5000), stream("short", 500, most=50_000)], [whole], 100)
    assert (moved(decision), decision.waits, decision.keeps_bound) == (["long"], ("short",), False)
    assert "1 have prompts too long for the bound" in decision.reason
    assert "max_num_batched_tokens" in decision.reason
    assert moved(decide([stream("long", 5000)], [replace(whole, queued_prefill_tokens=1)], 100)) == []
    chunked = decide([stream("long", 5000)], [whole, target("chunked")], 100)
    assert [(move.replica_id, chunked.keeps_bound) for move in chunked.moves] == [("chunked", True)]


def test_moves_are_spread_by_the_length_of_queues() -> None:
    streams = [stream(f"s{n}") for n in range(8)]
    decision = decide(streams, [target("a", queued=3000), target("b"), target("fast", rate=40_000, queued=8000)], 100)
    # seconds queued: a 0.3, b 0, fast 0.2; b first, until it has as much as the others
    assert [move.replica_id for move in decision.moves][:3] == ["b", "b", "b"]
    assert {move.replica_id for move in decision.moves} == {"a", "b", "fast"}


def test_streams_without_a_token_go_first_and_those_with_most_to_write_next() -> None:
    streams = [
        stream("short", expected=1000),
        stream("long", expected=9000),
        stream("unknown"),
        stream("new", gave_token=False, expected=10),
    ]
    assert moved(decide(streams, [target()], 20)) == ["new", "unknown", "long", "short"]


def test_a_full_target_is_given_nothing_while_there_is_time() -> None:
    streams = [stream("a", 1000, 500)]  # 1,500 tokens of cache
    assert moved(decide(streams, [target(free_kv_tokens=1499)], 10)) == []
    assert moved(decide(streams, [target(free_kv_tokens=1500)], 10)) == ["a"]
    assert moved(decide(streams, [target(free_streams=0)], 10)) == []
    assert decide(streams, [target(free_streams=0)], 10).ask_again_s == 0.25
    both = decide([stream("a", 1000, 500), stream("b", 1000, 500)], [target(free_kv_tokens=2999)], 10)
    assert (moved(both), both.waits) == (["a"], ("b",))
    # a large one does not keep a small one away
    assert moved(decide([stream("a", 3000), stream("b", 100, 500)], [target(free_kv_tokens=2000)], 10)) == ["b"]
    # an unknown rest counts as 1,024 tokens
    assert moved(decide([stream("a", 1000)], [target(free_kv_tokens=2023)], 10)) == []
    assert moved(decide([stream("a", 1000)], [target(free_kv_tokens=2024)], 10)) == ["a"]


# ---- too little time


def test_when_the_bound_takes_too_long_targets_get_all_they_can_prefill() -> None:
    # 20 x 1,000 tokens; whole prompts: paced 1,800 tokens in 0.2 s are 9,000/s, 2.2 s; unpaced 10,000/s, 2.0 s
    streams = [stream(f"s{n:02}", 900 + 10 * n, expected=10_000 + n) for n in range(20)]
    decision = decide(streams, [target(max_step_tokens=None)], 5.1)
    assert (decision.mode, decision.keeps_bound) == ("hurried", False)
    assert moved(decision) == ["s00", "s01", "s02", "s03", "s04", "s05"]  # cheapest first, 0.5 s of work
    assert "the bound is not kept" in decision.reason


@pytest.mark.parametrize(("queued", "mode"), [(0, "paced"), (20_000, "hurried")])
def test_what_is_queued_already_takes_its_time(queued: int, mode: str) -> None:
    streams = [stream(f"s{n}") for n in range(6)]  # 6,000 tokens, 0.7 s; with 20,000 before them 3.1 s
    assert decide(streams, [target(queued=queued)], LIMITS.margin_s + 2.9).mode == mode


def test_when_even_that_takes_too_long_it_is_said_and_the_rest_is_answered_here_until_the_end() -> None:
    streams = [stream(f"s{n:02}", 900 + 10 * n) for n in range(20)]
    decision = decide(streams, [target(max_step_tokens=None)], 4.5)  # 19,900 tokens in 1.5 s
    assert (decision.mode, moved(decision)) == ("hurried", ["s00", "s01", "s02", "s03", "s04", "s05"])
    assert "0.5 s of that are missing" in decision.reason


def test_when_the_time_is_over_all_move_cheapest_first() -> None:
    streams = [stream("c", 3000), stream("a", 1000), stream("b", 2000), stream("d", 4000)]
    decision = decide(streams, [target()], 3.25)  # 0.25 s are left, the next decision may come in 0.25 s
    assert (decision.mode, moved(decision), decision.waits) == ("at once", ["a", "b", "c", "d"], ())
    assert "all move at once, cheapest first" in decision.reason
    assert not decision.keeps_bound
    assert decide(streams, [target()], 3.26).mode == "hurried"


def test_at_the_last_moment_full_targets_are_given_the_rest_and_it_is_said() -> None:
    full, roomy = target("full", free_streams=0), target("roomy", free_streams=1, queued=5000)
    decision = decide([stream("a"), stream("b")], [full, roomy], 2)
    assert [move.replica_id for move in decision.moves] == ["roomy", "full"]
    assert "1 exceed the room of the targets" in decision.reason


def test_what_exceeds_the_room_is_spread_too() -> None:
    full = [target("a", free_streams=0), target("b", free_streams=0)]
    decision = decide([stream(f"s{n}") for n in range(4)], full, 2)
    assert sorted(move.replica_id for move in decision.moves) == ["a", "a", "b", "b"]


def test_a_drain_without_a_deadline_ends_whatever_the_answers_lengths() -> None:
    streams = [stream(f"s{n}") for n in range(400)]  # 48 s of work in pace
    assert decide(streams, [target()], None).mode == "hurried"
    assert decide(streams, [target(), target("u")], None).mode == "paced"
    assert len(decide(streams, [target(), target("u")], None, elapsed_s=30).moves) == 400


# ---- whatever the state


STREAMS = st.lists(
    st.builds(
        LeavingStream,
        st.text("abcdefgh", min_size=1, max_size=4),
        st.integers(0, 20_000),
        st.integers(0, 5_000),
        st.none() | st.floats(0, 5_000),
        st.booleans(),
        st.booleans(),
    ),
    max_size=30,
    unique_by=lambda one: one.stream_id,
)
TARGETS = st.lists(
    st.builds(
        TargetReplica,
        st.sampled_from("abcdefgh"),
        st.integers(0, 40),
        st.integers(0, 200_000),
        st.floats(0, 50_000),
        st.integers(0, 20_000),
        st.floats(0, 0.3),
        st.none() | st.integers(1, 16_384),
    ),
    max_size=5,
    unique_by=lambda one: one.replica_id,
)
DEADLINES = st.none() | st.floats(0, 200)
TOKEN_TIMES = st.none() | st.floats(0, 0.2)


@settings(deadline=None)
@given(STREAMS, TARGETS, DEADLINES, st.floats(0, 60), TOKEN_TIMES, st.booleans())
def test_no_stream_is_lost_and_none_is_moved_twice(
    streams: list[LeavingStream],
    targets: list[TargetReplica],
    deadline_s: float | None,
    elapsed_s: float,
    token_s: float | None,
    may_linger: bool,
) -> None:
    words = {"elapsed_s": elapsed_s, "token_s": token_s, "may_linger": may_linger}
    decision = decide(streams, targets, deadline_s, **words)  # type: ignore[arg-type]
    named = [*moved(decision), *decision.waits, *decision.stays, *decision.stuck]
    assert sorted(named) == sorted(one.stream_id for one in streams)
    movable = {one.stream_id for one in streams if one.is_movable}
    assert set(moved(decision)) | set(decision.waits) <= movable
    assert {move.replica_id for move in decision.moves} <= {one.replica_id for one in targets}
    assert (decision.ask_again_s is None) == (set(named) == set(moved(decision)))
    assert decision.ask_again_s is None or 0.02 <= decision.ask_again_s <= 1.0
    # the next decision comes before the time is over
    left_s = LIMITS.unhurried_s - elapsed_s if deadline_s is None else deadline_s - LIMITS.margin_s
    if decision.waits:
        assert decision.ask_again_s is not None
        assert decision.ask_again_s <= left_s
    assert decision.reason
    assert decision == decide(streams, targets, deadline_s, **words)  # type: ignore[arg-type]


@settings(deadline=None)
@given(STREAMS, TARGETS, DEADLINES, st.floats(0, 60), TOKEN_TIMES)
def test_the_pace_is_kept_unless_the_decision_says_otherwise(
    streams: list[LeavingStream],
    targets: list[TargetReplica],
    deadline_s: float | None,
    elapsed_s: float,
    token_s: float | None,
) -> None:
    decision = decide(streams, targets, deadline_s, elapsed_s=elapsed_s, token_s=token_s)
    if not decision.keeps_bound:
        assert decision.mode != "paced" or "too long for the bound" in decision.reason
        return
    for one in targets:
        given_tokens = sum(move.prefill_tokens for move in decision.moves if move.replica_id == one.replica_id)
        if not given_tokens:
            continue
        queued = one.queued_prefill_tokens + given_tokens
        step_tokens = queued if one.max_step_tokens is None else min(queued, one.max_step_tokens)
        # the longest step while this is prefilled
        assert one.step_s + step_tokens / one.prefill_tokens_per_s <= LIMITS.max_inter_token_s + 1e-9


@settings(deadline=None)
@given(STREAMS, TARGETS, st.floats(0, 200), TOKEN_TIMES)
def test_room_is_kept_until_the_last_moment(
    streams: list[LeavingStream], targets: list[TargetReplica], deadline_s: float, token_s: float | None
) -> None:
    decision = decide(streams, targets, deadline_s, token_s=token_s)
    if "exceed the room" in decision.reason:
        assert decision.mode == "at once"
        return
    for one in targets:
        assert sum(move.replica_id == one.replica_id for move in decision.moves) <= one.free_streams
        given_tokens = sum(move.prefill_tokens for move in decision.moves if move.replica_id == one.replica_id)
        assert given_tokens <= one.free_kv_tokens


@settings(deadline=None)
@given(STREAMS, TARGETS, st.floats(0, 200), st.floats(0, 200), TOKEN_TIMES)
def test_more_time_lets_more_streams_stay_and_is_never_more_urgent(
    streams: list[LeavingStream], targets: list[TargetReplica], one_s: float, other_s: float, token_s: float | None
) -> None:
    soon = decide(streams, targets, min(one_s, other_s), token_s=token_s)
    late = decide(streams, targets, max(one_s, other_s), token_s=token_s)
    assert set(soon.stays) <= set(late.stays)
    assert URGENCY.index(late.mode) <= URGENCY.index(soon.mode)
    assert late.remaining_s <= soon.remaining_s + 1e-9 or soon.mode != "paced"


@settings(deadline=None)
@given(STREAMS, TARGETS, DEADLINES, TOKEN_TIMES)
def test_at_the_margin_everything_that_can_move_has_its_target(
    streams: list[LeavingStream], targets: list[TargetReplica], deadline_s: float | None, token_s: float | None
) -> None:
    decision = decide(
        streams,
        targets,
        None if deadline_s is None else LIMITS.margin_s + LIMITS.window_s / 2,
        elapsed_s=LIMITS.unhurried_s - LIMITS.window_s / 2,
        token_s=token_s,
    )
    assert decision.waits == ()


# ---- played through


def play(
    streams: list[LeavingStream],
    targets: list[TargetReplica],
    deadline_s: float | None,
    *,
    true_rest: dict[str, int],
    token_s: float = 0.03,
    may_linger: bool = True,
    limits: EvacuationLimits = LIMITS,
) -> tuple[dict[str, float], dict[str, float], list[float], list[Evacuation]]:
    """When streams moved and ended at the source, the lengths of all steps at the targets, and the decisions.

    Steps of a target: a decode of `step_s`, and with it the prefill of up to `max_step_tokens` that are queued.
    """
    now_s, ask_s = 0.0, 0.0
    alive = {one.stream_id: one for one in streams}
    moved_s: dict[str, float] = {}
    ended_s: dict[str, float] = {}
    steps: list[float] = []
    decisions: list[Evacuation] = []
    queues = {one.replica_id: float(one.queued_prefill_tokens) for one in targets}
    free_s = {one.replica_id: 0.0 for one in targets}
    taken = {one.replica_id: 0 for one in targets}
    end_s = deadline_s if deadline_s is not None else 120.0
    while alive and now_s < end_s:
        for name in [name for name in alive if true_rest[name] * token_s <= now_s]:
            ended_s[name] = now_s
            del alive[name]
        if now_s >= ask_s and alive:
            written = int(now_s / token_s)
            state = EvacuationState(
                streams=[
                    replace(
                        one,
                        context_tokens=one.context_tokens + written,
                        max_remaining_tokens=max(0, one.max_remaining_tokens - written),
                    )
                    for one in alive.values()
                ],
                targets=[
                    replace(
                        one,
                        queued_prefill_tokens=math.ceil(queues[one.replica_id]),
                        free_streams=one.free_streams - taken[one.replica_id],
                    )
                    for one in targets
                ],
                deadline_s=None if deadline_s is None else deadline_s - now_s,
                may_linger=may_linger,
                elapsed_s=now_s,
                source_s_per_token=token_s,
            )
            decision = evacuation.decide(state, limits=limits)
            decisions.append(decision)
            for move in decision.moves:
                moved_s[move.stream_id] = now_s
                queues[move.replica_id] += move.prefill_tokens
                taken[move.replica_id] += 1
                del alive[move.stream_id]
            ask_s = now_s + (decision.ask_again_s or 0.5)
        for one in targets:
            if free_s[one.replica_id] <= now_s:
                queued = queues[one.replica_id]
                part = queued if one.max_step_tokens is None else min(queued, one.max_step_tokens)
                queues[one.replica_id] -= part
                step_s = one.step_s + part / one.prefill_tokens_per_s
                steps.append(step_s)
                free_s[one.replica_id] = now_s + step_s
        now_s += 0.01
    return moved_s, ended_s, steps, decisions


def fleet(num: int, **more: object) -> list[TargetReplica]:
    return [target(f"t{n}", **more) for n in range(num)]  # type: ignore[arg-type]


def conversation(num: int, *, seed: int, context: int) -> tuple[list[LeavingStream], dict[str, int]]:
    rng = random.Random(seed)
    streams, rest = [], {}
    for n in range(num):
        true = int(rng.expovariate(1 / 300)) + 1
        streams.append(LeavingStream(f"s{n}", rng.randint(context // 2, context * 3 // 2), 4096))
        rest[f"s{n}"] = true
    return streams, rest


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("deadline_s", "num", "context"), [(120, 64, 2000), (30, 64, 1200), (30, 32, 6000)])
def test_all_are_away_in_time_and_the_bound_holds(deadline_s: float, num: int, context: int, seed: int) -> None:
    streams, rest = conversation(num, seed=seed, context=context)
    moved_s, ended_s, steps, decisions = play(streams, fleet(4), deadline_s, true_rest=rest)
    assert moved_s.keys() | ended_s.keys() == {one.stream_id for one in streams}
    assert max(moved_s.values()) <= deadline_s - LIMITS.margin_s
    assert all(decision.keeps_bound for decision in decisions)
    assert max(steps) <= LIMITS.max_inter_token_s
    assert ended_s  # and some ended where they were


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_moves_everything_before_the_end_and_says_that_the_bound_is_lost(seed: int) -> None:
    streams, rest = conversation(64, seed=seed, context=15_000)  # a million tokens, 29 s over four targets
    rest = dict.fromkeys(rest, 100_000)
    moved_s, ended_s, _, decisions = play(streams, fleet(4), 20, true_rest=rest)
    assert moved_s.keys() | ended_s.keys() == {one.stream_id for one in streams}
    assert max(moved_s.values()) <= 20 - LIMITS.margin_s
    assert [decisions[0].mode, decisions[-1].mode] == ["hurried", "at once"]
    assert "the bound is not kept" in decisions[0].reason
    assert not any(decision.keeps_bound for decision in decisions if decision.moves)
    # The work goes on until the end: as much is prefilled by then as if all had moved at the beginning.
    assert sum(at_s < 16 for at_s in moved_s.values()) > 64 / 2


def test_in_a_storm_streams_that_wait_are_answered_and_many_end() -> None:
    streams, rest = conversation(64, seed=1, context=15_000)
    _, ended_s, _, decisions = play(streams, fleet(4), 20, true_rest=rest)
    assert decisions[0].mode == "hurried"
    assert len(ended_s) > 64 / 3  # answers take 9 s on average
    assert decisions[-1].mode != "at once"  # so the time is enough for the others


@pytest.mark.parametrize("deadline_s", [None, 30.0, 90.0])
@pytest.mark.parametrize("rest_tokens", [1_500, 100_000])  # 45 s, which a deadline of 90 s would allow, and 50 minutes
@pytest.mark.parametrize("seed", range(3))
def test_a_drain_takes_seconds_however_long_the_answers_are(
    seed: int, rest_tokens: int, deadline_s: float | None
) -> None:
    streams, _ = conversation(64, seed=seed, context=2000)
    streams = [replace(one, max_remaining_tokens=rest_tokens) for one in streams]
    rest = {one.stream_id: rest_tokens for one in streams}
    moved_s, _, steps, decisions = play(streams, fleet(2), deadline_s, true_rest=rest, may_linger=False)
    assert len(moved_s) == 64
    assert max(moved_s.values()) < 10  # 128,000 tokens at 2 x 8,366/s: 7.7 s
    assert max(steps) <= LIMITS.max_inter_token_s
    assert {decision.mode for decision in decisions} == {"paced"}


def test_room_that_is_missing_at_first_is_used_when_it_comes() -> None:
    streams, rest = conversation(8, seed=1, context=1000)
    rest = dict.fromkeys(rest, 100_000)
    moved_s, _, _, decisions = play(streams, [target(free_streams=3)], 30, true_rest=rest)
    assert len(moved_s) == 8  # three at once, the others into its queue when time is up
    assert 26.5 < sorted(moved_s.values())[3] <= 30 - LIMITS.margin_s
    assert "5 exceed the room" in decisions[-1].reason


def test_stays_are_certain_even_if_the_source_gets_slower() -> None:
    one = stream("a", most=100)
    longest_s = 100 * 0.03 * SLACK
    assert decide([one], [target()], longest_s + LIMITS.margin_s + 0.01).stays == ("a",)
    assert decide([one], [target()], longest_s + LIMITS.margin_s + 0.01, token_s=0.031).stays == ()


def test_four_times_as_many_streams_take_no_sixteen_times_as_long() -> None:
    """A thousand take 3 ms on an idle core; how long on this one is not asked."""
    rng = random.Random(1)
    streams = [
        LeavingStream(f"s{n}", rng.randint(100, 8000), rng.randint(1, 4000), rng.uniform(1, 500)) for n in range(1000)
    ]
    least_s = {250: math.inf, 1000: math.inf}
    gc.disable()
    try:
        for _ in range(10):
            for count in (250, 1000):
                state = EvacuationState(
                    streams=streams[:count], targets=fleet(16), deadline_s=3, source_s_per_token=0.03
                )
                began_s = time.process_time()
                decision = evacuation.decide(state)
                least_s[count] = min(least_s[count], time.process_time() - began_s)
                assert len(decision.moves) > 0.9 * count
    finally:
        gc.enable()
    assert least_s[1000] < 10 * least_s[250]


@pytest.mark.parametrize(
    ("cached", "queued", "goes_to", "prefill"),
    [
        # t has 1,000 tokens queued and u more; 1,000 tokens of context at 10k tokens/s
        pytest.param({}, 1100, "t", 1000, id="nothing is cached: the shorter queue"),
        pytest.param({"u": 800}, 1100, "u", 200, id="1,100 + 200 before 1,000 + 1,000"),
        pytest.param({"u": 800}, 1801, "t", 1000, id="1,801 + 200 is later"),
        pytest.param({"t": 400, "u": 800}, 1100, "u", 200, id="the one with more of it"),
        pytest.param({"t": 800, "u": 800}, 1100, "t", 200, id="both have it: the shorter queue"),
        pytest.param({"gone": 900}, 1100, "t", 1000, id="one that is no target"),
    ],
)
def test_a_stream_moves_to_where_its_prefix_is_if_it_is_ready_sooner_there(
    cached: dict[str, int], queued: int, goes_to: str, prefill: int
) -> None:
    targets = [target("t", queued=1000), target("u", queued=queued)]
    leaving = LeavingStream("s", 1000, 100_000, cached_tokens=cached)
    (move,) = decide([leaving], targets, 60.0, may_linger=False).moves
    assert (move.replica_id, move.prefill_tokens) == (goes_to, prefill)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 4000), st.integers(0, 3)), max_size=40), st.booleans())
def test_targets_with_prefixes_are_filled_as_far_as_others(
    streams: list[tuple[int, int, int]], is_strict: bool
) -> None:
    targets = [target(f"t{n}", free_streams=5, max_step_tokens=4096 if is_strict else None) for n in range(4)]
    leaving = [
        LeavingStream(f"s{n}", context, 100_000, cached_tokens={f"t{at}": min(cached, context - 1)} if cached else {})
        for n, (context, cached, at) in enumerate(streams)
    ]
    made = decide(leaving, targets, 60.0)
    assert len(made.moves) + len(made.waits) == len(streams)
    for one in targets:
        there = [move for move in made.moves if move.replica_id == one.replica_id]
        assert len(there) <= 5
        if made.mode == "paced" and made.keeps_bound:
            before = sum(move.prefill_tokens for move in there[:-1])
            assert before < (LIMITS.max_inter_token_s - 0.02) * 10_000 if is_strict else before < 0.5 * 10_000
    assert all(0 < move.prefill_tokens <= 4000 for move in made.moves)
