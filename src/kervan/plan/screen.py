"""Second step: all layouts, with what arithmetic alone says of each: whether it fits, and how much it takes."""

import dataclasses
import math
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.facts import layout as layouts
from kervan.facts.layout import Layout
from kervan.plan.load import PlanLoad
from kervan.plan.request import PlanRequest
from kervan.sim import memory
from kervan.sim.memory import MemoryEstimate
from kervan.sim.step_time import Batch, StepTime

FAR_BEHIND_SHARE = 0.6  # of the best layout's requests/s per GPU: below it a layout's load is not refined
BATCH_ROUNDS = 24
# The constants are those of closed loops, whose sequences are about equally long. Where each is somewhere else in its
# answer, the attention kernel's work is less even, and it reads less of the KV cache per second. Found with two open
# loops of 8B on H200 (benchmarks/records/open-loop-8b-1xh200-2026-11-28.jsonl): 3% and 5% were missing of their TPOT.
UNEVEN_KV_SHARE = 0.92
LONG_PIPELINE = 16  # stages from which on a closed loop is so many steps that it matters


@dataclass(frozen=True, slots=True)
class ScreenedLayout:
    """`copies` of a replica, whose own dp is 1.

    `requests_s`: what one replica takes by arithmetic: within the SLO, or in a closed loop with its streams; 0 for one
    that does not fit, and `reason` says why. `is_rough`: it takes so much less per GPU than the best that it is
    simulated once only, with less load.
    """

    replica: Layout
    copies: int
    memory: MemoryEstimate
    step_time: StepTime
    requests_s: float
    reason: str = ""
    is_rough: bool = False

    @property
    def layout(self) -> Layout:
        """The layout of all copies: that of a replica, with dp the number of copies."""
        return dataclasses.replace(self.replica, dp=self.copies)

    @property
    def fits(self) -> bool:
        """Whether the longest request of the load has room."""
        return not self.reason


