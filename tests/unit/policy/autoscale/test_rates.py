"""What a replica takes: from a model, corrected, and learned."""

import json
import math
from typing import Any

import pytest
from harness.paper_fleet import PaperReplica

from kervan.config.workload import Slo
from kervan.policy.autoscale.correction import CALM_S, EASED_S, LEAST, Correction, pressure
from kervan.policy.autoscale.learned_rate import FULL_SHARE, UNKNOWN_RATE, LearnedRate
from kervan.policy.autoscale.replica_rate import ModelledRates, ReplicaRate
from kervan.policy.autoscale.state import Demand

SLO = Slo(ttft_s=3.0, tpot_s=0.1)
RATE = ReplicaRate(requests_per_s=2.0, places=20.0, stay_s=10.0, quiet_stay_s=10.0, wait_s=1.5)


def test_the_rate_is_the_highest_within_the_slo() -> None:
    found = ModelledRates(PaperReplica(2.0), SLO).at(1000, 100)
    assert found.requests_per_s == pytest.approx(2.0, rel=0.05)  # lengths are rounded to 8%
    assert found.stay_s == pytest.approx(10.0)
    assert found.places == pytest.approx(20.0, rel=0.05)
    assert found.wait_s == 1.5
    assert found.prompt_share == pytest.approx(0.5, abs=0.03)
    assert not found.relaxed


def test_longer_requests_are_fewer() -> None:
    rates = ModelledRates(PaperReplica(2.0), SLO)
    assert rates.at(2000, 100).requests_per_s == pytest.approx(2.0 / 1.5, rel=0.08)
    assert rates.at(1000, 300).requests_per_s == pytest.approx(1.0, rel=0.08)


def test_bounds_that_no_replica_keeps_are_those_of_an_empty_one() -> None:
    found = ModelledRates(PaperReplica(2.0), Slo(tpot_s=0.01)).at(1000, 100)
    assert found.requests_per_s == pytest.approx(2.0, rel=0.05)
    assert found.relaxed == "TPOT 0.01 s (an empty replica needs 0.05 s)"


def corrected(seconds: int, correction: Correction | None = None, begin_s: int = 0, **more: Any) -> Correction:
    found = correction or Correction()
    for at_s in range(begin_s, begin_s + seconds, 5):
        given: dict[str, Any] = {
            "now_s": float(at_s), "dt": 5.0, "per_replica": 1.0, "peak": 1.0, "in_flight": 10.0, "waiting": 0.0,
            "good": 1.0, "prompt_tokens": 1000, "output_tokens": 100, "rate": RATE, "model": PaperReplica(2.0),
            "pressure": 0.5, "steady_s": 1000.0, "load_steady_s": 1000.0,
        }  # fmt: skip
        given |= {"good_lately": more.get("good", 1.0), "in_flight_now": more.get("in_flight", 10.0)}
        found.observe(**(given | more))
        found = Correction.from_memory(json.loads(json.dumps(found.to_memory())))
    return found


def test_a_model_that_is_right_is_left_alone() -> None:
    assert corrected(2000).factor == pytest.approx(1.0, abs=0.01)


def test_steps_that_take_longer_show_in_how_many_are_in_flight() -> None:
    # 1/s for 10 s each are 10; 14 are there, so that all takes 1.4 times as long.
    assert corrected(3000, in_flight=14.0).factor == pytest.approx(1 / 1.4, rel=0.03)


def test_of_a_load_that_moves_nothing_is_learned_of_the_pace() -> None:
    # Many are in flight when a burst has begun, and few have come in the last minute.
    assert corrected(3000, in_flight=100.0, load_steady_s=10.0).factor == pytest.approx(1.0, abs=0.01)


def test_a_queue_that_is_gone_says_nothing_of_the_pace() -> None:
    # The mean of a minute holds it for minutes: 100, of which 90 were those that waited.
    assert corrected(300, in_flight=100.0, in_flight_now=10.0).factor == 1.0
    assert corrected(300, in_flight=14.0, in_flight_now=8.0).factor < 0.95  # few may be few by chance


