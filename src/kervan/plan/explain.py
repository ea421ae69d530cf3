"""Last step: the plan in plain words: which strategy, what binds it, and what to do when nothing fits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kervan.config.workload import Slo
from kervan.facts import layout as layouts
from kervan.plan.load import PlanLoad
from kervan.plan.rank import LIKELY, PlannedLayout, better_elsewhere, excesses, is_alike, per_s
from kervan.plan.request import PlanRequest
from kervan.plan.screen import step_time
from kervan.plan.strategies import NOT_STARTED, Strategy, strategies
from kervan.sim.memory import GIB
from kervan.units import plural
from kervan.vendor.vllm_names import COUNTED_ARGUMENTS, RUNNER_V2_ARCHITECTURES, UNSERVED_CAPABILITIES

ADVISED_GPUS = (2, 4, 8, 16, 32, 64, 128)
ROUGH = "the top three layouts are simulated in full, the rest briefly: their figures, marked ~, are rough"


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """Layouts, the best first; those that do not fit last.

    `verdict` is a sentence, `notes` are more of them, `strategies` has one for each kind of parallelism.
    """

    load: PlanLoad
    layouts: tuple[PlannedLayout, ...]
    verdict: str
    notes: tuple[str, ...] = ()
    strategies: tuple[Strategy, ...] = ()

    @property
    def request(self) -> PlanRequest:
        """What was asked for."""
        return self.load.request

    @property
    def keeps_slo(self) -> bool:
        """Whether the best layout is likely to keep the SLO; true without one, where it serves the load."""
        return self.best.meets_slo >= LIKELY

    @property
    def best(self) -> PlannedLayout:
        """The first; it fits. `kervan up` starts it, unless nothing else fits or was asked for."""
        return self.layouts[0]

    @property
    def better_elsewhere(self) -> PlannedLayout | None:
        """One that would be better than the best, and that `kervan up` does not start."""
        return better_elsewhere(self.request, self.layouts)


def explain(load: PlanLoad, ranked: Sequence[PlannedLayout], *, remedies: Sequence[str], has_rough: bool) -> LayoutPlan:
    """The plan of ranked layouts. `remedies`: what would keep the SLO where none does. `has_rough`: figures of some are
    rough.
    """
    request, best = load.request, ranked[0]
    notes = _notes(request, ranked)
    if request.goal == "cost" and request.usd_per_gpu_h is None:
        notes.append(f"no price is known for {request.gpu.name}: ranked by tokens/s per GPU; give --price")
    if has_rough:
        notes.append(ROUGH)
    verdict = _verdict(request, ranked)
    if best.meets_slo < LIKELY:
        would = "; ".join(remedies) or "nothing that was tried (fp8 weights, other GPUs, up to 16 times as many)"
        notes = [f"nearest: {verdict}", f"what would keep it: {would}", *notes]
        verdict = _why_none(load, best)
    return LayoutPlan(load, tuple(ranked), verdict, tuple(notes), strategies(load, ranked))


def step_terms(plan: LayoutPlan, planned: PlannedLayout) -> list[tuple[str, float, float]]:
    """(term, ms in a decode step, ms in a prefill step) of one pass of a layout through all stages, the largest first.

    The decode step runs the planned batch at its mean context, the prefill step a full token budget of prompts,
    without what the prefix cache has of them.
    """
    load = plan.load
    times = step_time(load, dataclasses.replace(planned.layout, dp=1))
    decode = load.decode_step(max(1, round(planned.mean_batch)))
    prefill = load.prefill_step(times.max_num_batched_tokens)
    rows: dict[str, list[float]] = {}
    for column, batch in enumerate((decode, prefill)):
        for index in range(times.layout.pp):
            terms = times.terms(index, batch)
            for name in terms.__slots__:
                rows.setdefault(name, [0.0, 0.0])[column] += 1000 * getattr(terms, name)
        if times.layout.pp > 1:
            rows.setdefault("hand_over", [0.0, 0.0])[column] += 1000 * (times.layout.pp - 1) * times.hand_over_s(batch)
    named = [(name, first, second) for name, (first, second) in rows.items() if first or second]
    return sorted(named, key=lambda row: -row[1])


def nothing_fits(load: PlanLoad, unfit: Sequence[PlannedLayout]) -> str:
    """What is missing at the layout that comes nearest, and which GPU count or quantisation would do."""
    request = load.request
    nearest = max(unfit, key=lambda c: (c.memory.kv_gib, c.memory.kv_tokens))
    budget_gib = nearest.memory.total_gib * load.limits.gpu_memory_utilization
    workspace_gib = nearest.memory.activations_gib + nearest.memory.overhead_gib
    total_gib = request.spec.weights_bytes / GIB
    fixes = []
    for per_replica in ADVISED_GPUS:
        if per_replica > request.gpus and total_gib / per_replica + workspace_gib < 0.95 * budget_gib:
            fixes.append(f"--gpus {per_replica}")
            break
    if request.spec.quantization is None:
        for name, share in (("fp8", 0.5), ("4 bit (AWQ or GPTQ)", 0.27)):
            if total_gib * share / nearest.layout.gpus_per_replica + workspace_gib < 0.95 * budget_gib:
                fixes.append(f"the weights in {name}")
                break
    if nearest.memory.kv_gib > 0:
        fixes.insert(0, f"requests of at most {nearest.memory.kv_tokens // nearest.layout.attention_dp} tokens")
    advice = "; use " + " or ".join(fixes) if fixes else "; no number of these GPUs up to 128 would do"
    return (
        f"{request.spec.source} ({total_gib:.0f} GiB of weights) fits no layout on {request.gpus} x "
        f"{request.gpu.name}: at {nearest.layout} {nearest.reason}{advice}"
    )


def _verdict(request: PlanRequest, ranked: Sequence[PlannedLayout]) -> str:
    """The strategy in plain words, by the rule that people ask for."""
    best = ranked[0]
    layout = best.layout
    across = layouts.nodes_per_replica(layout, request.gpus_per_node) > 1
    if layout.attention_dp > 1:
        strategy = f"attention data-parallel over {layout.attention_dp} GPUs, experts shared out over them"
    elif request.spec.experts is not None and layout.ep > 1:
        strategy = f"experts shared out over the {layout.ep} GPUs of each replica"
    elif layout.pp > 1 and layout.tp > 1:
        strategy = "tensor parallel inside a node, pipeline stages between" + (" nodes" if across else " groups")
    elif layout.pp > 1:
        strategy = "pipeline stages"
    elif layout.tp > 1:
        strategy = f"tensor parallel over {layout.tp} GPUs"
    else:
        strategy = "the model fits one GPU: data parallel copies" if layout.dp > 1 else "the model fits one GPU"
    if layout.dp > 1 and layout.gpus_per_replica > 1:
        strategy += f", {layout.dp} copies"
    kept = ""
    if request.slo != Slo() and best.meets_slo >= LIKELY:
        kept = f"; the SLO ({request.slo}) is kept with a probability of {best.meets_slo:.0%}"
        if not request.has_load:
            kept = f"; keeps the SLO ({request.slo}) up to {per_s(best.requests_s)} requests/s"
    counted = f"{plural(layout.gpus, 'GPU')}: " if request.counts_gpus else ""
    return f"{counted}{layout}: {strategy}{kept}"


def _why_none(load: PlanLoad, best: PlannedLayout) -> str:
    """Why no layout keeps the SLO: the bound that the nearest one misses, and by how much."""
    request = load.request
    if best.served_share < 1:
        return (
            f"No layout serves the load: {per_s(load.rate)} requests/s come in, and {best.layout} serves "
            f"{per_s(best.requests_s)}, {best.served_share:.0%}"
        )
    name, excess = max(excesses(request, best).items(), key=lambda item: item[1])
    bound_ms = 1000 * getattr(request.slo, f"{name}_s")
    alone = "" if request.has_load else " with one request at a time"
    if excess <= 1:  # within the bound, but not likely so
        return (
            f"No layout is likely to keep the SLO ({request.slo}): {best.layout} has {name.upper()} p99 of "
            f"{excess * bound_ms:.3g} ms, so near {bound_ms:.4g} ms that its probability is {best.meets_slo:.0%}"
        )
    return (
        f"No layout keeps the SLO ({request.slo}): {best.layout} comes nearest, with {name.upper()} p99 of "
        f"{excess * bound_ms:.3g} ms{alone}, {excess:.2g} times the bound of {bound_ms:.4g} ms"
    )


def _notes(request: PlanRequest, ranked: Sequence[PlannedLayout]) -> list[str]:
    best = ranked[0]
    notes = [f"bound by {best.binding}: {best.lever}"]
    same_start = [c for c in ranked[1:] if c.fits and c.layout.starts_with == best.layout.starts_with]
    alike = [c for c in same_start if is_alike(request, best, c)]
    if alike:
        names = ", ".join(str(c.layout) for c in alike[:4]) + (" and more" if len(alike) > 4 else "")
        notes.append(f"cannot be told apart from {names}: the difference is within the prediction's band")
    if best.layout.starts_with == "vllm serve":
        notes.append(f"{NOT_STARTED}; vllm serve does (last line)")
    notes += request.spec.notes
    if request.gpu.compute_capability in UNSERVED_CAPABILITIES:
        notes.append(
            f"vLLM 0.24 to 0.32 does not serve {request.gpu.name}: its wheels have no kernels for compute capability "
            f"{request.gpu.compute_capability}; the plan is for an older vLLM or a build with CUDA 12"
        )
    if not request.calibration.is_of(request.gpu):
        notes.append(
            f"constants are those of {request.calibration.gpu} ({request.calibration.name}): "
            f"calibrate for {request.gpu.name}"
        )
    if not request.gpu.link.has_peer_to_peer and best.layout.tp > 1:
        notes.append(f"{request.gpu.name} has no direct link: the time of its all-reduce is assumed, not measured")
    if request.spec.architecture not in RUNNER_V2_ARCHITECTURES and any(c.fits and c.layout.pp > 1 for c in ranked):
        notes.append(
            f"vLLM 0.24 serves {request.spec.architecture} with its model runner V1: pipeline stages take turns, so "
            "they add memory and no speed"
        )
    if passed_on := sorted(request.arguments.keys() - COUNTED_ARGUMENTS):
        notes.append(f"the figures do not depend on engine argument {', '.join(passed_on)}; kervan up hands it to vLLM")
    unfit = [c for c in ranked if not c.fits]
    if unfit:
        notes.append(f"does not fit: {', '.join(sorted({str(dataclasses.replace(c.layout, dp=1)) for c in unfit}))}")
    return notes
