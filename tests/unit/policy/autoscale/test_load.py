import json
import random
from typing import Any

import pytest

from kervan.policy.autoscale.load import BLOCK_STEPS, Load


def observed(load: Load, arrived: int, **more: Any) -> Load:
    given: dict[str, Any] = {
        "window_s": 1.0, "arrived": arrived, "prompt_tokens": 1000 * arrived, "finished": arrived,
        "output_tokens": 100 * arrived, "good": arrived, "in_flight": arrived, "is_calm": True, "prompt_share": 0.5, "block_s": 50.0,
        "stay_s": 1.0, "wait_s": 1.0, "replica_rate": 1.0,
    }  # fmt: skip
    load.observe(**(given | more))
    return load


def test_the_level_of_a_steady_load_is_its_rate() -> None:
    load = Load()
    for _ in range(100):
        observed(load, 5)
    assert load.level == pytest.approx(5.0)
    assert load.mean_prompt_tokens == pytest.approx(1000.0)
    assert load.mean_output_tokens == pytest.approx(100.0, rel=0.1)  # two guessed ones are among them


def test_a_step_is_seen_before_the_slow_average_follows() -> None:
    load = Load()
    for _ in range(200):
        observed(load, 4)
    for _ in range(15):
        observed(load, 12)
    assert load.level > 9
    assert load.slow_rate < 6
    for _ in range(20):
        observed(load, 2)
    assert load.level < 5


def test_noise_moves_the_level_little() -> None:
    rng, load, levels = random.Random(1), Load(), []
    for second in range(1500):
        observed(load, sum(rng.random() < 0.01 for _ in range(1000)))  # about Poisson, 10 per second
        levels += [load.level] if second > 300 else []
    assert 7.5 < min(levels) <= max(levels) < 12.5


def test_a_long_prompt_counts_as_more_than_one_request() -> None:
    load = Load()
    for _ in range(300):
        observed(load, 2)
    observed(load, 1, prompt_tokens=9000)  # 1 + 0.5 * (9 - 1)
    assert load.peak > 2.4


def test_a_headroom_as_large_as_the_rises_seen_leaves_nobody_late() -> None:
    # Each 200 s a step from 4 to 8 for 100 s: with 2 more than the level many are late, with 4 more hardly any.
    load = Load()
    for second in range(4000):
        observed(load, 8 if second % 200 >= 100 else 4)
    assert load.late_share(2.0, 4.0, 50.0) > 0.05
    assert load.late_share(4.5, 4.0, 50.0) < 0.01
    assert load.usual_rise(4.0, 50.0, 0.01) == pytest.approx(3.5, abs=0.7)


def test_more_headroom_never_makes_more_late() -> None:
    rng, load = random.Random(2), Load()
    for _ in range(1000):
        observed(load, rng.choice((0, 0, 0, 1, 20)))
    shares = [load.late_share(0.25 * n, 3.0, 50.0) for n in range(100)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1


def test_without_history_a_prior_stands_in() -> None:
    load = Load()
    assert load.late_share(0.0, 10.0, 100.0) > 0.05
    assert load.late_share(5.0, 10.0, 100.0) == 0.0
    assert load.late_share(0.0, 0.0, 100.0) == 0.0


def test_a_short_burst_that_may_wait_is_none() -> None:
    load, patient = Load(), Load()
    for second in range(2000):
        observed(load, 10 if second % 100 == 50 else 1)
        observed(patient, 10 if second % 100 == 50 else 1, wait_s=20.0)
    assert load.late_share(1.0, 1.0, 50.0) > patient.late_share(1.0, 1.0, 50.0)


def test_what_was_late_in_a_queue_does_not_count() -> None:
    load = Load()
    for _ in range(100):
        observed(load, 5, good=0, is_calm=False)
    assert load.good == 1.0
    for _ in range(200):
        observed(load, 5, good=4)
    assert load.good == pytest.approx(0.8, abs=0.05)


def test_a_load_that_jumps_stands_still_again_when_the_slow_average_has_followed() -> None:
    rng, load = random.Random(4), Load()
    for _ in range(600):
        observed(load, sum(rng.random() < 0.05 for _ in range(100)))  # 5/s, binomial: about Poisson
    assert load.steady_s > 300
    observed(load, 40)
    observed(load, 40)
    for _ in range(5):
        observed(load, 20)
    assert load.steady_s == 0
    for _ in range(400):
        observed(load, 20)
    assert load.steady_s > 200
    assert load.slow_in_flight == pytest.approx(20, rel=0.01)


def test_it_is_small_and_survives_json() -> None:
    rng, load = random.Random(3), Load()
    for _ in range(600):
        observed(load, rng.randrange(200), prompt_tokens=rng.randrange(10**6))
    text = json.dumps(load.to_memory())
    assert len(text) < 3500
    again = Load.from_memory(json.loads(text))
    assert observed(again, 7).to_memory() == observed(load, 7).to_memory()
    assert BLOCK_STEPS < 100
