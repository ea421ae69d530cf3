import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.bench.sketch import RELATIVE_ERROR, Sketch, binned, merged, quantile_intervals

VALUES = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=300)


def filled(values: list[float]) -> Sketch:
    sketch = Sketch()
    sketch.extend(values)
    return sketch


@given(VALUES, st.floats(0, 1))
def test_quantiles_are_within_the_relative_error(values: list[float], q: float) -> None:
    import math

    exact = sorted(values)[math.ceil(q * (len(values) - 1))]
    found = filled(values).quantile(q)
    assert found == pytest.approx(exact, rel=1.001 * RELATIVE_ERROR)


@given(st.lists(st.floats(0, 1e4), max_size=300))
def test_counting_many_at_once_is_as_counting_each(values: list[float]) -> None:
    one, many = filled(values), Sketch()
    many.add_counts(binned(np.array(values)))
    assert (many.bins, many.count, many.largest, many.zeros) == (one.bins, one.count, one.largest, one.zeros)
    assert many.total == pytest.approx(one.total, abs=1e-4)


@given(VALUES, VALUES)
def test_merging_is_as_counting_all(a: list[float], b: list[float]) -> None:
    one, both = merged([filled(a), filled(b)]), filled(a + b)
    assert one.bins == both.bins
    assert (one.count, one.largest, one.zeros) == (both.count, both.largest, both.zeros)
    assert one.total == pytest.approx(both.total)


def test_edges() -> None:
    assert Sketch().quantile(0.5) is None
    assert Sketch().mean is None
    sketch = filled([0.0, 0.0, 3.0])
    assert sketch.quantiles((0, 0.5, 1)) == [0.0, 0.0, 3.0]
    assert sketch.cdf()[0] == (0.0, pytest.approx(2 / 3))
    assert sketch.cdf()[-1][1] == 1.0
    weighted = Sketch()
    weighted.add(2.0, 5)
    assert (weighted.count, weighted.total) == (5, 10)


def test_intervals_know_that_a_block_hangs_together() -> None:
    """32 blocks that differ much, each of 100 nearly equal values: the median is known as 32 values know it."""
    rng = random.Random(2)
    blocks = [filled([level + rng.random() * 1e-3 for _ in range(100)]) for level in range(1, 33)]
    interval = quantile_intervals(blocks, (0.5,))[0]
    assert interval is not None
    low, high = interval
    assert low < 15 < 18 < high  # single draws of the 3,200 values would say 16 to 17
    assert quantile_intervals(blocks[:7], (0.5,)) == [None]
