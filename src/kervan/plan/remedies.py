"""What would keep an SLO that no layout keeps: other GPUs, more of them, smaller weights, or another bound."""

import dataclasses
import math
from collections.abc import Iterator

from kervan.config.workload import Slo
from kervan.errors import KervanError
from kervan.facts.architecture import in_fp8
from kervan.facts.hardware import GPUS
from kervan.plan.evaluate import CLOSE_LOOK, GLANCE, Simulations
from kervan.plan.load import load
from kervan.plan.rank import PlannedLayout, excesses
from kervan.plan.request import PlanRequest
from kervan.plan.screen import screen

TRIED_LAYOUTS = 3  # of each other plan, those that serve most by arithmetic, and that of the largest tp
OTHER_GPUS = ("H100", "H200", "B200", "B300")
TIMES_GPUS = (2, 4, 8, 16)


def remedies(request: PlanRequest, nearest: PlannedLayout) -> list[str]:
    """Each keeps the SLO by simulation, or says what bound `nearest` keeps; the smallest change of a kind."""
    found = [words for words, other in _others(request) if _is_kept(other)]
    return [*found, *_bounds(request, nearest)]


def _others(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Other plans in words; of a kind those behind the first that is kept are not made."""
    if request.spec.quantization is None and request.gpu.fp8_flops:
        yield "weights in fp8", dataclasses.replace(request, spec=in_fp8(request.spec))
    for name in OTHER_GPUS:
        gpu = GPUS[name]
        if gpu.bandwidth_bytes_s > 1.1 * request.gpu.bandwidth_bytes_s or (
            gpu.bf16_flops > 1.1 * request.gpu.bf16_flops and gpu.bandwidth_bytes_s >= request.gpu.bandwidth_bytes_s
        ):
            other = dataclasses.replace(request, gpu=gpu)
            if _is_kept(other):
                yield f"--gpu {name}", other
                break
    if request.counts_gpus or request.fixed:
        return
    for times in TIMES_GPUS:
        gpus = request.gpus * times
        nodes = max(request.nodes, math.ceil(gpus / max(8, request.gpus_per_node)))
        other = dataclasses.replace(request, gpus=gpus, nodes=nodes)
        if _is_kept(other):
            yield f"--gpus {gpus}" + (f" --nodes {nodes}" if nodes > 1 else ""), other
            break


def _is_kept(request: PlanRequest) -> bool:
    """Whether some layout that `kervan up` starts keeps the SLO."""
    try:
        loaded = load(request)
        screened = [one for one in screen(loaded) if one.fits and one.replica.starts_with == "kervan up"]
    except KervanError:
        return False
    simulations = Simulations(loaded)
    screened.sort(key=lambda one: one.requests_s * one.copies, reverse=True)
    tried = screened[:TRIED_LAYOUTS] + sorted(screened, key=lambda one: one.replica.tp)[-1:]
    # Without a load one request alone decides; a load may pile up slowly, which short runs do not show.
    care = CLOSE_LOOK if request.has_load else GLANCE
    return any(simulations.evaluate(one, care).keeps_slo for one in tried)


def _bounds(request: PlanRequest, nearest: PlannedLayout) -> list[str]:
    """The SLO that the nearest layout keeps, rounded up to two digits, where it serves all requests."""
    broken = {name: excess for name, excess in excesses(request, nearest).items() if excess > 1}
    if nearest.served_share < 1 or not broken:
        return []
    values_ms = {"ttft": nearest.ttft_p99_ms, "tpot": nearest.tpot_p99_ms, "e2e": nearest.e2e_p99_ms}
    kept = {f"{name}_s": _rounded_up_ms(1.1 * values_ms[name]) / 1000 for name in broken}
    bounds = {f.name: getattr(request.slo, f.name) for f in dataclasses.fields(Slo)} | kept
    return [f"--slo {Slo(**bounds)}"]


def _rounded_up_ms(value_ms: float) -> float:
    unit = 10 ** (math.floor(math.log10(max(1e-3, value_ms))) - 1)
    return float(math.ceil(value_ms / unit) * unit)
