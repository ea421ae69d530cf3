import random
import statistics

import pytest

from kervan.stats import bootstrap_interval, quantile, wilson_interval


def test_quantile_is_linear_between_neighbours() -> None:
    values = [40.0, 10.0, 20.0, 30.0]
    assert [quantile(values, q) for q in (0, 0.5, 1)] == [10, 25, 40]
    assert quantile(values, 0.9) == pytest.approx(37)  # place 2.7: 30 + 0.7 * 10
    for values, q in (([], 0.5), ([1.0], 1.1)):
        with pytest.raises(ValueError, match="quantile"):
            quantile(values, q)


def test_wilson() -> None:
    # 9 of 10, worked by hand with z = 1.96: centre (0.9 + 0.19207) / 1.38415 = 0.78898, half 0.19300.
    low, high = wilson_interval(9, 10, z=1.96)
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=2e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_bootstrap_covers_what_it_says() -> None:
    rng = random.Random(1)
    hits = 0
    for seed in range(100):
        low, high = bootstrap_interval(
            [rng.gauss(5, 1) for _ in range(40)], statistic=statistics.fmean, draws=300, seed=seed
        )
        hits += low <= 5 <= high
    assert hits >= 85
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([1, 2, 3, 9]) == bootstrap_interval([1, 2, 3, 9])
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
