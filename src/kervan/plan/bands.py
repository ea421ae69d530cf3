"""Fourth step: how far the figures may be off, and what that leaves of the SLO."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from kervan.plan.evaluate import Evaluation
from kervan.plan.load import PlanLoad
from kervan.plan.request import PlanRequest
from kervan.plan.screen import token_s

BAND_SIGMAS = 1.2816  # of a normal distribution, on either side: four of five values lie within
MAX_FACTOR = 10.0  # at which a band ends: where a replica that is somewhat slower falls behind, there is no end
# How much slower a replica may be than predicted, in standard deviations, and how likely that is beside the others.
SLOWER = tuple(0.5 * i for i in range(-6, 7))
LIKELIHOODS = tuple(math.exp(-(sigmas**2) / 2) for sigmas in SLOWER)
STEP_DOWN, MAX_STEPS_DOWN = 0.03, 20  # of a rate, in search of one that is served by arithmetic
SURE_SHARE = 0.01  # a probability that differs by less between the slowest and the fastest of them
UNKNOWN_SPREAD = 0.1  # of a figure of which the calibration says nothing
MEASURED_AS = {
    "out_tok_s": "out_tok_s", "tpot_p50_ms": "tpot_p50_s", "tpot_p99_ms": "tpot_p50_s", "ttft_p50_ms": "ttft_p50_s",
    "ttft_p99_ms": "ttft_p99_s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bands:
    """`factors`: by figure, the factor up and down within which four of five measurements should lie.

    `meets_slo`: the probability that the 99th percentiles are within the SLO. Where no load is given and a layout gets
    as much as it takes within the SLO, 1, and 0 where even one request at a time is not within it.
    """

    factors: Mapping[str, float]
    meets_slo: float


def bands(load: PlanLoad, evaluation: Evaluation) -> Bands:
    """The calibration's spread, wider where it was not measured (another GPU, stages, experts, quantisation, PCIe, a
    family that is not known): there by judgement, not by measurement.

    Where requests come at a rate, times have a second error: that of the replica's speed. One that is 5% slower than
    predicted has the times of 5% more requests, 5% longer. At half load that is little, and just below saturation many
    times as much.
    """
    request, wider = load.request, _wider(load.request, evaluation)
    spread = {key: wider * value for key, value in request.calibration.spread.items()}
    sigmas = {figure: spread.get(key, wider * UNKNOWN_SPREAD) for figure, key in MEASURED_AS.items()}
    slower = _Slowdowns(load, evaluation, sigmas["out_tok_s"])
    late = math.log(slower.at(BAND_SIGMAS))
    factors = {
        figure: min(MAX_FACTOR, math.exp(math.hypot(BAND_SIGMAS * sigma, late if figure != "out_tok_s" else 0.0)))
        for figure, sigma in sigmas.items()
    }
    if not request.has_load:
        return Bands(factors, float(evaluation.keeps_slo))
    return Bands(factors, _meets_slo(request, evaluation, sigmas, slower) if evaluation.is_stable else 0.0)


def _wider(request: PlanRequest, evaluation: Evaluation) -> float:
    """How many times the calibration's spread: more where less was measured."""
    layout = evaluation.screened.replica
    wider = 1.0 if request.calibration.is_of(request.gpu) else 1.6
    wider *= 1.3 if layout.pp > 1 else 1.0
    wider *= 1.5 if request.spec.experts is not None else 1.0
    wider *= 1.0 if request.spec.quantization is None else 1.5
    wider *= 1.5 if layout.attention_dp > 1 else 1.0
    wider *= 1.0 if request.spec.is_known else 2.0
    return wider * (1.0 if request.gpu.link.has_peer_to_peer or layout.tp == 1 else 1.5)


class _Slowdowns:
    """How times of an open loop grow with those of a replica's steps, by arithmetic.

    A replica whose steps take `x` times as long is one whose clock runs slower: at a rate it does what it was to do at
    `x` times the rate, in `x` times the time.
    """

    def __init__(self, load: PlanLoad, evaluation: Evaluation, sigma: float) -> None:
        self._load, self._screened, self._sigma = load, evaluation.screened, sigma
        self._rate = self._token_s = 0.0
        if load.request.concurrency is not None or not evaluation.is_stable:
            return
        rate = (load.rate or evaluation.requests_s) / evaluation.screened.copies
        # The simulation may serve a rate at which the arithmetic falls behind: then it is just below such a one.
        for _ in range(MAX_STEPS_DOWN):
            if not math.isinf(before_s := token_s(load, self._screened, rate)):
                self._rate, self._token_s = rate, before_s
                return
            rate *= 1 - STEP_DOWN

    def at(self, sigmas: float) -> float:
        """How many times as long all takes in a replica that is so many standard deviations slower than predicted;
        infinite where it falls behind. A closed loop waits for its replica: 1.
        """
        if not self._rate:
            return 1.0
        longer = math.exp(sigmas * self._sigma)
        return longer * token_s(self._load, self._screened, longer * self._rate) / self._token_s


def _meets_slo(request: PlanRequest, evaluation: Evaluation, sigmas: Mapping[str, float], slower: _Slowdowns) -> float:
    """If errors are lognormal: the mean over the speeds that the replica may have."""
    bounds = [
        (math.log(1000 * bound_s / max(1e-6, value_ms)), sigmas[name])
        for value_ms, name, bound_s in (
            (evaluation.ttft_p99_ms, "ttft_p99_ms", request.slo.ttft_s),
            (evaluation.tpot_p99_ms, "tpot_p99_ms", request.slo.tpot_s),
            (evaluation.e2e_p99_ms, "tpot_p99_ms", request.slo.e2e_s),  # most of it is the time of the tokens
        )
        if bound_s is not None
    ]

    def probability(late: float) -> float:
        """With all times longer by this, as a logarithm."""
        if math.isinf(late):
            return 0.0
        return math.prod(0.5 * (1 + math.erf((room - late) / sigma / math.sqrt(2))) for room, sigma in bounds)

    fastest, slowest = (probability(math.log(slower.at(sigmas))) for sigmas in (SLOWER[0], SLOWER[-1]))
    if fastest - slowest < SURE_SHARE:  # far from saturation
        return (slowest + fastest) / 2
    return statistics.fmean((probability(math.log(slower.at(sigmas))) for sigmas in SLOWER), LIKELIHOODS)
