"""Fifth step: layouts with figures, bands and prices, the best first."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kervan.facts.layout import Layout
from kervan.plan.bands import Bands
from kervan.plan.evaluate import Evaluation
from kervan.plan.load import PlanLoad
from kervan.plan.request import PlanRequest
from kervan.plan.screen import ScreenedLayout
from kervan.sim.limits import EngineLimits
from kervan.sim.memory import MemoryEstimate

ALIKE_SHARE = 0.5  # of the band's width: closer than this, two figures cannot be told apart
LIKELY = 0.5  # from here on a layout counts as keeping the SLO
START_S = 101.0  # first start of an 8B engine on a machine: benchmarks/records/layouts-replicas-2xh200-2026-11-23.json
STARTS_PER_DAY = 1.0
FP8_CACHE = "an fp8 KV cache (--engine-arg kv_cache_dtype=fp8)"
LEVERS = {
    "weights bandwidth": "more streams per replica share a read of the weights; fp8 halves it; a larger tp divides it",
    "compute": "fp8 where the GPU has it, prefix caching for repeated prompts, or more GPUs",
    "expert weights and compute": "more streams share each read of the experts; fp8 weights; a larger tp with ep",
    "KV bandwidth": f"{FP8_CACHE} halves it; a larger tp divides it",
    "KV memory": f"{FP8_CACHE}, fp8 weights, a larger tp, or more replicas",
    "all-reduce": "a smaller tp with more replicas, if the model fits; or GPUs with faster links",
    "exchange of tokens": "GPUs with faster links, or DeepEP's kernels (vLLM's all2all_backend)",
    "pipeline bubble": "a larger tp in place of pp, within a node",
    "per-step overhead": "more streams per replica, or a smaller tp: the GPU waits for launches and small kernels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """A layout with predictions, times in milliseconds. `bands` and `meets_slo`: as in `Bands`.

    `concurrency`: streams that it runs at once, over all replicas. `score`: larger is better. A layout that does not
    fit has no figures, and `reason`; so has one that serves only `served_share` of the requests that come in.
    `is_rough`: its figures come of a short look.
    """

    layout: Layout
    fits: bool
    memory: MemoryEstimate
    limits: EngineLimits
    concurrency: int = 0
    out_tok_s: float = 0.0
    requests_s: float = 0.0
    ttft_p50_ms: float = 0.0
    ttft_p95_ms: float = 0.0
    ttft_p99_ms: float = 0.0
    tpot_p50_ms: float = 0.0
    tpot_p95_ms: float = 0.0
    tpot_p99_ms: float = 0.0
    e2e_p99_ms: float = 0.0
    mean_batch: float = 0.0
    usd_per_mtok: float | None = None
    usd_per_mtok_spot: float | None = None
    usd_per_mtok_all_in: float | None = None
    binding: str = ""
    lever: str = ""
    served_share: float = 1.0
    meets_slo: float = 1.0
    is_rough: bool = False
    bands: Mapping[str, float] = field(default_factory=dict)
    score: float = 0.0
    reason: str = ""


def planned(load: PlanLoad, evaluation: Evaluation, bands: Bands) -> PlannedLayout:
    """The figures of a layout that fits, with its price and score."""
    request, layout = load.request, evaluation.screened.layout
    served_share = 1.0 if evaluation.is_stable or not load.rate else min(1.0, evaluation.requests_s / load.rate)
    mtok_per_h = evaluation.out_tok_s * 3600 / 1e6
    usd = request.usd_per_gpu_h * layout.gpus / mtok_per_h if request.usd_per_gpu_h and mtok_per_h else None
    spot = request.spot_usd_per_gpu_h * layout.gpus / mtok_per_h if request.spot_usd_per_gpu_h and mtok_per_h else None
    unscored = PlannedLayout(
        layout=layout,
        fits=True,
        memory=evaluation.screened.memory,
        limits=load.limits,
        concurrency=request.concurrency or max(1, round(evaluation.running)),
        out_tok_s=evaluation.out_tok_s,
        requests_s=evaluation.requests_s,
        ttft_p50_ms=evaluation.ttft_p50_ms,
        ttft_p95_ms=evaluation.ttft_p95_ms,
        ttft_p99_ms=evaluation.ttft_p99_ms,
        tpot_p50_ms=evaluation.tpot_p50_ms,
        tpot_p95_ms=evaluation.tpot_p95_ms,
        tpot_p99_ms=evaluation.tpot_p99_ms,
        e2e_p99_ms=evaluation.e2e_p99_ms,
        mean_batch=evaluation.mean_batch,
        usd_per_mtok=usd,
        usd_per_mtok_spot=spot,
        usd_per_mtok_all_in=None if usd is None else usd * all_in_factor(layout.dp),
        binding=evaluation.binding,
        lever=_lever(load, evaluation.binding),
        served_share=served_share,
        meets_slo=bands.meets_slo,
        bands=bands.factors,
        reason="" if evaluation.is_stable else _overload(evaluation, load.rate),
    )
    return dataclasses.replace(unscored, score=_score(request, unscored))


def unfit(load: PlanLoad, screened: ScreenedLayout) -> PlannedLayout:
    """A layout that does not fit."""
    return PlannedLayout(
        layout=screened.layout, fits=False, memory=screened.memory, limits=load.limits, reason=screened.reason,
        binding="KV memory" if screened.memory.kv_gib > 0 else "weights memory",
    )  # fmt: skip


def rank(request: PlanRequest, layouts: Iterable[PlannedLayout]) -> list[PlannedLayout]:
    """The best first: what fits, of that what `kervan up` starts, what keeps the SLO, then the goal; what does not keep
    it, by how little it fails.
    """
    return sorted(
        layouts, key=lambda c: (c.fits, c.layout.starts_with == "kervan up", *_merit(request, c)), reverse=True
    )


def better_elsewhere(request: PlanRequest, ranked: Sequence[PlannedLayout]) -> PlannedLayout | None:
    """The first that fits and `kervan up` does not start, where it would be before the best if that did not count, by
    more than the prediction's band.
    """
    best = ranked[0]
    other = next((c for c in ranked[1:] if c.fits and c.layout.starts_with != "kervan up"), None)
    if other is None or best.layout.starts_with != "kervan up" or is_close(request, best, other):
        return None
    return other if _merit(request, other) > _merit(request, best) else None


def is_close(request: PlanRequest, best: PlannedLayout, other: PlannedLayout) -> bool:
    """Whether the difference of two layouts is within the prediction's band. Both serve the same open loop with as many
    GPUs: the time per token is the difference then.
    """
    if best.served_share != other.served_share or (best.meets_slo < LIKELY) != (other.meets_slo < LIKELY):
        return False
    if not request.is_open or best.layout.gpus != other.layout.gpus:
        return is_alike(request, best, other)
    width = math.log(best.bands.get("tpot_p50_ms", 1.0))
    return abs(math.log(best.tpot_p50_ms / max(1e-9, other.tpot_p50_ms))) < ALIKE_SHARE * 2 * width


def is_alike(request: PlanRequest, best: PlannedLayout, other: PlannedLayout) -> bool:
    """Whether the goal's figures differ by less than the prediction's band."""
    if other.meets_slo < LIKELY <= best.meets_slo or other.score <= 0 or best.score <= 0:
        return False
    key = "tpot_p50_ms" if request.goal == "latency" else "out_tok_s"
    width = math.log(best.bands.get(key, 1.0))
    return abs(math.log(best.score / other.score)) < ALIKE_SHARE * 2 * width


def all_in_factor(copies: int) -> float:
    """What a price per token grows by with one spare replica, and a cold start of each replica per day."""
    return (copies + 1) / copies * (1 + STARTS_PER_DAY * START_S / 86_400)


def _lever(load: PlanLoad, binding: str) -> str:
    lever = LEVERS[binding]
    if load.limits.kv_dtype_bytes <= 1:  # it is small already
        lever = lever.replace(f"{FP8_CACHE} halves it; ", "").replace(f"{FP8_CACHE}, ", "")
    return lever.replace("fp8 weights, ", "") if load.request.spec.quantization else lever


def excesses(request: PlanRequest, candidate: PlannedLayout) -> dict[str, float]:
    """How many times its bound each 99th percentile of an SLO is, by name: above 1 it is broken."""
    values_ms = {"ttft": candidate.ttft_p99_ms, "tpot": candidate.tpot_p99_ms, "e2e": candidate.e2e_p99_ms}
    bounds_s = {"ttft": request.slo.ttft_s, "tpot": request.slo.tpot_s, "e2e": request.slo.e2e_s}
    return {name: values_ms[name] / (1000 * bound_s) for name, bound_s in bounds_s.items() if bound_s is not None}


def per_s(requests_s: float) -> str:
    """A rate with three digits at least."""
    return f"{requests_s:,.0f}" if requests_s >= 100 else f"{requests_s:.3g}"


def _overload(evaluation: Evaluation, rate: float) -> str:
    return f"overloaded: {per_s(rate)} requests/s come in, and {per_s(evaluation.requests_s)} are served"


def _merit(request: PlanRequest, candidate: PlannedLayout) -> tuple[float, ...]:
    if candidate.meets_slo >= LIKELY:
        return (True, candidate.score, -candidate.layout.gpus, -candidate.tpot_p50_ms)
    # What is not kept, by how near: to all requests served, then to the bounds; of equals, the better by the goal.
    excess = max(excesses(request, candidate).values(), default=0.0) if candidate.served_share == 1 else 0.0
    return (False, candidate.served_share, -round(excess, 2), _value(request, candidate))


def _score(request: PlanRequest, candidate: PlannedLayout) -> float:
    """Larger is better: the goal, times the probability to keep the SLO."""
    return _value(request, candidate) * candidate.meets_slo


def _value(request: PlanRequest, candidate: PlannedLayout) -> float:
    if request.goal == "latency":
        return 1000 / max(1e-9, candidate.tpot_p50_ms)
    if request.goal == "throughput":
        return candidate.out_tok_s
    if candidate.usd_per_mtok is not None:
        return 1 / candidate.usd_per_mtok
    return candidate.out_tok_s / candidate.layout.gpus
