import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy import gateway_count
from kervan.policy.gateway_count import HIGH, LOW


@pytest.mark.parametrize(
    ("busy", "current", "count", "reason"),
    [
        pytest.param([], 1, 1, "no gateway has reported", id="nothing known"),
        pytest.param([0.5], 1, 1, "50% busy", id="enough"),
        pytest.param([0.9], 1, 2, "90% busy, above 70%", id="one more: 0.9/0.5 = 1.8"),
        pytest.param([1.0, 0.8], 2, 4, "90% busy, above 70%", id="two more: 1.8/0.5 = 3.6"),
        pytest.param([0.9], 2, 4, "90% busy", id="the second one starts and tells nothing yet: taken to be as busy"),
        pytest.param([1.0] * 4, 4, 4, "4 gateways are the most allowed", id="no more allowed"),
        pytest.param([0.2, 0.1, 0.1], 3, 2, "2 would be 20% busy, below 35%", id="one leaves"),
        pytest.param([0.3, 0.3], 2, 2, "30% busy", id="one would be 60% busy"),
        pytest.param([0.1], 2, 2, "10% busy", id="one has not told: none leaves"),
        pytest.param([0.0], 1, 1, "0% busy", id="the last one stays"),
        pytest.param([0.5] * 6, 6, 4, "6 is outside 1 to 4", id="more than now allowed"),
    ],
)
def test_table(busy: list[float], current: int, count: int, reason: str) -> None:
    decision = gateway_count.decide(busy, current, 1, 4)
    assert decision.count == count
    assert reason in decision.reason


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_within_bounds_and_never_back_and_forth(busy: list[float], current: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    decision = gateway_count.decide(busy, current, low, high)
    assert low <= decision.count <= high
    if low <= current <= high and busy and decision.count != current:
        # The same load on the new number asks for no way back.
        then = [min(1.0, sum(busy) / len(busy) * current / decision.count)] * decision.count
        back = gateway_count.decide(then, decision.count, low, high).count
        assert (back - decision.count) * (decision.count - current) >= 0, (HIGH, LOW)
