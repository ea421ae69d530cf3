"""What became of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.chaos.verify import Difference, compare
from kervan.twin.token_engine import TwinLimits, answer


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
