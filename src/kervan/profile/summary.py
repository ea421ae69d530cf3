"""Where the time went, from all that was recorded of a replica and its gateways. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kervan.facts import hardware
from kervan.profile import device, lever, samples
from kervan.profile import trace as traces
from kervan.profile.device import DeviceUse, KernelTotal
from kervan.profile.py_spy import RATE_HZ
from kervan.profile.samples import EVENT_LOOP, GPU_WAIT, StackSamples
from kervan.profile.trace import Interval, TorchTrace

# Parts of an engine's loop, in the order in which they claim time: what a worker does while the loop schedules is its.
HOST_PARTS = (
    GPU_WAIT,
    "forward",
    "sampling",
    "prepare inputs",
    "bookkeeping",
    "rest of the model runner",
    "no work",
    "schedule",
    "update requests",
    "take requests",
)
_IN_WORKER = frozenset(HOST_PARTS[1:5])
_RUNNER = HOST_PARTS[5]
TOP_KERNELS = 10
TOP_PARTS = 8


@dataclass(frozen=True, slots=True)
class BatchMeans:
    """Of the steps that were scheduled. `streams`: that decode; `step_s`: between two steps while there is work."""

    num_steps: int = 0
    streams: float = 0.0
    context_tokens: float = 0.0
    prefill_share: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """`shares`: of the GPU's time, or without a GPU of the loop's. `waits_for`: the largest of them.

    `cache_reading`: the part of the GPU's time in which attention reads the KV cache.
    """

    gpu: str
    shares: dict[str, float]
    host_shares: dict[str, float]
    kernels: tuple[KernelTotal, ...]
    batch: BatchMeans
    window_s: float
    standstill_s: float
    ended_by: str
    cache_reading: float = 0.0

    @property
    def waits_for(self) -> str:
        """What takes most of it."""
        return max(self.shares, key=lambda name: self.shares[name], default="")


@dataclass(frozen=True, slots=True)
class GatewaySummary:
    """`busy`: CPU time over wall time. `parts`: microseconds of CPU per token, empty where no stacks were sampled.

    `num_samples`: that `parts` come from; few give rough parts. `ranges`: (calls, seconds) by name.
    """

    id: str
    busy: float
    tokens_per_s: float
    us_per_token: float
    parts: dict[str, float]
    ranges: dict[str, tuple[int, float]]
    num_samples: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it. `stacks`: py-spy's by process; `request_shares`: of the time of `num_requests` requests."""

    replica: str
    window_s: float
    engine: EngineSummary | None
    gateways: tuple[GatewaySummary, ...]
    stacks: dict[str, StackSamples]
    num_requests: int
    request_shares: dict[str, float]
    next: str
    left_out: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """What `kervan profile --json` prints; scripts rely on these keys."""
        engine = self.engine
        return {
            "replica": self.replica,
            "window_s": self.window_s,
            "gpu_waits_for": None if engine is None or not engine.gpu else engine.waits_for,
            "gpu": None if engine is None else engine.gpu or None,
            "shares": {} if engine is None else _rounded(engine.shares),
            "host_shares": {} if engine is None else _rounded(engine.host_shares),
            "kernels": [
                {"name": k.name, "share": round(k.share, 4), "calls": k.calls, "bound": k.bound}
                for k in (engine.kernels if engine is not None else ())[: 4 * TOP_KERNELS]
            ],
            "steps": None
            if engine is None
            else {
                "traced": engine.batch.num_steps,
                "traced_s": round(engine.window_s, 3),
                "ended_by": engine.ended_by,
                "streams": round(engine.batch.streams, 1),
                "context_tokens": round(engine.batch.context_tokens),
                "prefill_share": round(engine.batch.prefill_share, 4),
                "step_s": round(engine.batch.step_s, 6),
                "standstill_s": round(engine.standstill_s, 3),
            },
            "requests": {"count": self.num_requests, "shares": _rounded(self.request_shares)},
            "gateways": [
                {
                    "id": g.id,
                    "busy": round(g.busy, 4),
                    "tokens_per_s": round(g.tokens_per_s, 1),
                    "us_per_token": round(g.us_per_token, 1),
                    "samples": g.num_samples,
                    "us_per_token_by_part": {name: round(us, 2) for name, us in g.parts.items()},
                    "ranges": {name: {"calls": c, "seconds": round(s, 6)} for name, (c, s) in g.ranges.items()},
                }
                for g in self.gateways
            ],
            "stacks": {
                who: {
                    "samples": found.num_samples,
                    "waiting": found.num_waiting,
                    "parts": {name: round(found.share(name), 4) for name, _ in found.parts},
                    "functions": [[name, count] for name, count in found.functions[:20]],
                }
                for who, found in self.stacks.items()
            },
            "next": self.next,
            "left_out": list(self.left_out),
        }


