"""The pure parts of `kervan chaos`: when something is disturbed, what became of tokens, how long streams waited."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.chaos import effects
from kervan.chaos.effects import Disruption
from kervan.chaos.report import Report
from kervan.chaos.schedule import Moment, choose, moments
from kervan.chaos.verify import Difference, compare
from kervan.config.fleet import FleetConfig
from kervan.stats import quantile
from kervan.twin.token_engine import TwinLimits, answer

# ---- when, and whom


def test_each_kind_comes_once_in_its_period() -> None:
    # kills at 10, 20, 30 (not at 35 and not at 40); drains at 15 and 30, at which the order is by name
    found = moments({"kill": 10.0, "drain": 15.0}, 35.0)
    assert found == [
        Moment(10.0, "kill"),
        Moment(15.0, "drain"),
        Moment(20.0, "kill"),
        Moment(30.0, "drain"),
        Moment(30.0, "kill"),
    ]
    assert moments({"kill": 10.0}, 10.0) == []


def test_a_victim_needs_others_that_are_ready() -> None:
    assert choose({"a", "b"}, min_ready=2, seed=0, number=0) is None
    assert choose({"a", "b", "c"}, min_ready=2, seed=0, number=0) in {"a", "b", "c"}
    assert choose(set(), min_ready=0, seed=0, number=0) is None
    assert choose({"a"}, min_ready=0, seed=0, number=0) == "a"


def test_the_same_seed_gives_the_same_victims_and_hits_all() -> None:
    ready = ["d", "b", "a", "c"]
    victims = [choose(ready, min_ready=1, seed=7, number=n) for n in range(50)]
    assert victims == [choose(sorted(ready), min_ready=1, seed=7, number=n) for n in range(50)]
    assert set(victims) == set(ready)


# ---- tokens


@pytest.mark.parametrize(
    ("truth", "got", "expected"),
    [
        pytest.param("abcdef", "abcdef", Difference(), id="whole"),
        pytest.param("abcdef", "abdef", Difference(lost=1), id="c is lost"),
        pytest.param("abcdef", "cdef", Difference(lost=2), id="the first two are lost"),
        pytest.param("abcdef", "abc", Difference(lost=3), id="the rest is lost"),
        pytest.param("abcdef", "", Difference(lost=6), id="nothing came"),
        pytest.param("abcdef", "abccdef", Difference(doubled=1), id="c twice"),
        pytest.param("abcdef", "abcbcdef", Difference(doubled=2), id="bc twice"),
        pytest.param("abcdef", "abcdefabcdef", Difference(doubled=6), id="all twice"),
        # b is lost and d comes twice: two edits; to replace b by c and c by d would be two as well
        pytest.param("abcdef", "acddef", Difference(lost=1, doubled=1), id="one lost, one twice"),
        pytest.param("abcdef", "abXdef", Difference(wrong=4), id="another token at c; what follows is suspect"),
        pytest.param("abcdef", "abXYZW", Difference(wrong=4), id="another way from c on"),
        pytest.param("abcdef", "abXYZ", Difference(lost=1, wrong=3), id="another way, and one too few"),
        pytest.param("abcdef", "abXYZWVU", Difference(doubled=2, wrong=4), id="another way, and two too many"),
    ],
)
def test_what_became_of_tokens(truth: str, got: str, expected: Difference) -> None:
    assert compare([*map(ord, truth)], [*map(ord, got)]) == expected


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        pytest.param("abc", Difference(), id="broke after c"),
        pytest.param("", Difference(), id="broke at once"),
        pytest.param("acd", Difference(lost=1), id="b was lost before it broke"),
        pytest.param("abbc", Difference(doubled=1), id="b came twice before it broke"),
        pytest.param("aXYZ", Difference(wrong=3), id="went another way before it broke"),
    ],
)
def test_what_a_broken_stream_did_not_get_is_not_lost(got: str, expected: Difference) -> None:
    assert compare([*map(ord, "abcdef")], [*map(ord, got)], is_whole=False) == expected


tokens = st.lists(st.integers(0, 3), max_size=30)  # few different ones: the hardest to align


@given(tokens)
def test_the_truth_is_no_difference(truth: list[int]) -> None:
    assert compare(truth, truth) == Difference()


@given(tokens, st.data())
def test_lost_tokens_are_counted_exactly(truth: list[int], data: st.DataObject) -> None:
    keeps = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
    got = [token for token, is_kept in zip(truth, keeps, strict=True) if is_kept]
    assert compare(truth, got) == Difference(lost=keeps.count(False))


@given(tokens, st.data())
def test_doubled_tokens_are_counted_exactly(truth: list[int], data: st.DataObject) -> None:
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(truth), max_size=len(truth)))
    got = [token for token, number in zip(truth, times, strict=True) for _ in range(number)]
    assert compare(truth, got) == Difference(doubled=sum(times) - len(truth))


@given(tokens, tokens)
def test_the_count_adds_up_and_only_the_truth_is_faultless(truth: list[int], got: list[int]) -> None:
    found = compare(truth, got)
    assert found.doubled - found.lost == len(got) - len(truth)
    assert (found == Difference()) == (truth == got)


@given(tokens, st.integers(0, 30))
def test_a_broken_stream_that_was_right_so_far_has_no_difference(truth: list[int], length: int) -> None:
    assert compare(truth, truth[:length], is_whole=False) == Difference()


LIMITS = TwinLimits(num_blocks=100, first_token=5, last_token=500, eos_token=1)


@pytest.mark.parametrize("at", [0, 1, 57, 99])
def test_a_twin_resumed_without_a_token_is_found_out(at: int) -> None:
    """It goes on from other tokens, so everything after the lost one differs."""
    prompt = [7, 8, 9]
    truth = answer(prompt, 100, LIMITS)
    resumed = truth[:at] + answer(prompt + truth[: max(0, at - 1)], 100 - at, LIMITS)
    found = compare(truth, resumed)
    if at == 0:
        assert found == Difference()  # nothing had been generated: nothing could be lost
    else:
        assert found.wrong + found.doubled > 0


# ---- gaps


def kill(ordered_s: float, felt_s: float | None = None) -> Disruption:
    return Disruption(0, "kill", "r", ordered_s, felt_s=felt_s)


@pytest.mark.parametrize(
    ("sent_s", "tokens_s", "expected"),
    [
        # kills at 10 (felt at 10.5) and 20 (felt at 20.5)
        pytest.param(5.0, [6.0, 7.0, 9.5], [], id="over before the first"),
        pytest.param(8.0, [8.5, 9.0, 9.5, 11.25, 11.5], [1.75], id="9.5 to 11.25 is around the first"),
        pytest.param(8.0, [9.0, 11.0, 19.0, 20.5], [8.0, 1.5], id="2 and 8 after the first, 1.5 after the second"),
        pytest.param(9.0, [12.0, 12.25], [3.0], id="waited for its first token when the first came"),
        pytest.param(10.25, [12.0, 12.25], [1.75], id="sent before the first was felt: may be on that replica"),
        pytest.param(11.0, [12.0, 12.25], [0.25], id="sent later: its first token took as long as ever"),
        pytest.param(11.0, [12.0], [], id="sent later, and one token"),
        pytest.param(8.0, [], [], id="no token"),
    ],
)
def test_longest_gaps(sent_s: float, tokens_s: list[float], expected: list[float]) -> None:
    assert effects.longest_gaps_s(sent_s, tokens_s, [kill(10.0, 10.5), kill(20.0, 20.5)]) == expected


def test_a_first_token_counts_as_long_as_a_hung_replica_looks_ready() -> None:
    assert effects.longest_gaps_s(15.0, [17.0], [kill(10.0, None)]) == [2.0]
    assert effects.longest_gaps_s(15.0, [17.0], [kill(10.0, None), kill(12.0, 12.5)]) == [2.0]


def test_moved_gaps_are_the_longest() -> None:
    assert effects.moved_gaps_s([0.1, 0.9, 0.3, 0.5], 2) == [0.9, 0.5]
    assert effects.moved_gaps_s([0.1, 0.9], 0) == []
    assert effects.moved_gaps_s([0.1], 3) == [0.1]  # a stream that was moved twice has one longest gap


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_of_moved_gaps_are_never_too_small(gaps: list[tuple[float, bool]], share: float) -> None:
    moved = [gap for gap, was_moved in gaps if was_moved]
    if moved:
        told = effects.moved_gaps_s([gap for gap, _ in gaps], len(moved))
        assert quantile(told, share) >= quantile(moved, share) - 1e-9


# ---- recovery


def test_recovery_of_a_kill_counts_from_the_death() -> None:
    # ordered at 10, dead at 10.75, a new one at 14
    one = Disruption(0, "kill", "a", 10.0)
    assert effects.follow([one], {"a", "b"}, 2, 10.25) == []
    assert effects.follow([one], {"b"}, 2, 10.75) == []
    assert effects.follow([one], {"b", "c"}, 2, 14.0) == [one]
    assert one.recover_s == 14.0 - 10.75
    assert effects.follow([one], {"b", "c"}, 2, 15.0) == []  # told once
    assert one.whole_s == 14.0


def test_a_hung_replica_that_looks_ready_does_not_make_the_fleet_whole() -> None:
    # hung at 10 and seen at 20; killed at 12, replaced at 15; the hung one is replaced at 24
    hung, killed = Disruption(0, "hang", "a", 10.0), Disruption(1, "kill", "b", 12.0)
    both = [hung, killed]
    assert effects.follow(both, {"a", "c"}, 3, 12.5) == []
    assert effects.follow(both, {"a", "c", "d"}, 3, 15.0) == []
    assert effects.follow(both, {"c", "d"}, 3, 20.0) == []
    assert effects.follow(both, {"c", "d", "e"}, 3, 24.0) == both
    assert (hung.recover_s, killed.recover_s) == (24.0 - 10.0, 24.0 - 12.5)


def test_where_more_are_ready_than_must_be_a_disruption_is_over_when_it_was_felt() -> None:
    one = Disruption(0, "drain", "a", 10.0)
    assert effects.follow([one], {"a", "b", "c"}, 2, 10.5) == []
    assert one.recover_s is None
    assert effects.follow([one], {"b", "c"}, 2, 11.0) == [one]
    assert one.recover_s == 1.0


# ---- the report


def report(**more: object) -> Report:
    words: dict[str, object] = {
        "plan": {}, "engine": "twin", "target_replicas": 2, "wall_s": 60.0, "disruptions": [], "skipped": {"kill": 0},
        "streams": 10, "unfinished": 0, "tokens": 100, "broken": 0, "difference": Difference(), "errors": {},
        "messages": {}, "moves": 0, "longest_s": [],
    }  # fmt: skip
    return Report(**(words | more))  # type: ignore[arg-type]


def test_the_report_has_the_keys_that_scripts_rely_on() -> None:
    whole = Disruption(0, "kill", "a", 10.0, 3, 10.5, 12.5)  # 2 s
    later = Disruption(1, "drain", "b", 20.0, 3, 20.0, 26.0)  # 6 s
    found = report(
        disruptions=[whole, later], skipped={"kill": 1, "drain": 0}, moves=3, longest_s=[0.5, 0.1, 0.3, 0.02, 0.2]
    ).to_dict()
    assert found["disruptions"] == 2
    assert found["recover_s"] == {"p50": 4.0, "max": 6.0}  # halfway between 2 and 6
    # the three longest: 0.2, 0.3, 0.5; p99 is 98% of the way from 0.3 to 0.5
    assert found["gap_s"] == {"p50": 0.3, "p99": 0.496, "max": 0.5}
    assert found["kinds"]["kill"] == {"disruptions": 1, "skipped": 1, "recover_s": {"p50": 2.0, "max": 2.0}}
    assert (found["skipped"], found["moves"], found["streams"]) == (1, 3, 10)
    needed = {"disruptions", "streams", "broken", "tokens_lost", "tokens_doubled", "moves", "gap_s", "recover_s"}
    assert needed <= found.keys()


def test_without_moves_and_disruptions_there_are_no_times() -> None:
    found = report().to_dict()
    assert found["gap_s"] == {"p50": None, "p99": None, "max": None}
    assert found["recover_s"] == {"p50": None, "max": None}


@pytest.mark.parametrize(
    ("more", "is_good"),
    [
        ({}, True),
        ({"broken": 1}, False),
        ({"difference": Difference(lost=1)}, False),
        ({"difference": Difference(doubled=1)}, False),
        ({"difference": Difference(wrong=1)}, False),
        ({"streams": 0}, False),
        ({"disruptions": [Disruption(0, "kill", "a", 10.0, felt_s=11.0)]}, False),
        ({"disruptions": [Disruption(0, "kill", "a", 10.0, felt_s=11.0)], "was_interrupted": True}, True),
        ({"unfinished": 5, "was_interrupted": True}, True),
    ],
    ids=str,
)
def test_what_is_good(more: dict[str, object], is_good: bool) -> None:
    assert report(**more).is_good is is_good


def test_fleets_are_what_plans_are_checked_against() -> None:
    from kervan.chaos.run import Plan
    from kervan.errors import ConfigError

    plan = Plan(periods_s={"kill": 1.0}, duration_s=5.0, streams=1)
    plan.check(FleetConfig(model="m", replicas=2))
    with pytest.raises(
        ConfigError, match=r"the fleet has 1 replica, and --min-ready 1 wants 1 besides.*kervan scale 2"
    ):
        plan.check(FleetConfig(model="m", replicas=1))
