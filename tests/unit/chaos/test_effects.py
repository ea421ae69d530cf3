"""How long streams waited around disruptions, and when the fleet was whole again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.chaos import effects
from kervan.chaos.effects import Disruption
from kervan.stats import quantile


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
