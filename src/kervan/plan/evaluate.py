"""Third step: what a layout delivers under the load: the replica is simulated, its copies are counted."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kervan.config.workload import Slo
from kervan.facts.layout import Layout
from kervan.plan import serving
from kervan.plan.load import PlanLoad
from kervan.plan.screen import ScreenedLayout, most_sequences, steady_batch
from kervan.plan.serving import LoadResult
from kervan.sim.step_time import Batch

MANY_STREAMS = 1024
MAX_STREAM_REQUESTS = 512  # of a closed loop, as in the measurements
LEAST_OPEN_REQUESTS, MAX_OPEN_REQUESTS = 24, 720
PIPELINE_LOSS = 0.35  # of the arithmetic's rate for each stage more, where a search begins: it knows no bubbles
MAX_FACTORS = 24
# An open loop is run again with as many requests in flight as it had on average, while these are so many more than it
# began with.
MORE_IN_FLIGHT, STEADY_ROUNDS = 1.5, 3
HEADROOM = 1.1  # times the rate must be served by as many GPUs as are advised for it


@dataclass(frozen=True, slots=True)
class Care:
    """How closely a layout is looked at.

    `seeds`: runs of each load. `requests`: measured of an open loop in each; more, `MAX_OPEN_REQUESTS` at most, where
    they come in less than `least_s`: a busy replica swings for longer. `factor`: by which the search for the highest
    rate within the SLO goes up and down; it ends when a rate that keeps it and one that does not differ by less than
    `close_share`. `pipeline_steps`: so long an open loop of a pipeline is followed, about; its steps are composed one
    by one.
    """

    seeds: int
    requests: int
    least_s: float
    factor: float
    close_share: float
    pipeline_steps: int


GLANCE = Care(seeds=1, requests=60, least_s=2.0, factor=1.25, close_share=0.26, pipeline_steps=800)
FIRST_LOOK = Care(seeds=1, requests=100, least_s=5.0, factor=1.25, close_share=0.15, pipeline_steps=1000)
CLOSE_LOOK = Care(seeds=3, requests=320, least_s=25.0, factor=1.06, close_share=0.02, pipeline_steps=2000)
FULL_SHARE = 0.93  # of the KV cache, from which on it counts as full
BINDING = {
    "weights": "weights bandwidth", "compute": "compute", "experts": "expert weights and compute",
    "kv_read": "KV bandwidth", "prefill_attention": "compute", "elementwise": "compute", "kernels": "per-step overhead",
    "all_reduce": "all-reduce", "exchange": "exchange of tokens", "head": "weights bandwidth",
    "overhead": "per-step overhead", "host": "per-step overhead",
}  # fmt: skip

# By seed: (replicas, what one of them served).
Runs = list[list[tuple[int, LoadResult]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a layout delivers, over all its replicas; times in milliseconds.

    `running`: requests that are in flight, mean over time, over all replicas; `mean_batch`: sequences in a step of the
    fullest replica. `is_stable`: requests are served as fast as they come. `keeps_slo`: the figures are within the SLO.
    `binding`: what most of the time goes to.
    """

    screened: ScreenedLayout
    out_tok_s: float
    requests_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p95_ms: float
    tpot_p99_ms: float
    e2e_p99_ms: float
    mean_batch: float
    running: float
    is_stable: bool
    keeps_slo: bool
    binding: str