def summarise(
    replica: str,
    *,
    window_s: float,
    engine: Mapping[str, Any] | None,
    trace: TorchTrace | None,
    gateways: Sequence[Mapping[str, Any]],
    stacks: Mapping[str, str],
    sampled_s: float = 0.0,
    sampled_gateways: Sequence[Mapping[str, Any]] = (),
    left_out: Iterable[str] = (),
    max_streams: int = 0,
    tp: int = 1,
    is_eager: bool = False,
) -> Summary:
    """`engine`, `gateways`: as they recorded themselves; `stacks`: py-spy's raw output by process, of `sampled_s`.

    `sampled_gateways`: as they recorded themselves while stacks were sampled.
    """
    sampled = {told["gateway"]: told for told in sampled_gateways}
    folded = {who: samples.fold(raw) for who, raw in stacks.items()}
    summed = None if engine is None else engine_summary(engine, trace)
    fronts = tuple(
        _gateway(told, sampled.get(told["gateway"]), folded.get(f"gateway {told['gateway']}"), sampled_s)
        for told in gateways
    )
    requests = [timed["request"] for told in gateways for timed in told["requests"]]
    request_shares = shares_of_requests(requests)
    busiest = max((front.busy for front in fronts), default=0.0)
    if summed is None:
        next_lever = "record the engine too: without it nothing is known of the GPU"
    else:
        next_lever = lever.decide(
            lever.Findings(
                summed.shares,
                has_gpu=bool(summed.gpu),
                host_shares=summed.host_shares,
                request_shares=request_shares,
                gateway_busy=busiest,
                num_gateways=len(fronts),
                streams=summed.batch.streams,
                max_streams=max_streams,
                prefill_share=summed.batch.prefill_share,
                step_s=summed.batch.step_s,
                cache_reading=summed.cache_reading,
                context_tokens=summed.batch.context_tokens,
                tp=tp,
                is_eager=is_eager,
            )
        )
    return Summary(
        replica, window_s, summed, fronts, folded, len(requests), request_shares, next_lever, tuple(left_out)
    )


def engine_summary(engine: Mapping[str, Any], trace: TorchTrace | None) -> EngineSummary:
    """Of what an engine recorded (`fleet.vllm.profiling`), and torch's trace if there is one."""
    zero_ns = engine[
        "begin_ns"
    ]  # all times from here on: as floats, those since 1970 have no digits left for parts of us
    spans: dict[str, list[Interval]] = defaultdict(list)
    batches = []
    for name, begin_ns, end_ns, facts in engine["spans"]:
        spans[name].append(((begin_ns - zero_ns) / 1e3, (end_ns - zero_ns) / 1e3))
        if name == "schedule" and sum(facts.values()):
            batches.append(facts)
    window = 0.0, (engine["end_ns"] - zero_ns) / 1e3
    if trace is not None:
        base_us = (trace.base_ns - zero_ns) / 1e3
        for event in trace.of(traces.RANGE):
            if event.name in _IN_WORKER:
                spans[event.name].append((base_us + event.ts, base_us + event.end))
        for step in traces.steps_on_host(trace):
            spans[_RUNNER].append((base_us + step.begin_us, base_us + step.end_us))
        spans[GPU_WAIT] += [(base_us + begin, base_us + end) for begin, end in traces.waits_for_gpu(trace)]
    host_shares = partition(spans, window)
    gpu, shares = "", host_shares
    kernels: tuple[KernelTotal, ...] = ()
    cache_reading = 0.0
    if trace is not None and trace.gpu_work:
        moved = [(begin - base_us, end - base_us) for begin, end in spans["no work"]]
        known = hardware.find(trace.gpu)
        used: DeviceUse = device.use(trace, (window[0] - base_us, window[1] - base_us), moved, known)
        gpu, kernels, shares, cache_reading = trace.gpu or "GPU", used.kernels, used.shares, used.cache_reading
    elif trace is not None:
        kernels = device.operations(trace)
    window_s = (window[1] - window[0]) / 1e6
    return EngineSummary(
        gpu, shares, host_shares, kernels,
        _batch(batches, engine["num_steps"], window_s * (1 - host_shares.get("no work", 0.0))),
        window_s, engine["standstill_s"], engine["ended_by"], cache_reading,
    )  # fmt: skip


