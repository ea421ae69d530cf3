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