class Simulations:
    """Evaluates layouts under one load. A simulation that comes again (a second look from more seeds) is not run again;
    nothing else is kept, and the order of calls does not matter.
    """

    def __init__(self, load: PlanLoad) -> None:
        self._load = load
        self._closed_results: dict[tuple[ScreenedLayout, int, int], LoadResult] = {}
        self._open_results: dict[tuple[Layout, int, float, int, int], LoadResult] = {}

    def evaluate(self, screened: ScreenedLayout, care: Care = CLOSE_LOOK) -> Evaluation:
        """The figures of a layout that fits."""
        request, rate = self._load.request, 0.0
        if request.concurrency is not None:
            runs = self._closed(screened, request.concurrency, care.seeds)
        elif request.is_open:
            rate = 0.0 if request.trace else request.rate or 0.0
            runs = self._open(screened, rate / screened.copies, care)
        else:
            each = self.highest_rate(screened, care)
            rate = each * screened.copies
            runs = self._open(screened, each, care) if rate else self._closed(screened, screened.copies, 1)
        return _evaluation(self._load, screened, runs, rate)

    def _closed(self, screened: ScreenedLayout, streams: int, seeds: int) -> Runs:
        """Streams are dealt evenly; a replica without one idles."""
        least, more = divmod(streams, screened.copies)
        shares = [(n, each) for n, each in ((screened.copies - more, least), (more, least + 1)) if n and each]
        seeds = seeds if least < MANY_STREAMS else 1  # of so many the quantiles hardly differ
        return [[(n, self._closed_result(screened, each, seed)) for n, each in shares] for seed in range(seeds)]

    def _closed_result(self, screened: ScreenedLayout, streams: int, seed: int) -> LoadResult:
        key = (screened, streams, seed)
        if key not in self._closed_results:
            each = 1 if screened.is_rough else 4
            count = max(8, min(each * streams, MAX_STREAM_REQUESTS), streams)
            self._closed_results[key] = serving.closed_loop(
                screened.step_time, self._load.closed_loop(count, seed), streams=streams,
                kv_tokens=screened.memory.kv_tokens, frontends=self._frontends(screened), seed=seed,
            )  # fmt: skip
        return self._closed_results[key]

    def _open(self, screened: ScreenedLayout, rate: float, care: Care) -> Runs:
        is_single = self._load.request.trace or screened.step_time.is_pipelined  # whose runs take long, step by step
        seeds = 1 if is_single else care.seeds
        runs: Runs = []
        for seed in range(seeds):
            result = self._open_result(screened, rate, care, seed)
            runs.append([(screened.copies, result)])
            if not result.is_stable:  # whatever the others say
                break
        return runs

    def _open_result(self, screened: ScreenedLayout, rate: float, care: Care, seed: int) -> LoadResult:
        """Of one replica at `rate` requests per second (of a trace as it says), in a steady state."""
        is_trace = bool(self._load.request.trace)
        most = most_sequences(self._load, screened.step_time, screened.memory)
        running = (
            0 if is_trace else round(min(most, steady_batch(self._load, screened.step_time, screened.memory, rate)))
        )
        count = self._affordable(screened, rate, care, running)
        key = (screened.replica, screened.copies if is_trace else 0, rate, count, seed)
        if key not in self._open_results:
            result = self._simulated(screened, rate, count, running, seed)
            for _ in range(0 if is_trace else STEADY_ROUNDS):
                # By Little's law; more than it began with: it was on its way to there.
                if result.in_flight <= MORE_IN_FLIGHT * running + 2 or running >= most:
                    break
                running = min(most, round(result.in_flight))
                result = self._simulated(screened, rate, count, running, seed)
            if not is_trace and result.in_flight > MORE_IN_FLIGHT * most + 2:  # more than it can run, for good
                result = dataclasses.replace(result, is_stable=False)
            self._open_results[key] = result
        return self._open_results[key]

    def _simulated(self, screened: ScreenedLayout, rate: float, count: int, running: int, seed: int) -> LoadResult:
        loop = self._load.open_loop(rate, screened.copies, count=count, running=running, seed=seed)
        return serving.open_loop(
            screened.step_time, loop.requests, kv_tokens=screened.memory.kv_tokens, measured=loop.measured,
            running=loop.running, frontends=self._frontends(screened), seed=seed,
        )  # fmt: skip

    def _frontends(self, screened: ScreenedLayout) -> int:
        """Of one replica; `vllm serve` starts one for each data-parallel rank."""
        return self._load.request.frontends * screened.replica.attention_dp

    def _affordable(self, screened: ScreenedLayout, rate: float, care: Care, running: int) -> int:
        """How many requests are measured: fewer where a pipeline would take more steps than there is time for."""
        times = screened.step_time
        wanted = max(care.requests, min(MAX_OPEN_REQUESTS, int(care.least_s * rate)))
        if not times.is_pipelined:
            return wanted
        sequences = max(1, running // times.layout.pp)
        batch = Batch(sequences, sequences * self._load.context_tokens, 0, 0.0, sequences)
        step_s = max(*times.stages_s(batch), times.total_s(batch) / times.layout.pp)
        return max(LEAST_OPEN_REQUESTS, min(wanted, int(care.pipeline_steps * step_s * rate)))

    def highest_rate(self, screened: ScreenedLayout, care: Care = CLOSE_LOOK) -> float:
        """Requests per second of one replica at which its 99th percentiles are just within the SLO; 0 where those of
        one request at a time are not. A closer look begins where the first one ended.
        """
        slo, factor = self._load.request.slo, care.factor

        def is_kept(rate: float) -> bool:
            return keeps(slo, [result for [(_, result)] in self._open(screened, rate, care)])

        if not keeps(slo, [self._closed_result(screened, 1, 0)]):
            return 0.0
        if care == CLOSE_LOOK:
            kept = self.highest_rate(screened, FIRST_LOOK)
        else:
            kept = screened.requests_s / (1 + PIPELINE_LOSS * (screened.replica.pp - 1))
        broken = math.inf
        for _ in range(MAX_FACTORS):
            if is_kept(kept):
                break
            kept, broken = kept / factor, kept
        while math.isinf(broken):
            if is_kept(kept * factor):
                kept, factor = kept * factor, factor * care.factor
            else:
                broken = kept * factor
        while broken / kept > 1 + care.close_share:
            middle = math.sqrt(kept * broken)
            kept, broken = (middle, broken) if is_kept(middle) else (kept, middle)
        return kept

    def copies_needed(self, screened: ScreenedLayout, care: Care) -> int:
        """Replicas that keep the SLO at the rate of the plan, with `HEADROOM`; where one request at a time does not
        keep it either, one for each that is in flight.
        """
        rate = self._load.rate
        each = self.highest_rate(screened, care)
        if not each:
            alone = self._closed_result(screened, 1, 0)
            return max(1, math.ceil(rate * alone.e2e_s(0.5)))
        return max(1, math.ceil(rate * HEADROOM / each))


def keeps(slo: Slo, results: Sequence[LoadResult]) -> bool:
    """Whether requests are served as fast as they come, and their 99th percentiles, means of all results, are within
    the bounds.
    """
    bounds = ((LoadResult.ttft_s, slo.ttft_s), (LoadResult.tpot_s, slo.tpot_s), (LoadResult.e2e_s, slo.e2e_s))
    return all(result.is_stable for result in results) and all(
        bound_s is None or statistics.fmean(figure(result, 0.99) for result in results) <= bound_s
        for figure, bound_s in bounds
    )


def _evaluation(load: PlanLoad, screened: ScreenedLayout, runs: Runs, rate: float) -> Evaluation:
    """`rate`: requests per second that come in over all replicas; 0 where that is not given."""
    first = runs[0]
    is_stable = all(result.is_stable for parts in runs for _, result in parts)
    if rate and is_stable:  # what comes in goes out
        requests_s, out_tok_s = rate, rate * load.osl
    else:
        out_tok_s = statistics.fmean(sum(copies * result.out_tok_s for copies, result in parts) for parts in runs)
        requests_s = statistics.fmean(sum(copies * result.requests_s for copies, result in parts) for parts in runs)
    batch = max(result.mean_batch for _, result in first)
    is_full = batch * load.context_tokens >= FULL_SHARE * screened.memory.kv_tokens
    is_preempted = any(result.preemptions for _, result in first)
    results = [_all_replicas(parts) for parts in runs]
    return Evaluation(
        screened=screened,
        out_tok_s=out_tok_s,
        requests_s=requests_s,
        **{f"ttft_p{q}_ms": 1000 * statistics.fmean(r.ttft_s(q / 100) for r in results) for q in (50, 95, 99)},
        **{f"tpot_p{q}_ms": 1000 * statistics.fmean(r.tpot_s(q / 100) for r in results) for q in (50, 95, 99)},
        e2e_p99_ms=1000 * statistics.fmean(r.e2e_s(0.99) for r in results),
        mean_batch=batch,
        running=statistics.fmean(sum(copies * result.in_flight for copies, result in parts) for parts in runs),
        is_stable=is_stable,
        keeps_slo=keeps(load.request.slo, results),
        binding="KV memory" if is_preempted or is_full else _binding(load, screened, batch),
    )


def _all_replicas(parts: list[tuple[int, LoadResult]]) -> LoadResult:
    """The responses of all replicas together."""
    if len(parts) == 1:
        return parts[0][1]
    # Weights would be exact; with two loads that differ by one stream the copies are few.
    responses = tuple(response for copies, result in parts for response in result.responses * min(copies, 4))
    return dataclasses.replace(parts[0][1], responses=responses)


def _binding(load: PlanLoad, screened: ScreenedLayout, batch: float) -> str:
    """What most of the time goes to: of decode steps, and of the prefill that their tokens need."""
    times = screened.step_time
    sequences = max(1, round(batch))
    decode = load.decode_step(sequences)
    tokens = max(1, min(times.max_num_batched_tokens, int(load.prefill_tokens * max(1, sequences // 4))))
    prefill = load.prefill_step(tokens)
    spent: dict[str, float] = {}
    for index in range(times.layout.pp):
        for terms, weight in (
            (times.terms(index, decode), load.osl / sequences),
            (times.terms(index, prefill), load.prefill_tokens / tokens),
        ):
            for term, cause in BINDING.items():
                spent[cause] = spent.get(cause, 0.0) + weight * getattr(terms, term)
    at_once = sequences if times.is_pipelined else 1  # batches that the stages work on
    if at_once < times.layout.pp:
        spent["pipeline bubble"] = sum(spent.values()) * (times.layout.pp - at_once) / at_once / times.layout.pp
    return max(spent, key=lambda cause: spent[cause])
