"""What a gateway learns of its replicas' speed."""

import pytest

from kervan.policy.prefill_speed import DEFAULT_PREFILL_TOKENS_PER_S, MIN_PROMPTS, PrefillSpeed


def test_prefill_speed_is_that_of_prompts_that_did_not_wait() -> None:
    speed = PrefillSpeed()
    assert speed.tokens_per_s == DEFAULT_PREFILL_TOKENS_PER_S
    for _ in range(MIN_PROMPTS - 1):
        speed.observe(1000, 1.0)
    speed.observe(100, 0.001)  # too short to tell
    assert speed.tokens_per_s == DEFAULT_PREFILL_TOKENS_PER_S
    speed.observe(1000, 0.1)
    assert speed.tokens_per_s == 10_000
    speed.observe(1000, 5.0)
    assert speed.tokens_per_s == pytest.approx(9_800)
    for _ in range(500):
        speed.observe(1000, 0.5)
    assert speed.tokens_per_s == pytest.approx(2_000)
