"""Start times and loads as users write them."""

import random
import statistics

import pytest

from kervan.errors import ConfigError
from kervan.simulate.duration import measured, parse_durations
from kervan.simulate.loads import parse_ramp


def test_start_times_are_fixed_or_drawn() -> None:
    rng = random.Random(1)
    assert parse_durations("100s").sample(rng) == 100.0
    even = parse_durations("60s..140s")
    assert statistics.fmean(even.sample(rng) for _ in range(4000)) == pytest.approx(100, rel=0.03)
    skewed = parse_durations("lognormal:median=90s,sigma=0.3")
    assert statistics.median(skewed.sample(rng) for _ in range(4000)) == pytest.approx(90, rel=0.05)
    mixed = parse_durations("80s@0.75,200s@0.25")
    assert statistics.fmean(mixed.sample(rng) for _ in range(4000)) == pytest.approx(110, rel=0.04)
    assert mixed.quantile_s(0.5) == 80.0
    assert measured([5.0, 1.0, 3.0]).quantile_s(0.5) == 3.0


@pytest.mark.parametrize(
    "text",
    ["", "soon", "9..", "90s..10s", "-5s", "lognormal:median=90s", "lognormal:median=9s,sigma=x", "5s@x", "5s@0"],
)
def test_a_start_time_that_is_none_gets_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="--start-time"):
        parse_durations(text, "--start-time")


def test_steps_of_a_ramp_are_those_of_bench() -> None:
    assert parse_ramp("2:330s, 4:6min,burst:10") == parse_ramp("2@330s,4@6min,burst:10")
    assert sum(stage.duration_s for stage in parse_ramp("2:330s,4:6min")) == 690.0