def partition(spans: Mapping[str, Sequence[Interval]], window: Interval) -> dict[str, float]:
    """Shares of a window by part, and `other`, which add up to 1. Time that is in two parts is the earlier one's."""
    whole = max(window[1] - window[0], 1e-9)
    taken: list[Interval] = []
    shares: dict[str, float] = {}
    for name in HOST_PARTS:
        own = traces.within(spans.get(name, ()), window)
        share = (traces.length(own) - traces.overlap(own, taken)) / whole
        if share > 0:
            shares[name] = share
        taken = traces.union([*taken, *own])
    shares["other"] = 1 - traces.length(taken) / whole
    return shares


def shares_of_requests(requests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the time of all requests, by part, as `kervan explain` tells it. Largest first."""
    seconds: dict[str, float] = defaultdict(float)
    for request in requests:
        streams = request["streams"]
        for part in (*request["before"], *(part for stream in streams for part in stream["parts"])):
            seconds[part["part"]] += part["seconds"]
        seconds["delivery"] += request["delivery_s"]
    whole = sum(seconds.values())
    if not whole:
        return {}
    return {name: s / whole for name, s in sorted(seconds.items(), key=lambda item: -item[1]) if s > 0}


def _gateway(
    told: Mapping[str, Any], sampled: Mapping[str, Any] | None, stacks: StackSamples | None, sampled_s: float
) -> GatewaySummary:
    """`sampled`: of the time of the stacks, None where it is not known and the other time stands for it."""
    records = [record for record in (told, sampled) if record is not None]
    wall_s, cpu_s, tokens = (
        sum((record["end_ns"] - record["begin_ns"]) / 1e9 for record in records),
        sum(record["cpu_s"] for record in records),
        sum(record["tokens"] for record in records),
    )
    us_per_token = cpu_s / tokens * 1e6 if tokens else 0.0
    last = records[-1]
    most = last["active_s"] / ((last["end_ns"] - last["begin_ns"]) / 1e9) * sampled_s * RATE_HZ
    counts = {} if stacks is None else working_samples(stacks, most)
    whole = sum(counts.values())
    return GatewaySummary(
        told["gateway"],
        cpu_s / wall_s,
        tokens / wall_s,
        us_per_token,
        {name: us_per_token * count / whole for name, count in counts.items()} if whole and us_per_token else {},
        {name: (total["calls"], total["seconds"]) for name, total in told["totals"].items()},
        round(whole),
    )


def working_samples(stacks: StackSamples, most: float) -> dict[str, float]:
    """Samples by part, of a process whose loop can have `most`: it ran, or waited for a core, for so long.

    A loop that waits and one that writes to sockets look alike to py-spy, where the kernel does not tell it which
    threads sleep: what is more than that was waiting, and is taken from the event loop.
    """
    counts: dict[str, float] = dict(stacks.parts)
    too_many = sum(counts.values()) - most
    if too_many > 0 and EVENT_LOOP in counts:
        counts[EVENT_LOOP] = max(0.0, counts[EVENT_LOOP] - too_many)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _batch(batches: Sequence[Mapping[str, int]], num_steps: int, working_s: float) -> BatchMeans:
    count = len(batches)
    if not count:
        return BatchMeans(num_steps)
    decoded = sum(batch["sequences"] for batch in batches)
    prefilled = sum(batch["prefill_tokens"] for batch in batches)
    return BatchMeans(
        num_steps,
        streams=decoded / count,
        context_tokens=sum(batch["context_tokens"] for batch in batches) / count,
        prefill_share=prefilled / max(1, prefilled + decoded),
        step_s=working_s / count,
    )


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])}
