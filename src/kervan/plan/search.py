"""All layouts of a model on some GPUs, ranked; and what is to be said when none fits or two are alike."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kervan.errors import CapacityError, ConfigError
from kervan.facts import layout as layouts
from kervan.facts.layout import Layout
from kervan.plan.candidates import SEEDS, Candidate, Evaluator, Question, q_utilization
from kervan.sim import limits as engine
from kervan.sim.memory import GIB
from kervan.vendor.vllm_names import RUNNER_V2_ARCHITECTURES

LIKELY = 0.5  # from here on a layout counts as keeping the SLO
REFINED = 3  # so many of many layouts are simulated with all seeds
ALIKE_SHARE = 0.5  # of the band's width: closer than this, two figures cannot be told apart


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates, the best first; those that do not fit last. `verdict` is a sentence, `notes` are more of them."""

    question: Question
    candidates: tuple[Candidate, ...]
    verdict: str
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def search(question: Question) -> Plan:
    """Every layout that the model and the GPUs allow, or the one that `question.fixed` names.

    Raises: ConfigError for a layout that the model does not allow. CapacityError when nothing fits, with what is
    missing and what would do.
    """
    evaluator = Evaluator(question)
    pairs = _pairs(question, evaluator)
    evaluator.compare(pairs)
    few = len(pairs) <= REFINED
    found = [evaluator.evaluate(replica, dp, seeds=SEEDS if few else 1) for replica, dp in pairs]
    if not any(candidate.fits for candidate in found):
        raise CapacityError(_nothing_fits(question, found))
    ranked = sorted(found, key=lambda c: _rank(question, c), reverse=True)
    if not few:  # a second look at those in front, from more runs
        again = [evaluator.evaluate(dataclasses.replace(c.layout, dp=1), c.layout.dp) for c in ranked[:REFINED]]
        ranked = sorted([*again, *ranked[REFINED:]], key=lambda c: _rank(question, c), reverse=True)
    notes = _notes(question, ranked)
    if any(evaluator.is_rough(dataclasses.replace(c.layout, dp=1)) for c in ranked):
        notes.append("layouts far behind the best were simulated once, with less load: their figures are rough")
    return Plan(question, tuple(ranked), _verdict(question, ranked), tuple(notes))


def _rank(q: Question, c: Candidate) -> tuple[float, ...]:
    """Larger is better: what fits, what keeps the SLO, then the goal; what does not keep it, by how little it fails."""
    if c.meets_slo >= LIKELY:
        return (c.fits, True, c.score, -c.layout.gpus)
    bounds = ((c.ttft_p99_ms, q.slo.ttft_s), (c.tpot_p99_ms, q.slo.tpot_s))
    excess = max((found / (1000 * bound) for found, bound in bounds if bound is not None), default=0.0)
    return (c.fits, False, -excess, -c.layout.gpus)


