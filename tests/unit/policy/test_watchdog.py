import pytest

from kervan.policy import watchdog
from kervan.policy.watchdog import EngineSample


@pytest.mark.parametrize(
    ("now_s", "last_report_s", "last_step_s", "has_work", "reason"),
    [
        pytest.param(100, 99, 99, True, "", id="works"),
        pytest.param(100, 99, 0, False, "", id="idle for long"),
        pytest.param(100, 40, 99, False, "", id="silent for exactly the limit"),
        pytest.param(101, 40, 101, False, "no report for 61 s (limit 60 s)", id="silent"),
        pytest.param(100, 100, 40, True, "", id="no step for exactly the limit"),
        pytest.param(101, 101, 40, True, "has work but made no step for 61 s (limit 60 s)", id="stalled"),
        pytest.param(101, 40, 40, True, "no report for 61 s (limit 60 s)", id="silent and stalled: silence is named"),
    ],
)
def test_health(now_s: float, last_report_s: float, last_step_s: float, has_work: bool, reason: str) -> None:
    health = watchdog.decide(EngineSample(now_s, last_report_s, last_step_s, has_work), stall_timeout_s=60)
    assert health == watchdog.Health(not reason, reason)


@pytest.mark.parametrize(
    ("expected_step_s", "num_suspects", "limit_s"),
    [
        pytest.param(0.0, 0, 60, id="in no step: it should begin one"),
        pytest.param(0.0, 3, 60, id="in no step, whatever waits"),
        pytest.param(12.0, 0, 60, id="three times 12 s are less"),
        pytest.param(40.0, 0, 120, id="three times 40 s"),
        pytest.param(0.1, 1, 600, id="a request that another replica stood still over"),
        pytest.param(300.0, 1, 900, id="three times 300 s are more"),
    ],
)
def test_a_long_step_is_given_its_time(expected_step_s: float, num_suspects: int, limit_s: float) -> None:
    for stalled_s, is_healthy in ((limit_s, True), (limit_s + 1, False)):
        sample = EngineSample(stalled_s, stalled_s, 0.0, True, expected_step_s, num_suspects)
        assert watchdog.decide(sample, stall_timeout_s=60).is_healthy is is_healthy


def test_a_hang_in_a_collective_is_not_given_the_time_of_a_long_step() -> None:
    hang = "a collective hangs: rank 1 (pid 7) is stopped (SIGSTOP)"
    for stalled_s, is_healthy in ((60.0, True), (61.0, False)):
        sample = EngineSample(stalled_s, stalled_s, 0.0, True, 300.0, 1, hang)
        health = watchdog.decide(sample, stall_timeout_s=60)
        assert health.is_healthy is is_healthy
    assert health.reason == f"has work but made no step for 61 s (limit 60 s); {hang}"
