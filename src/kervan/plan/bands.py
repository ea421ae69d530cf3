"""Fourth step: how far the figures may be off, and what that leaves of the SLO."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kervan.plan.evaluate import Evaluation
from kervan.plan.request import PlanRequest

BAND_SIGMAS = 1.2816  # of a normal distribution, on either side: four of five values lie within
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


def bands(request: PlanRequest, evaluation: Evaluation) -> Bands:
    """The calibration's spread, wider where it was not measured (another GPU, stages, experts, quantisation,
    PCIe, a family that is not known): there by judgement, not by measurement.
    """
    layout = evaluation.screened.replica
    wider = 1.0 if request.calibration.is_of(request.gpu) else 1.6
    wider *= 1.3 if layout.pp > 1 else 1.0
    wider *= 1.5 if request.spec.experts is not None else 1.0
    wider *= 1.0 if request.spec.quantization is None else 1.5
    wider *= 1.0 if request.spec.is_known else 2.0
    wider *= 1.0 if request.gpu.link.has_peer_to_peer or layout.tp == 1 else 1.5
    spread = request.calibration.spread
    factors = {
        figure: math.exp(BAND_SIGMAS * wider * spread.get(key, UNKNOWN_SPREAD)) for figure, key in MEASURED_AS.items()
    }
    if not request.has_load:
        return Bands(factors, float(evaluation.keeps_slo))
    return Bands(factors, _meets_slo(request, evaluation, factors) if evaluation.is_stable else 0.0)


def _meets_slo(request: PlanRequest, evaluation: Evaluation, factors: Mapping[str, float]) -> float:
    """If errors are lognormal."""
    probability = 1.0
    for value_ms, name, bound_s in (
        (evaluation.ttft_p99_ms, "ttft_p99_ms", request.slo.ttft_s),
        (evaluation.tpot_p99_ms, "tpot_p99_ms", request.slo.tpot_s),
        (evaluation.e2e_p99_ms, "tpot_p99_ms", request.slo.e2e_s),  # most of it is the time of the tokens
    ):
        if bound_s is not None:
            sigma = math.log(factors[name]) / BAND_SIGMAS
            distance = math.log(1000 * bound_s / max(1e-6, value_ms)) / sigma
            probability *= 0.5 * (1 + math.erf(distance / math.sqrt(2)))
    return probability
