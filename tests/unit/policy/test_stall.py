"""Which replicas stand still."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy.stall import MAX_DOUBLINGS, MIN_PATIENCE_S, StepProgress, decide, patience_s


def stalled(*replicas: StepProgress, rate: float | None = 20_000.0, num_recent: int = 0) -> set[str]:
    return set(decide(replicas, prefill_tokens_per_s=rate, num_recent=num_recent).reasons)


@pytest.mark.parametrize(
    ("step_s", "prefill_tokens", "rate", "num_recent", "expected_s"),
    [
        pytest.param(0.02, 0, 20_000.0, 0, 1.5, id="20 steps are 0.4 s: the least"),
        pytest.param(None, 0, None, 0, 1.5, id="nothing is known"),
        pytest.param(0.2, 0, 20_000.0, 0, 4.0, id="20 steps"),
        pytest.param(0.02, 8192, 20_000.0, 0, 1.5, id="three times 0.41 s"),
        pytest.param(0.02, 8192, 8_000.0, 0, 3.072, id="three times 1.02 s"),
        pytest.param(0.02, 2048, None, 0, 6.144, id="speed unknown: three times 2.05 s"),
        pytest.param(0.02, 0, 20_000.0, 2, 6.0, id="two others lately"),
        pytest.param(0.02, 0, 20_000.0, 99, 24.0, id="doubled four times at most"),
    ],
)
def test_patience(
    step_s: float | None, prefill_tokens: int, rate: float | None, num_recent: int, expected_s: float
) -> None:
    one = StepProgress("a", 0.0, step_s, prefill_tokens)
    assert patience_s(one, prefill_tokens_per_s=rate, num_recent=num_recent) == pytest.approx(expected_s)


def test_what_an_engine_expects_of_its_step_is_waited_for() -> None:
    one = StepProgress("a", 0.0, 0.02, 2048, expected_step_s=12.0)
    assert patience_s(one, prefill_tokens_per_s=None, num_recent=0) == 36.0


def test_a_replica_without_a_step_for_longer_than_that_is_stalled() -> None:
    assert stalled(
        StepProgress("a", 1.5, 0.02, 0), StepProgress("b", 1.6, 0.02, 0), StepProgress("c", 0.0, None, 0)
    ) == {"b"}
    (reason,) = decide([StepProgress("a", 2.04, 0.02, 0)], prefill_tokens_per_s=None, num_recent=0).reasons.values()
    assert reason == "has work but made no step for 2.0 s (patience 1.5 s)"


def test_one_that_was_found_to_stand_still_does_so_until_it_steps() -> None:
    """It counts among the recent ones, which double the patience with others."""
    found = StepProgress("a", 1.75, 0.02, 0, found_after=0)
    assert stalled(found, StepProgress("b", 1.75, 0.02, 0), num_recent=1) == {"a"}
    assert stalled(StepProgress("a", 0.1, 0.02, 0, found_after=0), num_recent=1) == set()


@pytest.mark.parametrize(
    ("other", "can_move"),
    [
        pytest.param(StepProgress("b", 0.3, 0.02, 0), True, id="one that steps"),
        pytest.param(StepProgress("b", 1.2, 0.02, 0), False, id="one that may be about to stall too"),
        pytest.param(StepProgress("b", 9.0, 0.02, 0), False, id="one that is stalled"),
        pytest.param(StepProgress("b", 0.0, 0.02, 0, takes_streams=False), False, id="one that drains"),
        pytest.param(None, False, id="none"),
    ],
)
def test_streams_move_only_to_a_replica_that_steps(other: StepProgress | None, can_move: bool) -> None:
    replicas = [StepProgress("a", 9.0, 0.02, 0), *([other] if other else [])]
    assert decide(replicas, prefill_tokens_per_s=None, num_recent=0).can_move is can_move


PROGRESS = st.builds(
    StepProgress,
    st.sampled_from("abcdef"),
    st.floats(0, 100),
    st.none() | st.floats(0, 1),
    st.integers(0, 20_000),
    st.booleans(),
)


@given(
    st.lists(PROGRESS, max_size=6, unique_by=lambda one: one.replica_id),
    st.none() | st.floats(10, 1e5),
    st.integers(0, 9),
)
def test_whatever_is_known(replicas: list[StepProgress], rate: float | None, num_recent: int) -> None:
    decision = decide(replicas, prefill_tokens_per_s=rate, num_recent=num_recent)
    by_id = {one.replica_id: one for one in replicas}
    assert all(by_id[replica_id].stalled_s > MIN_PATIENCE_S for replica_id in decision.reasons)
    assert not decision.can_move or set(by_id) - set(decision.reasons)
    later = decide(replicas, prefill_tokens_per_s=rate, num_recent=num_recent + 1)
    assert set(later.reasons) <= set(decision.reasons)
    if num_recent >= MAX_DOUBLINGS:
        assert later == decision
