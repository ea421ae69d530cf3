"""What a layout would deliver under a load: the replica is simulated, its copies are counted."""

import dataclasses
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kervan.config.workload import Lengths, Slo, TraceRow
from kervan.errors import ConfigError
from kervan.facts import layout as layouts
from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout
from kervan.plan import serving
from kervan.plan.calibration import PRIOR, Calibration
from kervan.plan.serving import LoadRequest, LoadResult
from kervan.sim import limits as engine
from kervan.sim import memory
from kervan.sim.limits import EngineLimits
from kervan.sim.memory import Memory
from kervan.sim.step_time import Batch, StepTime

Goal = Literal["cost", "throughput", "latency"]
SEEDS = 3
MANY_STREAMS = 1024
MAX_STREAM_REQUESTS = 512  # of a closed loop, as in the measurements
OPEN_LOOP_STEPS = 1800  # so long is an open loop followed, about
OPEN_LOOP_REQUESTS = (12, 160)
FAR_BEHIND_SHARE = 0.6  # of the best layout's requests/s per GPU: below it a layout's load is not refined
PIPELINE_LOAD = 0.64  # of the arithmetic's rate, from which pipelines are refined: it knows no bubbles
LONG_PIPELINE = 16  # stages from which on a closed loop is so many steps that it matters
FAR_BEHIND_LOAD = 0.6  # of the arithmetic's rate, at which most such layouts keep the SLO
WARM_UP_SHARE = 0.15  # of an open loop's first requests, which find the replica empty
NETWORK_BYTES_S = 50e9  # between nodes, each GPU, when nobody says: 400 Gbit/s
BINDING = {
    "weights": "weights bandwidth", "compute": "compute", "experts": "expert weights and compute",
    "kv_read": "KV bandwidth", "prefill_attention": "compute", "elementwise": "compute", "kernels": "per-step overhead",
    "all_reduce": "all-reduce", "head": "weights bandwidth", "overhead": "per-step overhead",
    "host": "per-step overhead",
}  # fmt: skip
LEVERS = {
    "weights bandwidth": "more streams per replica share a read of the weights; fp8 halves it; a larger tp divides it",
    "compute": "fp8 where the GPU has it, prefix caching for repeated prompts, or more GPUs",
    "expert weights and compute": "more streams share each read of the experts; fp8 weights; a larger tp with ep",
    "KV bandwidth": "an fp8 KV cache (--engine-arg kv_cache_dtype=fp8) halves it; a larger tp divides it",
    "KV memory": "an fp8 KV cache (--engine-arg kv_cache_dtype=fp8), fp8 weights, a larger tp, or more replicas",
    "all-reduce": "a smaller tp with more replicas, if the model fits; or GPUs with faster links",
    "pipeline bubble": "a larger tp in place of pp, within a node",
    "per-step overhead": "more streams per replica, or a smaller tp: the GPU waits for launches and small kernels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be planned. One of `concurrency` (streams of a closed loop, over the whole plan) and `rate` (requests
    per second, Poisson) or `trace`; without any, each layout is loaded as far as the SLO allows.

    `fixed`: sizes of the layout that are given (tp, pp, dp, ep). `frontends`: API server processes per replica, or
    gateways. `usd_per_gpu_h`, `spot_usd_per_gpu_h`: None when no price is known.
    """

    spec: ModelSpec
    gpu: Gpu
    gpus: int = 8
    nodes: int = 1
    isl: Lengths
    osl: Lengths
    concurrency: int | None = None
    rate: float | None = None
    trace: Sequence[TraceRow] = ()
    slo: Slo = field(default_factory=Slo)
    goal: Goal = "cost"
    usd_per_gpu_h: float | None = None
    spot_usd_per_gpu_h: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    calibration: Calibration = PRIOR
    frontends: int = 1
    network_bytes_s: float = NETWORK_BYTES_S

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ConfigError(
                f"{self.gpus} GPUs do not divide evenly over {self.nodes} nodes; give --gpus as a multiple of --nodes"
            )
        if self.concurrency is not None and self.rate is not None:
            raise ConfigError("--concurrency is a closed loop and --rate an open one; give one of them")

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def longest_tokens(self) -> int:
        if self.trace:
            return max(row.input_tokens + row.output_tokens for row in self.trace)
        return self.isl.maximum + self.osl.maximum

    @property
    def mean_tokens(self) -> tuple[float, float]:
        """Mean prompt and output tokens."""
        if self.trace:
            return (
                statistics.fmean(row.input_tokens for row in self.trace),
                statistics.fmean(max(1, row.output_tokens) for row in self.trace),
            )
        return self.isl.mean, self.osl.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with predictions, times in milliseconds. `bands`: by figure, the factor up and down within which four of
    five measurements should lie. `meets_slo`: the probability of it.

    `concurrency`: streams that it runs at once, over all replicas. A layout that does not fit has no figures, and
    `reason`.
    """

    layout: Layout
    fits: bool
    memory: Memory
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
    mean_batch: float = 0.0
    usd_per_mtok: float | None = None
    usd_per_mtok_spot: float | None = None
    usd_per_mtok_all_in: float | None = None
    binding: str = ""
    lever: str = ""
    meets_slo: float = 1.0
    bands: Mapping[str, float] = field(default_factory=dict)
    score: float = 0.0
    reason: str = ""


