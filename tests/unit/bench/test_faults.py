"""What a fault did to the rate."""

import pytest

from kervan.bench import faults
from kervan.bench.drive import Event
from kervan.bench.tally import Timeline


def rates(*tokens_per_s: float) -> Timeline:
    timeline = Timeline(width_s=0.5)
    for number, rate in enumerate(tokens_per_s):
        timeline.at(number / 2).tokens = rate / 2
    return timeline


def test_the_effect_of_a_fault() -> None:
    timeline = rates(0, 50, *[100] * 8, 20, 20, 20, 60, 95, *[100] * 10)
    timeline.cells[11].gap_max_s, timeline.cells[11].errors = 1.75, 2
    (effect,) = faults.effects(timeline, [Event(5.0, "kill", 0)], 12.5)
    assert effect.tokens_per_s_before == pytest.approx(100)
    assert effect.tokens_per_s_lowest == pytest.approx(20)
    assert effect.dip == pytest.approx(0.8)
    assert effect.recovered_after_s == pytest.approx(1.5)
    assert (effect.longest_gap_s, effect.errors) == (1.75, 2)


def test_a_fault_without_effect_and_one_without_end() -> None:
    quiet, lasting = faults.effects(rates(*[100] * 20, *[10] * 10), [Event(4.0, "a"), Event(10.0, "b")], 15.0)
    assert (quiet.dip, quiet.recovered_after_s) == (pytest.approx(0), 0.0)
    assert lasting.recovered_after_s is None
