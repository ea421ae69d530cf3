"""Third step: what a layout delivers under the load: the replica is simulated, its copies are counted."""

import dataclasses
import math
import statistics
from dataclasses import dataclass

from kervan.plan import serving
from kervan.plan.load import PlanLoad
from kervan.plan.screen import ScreenedLayout
from kervan.plan.serving import LoadResult
from kervan.sim.step_time import Batch

SEEDS = 3
MANY_STREAMS = 1024
MAX_STREAM_REQUESTS = 512  # of a closed loop, as in the measurements
PIPELINE_LOAD = 0.64  # of the arithmetic's rate, from which pipelines are refined: it knows no bubbles
FAR_BEHIND_LOAD = 0.6  # of the arithmetic's rate, at which most rough layouts keep the SLO
KEPT_UP_SHARE = 0.85  # of the rate at which requests come: below it they pile up
WARM_UP_SHARE = 0.15  # of an open loop's first requests, which find the replica empty
FULL_SHARE = 0.93  # of the KV cache, from which on it counts as full
BINDING = {
    "weights": "weights bandwidth", "compute": "compute", "experts": "expert weights and compute",
    "kv_read": "KV bandwidth", "prefill_attention": "compute", "elementwise": "compute", "kernels": "per-step overhead",
    "all_reduce": "all-reduce", "head": "weights bandwidth", "overhead": "per-step overhead",
    "host": "per-step overhead",
}  # fmt: skip

# By seed: (replicas, what one of them served).
Runs = list[list[tuple[int, LoadResult]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a layout delivers, over all its replicas; times in milliseconds.

    `running`: sequences that run, mean over time, over all replicas; `mean_batch`: of the fullest. `is_stable`:
    requests are served as fast as they come. `binding`: what most of the time goes to.
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
    mean_batch: float
    running: float
    is_stable: bool
    binding: str


class Simulations:
    """Evaluates layouts under one load. A simulation that comes again (a second look from more seeds) is not run again;
    nothing else is kept, and the order of calls does not matter.
    """

    def __init__(self, load: PlanLoad) -> None:
        self._load = load
        self._closed_results: dict[tuple[ScreenedLayout, int, int], LoadResult] = {}
        self._open_results: dict[tuple[ScreenedLayout, float], LoadResult] = {}

    def evaluate(self, screened: ScreenedLayout, *, seeds: int = SEEDS) -> Evaluation:
        """The figures of a layout that fits; closed loops run `seeds` times."""
        request = self._load.request
        if request.concurrency is not None:
            runs = self._closed(screened, request.concurrency, seeds)
        elif request.is_open:
            result = self._open_result(screened, (request.rate or 0.0) / screened.copies)
            runs = [[(screened.copies, result)]]
        else:
            runs = [[(screened.copies, self._loaded(screened))]]
        return _evaluation(self._load, screened, runs)

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
                kv_tokens=screened.memory.kv_tokens, frontends=self._load.request.frontends, seed=seed,
            )  # fmt: skip
        return self._closed_results[key]

    def _open_result(self, screened: ScreenedLayout, rate: float) -> LoadResult:
        """Of one replica at `rate` requests per second, without the first of them."""
        key = (screened, rate)
        if key not in self._open_results:
            requests = self._load.open_loop(screened.step_time, rate, screened.copies)
            result = serving.open_loop(
                screened.step_time, requests, kv_tokens=screened.memory.kv_tokens,
                frontends=self._load.request.frontends, seed=0,
            )  # fmt: skip
            cut = int(WARM_UP_SHARE * len(result.responses))
            seconds = requests[-1].sent_s - requests[0].sent_s
            offered = len(requests) / max(1e-9, seconds) if len(requests) > 1 else 0.0
            responses = tuple(sorted(result.responses, key=lambda response: response.sent_s)[cut:])
            # What is not served at the rate at which it comes in piles up: the tail is then that of the run's length.
            has_kept_up = result.is_stable and result.requests_s > KEPT_UP_SHARE * offered
            self._open_results[key] = dataclasses.replace(result, responses=responses, is_stable=has_kept_up)
        return self._open_results[key]

    def _loaded(self, screened: ScreenedLayout) -> LoadResult:
        """An open loop at about the highest rate at which the SLO holds."""
        rate = screened.requests_s
        if screened.is_rough:
            return self._open_result(screened, rate * FAR_BEHIND_LOAD)
        is_pipeline = screened.replica.pp > 1
        rate *= PIPELINE_LOAD if is_pipeline else 1.0
        result = self._open_result(screened, rate)
        for _ in range(1 if is_pipeline else 3):
            if result.is_stable and self._keeps_slo(result):
                break
            rate *= 0.8
            result = self._open_result(screened, rate)
        return result

    def _keeps_slo(self, result: LoadResult) -> bool:
        slo = self._load.request.slo
        return (slo.ttft_s is None or result.ttft_s(0.99) <= slo.ttft_s) and (
            slo.tpot_s is None or result.tpot_s(0.99) <= slo.tpot_s
        )


def _evaluation(load: PlanLoad, screened: ScreenedLayout, runs: Runs) -> Evaluation:
    request, first = load.request, runs[0]
    out_tok_s = statistics.fmean(sum(copies * result.out_tok_s for copies, result in parts) for parts in runs)
    requests_s = statistics.fmean(sum(copies * result.requests_s for copies, result in parts) for parts in runs)
    if request.concurrency is None:
        out_tok_s = min(out_tok_s, (request.rate or math.inf) * load.osl)
    batch = max(result.mean_batch for _, result in first)
    is_full = batch * load.context_tokens >= FULL_SHARE * screened.memory.kv_tokens
    is_preempted = any(result.preemptions for _, result in first)
    results = [_all_replicas(parts) for parts in runs]
    return Evaluation(
        screened=screened,
        out_tok_s=out_tok_s,
        requests_s=min(requests_s, request.rate or math.inf),
        **{f"ttft_p{q}_ms": 1000 * statistics.fmean(r.ttft_s(q / 100) for r in results) for q in (50, 95, 99)},
        **{f"tpot_p{q}_ms": 1000 * statistics.fmean(r.tpot_s(q / 100) for r in results) for q in (50, 95, 99)},
        mean_batch=batch,
        running=sum(copies * result.mean_batch for copies, result in first),
        is_stable=all(result.is_stable for _, result in first),
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
    decode = Batch(sequences, sequences * load.context_tokens, 0, 0.0, sequences)
    tokens = max(1, min(load.limits.max_num_batched_tokens, int(load.isl * max(1, sequences // 4))))
    prefill = Batch(0, 0, tokens, tokens * min(load.isl, tokens) / 2, max(1, int(tokens / load.isl)))
    spent: dict[str, float] = {}
    for index in range(times.layout.pp):
        for terms, weight in (
            (times.terms(index, decode), load.osl / sequences),
            (times.terms(index, prefill), load.isl / tokens),
        ):
            for term, cause in BINDING.items():
                spent[cause] = spent.get(cause, 0.0) + weight * getattr(terms, term)
    at_once = sequences if times.is_pipelined else 1  # batches that the stages work on
    if at_once < times.layout.pp:
        spent["pipeline bubble"] = sum(spent.values()) * (times.layout.pp - at_once) / at_once / times.layout.pp
    return max(spent, key=lambda cause: spent[cause])
