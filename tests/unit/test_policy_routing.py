import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy import routing
from kervan.policy.routing import OUTPUT_CAP_TOKENS, ReplicaLoad

LOADS = st.lists(
    st.builds(
        ReplicaLoad,
        st.text("abcdef", min_size=1, max_size=3),
        st.integers(0, 5),
        st.booleans(),
        st.integers(0, 1),
    ),
    max_size=6,
    unique_by=lambda load: load.replica_id,
)


@pytest.mark.parametrize(
    ("replicas", "is_suspect", "chosen", "reason"),
    [
        pytest.param([], False, None, "no live replica", id="no replica"),
        pytest.param([("a", 900), ("b", 300)], False, "b", "(300) of 2", id="fewest tokens"),
        pytest.param([("a", 7), ("b", 7)], False, "a", "(7) of 2", id="tie: the first"),
        pytest.param([("a", 0, True), ("b", 500)], False, "b", "(500) of 2", id="idle but draining"),
        pytest.param([("a", 0, True)], False, None, "not draining", id="all drain"),
        pytest.param([("a", 1, False, 1), ("b", 9)], False, "a", "(1) of 2", id="a suspect keeps nobody else away"),
        pytest.param([("a", 1, False, 1), ("b", 9)], True, "b", "(9) of 2", id="suspects do not meet"),
        pytest.param([("a", 1, False, 1), ("b", 9, True)], True, None, "each of 1 replicas", id="suspect waits"),
        pytest.param([("a", 1, True)], True, None, "not draining", id="suspect, all drain"),
    ],
)
def test_placement_table(replicas: list[tuple], is_suspect: bool, chosen: str | None, reason: str) -> None:
    placement = routing.decide([ReplicaLoad(*replica) for replica in replicas], is_suspect=is_suspect)
    assert placement.replica_id == chosen
    assert reason in placement.reason


@given(LOADS, st.booleans())
def test_the_least_loaded_that_may_take_it_takes_it(loads: list[ReplicaLoad], is_suspect: bool) -> None:
    placement = routing.decide(loads, is_suspect=is_suspect)
    able = [r for r in loads if not r.is_draining and not (is_suspect and r.num_suspects)]
    if not able:
        assert placement.replica_id is None
        return
    chosen = next(r for r in loads if r.replica_id == placement.replica_id)
    assert chosen in able
    assert chosen.outstanding_tokens == min(r.outstanding_tokens for r in able)
    assert chosen is next(r for r in able if r.outstanding_tokens == chosen.outstanding_tokens)


@pytest.mark.parametrize(
    ("prompt_tokens", "remaining_output_tokens", "cost_tokens"),
    [
        (0, 0, 1),  # nothing to do still holds a place
        (100, 28, 128),
        (100, 1024, 1124),
        (100, 131_072, 1124),  # no max_tokens: remaining output is capped at 1,024
        (131_072, 0, 131_072),  # prompts are not
    ],
)
def test_cost_of_a_stream(prompt_tokens: int, remaining_output_tokens: int, cost_tokens: int) -> None:
    assert OUTPUT_CAP_TOKENS == 1024
    assert routing.cost_tokens(prompt_tokens, remaining_output_tokens) == cost_tokens