def _pairs(q: Question, evaluator: Evaluator) -> list[tuple[Layout, int]]:
    """(replica, copies): the given layout, or all, with as many copies as there are GPUs for. Where requests come at a
    rate, also with as many as it needs by arithmetic, and twice that.
    """
    if q.fixed:
        return [_given(q)]
    pairs = []
    for one in layouts.sizes(q.spec, gpus=q.gpus, gpus_per_node=q.gpus_per_node):
        most = layouts.most_copies(one, gpus=q.gpus, gpus_per_node=q.gpus_per_node)
        copies = {most}
        rate = q.rate or (len(q.trace) / max(1.0, q.trace[-1].at_s) if q.trace else 0.0)
        if rate and (capacity := evaluator.capacity(one)):
            needed = math.ceil(rate / capacity)
            copies |= {n for n in (max(1, needed // 2), needed, 2 * needed) if n < most}
        pairs += [(one, dp) for dp in sorted(copies)]
    return pairs


def _given(q: Question) -> tuple[Layout, int]:
    """The layout of `fixed`, whose sizes are 1 where it names none."""
    replica = Layout(q.fixed.get("tp", 1), q.fixed.get("pp", 1), 1, q.fixed.get("ep", 1))
    layouts.check(q.spec, replica)
    if replica.tp > q.gpus_per_node:
        raise ConfigError(
            f"tp={replica.tp} needs as many GPUs on one node, and a node has {q.gpus_per_node}; use at most "
            f"tp={q.gpus_per_node}, and pp for more GPUs (--layout)"
        )
    dp = q.fixed.get("dp", 1)
    if dp * replica.gpus_per_replica > q.gpus:
        raise ConfigError(
            f"tp={replica.tp} x pp={replica.pp} x dp={dp} needs {dp * replica.gpus_per_replica} GPUs, and there are "
            f"{q.gpus}; give --gpus {dp * replica.gpus_per_replica} or a smaller --layout"
        )
    return replica, dp


def _nothing_fits(q: Question, found: Sequence[Candidate]) -> str:
    """What is missing at the layout that comes nearest, and which GPU count or quantisation would do."""
    nearest = max(found, key=lambda c: (c.memory.kv_gib, c.memory.kv_tokens))
    budget = nearest.memory.total_gib * q_utilization(q)
    workspace = nearest.memory.activations_gib + nearest.memory.overhead_gib
    total = q.spec.parameters * q.spec.weight_bytes / GIB
    fixes = []
    for per_replica in (2, 4, 8, 16, 32, 64, 128):
        if per_replica > q.gpus and total / per_replica + workspace < 0.95 * budget:
            fixes.append(f"--gpus {per_replica}")
            break
    if q.spec.quantization is None:
        for name, share in (("fp8", 0.5), ("4 bit (AWQ or GPTQ)", 0.27)):
            if total * share / nearest.layout.gpus_per_replica + workspace < 0.95 * budget:
                fixes.append(f"the weights in {name}")
                break
    if nearest.memory.kv_gib > 0:
        fixes.insert(0, f"requests of at most {nearest.memory.kv_tokens} tokens")
    advice = "; use " + " or ".join(fixes) if fixes else "; no number of these GPUs up to 128 would do"
    return (
        f"{q.spec.source} ({total:.0f} GiB of weights) fits no layout on {q.gpus} x {q.gpu.name}: at {nearest.layout} "
        f"{nearest.reason}{advice}"
    )


def _verdict(q: Question, ranked: Sequence[Candidate]) -> str:
    """The strategy in plain words, by the rule that people ask for."""
    best = ranked[0]
    layout = best.layout
    across = layouts.nodes_per_replica(layout, q.gpus_per_node) > 1
    if q.spec.experts is not None and layout.ep > 1:
        words = f"experts shared out over the {layout.ep} GPUs of each replica"
    elif layout.pp > 1 and layout.tp > 1:
        words = "tensor parallel inside a node, pipeline stages between" + (" nodes" if across else " groups")
    elif layout.pp > 1:
        words = "pipeline stages"
    elif layout.tp > 1:
        words = f"tensor parallel over {layout.tp} GPUs"
    else:
        words = "the model fits one GPU: data parallel copies" if layout.dp > 1 else "the model fits one GPU"
    if layout.dp > 1 and layout.gpus_per_replica > 1:
        words += f", {layout.dp} copies"
    kept = ""
    if q.slo.ttft_s is not None or q.slo.tpot_s is not None:
        kept = f"; the SLO ({q.slo}) is kept with a probability of {best.meets_slo:.0%}"
        if best.meets_slo < LIKELY:
            kept = f"; no layout is likely to keep the SLO ({q.slo}): this one does with {best.meets_slo:.0%}"
    return f"{layout}: {words}{kept}"


def _notes(q: Question, ranked: Sequence[Candidate]) -> list[str]:
    best = ranked[0]
    notes = [f"bound by {best.binding}: {best.lever}"]
    alike = [c for c in ranked[1:] if c.fits and _is_alike(q, best, c)]
    if alike:
        names = ", ".join(str(c.layout) for c in alike[:4]) + (" and more" if len(alike) > 4 else "")
        notes.append(f"cannot be told apart from {names}: the difference is within the prediction's band")
    if not q.spec.is_known:
        notes.append(
            f"{q.spec.architecture} is not an architecture that kervan knows: counted as attention and gated MLP, by "
            "the config's numbers"
        )
    if q.gpu.name != q.calibration.gpu:
        notes.append(f"constants are those of {q.calibration.gpu} ({q.calibration.name}): calibrate for {q.gpu.name}")
    if not q.gpu.link.has_peer_to_peer and best.layout.tp > 1:
        notes.append(f"{q.gpu.name} has no direct link: the time of its all-reduce is assumed, not measured")
    if q.spec.architecture not in RUNNER_V2_ARCHITECTURES and any(c.fits and c.layout.pp > 1 for c in ranked):
        notes.append(
            f"vLLM 0.24 serves {q.spec.architecture} with its model runner V1: pipeline stages take turns, so they add "
            "memory and no speed"
        )
    if passed_on := sorted(q.arguments.keys() - engine.COUNTED):
        notes.append(
            f"the figures do not depend on engine argument {', '.join(passed_on)}; kervan up hands it to vLLM, which "
            "refuses a name that it does not know"
        )
    missing = [c for c in ranked if not c.fits]
    if missing:
        notes.append(f"does not fit: {', '.join(sorted({str(dataclasses.replace(c.layout, dp=1)) for c in missing}))}")
    return notes


def _is_alike(q: Question, best: Candidate, other: Candidate) -> bool:
    """Whether the goal's figures differ by less than the prediction's band."""
    if other.meets_slo < LIKELY <= best.meets_slo or other.score <= 0 or best.score <= 0:
        return False
    key = "tpot_p50_ms" if q.goal == "latency" else "out_tok_s"
    width = math.log(best.bands.get(key, 1.0))
    return abs(math.log(best.score / other.score)) < ALIKE_SHARE * 2 * width