def screen(load: PlanLoad) -> list[ScreenedLayout]:
    """The layout that is given, or all, with as many copies as there are GPUs for. Where requests come at a rate, also
    with as many as it needs by arithmetic, with half and with twice that; one copy where GPUs are to be counted.

    Raises: ConfigError for a given layout that the model or the GPUs do not allow.
    """
    request = load.request
    if request.fixed:
        return [_screened(load, *_given(request))]
    screened = []
    for replica in layouts.sizes(request.spec, gpus=request.gpus, gpus_per_node=request.gpus_per_node):
        if request.counts_gpus:
            screened.append(_screened(load, replica, 1))
            continue
        most = layouts.most_copies(replica, gpus=request.gpus, gpus_per_node=request.gpus_per_node)
        fullest = _screened(load, replica, most)
        copies = {most}
        if load.rate and fullest.requests_s:
            needed = math.ceil(load.rate / fullest.requests_s)
            copies |= {n for n in (max(1, needed // 2), needed, 2 * needed) if n < most}
        screened += [dataclasses.replace(fullest, copies=n) for n in sorted(copies)]
    return screened if request.is_open and not request.counts_gpus else _compared(request, screened)


def step_time(load: PlanLoad, replica: Layout) -> StepTime:
    """The step times of one replica; stages on several nodes hand over by the network."""
    request, constants = load.request, load.request.calibration.constants
    is_spread = layouts.nodes_per_replica(replica, request.gpus_per_node) > 1
    if request.concurrency is None:
        share = UNEVEN_KV_SHARE * constants.kv_bandwidth_share
        constants = dataclasses.replace(constants, kv_bandwidth_share=share)
    return StepTime(
        request.spec, replica, request.gpu, load.limits, constants,
        network_bytes_s=request.network_bytes_s if is_spread else 0.0,
    )  # fmt: skip


def _screened(load: PlanLoad, replica: Layout, copies: int) -> ScreenedLayout:
    request = load.request
    room = memory.estimate(request.spec, replica, request.gpu, load.limits, context_tokens=load.context_tokens)
    times = step_time(load, replica)
    if room.kv_tokens // replica.attention_dp < load.longest_tokens:
        return ScreenedLayout(replica, copies, room, times, 0.0, reason=_why_not(room, replica, load))
    if request.concurrency is None:
        requests_s = _slo_requests_s(load, times, room)
    else:
        streams = min(math.ceil(request.concurrency / copies), times.max_num_seqs)
        busy = min(copies, request.concurrency)  # replicas that have a stream
        requests_s = _steady(load, times, streams)[0] * busy / copies
    return ScreenedLayout(replica, copies, room, times, requests_s)


def _compared(request: PlanRequest, screened: list[ScreenedLayout]) -> list[ScreenedLayout]:
    """Those far behind the best that `kervan up` starts are rough; in a closed loop, of them long pipelines only."""
    best = max(
        (c.requests_s / c.replica.gpus_per_replica for c in screened if c.replica.starts_with == "kervan up"),
        default=0.0,
    )
    return [
        dataclasses.replace(
            candidate,
            is_rough=candidate.fits
            and candidate.requests_s / candidate.replica.gpus_per_replica < FAR_BEHIND_SHARE * best
            and (request.concurrency is None or candidate.replica.pp >= LONG_PIPELINE),
        )
        for candidate in screened
    ]


def _given(request: PlanRequest) -> tuple[Layout, int]:
    """The layout of `fixed`, whose sizes are 1 where it names none, and `ep` that of `attention_dp`."""
    ranks = request.fixed.get("attention_dp", 1)
    replica = Layout(
        request.fixed.get("tp", 1), request.fixed.get("pp", 1), ep=request.fixed.get("ep", ranks), attention_dp=ranks
    )
    layouts.check(request.spec, replica)
    if ranks > request.gpus_per_node:
        raise ConfigError(
            f"attention_dp={ranks} is counted for the GPUs of one node, and a node has {request.gpus_per_node}; use at "
            f"most attention_dp={request.gpus_per_node}"
        )
    if replica.tp > request.gpus_per_node:
        raise ConfigError(
            f"tp={replica.tp} needs as many GPUs on one node, and a node has {request.gpus_per_node}; use at most "
            f"tp={request.gpus_per_node}, and pp for more GPUs (--layout)"
        )
    copies = request.fixed.get("dp", 1)
    if copies * replica.gpus_per_replica > request.gpus:
        raise ConfigError(
            (f"attention_dp={ranks}" if ranks > 1 else f"tp={replica.tp} x pp={replica.pp}")
            + f" x dp={copies} needs {copies * replica.gpus_per_replica} GPUs, and "
            f"there are {request.gpus}; give --gpus {copies * replica.gpus_per_replica} or a smaller --layout"
        )
    return replica, copies


def steady_batch(load: PlanLoad, times: StepTime, room: MemoryEstimate, rate: float) -> float:
    """Sequences that a replica runs at `rate` requests per second, by arithmetic; infinite when it falls behind.

    Prompts that come during a step are prefilled together in the next one. The steps between those decode. Each step
    gives each sequence a token, in a pipeline each `pp`-th; the batch follows by Little's law.
    """
    most, budget = most_sequences(load, times, room), times.max_num_batched_tokens
    distance = times.layout.pp if times.is_pipelined else 1

    def step_s(batch: Batch) -> float:
        return max(times.stages_s(batch)) if times.is_pipelined else times.total_s(batch)

    running = prompts = 1.0
    for _ in range(BATCH_ROUNDS):
        sequences = max(1, round(min(running, most) / distance))
        context = round(sequences * load.context_tokens)
        chunk = max(1, min(budget - sequences, round(prompts * load.prefill_tokens)))
        decode = Batch(sequences, context, 0, 0.0, sequences)
        # On one engine core how many prompts they are matters little; between ranks they are dealt out.
        complete = max(1, round(chunk / load.prefill_tokens)) if times.layout.attention_dp > 1 else 1
        prefill_s = step_s(Batch(sequences, context, chunk, chunk * load.mean_attended(chunk), sequences + complete))
        prefills = rate * load.prefill_tokens / chunk  # a second
        share = prefills * prefill_s  # of the time
        if share >= 1 and chunk >= budget - sequences:
            return math.inf
        prompts = max(1.0, rate * prefill_s)
        steps = prefills + max(0.0, 1 - share) / step_s(decode)
        token_s = max(distance / steps, times.total_s(decode))
        running = (running + rate * load.osl * token_s) / 2
    return running if running <= most else math.inf


def token_s(load: PlanLoad, screened: ScreenedLayout, rate: float) -> float:
    """Seconds per token at `rate` requests per second of a replica, by arithmetic; infinite when it falls behind."""
    return steady_batch(load, screened.step_time, screened.memory, rate) / (rate * load.osl)


def most_sequences(load: PlanLoad, times: StepTime, room: MemoryEstimate) -> int:
    """Sequences of mean length that have room, and are allowed, at once in a replica."""
    return max(1, min(times.max_num_seqs, int(room.kv_tokens / load.context_tokens)))


def _slo_requests_s(load: PlanLoad, times: StepTime, room: MemoryEstimate) -> float:
    """Requests per second of one replica at which the mean time per token reaches 85% of the SLO, by arithmetic. Where
    a sequence that is alone takes about as long, half of what is left between, and a little at least.
    """
    slo_s = load.request.slo.tpot_s or 0.1
    alone_s = times.total_s(Batch(1, load.context_tokens, 0, 0.0, 1))
    bound_s = max(0.85 * slo_s, (alone_s + slo_s) / 2, 1.05 * alone_s)

    def is_kept(rate: float) -> bool:
        return steady_batch(load, times, room, rate) <= rate * load.osl * bound_s

    low, high = 1e-6, 1.0
    while is_kept(high) and high < 1e6:
        low, high = high, 2 * high
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_kept(middle) else (low, middle)
    return low


def _steady(load: PlanLoad, times: StepTime, batch: int) -> tuple[float, float]:
    """(requests per second, seconds per token) of a replica that always runs `batch` sequences, in a closed loop."""
    isl, osl = load.prefill_tokens, load.osl
    decode = Batch(batch, batch * load.context_tokens, 0, 0.0, batch)
    budget = max(1, times.max_num_batched_tokens - batch)
    prompts = max(1.0, budget / isl)
    chunk = min(budget, int(isl * prompts))
    prefill = Batch(batch, batch * load.context_tokens, chunk, chunk * load.mean_attended(chunk), batch + int(prompts))
    slowest_s = max(times.stage_s(i, decode) for i in range(times.layout.pp))
    decode_s = max(times.total_s(decode), slowest_s * times.layout.pp) if times.layout.pp > 1 else slowest_s
    extras_s = [times.stage_s(i, prefill) - times.stage_s(i, decode) for i in range(times.layout.pp)]
    extra_s = max(extras_s) if times.is_pipelined else sum(extras_s)
    # While a sequence runs, each of the others is replaced once: so many prompts are prefilled in between.
    per_token_s = decode_s + batch / osl * extra_s * isl / chunk
    return batch / (osl * per_token_s), per_token_s


def _why_not(room: MemoryEstimate, replica: Layout, load: PlanLoad) -> str:
    budget_gib = room.total_gib * load.limits.gpu_memory_utilization
    if room.kv_gib <= 0:
        return (
            f"{room.weights_gib:.1f} GiB of weights and {room.activations_gib + room.overhead_gib:.1f} GiB of "
            f"workspace per GPU are {-room.kv_gib:.1f} GiB more than the {budget_gib:.1f} GiB that vLLM may use of a "
            f"{load.request.gpu.name}"
        )
    return (
        f"{room.kv_gib:.1f} GiB per GPU are left for {room.kv_tokens // replica.attention_dp} tokens of KV cache, and "
        f"one request has up to {load.longest_tokens}"
    )
