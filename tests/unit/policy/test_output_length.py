import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.policy.output_length import EDGES, MAX_COUNT, MIN_ANSWERS, NUM_BUCKETS, LengthEstimate, _bucket

LENGTHS = st.lists(st.integers(0, 40_000), max_size=80)


def learned(lengths: list[int]) -> LengthEstimate:
    estimate = LengthEstimate()
    for length in lengths:
        estimate.observe(length)
    return estimate


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 100, 127, 128, 1000, 4096, 5119, 5120, 16_777_215])
def test_a_length_is_in_its_bucket(tokens: int) -> None:
    bucket = _bucket(tokens)
    assert EDGES[bucket] <= tokens < EDGES[bucket + 1]


def test_buckets_rise_and_the_longest_has_one() -> None:
    assert list(EDGES) == sorted(set(EDGES))
    assert _bucket(10**9) == NUM_BUCKETS - 1


@pytest.mark.parametrize(
    ("lengths", "generated", "max_remaining", "mean"),
    [
        # 20 answers in [128, 160): 144 on average
        pytest.param([130] * 20, 0, 1000, 144, id="from the start"),
        pytest.param([130] * 20, 100, 1000, 44, id="100 of them are there"),
        # of 40 in [128, 160) half is longer than 144, and those get to 152 on average
        pytest.param([130] * 40, 144, 1000, 8, id="within the bucket"),
        pytest.param([130] * 20, 100, 20, 20, id="no more than max_tokens allows"),
        # half end at 144, half at 1152 on average ([1024, 1280)); of those that passed 200, all go to 1152
        pytest.param([130] * 20 + [1100] * 20, 0, 10_000, 648, id="two kinds"),
        pytest.param([130] * 20 + [1100] * 20, 200, 10_000, 952, id="those that passed 200 are of the long kind"),
        pytest.param([130] * 19, 0, 1000, None, id="too few answers"),
        pytest.param([130] * 20, 160, 1000, None, id="none got so long"),
        pytest.param([], 0, 1000, None, id="nothing known"),
    ],
)
def test_the_mean_rest(lengths: list[int], generated: int, max_remaining: int, mean: float | None) -> None:
    rest = learned(lengths).remaining_tokens(generated, max_remaining_tokens=max_remaining)
    assert rest == (None if mean is None else pytest.approx(mean))


@pytest.mark.parametrize(
    ("q", "rest"),
    [(0.0, 128), (0.25, 144), (0.5, 160), (0.75, 1152), (1.0, 1280)],  # half in [128, 160), half in [1024, 1280)
)
def test_quantiles_of_the_rest(q: float, rest: float) -> None:
    estimate = learned([130] * 20 + [1100] * 20)
    found = estimate.quantile_tokens(0, q, max_remaining_tokens=10_000)
    assert found is not None
    if q == 0.0:
        assert 0 <= found <= rest
    else:
        assert found == pytest.approx(rest)
    assert estimate.quantile_tokens(0, q, max_remaining_tokens=100) == min(found, 100)


def test_a_heavy_tail_lets_the_rest_grow_with_what_was_written() -> None:
    rng = random.Random(1)
    estimate = learned([int(100 * rng.paretovariate(1.5)) for _ in range(3000)])
    rests = [estimate.remaining_tokens(written, max_remaining_tokens=100_000) for written in (200, 600, 1800)]
    assert all(rest is not None for rest in rests)
    assert rests == sorted(rests)  # type: ignore[type-var]


def test_a_mean_is_right_to_an_eighth() -> None:
    rng = random.Random(2)
    lengths = [int(rng.lognormvariate(5, 1)) for _ in range(2000)]
    rest = learned(lengths).remaining_tokens(300, max_remaining_tokens=10**6)
    true = statistics.mean(length - 300 for length in lengths if length > 300)
    assert rest == pytest.approx(true, rel=1 / 8)


def test_new_traffic_outweighs_the_old() -> None:
    estimate = learned([100] * 4000 + [1000] * 8000)
    assert sum(estimate.counts) < MAX_COUNT
    rest = estimate.remaining_tokens(0, max_remaining_tokens=10_000)
    assert rest is not None
    assert rest > 700


def test_estimates_add_up() -> None:
    one, other = learned([100] * 30), learned([1000] * 30)
    both = LengthEstimate(one.counts)
    both.merge(other)
    assert both.counts == learned([100] * 30 + [1000] * 30).counts
    assert LengthEstimate((1.0, 2.0)).counts == LengthEstimate().counts  # of another version: not understood


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 50_000), st.integers(0, 50_000), st.floats(0, 1))
def test_the_rest_is_possible(lengths: list[int], generated: int, max_remaining: int, q: float) -> None:
    estimate = learned(lengths)
    mean = estimate.remaining_tokens(generated, max_remaining_tokens=max_remaining)
    quantile = estimate.quantile_tokens(generated, q, max_remaining_tokens=max_remaining)
    assert (mean is None) == (quantile is None)
    for rest in (mean, quantile):
        assert rest is None or 0 <= rest <= max_remaining
    if mean is not None:
        assert sum(length * 1.25 + 1 > generated for length in lengths) >= MIN_ANSWERS


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000))
def test_a_larger_maximum_allows_no_less(lengths: list[int], generated: int) -> None:
    estimate = learned(lengths)
    rests = [estimate.remaining_tokens(generated, max_remaining_tokens=most) for most in (0, 10, 1000, 100_000)]
    known = [rest for rest in rests if rest is not None]
    assert all(low <= high + 1e-6 for low, high in itertools.pairwise(known))


@settings(deadline=None)
@given(LENGTHS)
def test_quantiles_rise(lengths: list[int]) -> None:
    estimate = learned(lengths)
    rests = [estimate.quantile_tokens(50, q / 10, max_remaining_tokens=10**6) for q in range(11)]
    known = [rest for rest in rests if rest is not None]
    assert known == sorted(known)
