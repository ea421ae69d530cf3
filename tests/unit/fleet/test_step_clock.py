import pytest

from kervan.fleet import step_clock
from kervan.fleet.step_clock import MAX_STEPS, StepClock


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: now_s[0])
    return now_s


def test_a_step_should_take_what_its_tokens_took_before(now_s: list[float]) -> None:
    clock = StepClock()
    clock.tokens_begin(2000)
    assert (clock.step_tokens, clock.expected_s(), clock.expected_s(is_guessed=True)) == (
        2000,
        0.0,
        20.0,
    )  # no speed is known
    now_s[0] += 4.0
    clock.tokens_end()
    assert (clock.step_tokens, clock.expected_s(is_guessed=True)) == (0, 0.0)
    clock.tokens_begin(1000)
    assert clock.expected_s(is_guessed=True) == 2.0  # at 500 tokens/s


def test_short_steps_tell_no_speed(now_s: list[float]) -> None:
    clock = StepClock()
    clock.tokens_begin(4)
    now_s[0] += 1.0
    clock.tokens_end()
    clock.tokens_begin(400)
    assert clock.expected_s(is_guessed=True) == 4.0


def test_steps_overlap(now_s: list[float]) -> None:
    clock = StepClock()
    clock.tokens_begin(100)
    now_s[0] += 0.5
    clock.tokens_begin(900)
    assert clock.step_tokens == 1000
    now_s[0] += 0.5
    clock.tokens_end()  # 100 tokens in 1 s
    now_s[0] += 0.9
    clock.tokens_end()  # 900 in the 0.9 s since
    clock.tokens_begin(500)
    assert clock.expected_s() == pytest.approx(0.5)


def test_what_never_ends_is_forgotten() -> None:
    clock = StepClock()
    clock.tokens_end()
    for _ in range(3 * MAX_STEPS):
        clock.tokens_begin(1)
    assert clock.step_tokens == MAX_STEPS


def test_what_stands_still_on_purpose_is_expected_to() -> None:
    clock = StepClock()
    clock.hold(20.0)
    assert clock.expected_s() == clock.expected_s(is_guessed=True) == 20.0
    clock.hold(0.0)
    assert clock.expected_s() == 0.0
