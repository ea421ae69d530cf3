"""Arrival times: exact where they are fixed, in distribution where they are drawn."""

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.bench.arrivals import Stage, offsets_s, parse_stages, steady
from kervan.errors import ConfigError


def take(count: int, *args: object, **kwargs: object) -> list[float]:
    return list(itertools.islice(offsets_s(*args, **kwargs), count))  # type: ignore[arg-type]


def test_a_constant_rate() -> None:
    assert take(4, steady(4), "constant") == [0, 0.25, 0.5, 0.75]


def test_stages_follow_each_other() -> None:
    stages = parse_stages("2@2s,burst:3,4@1s")
    assert list(offsets_s(stages, "constant")) == [0, 0.5, 1, 1.5, 2, 2, 2, 2, 2.25, 2.5, 2.75]


def test_a_ramp() -> None:
    # 0 to 4 per second in 4 s: t^2 / 2 arrivals by time t, so arrival n comes at sqrt(2 n).
    times = list(offsets_s(parse_stages("0..4@4s"), "constant"))
    assert times == pytest.approx([(2 * n) ** 0.5 for n in range(8)])
    down = list(offsets_s(parse_stages("4..0@4s"), "constant"))
    assert len(down) == 8
    assert down[:2] == pytest.approx([0, 4 - (16 - 2) ** 0.5])  # 4 t - t^2 / 2 = 1


@pytest.mark.parametrize(("process", "burstiness", "cv"), [("poisson", 1, 1), ("gamma", 0.25, 2), ("gamma", 4, 0.5)])
def test_gaps_have_the_rate_and_the_spread(process: str, burstiness: float, cv: float) -> None:
    times = take(20_000, steady(5), process, burstiness=burstiness, seed=3)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.06)


@given(st.integers(0, 9), st.sampled_from(["constant", "poisson", "gamma"]), st.floats(0.1, 5))
def test_times_are_ordered_repeatable_and_inside(seed: int, process: str, burstiness: float) -> None:
    stages = parse_stages("3@2s,0@1s,burst:2,1..9@2s,0..0@1s")
    times = take(200, stages, process, burstiness=burstiness, seed=seed)
    assert times == sorted(times) == take(200, stages, process, burstiness=burstiness, seed=seed)
    assert all(0 <= t <= 6 for t in times)
    assert not any(2 + 1e-9 < t < 3 for t in times)


def test_seeds_differ() -> None:
    assert take(5, steady(5), "poisson", seed=1) != take(5, steady(5), "poisson", seed=2)


@pytest.mark.parametrize(
    "text", ["", "2", "2@", "x@3s", "-1@3s", "inf@3s", "2@0s", "burst:", "burst:0", "burst:x", "2@3s,", "nan@2s"]
)
def test_bad_stages(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_stages(text)


def test_bad_rate() -> None:
    with pytest.raises(ConfigError, match="rate 0 is not above 0"):
        steady(0)
    assert steady(2) == (Stage(2, 2, float("inf")),)
