"""Data, tensor, pipeline and expert parallelism: whether the best layout uses each, and why, with its numbers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kervan.plan.load import PlanLoad
from kervan.plan.rank import LIKELY, PlannedLayout, better_elsewhere, excesses, is_close
from kervan.plan.screen import step_time
from kervan.units import plural

Name = Literal["data parallelism", "tensor parallelism", "pipeline parallelism", "expert parallelism"]
SAME_SHARE = 0.03  # two figures that differ by less are called the same
NOT_STARTED = "kervan up does not start data-parallel attention: each of its replicas is one engine core"


@dataclass(frozen=True, slots=True)
class Strategy:
    """A kind of parallelism. `reason`: a sentence without its full stop."""

    name: Name
    use: bool
    reason: str


def strategies(load: PlanLoad, ranked: Sequence[PlannedLayout]) -> tuple[Strategy, ...]:
    """One for each kind, for the best of the ranked layouts."""
    best = ranked[0]
    same_start = [c for c in ranked if c.layout.starts_with == best.layout.starts_with or not c.fits]
    return (
        Strategy("data parallelism", best.layout.dp > 1, _data(load, same_start)),
        Strategy("tensor parallelism", best.layout.tp > 1, _tensor(load, same_start)),
        Strategy("pipeline parallelism", best.layout.pp > 1, _pipeline(load, same_start)),
        Strategy("expert parallelism", best.layout.ep > 1, _expert(load, same_start) + _attention_dp(load, ranked)),
    )


def _data(load: PlanLoad, ranked: Sequence[PlannedLayout]) -> str:
    best, size = ranked[0], ranked[0].layout
    room = int(best.memory.kv_tokens / load.context_tokens)
    gpus = "one GPU" if size.gpus_per_replica == 1 else f"{size.gpus_per_replica} GPUs"
    length = f"{load.context_tokens:,.0f} tokens (prompt and half of the output)"
    holds = f"a replica on {gpus} has KV cache for {room:,} sequences of {length}"
    if size.dp > 1:
        return f"{holds}, and replicas do not communicate"
    if load.request.is_open and best.served_share == 1 and best.meets_slo >= LIKELY:
        return f"one replica serves the load: {holds}"
    other = _first(ranked, lambda c: c.layout.dp > 1)
    if other is None:
        unfit = next((c for c in ranked if not c.fits and c.layout.dp > 1), None)
        return f"{unfit.layout} does not fit: {unfit.reason}" if unfit else f"the GPUs make one replica only: {holds}"
    return _compared(load, best, other)


def _tensor(load: PlanLoad, ranked: Sequence[PlannedLayout]) -> str:
    best = ranked[0]
    if best.layout.tp > 1:
        unfit = next((c for c in ranked if not c.fits and c.layout.tp == 1 and c.layout.pp == 1), None)
        if unfit is not None:
            return f"TP1 does not fit: {unfit.reason}"
        other = _first(ranked, lambda c: c.layout.tp == 1)
        if other is None:
            return "it was asked for"
        each, others = (c.memory.kv_tokens / c.layout.gpus_per_replica for c in (best, other))
        return f"{_compared(load, best, other)}; {each / others:.1f} times the KV cache per GPU"
    other = _first(ranked, lambda c: c.layout.tp > 1)
    if other is None:
        return _no_other(load, ranked, lambda c: c.layout.tp > 1, "the GPUs or the model's heads allow no other")
    return f"{_compared(load, best, other)}; {_all_reduce_share(load, other):.0%} of a decode step is all-reduce"


def _pipeline(load: PlanLoad, ranked: Sequence[PlannedLayout]) -> str:
    best = ranked[0]
    if best.layout.pp > 1:
        other = _first(ranked, lambda c: c.layout.pp == 1)
        if other is not None:
            return _compared(load, best, other)
        unfit = next((c for c in ranked if not c.fits and c.layout.pp == 1), None)
        return f"without stages {unfit.layout} does not fit: {unfit.reason}" if unfit else "it was asked for"
    other = _first(ranked, lambda c: c.layout.pp > 1)
    if other is None:
        return _no_other(load, ranked, lambda c: c.layout.pp > 1, "there is one GPU for each replica at most")
    why = "each token passes all stages one after the other"
    if not step_time(load, dataclasses.replace(other.layout, dp=1)).is_pipelined:
        why = "stages take turns with vLLM's model runner V1"
    return f"{_compared(load, best, other)}: {why}; it helps where a replica needs several nodes"


def _expert(load: PlanLoad, ranked: Sequence[PlannedLayout]) -> str:
    experts = load.request.spec.experts
    if experts is None:
        return "the model has no experts"
    best = ranked[0]
    is_used = best.layout.ep > 1
    other = _first(ranked, lambda c: (c.layout.ep > 1) != is_used and c.layout.tp > 1)
    if is_used:
        each = experts.count // best.layout.ep
        return f"{each} whole experts per GPU" + ("" if other is None else f"; {_compared(load, best, other)}")
    if best.layout.tp == 1:
        return f"a replica's experts are all on its GPUs already (TP1): {experts.count} of them"
    if other is None:
        return _no_other(load, ranked, lambda c: c.layout.ep > 1, "the experts do not divide over the GPUs")
    return f"{_compared(load, best, other)}: the weights take as much either way, and the fullest GPU holds all up"


def _attention_dp(load: PlanLoad, ranked: Sequence[PlannedLayout]) -> str:
    """What data-parallel attention over the ranks that share the experts would deliver, beside the rest; empty where
    the best layout has it, or it does not fit.
    """
    best = ranked[0]
    other = _first(ranked, lambda c: c.layout.attention_dp > 1)
    if best.layout.attention_dp > 1 or other is None:
        return ""
    ranks = other.layout.attention_dp
    compared = _compared(load, best, other)
    if is_close(load.request, best, other):
        compared = f"{other.layout} cannot be told apart, within the prediction's band"
    elif best.served_share < 1 == other.served_share:
        compared = f"{other.layout} serves all of the load"
    elif best.meets_slo < LIKELY <= other.meets_slo:
        compared = f"{other.layout} keeps the SLO"
    words = f"; attention data-parallel with EP{ranks}: {compared}"
    if better_elsewhere(load.request, ranked) is None:
        return words
    each, others = (c.memory.kv_tokens / c.layout.gpus_per_replica for c in (other, best))
    return (
        f"{words}, at {other.out_tok_s:,.0f} tok/s, with {each / others:.1f} times the KV cache; kervan up does not "
        f"start it: vllm serve MODEL --data-parallel-size {ranks} --enable-expert-parallel"
    )


def _first(ranked: Sequence[PlannedLayout], matches: Callable[[PlannedLayout], bool]) -> PlannedLayout | None:
    """The best of those that fit and match."""
    return next((c for c in ranked if c.fits and matches(c)), None)


def _no_other(
    load: PlanLoad, ranked: Sequence[PlannedLayout], matches: Callable[[PlannedLayout], bool], otherwise: str
) -> str:
    """Why there is no such layout to compare with."""
    if load.request.fixed:
        return "another layout was asked for"
    unfit = next((c for c in ranked if not c.fits and matches(c)), None)
    return f"{unfit.layout} does not fit: {unfit.reason}" if unfit else otherwise


def _compared(load: PlanLoad, best: PlannedLayout, other: PlannedLayout) -> str:
    """What the other layout does worse, or no better."""
    request = load.request
    if other.served_share < 1:
        return f"{other.layout} serves {other.served_share:.0%} of the load"
    if other.meets_slo < LIKELY <= best.meets_slo:
        name, excess = max(excesses(request, other).items(), key=lambda item: item[1])
        return f"{other.layout} misses the SLO: {name.upper()} p99 is {excess:.2f} times its bound"
    if request.is_open and other.layout.gpus != best.layout.gpus:
        taken = plural(other.layout.gpus, "GPU")
        return f"{other.layout} takes {taken} for the load, and {best.layout} takes {best.layout.gpus}"
    if request.is_open or request.goal == "latency":
        ratio = other.tpot_p50_ms / max(1e-9, best.tpot_p50_ms)
        return f"{other.layout} takes {_more_or_less(ratio, 'less')} time per token"
    ratio = (other.out_tok_s / other.layout.gpus) / max(1e-9, best.out_tok_s / best.layout.gpus)
    return f"{other.layout} delivers {_more_or_less(ratio, 'fewer')} tokens/s per GPU"


def _more_or_less(ratio: float, less: str) -> str:
    if abs(math.log(max(1e-9, ratio))) < SAME_SHARE:
        return "about the same"
    return f"{ratio:.2g} times the" if ratio > 2 else f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else less}"


def _all_reduce_share(load: PlanLoad, planned: PlannedLayout) -> float:
    times = step_time(load, dataclasses.replace(planned.layout, dp=1))
    terms = times.terms(0, load.decode_step(max(1, round(planned.mean_batch))))
    return terms.all_reduce / terms.total_s