def step_time(question: Question, layout: Layout, limits: EngineLimits) -> StepTime:
    """The step times of one replica; stages on several nodes hand over by the network."""
    spread = layouts.nodes_per_replica(layout, question.gpus_per_node) > 1
    return StepTime(
        question.spec, layout, question.gpu, limits, question.calibration.constants,
        network_bytes_s=question.network_bytes_s if spread else 0.0,
    )  # fmt: skip


class Evaluator:
    """Evaluates layouts for one question; what replicas of equal cut and load do is simulated once."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.limits = engine.limits(
            question.spec, question.gpu, question.arguments, needed_tokens=question.longest_tokens
        )
        if question.longest_tokens > self.limits.max_model_len:
            raise ConfigError(
                f"a request of {question.longest_tokens} tokens is longer than max_model_len="
                f"{self.limits.max_model_len}; use shorter --isl and --osl, or --engine-arg max_model_len="
                f"{question.longest_tokens} if the model allows"
            )
        self._served: dict[tuple[Layout, int | float], list[LoadResult]] = {}
        self._by_arithmetic: dict[Layout, float] = {}

    def memory(self, layout: Layout) -> Memory:
        isl, osl = self.question.mean_tokens
        return memory.estimate(self.question.spec, layout, self.question.gpu, self.limits, context_tokens=isl + osl / 2)

    def evaluate(self, replica: Layout, dp: int, *, seeds: int = SEEDS) -> Candidate:
        """`dp` copies of a replica (whose own dp is 1) under the question's load; closed loops run `seeds` times."""
        q = self.question
        found = self.memory(replica)
        layout = dataclasses.replace(replica, dp=dp)
        if found.kv_tokens < q.longest_tokens:
            return Candidate(
                layout=layout, fits=False, memory=found, limits=self.limits, reason=_why_not(found, q),
                binding="KV memory" if found.kv_gib > 0 else "weights memory",
            )  # fmt: skip
        time = step_time(q, replica, self.limits)
        if q.concurrency is not None:
            parts = self._closed(time, found, q.concurrency, dp, seeds)
        elif q.rate is not None or q.trace:
            parts = self._open(time, found, (q.rate or 0.0) / dp, dp)
        else:
            parts = self._loaded(time, found, dp)
        return self._candidate(layout, time, found, parts)

    # ---- loads

    def _closed(
        self, time: StepTime, room: Memory, streams: int, dp: int, seeds: int
    ) -> list[list[tuple[int, LoadResult]]]:
        """By seed: (replicas, what one of them served). Streams are dealt evenly; a replica without one idles."""
        least, more = divmod(streams, dp)
        shares = [(copies, each) for copies, each in ((dp - more, least), (more, least + 1)) if copies and each]
        seeds = seeds if least < MANY_STREAMS else 1  # of so many the quantiles hardly differ
        return [
            [(copies, self._closed_one(time, room, each, seed)) for copies, each in shares] for seed in range(seeds)
        ]

    def _closed_one(self, time: StepTime, room: Memory, streams: int, seed: int) -> LoadResult:
        runs = self._served.setdefault((time.layout, streams), [])
        while len(runs) <= seed:
            each = 1 if self.is_rough(time.layout) else 4
            count = max(8, min(each * streams, MAX_STREAM_REQUESTS), streams)
            runs.append(
                serving.closed_loop(
                    time, self._asks(count, len(runs)), streams=streams, kv_tokens=room.kv_tokens,
                    frontends=self.question.frontends, seed=len(runs),
                )
            )  # fmt: skip
        return runs[seed]

    def _open(self, time: StepTime, room: Memory, rate: float, dp: int) -> list[list[tuple[int, LoadResult]]]:
        key = (time.layout, rate if rate else -float(dp))
        if key not in self._served:
            asks = self._arrivals(time, rate, dp)
            served = serving.open_loop(time, asks, kv_tokens=room.kv_tokens, frontends=self.question.frontends, seed=0)
            cut = int(WARM_UP_SHARE * len(served.responses))
            offered = len(asks) / max(1e-9, asks[-1].sent_s - asks[0].sent_s) if len(asks) > 1 else 0.0
            responses = tuple(sorted(served.responses, key=lambda response: response.sent_s)[cut:])
            # What is not served at the rate at which it comes in piles up: the tail is then that of the run's length.
            kept_up = served.is_stable and served.requests_s > 0.85 * offered
            self._served[key] = [dataclasses.replace(served, responses=responses, is_stable=kept_up)]
        return [[(dp, self._served[key][0])]]

    def _loaded(self, time: StepTime, room: Memory, dp: int) -> list[list[tuple[int, LoadResult]]]:
        """An open loop at about the highest rate at which the SLO holds."""
        rate = self._slo_rate(time, room)
        if self.is_rough(time.layout):
            return self._open(time, room, rate * FAR_BEHIND_LOAD, dp)
        rate *= PIPELINE_LOAD if time.layout.pp > 1 else 1.0
        parts = self._open(time, room, rate, dp)
        for _ in range(3 if time.layout.pp == 1 else 1):
            served = parts[0][0][1]
            if served.is_stable and self._meets(served):
                break
            rate *= 0.8
            parts = self._open(time, room, rate, dp)
        return parts

    def is_rough(self, replica: Layout) -> bool:
        """Whether a layout takes so much less per GPU than the best, by arithmetic, that it is looked at once only."""
        best = max(self._by_arithmetic.values(), default=0.0)
        is_far_behind = self._by_arithmetic.get(replica, math.inf) < FAR_BEHIND_SHARE * best
        return is_far_behind and (self.question.concurrency is None or replica.pp >= LONG_PIPELINE)

    def capacity(self, replica: Layout) -> float:
        """Requests per second that one replica takes within the SLO, by arithmetic; 0 for one that does not fit."""
        room = self.memory(replica)
        if room.kv_tokens < self.question.longest_tokens:
            return 0.0
        return self._slo_rate(step_time(self.question, replica, self.limits), room)

    def compare(self, pairs: Iterable[tuple[Layout, int]]) -> None:
        """Look over all layouts (replica, copies) first, by arithmetic alone. Those far behind the best are then
        simulated once: without a load, not refined; in a closed loop, long pipelines with one request per stream.
        """
        q = self.question
        if q.rate is not None or q.trace:
            return
        for replica, dp in pairs:
            if rate := self.capacity(replica):
                if q.concurrency is not None:
                    streams = min(math.ceil(q.concurrency / dp), self.limits.max_num_seqs)
                    busy = min(dp, q.concurrency)  # replicas that have a stream
                    rate = self._steady(step_time(q, replica, self.limits), streams)[0] * busy / dp
                self._by_arithmetic[replica] = rate / replica.gpus_per_replica

    def _slo_rate(self, time: StepTime, room: Memory) -> float:
        """Requests per second of one replica where the mean time per token, prompts mixed in, reaches 85% of the SLO.

        Each request costs a share of a prefill step and of its decode steps; the batch follows by Little's law.
        """
        isl, osl = self.question.mean_tokens
        bound_s = 0.85 * (self.question.slo.tpot_s or 0.1)
        most = max(1, min(self.limits.max_num_seqs, int(room.kv_tokens / (isl + osl / 2) * 0.9)))
        low, high = 1, most
        while low < high:
            batch = (low + high + 1) // 2
            if self._steady(time, batch)[1] <= bound_s:
                low = batch
            else:
                high = batch - 1
        rate, _ = self._steady(time, low)
        return 0.9 * rate

    def _steady(self, time: StepTime, batch: int) -> tuple[float, float]:
        """(requests per second, seconds per token) of a replica that always runs `batch` sequences."""
        isl, osl = self.question.mean_tokens
        decode = Batch(batch, batch * (isl + osl / 2), 0, 0.0, batch)
        budget = max(1, self.limits.max_num_batched_tokens - batch)
        prompts = max(1.0, budget / isl)
        chunk = min(budget, int(isl * prompts))
        prefill = Batch(batch, batch * (isl + osl / 2), chunk, chunk * min(isl, chunk) / 2, batch + int(prompts))
        slowest = max(time.stage_s(i, decode) for i in range(time.layout.pp))
        decode_s = max(time.total_s(decode), slowest * time.layout.pp) if time.layout.pp > 1 else slowest
        extras_s = [time.stage_s(i, prefill) - time.stage_s(i, decode) for i in range(time.layout.pp)]
        extra_s = max(extras_s) if time.is_pipelined else sum(extras_s)
        # While a sequence runs, each of the others is replaced once: so many prompts are prefilled in between.
        per_token_s = decode_s + batch / osl * extra_s * isl / chunk
        return batch / (osl * per_token_s), per_token_s

    def _meets(self, served: LoadResult) -> bool:
        slo = self.question.slo
        return (slo.ttft_s is None or served.ttft_s(0.99) <= slo.ttft_s) and (
            slo.tpot_s is None or served.tpot_s(0.99) <= slo.tpot_s
        )

    def _asks(self, count: int, seed: int) -> list[LoadRequest]:
        q = self.question
        if q.isl.minimum == q.isl.maximum and q.osl.minimum == q.osl.maximum:
            return serving.fixed(count, q.isl.maximum, q.osl.maximum)
        rng = random.Random(seed)
        return [LoadRequest(0.0, q.isl.sample(rng), q.osl.sample(rng)) for _ in range(count)]

    def _arrivals(self, time: StepTime, rate: float, dp: int) -> list[LoadRequest]:
        q = self.question
        if q.trace:
            rows = q.trace[::dp]
            scale = 1.0
            if q.rate and rows[-1].at_s > 0:
                scale = len(q.trace) / rows[-1].at_s / q.rate
            asks = [LoadRequest(row.at_s * scale, row.input_tokens, max(1, row.output_tokens)) for row in rows]
            return asks[: OPEN_LOOP_REQUESTS[1]]
        isl, osl = q.mean_tokens
        alone_s = time.total_s(Batch(1, isl + osl / 2, 0, 0.0, 1))
        # Sequences that run at once, in each of the stages' batches: so many tokens come of a step.
        busy = max(1.0, rate * osl * alone_s * 1.5 / time.layout.pp)
        count = int(min(OPEN_LOOP_REQUESTS[1], max(OPEN_LOOP_REQUESTS[0], OPEN_LOOP_STEPS * busy / osl)))
        rng = random.Random(1)
        at_s, asks = 0.0, []
        for ask in self._asks(count, seed=2):
            at_s += rng.expovariate(rate)
            asks.append(dataclasses.replace(ask, sent_s=at_s))
        return asks

    # ---- figures

    def _candidate(
        self, layout: Layout, time: StepTime, room: Memory, runs: list[list[tuple[int, LoadResult]]]
    ) -> Candidate:
        q = self.question

        def figure(name: str, quantile: float) -> float:
            """The quantile over all replicas' requests, in ms, mean over the seeds."""
            values = []
            for parts in runs:
                if len(parts) == 1:
                    served = parts[0][1]
                else:  # weights would be exact; with two loads that differ by one stream the copies are few
                    responses = tuple(a for copies, s in parts for a in s.responses * min(copies, 4))
                    served = dataclasses.replace(parts[0][1], responses=responses)
                values.append(served.ttft_s(quantile) if name == "ttft" else served.tpot_s(quantile))
            return 1000 * statistics.fmean(values)

        first = runs[0]
        out_tok_s = statistics.fmean(sum(copies * served.out_tok_s for copies, served in parts) for parts in runs)
        requests_s = statistics.fmean(sum(copies * served.requests_s for copies, served in parts) for parts in runs)
        batch = max(served.mean_batch for _, served in first)
        running = sum(copies * served.mean_batch for copies, served in first)
        is_stable = all(served.is_stable for _, served in first)
        preempted = sum(served.preemptions for _, served in first)
        if q.rate is not None or q.trace or q.concurrency is None:
            _isl, osl = q.mean_tokens
            out_tok_s = min(out_tok_s, (q.rate or math.inf) * osl)
        times = {f"{n}_p{p}_ms": figure(n, p / 100) for n in ("ttft", "tpot") for p in (50, 95, 99)}
        bands = _bands(q, layout)
        binding = "KV memory" if preempted or not self._has_room(room, batch) else self._binding(time, batch)
        per_hour = out_tok_s * 3600 / 1e6
        usd = q.usd_per_gpu_h * layout.gpus / per_hour if q.usd_per_gpu_h and per_hour else None
        spot = q.spot_usd_per_gpu_h * layout.gpus / per_hour if q.spot_usd_per_gpu_h and per_hour else None
        meets = _meets_slo(q.slo, times, bands) if is_stable else 0.0
        found = Candidate(
            layout=layout,
            fits=True,
            memory=room,
            limits=self.limits,
            concurrency=q.concurrency or max(1, round(running)),
            out_tok_s=out_tok_s,
            requests_s=min(requests_s, q.rate or math.inf),
            **times,
            mean_batch=batch,
            usd_per_mtok=usd,
            usd_per_mtok_spot=spot,
            usd_per_mtok_all_in=None if usd is None else usd * all_in_factor(layout.dp),
            binding=binding,
            lever=LEVERS[binding],
            meets_slo=meets,
            bands=bands,
            reason="" if is_stable else "requests come in faster than they are served",
        )
        return dataclasses.replace(found, score=_score(q, found))

    def _has_room(self, room: Memory, batch: float) -> bool:
        isl, osl = self.question.mean_tokens
        return batch * (isl + osl / 2) < 0.93 * room.kv_tokens

    def _binding(self, time: StepTime, batch: float) -> str:
        """What most of the time goes to: of decode steps, and of the prefill that their tokens need."""
        isl, osl = self.question.mean_tokens
        sequences = max(1, round(batch))
        decode = Batch(sequences, sequences * (isl + osl / 2), 0, 0.0, sequences)
        tokens = max(1, min(self.limits.max_num_batched_tokens, int(isl * max(1, sequences // 4))))
        prefill = Batch(0, 0, tokens, tokens * min(isl, tokens) / 2, max(1, int(tokens / isl)))
        spent: dict[str, float] = {}
        for index in range(time.layout.pp):
            for terms, weight in (
                (time.terms(index, decode), osl / sequences),
                (time.terms(index, prefill), isl / tokens),
            ):
                for key, word in BINDING.items():
                    spent[word] = spent.get(word, 0.0) + weight * getattr(terms, key)
        at_once = sequences if time.is_pipelined else 1  # batches that the stages work on
        if at_once < time.layout.pp:
            spent["pipeline bubble"] = sum(spent.values()) * (time.layout.pp - at_once) / at_once / time.layout.pp
        return max(spent, key=lambda word: spent[word])


START_S = 101.0  # first start of an 8B engine on a machine: benchmarks/records/layouts-replicas-2xh200-2026-11-23.json
STARTS_PER_DAY = 1.0


def all_in_factor(dp: int) -> float:
    """What a price per token grows by with one spare replica, and a cold start of each replica per day."""
    return (dp + 1) / dp * (1 + STARTS_PER_DAY * START_S / 86_400)


def _why_not(found: Memory, q: Question) -> str:
    budget = found.total_gib * q_utilization(q)
    if found.kv_gib <= 0:
        return (
            f"{found.weights_gib:.1f} GiB of weights and {found.activations_gib + found.overhead_gib:.1f} GiB of "
            f"workspace per GPU are {-found.kv_gib:.1f} GiB more than the {budget:.1f} GiB that vLLM may use of a "
            f"{q.gpu.name}"
        )
    return (
        f"{found.kv_gib:.1f} GiB per GPU are left for {found.kv_tokens} tokens of KV cache, and one request has up to "
        f"{q.longest_tokens}"
    )


def q_utilization(q: Question) -> float:
    """The share of a GPU's memory that vLLM may use."""
    return engine.limits(q.spec, q.gpu, q.arguments).gpu_memory_utilization


def _bands(q: Question, layout: Layout) -> dict[str, float]:
    """Factors for an 80% band: the calibration's spread, wider where it was not measured."""
    wider = 1.0 if q.gpu.name == q.calibration.gpu else 1.6
    wider *= 1.3 if layout.pp > 1 else 1.0
    wider *= 1.5 if q.spec.experts is not None else 1.0
    wider *= 1.0 if q.spec.quantization is None else 1.5
    wider *= 1.0 if q.gpu.link.has_peer_to_peer or layout.tp == 1 else 1.5
    spread = q.calibration.spread
    names = {
        "out_tok_s": "out_tok_s", "tpot_p50_ms": "tpot_p50_s", "tpot_p99_ms": "tpot_p50_s", "ttft_p50_ms": "ttft_p50_s",
        "ttft_p99_ms": "ttft_p99_s",
    }  # fmt: skip
    return {name: math.exp(1.2816 * wider * spread.get(key, 0.1)) for name, key in names.items()}


def _meets_slo(slo: Slo, times: Mapping[str, float], bands: Mapping[str, float]) -> float:
    """The probability that the 99th percentiles are within the SLO, if errors are lognormal."""
    found = 1.0
    for name, bound_s in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
        if bound_s is not None:
            sigma = math.log(bands[f"{name}_p99_ms"]) / 1.2816
            distance = math.log(1000 * bound_s / max(1e-6, times[f"{name}_p99_ms"])) / sigma
            found *= 0.5 * (1 + math.erf(distance / math.sqrt(2)))
    return found


def _score(q: Question, c: Candidate) -> float:
    """Larger is better: the goal, times the probability to keep the SLO."""
    if q.goal == "latency":
        value = 1000 / max(1e-9, c.tpot_p50_ms)
    elif q.goal == "throughput":
        value = c.out_tok_s
    elif c.usd_per_mtok is not None:
        value = 1 / c.usd_per_mtok
    else:
        value = c.out_tok_s / c.layout.gpus
    return value * c.meets_slo