def test_a_rate_at_which_all_is_well_is_one_that_a_replica_takes() -> None:
    found = corrected(600, per_replica=2.4, peak=2.4, in_flight=24.0)
    assert 2.0 * found.factor == pytest.approx(2.4, rel=0.05)
    pressed = corrected(600, per_replica=2.4, peak=2.4, in_flight=24.0, pressure=0.95)
    assert pressed.factor == pytest.approx(1.0, abs=0.05)


def test_answers_that_miss_the_slo_with_no_queue_lower_the_rate() -> None:
    assert corrected(900, good=0.97).factor < 0.7
    assert corrected(100_000, good=0.9, in_flight=1.0).factor >= LEAST
    assert corrected(900, good=0.97, waiting=20.0).factor == pytest.approx(1.0, abs=0.01)  # the queue is to blame
    assert corrected(int(CALM_S), good=0.97, begin_s=0, peak=9.0).factor == pytest.approx(1.0, abs=0.01)
    assert corrected(900, good=0.97, is_growing=True).factor == pytest.approx(1.0, abs=0.01)  # help is under way
    over = corrected(900, good=0.97, good_lately=1.0)  # what is late was late minutes ago
    assert over.factor == pytest.approx(1.0, abs=0.01)


def test_a_rate_that_was_lowered_is_forgiven_in_half_an_hour() -> None:
    lowered = corrected(600, good=0.97)
    assert lowered.proven < 0.8
    calm = {"per_replica": 0.5, "peak": 0.5, "in_flight": 5.0}
    assert corrected(1800, lowered, 600, **calm).proven == pytest.approx(1 - (1 - lowered.proven) / math.e, rel=0.02)


def test_what_more_replicas_do_not_mend_is_not_their_rate() -> None:
    found, eased = corrected(300, good=0.97), {"per_replica": 0.5, "peak": 0.5, "in_flight": 5.0}
    assert found.factor < 0.9
    found = corrected(60, found, 300, good=0.97, **eased)
    assert found.factor < 0.9  # who kept the SLO is an average of five minutes, in which replicas had more to do
    found = corrected(int(EASED_S), found, 360, good=0.97, **eased)
    assert found.factor == pytest.approx(1.0, abs=0.01)
    found = corrected(600, found, 660, good=0.97, **eased)
    assert found.factor == pytest.approx(1.0, abs=0.01)


def test_pressure_is_how_close_the_nearer_bound_is() -> None:
    assert pressure(Demand(window_s=1.0, ttft_p95_s=1.5, tpot_p95_s=0.09), SLO) == pytest.approx(0.9)
    assert pressure(Demand(window_s=1.0), SLO) == 0.0


def learned(seconds: int, found: LearnedRate | None = None, **more: float) -> LearnedRate:
    found = found or LearnedRate()
    for _ in range(0, seconds, 5):
        given = {"per_replica": 1.0, "finished": 1.0, "in_flight": 10.0, "waiting": 0.0, "good": 1.0, "pressure": 0.4, "dt": 5.0}  # fmt: skip
        found.observe(**(given | more))
        found = LearnedRate.from_memory(json.loads(json.dumps(found.to_memory())))
    return found


def test_nothing_seen_is_a_guess() -> None:
    assert LearnedRate().rate(SLO).requests_per_s == UNKNOWN_RATE


@pytest.mark.parametrize(("pressed", "rate"), [(0.4, 1.5), (0.64, 1.25), (0.8, 1.0), (1.6, 0.5)])
def test_the_rate_without_a_model_is_as_far_as_the_pressure_lets(pressed: float, rate: float) -> None:
    assert learned(600, pressure=pressed).rate(SLO).requests_per_s == pytest.approx(rate, rel=0.02)


def test_what_comes_out_of_full_replicas_is_the_most() -> None:
    found = learned(600, per_replica=3.0, finished=1.2, waiting=30.0, in_flight=40.0, good=0.5)
    assert found.rate(SLO).requests_per_s <= FULL_SHARE * 1.2 + 1e-6


def test_what_went_well_is_remembered() -> None:
    found = learned(600, per_replica=2.0)
    found = learned(300, found, per_replica=0.2, in_flight=2.0)
    assert found.rate(SLO).requests_per_s > 1.8
    assert math.isfinite(found.rate(Slo()).wait_s)
