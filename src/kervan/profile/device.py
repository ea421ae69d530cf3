"""What a GPU did and what it waited for, from a trace of its kernels. Pure.

A GPU that computes is bound by its arithmetic or by its memory. A matrix product over T tokens does 2T operations for
each weight, and reads it once: at 16 bits T operations per byte. The roofline's edge is where arithmetic and memory
take equally long, `bf16_flops / bandwidth_bytes_s` operations per byte (206 for an H200). With 8-bit weights both
double. So a product is bound by memory while the step has fewer tokens than that, and by arithmetic beyond. Attention
of a decode reads each cached key and value once for few operations, and so is bound by memory; that of a prefill
computes.

Source: Williams et al. 2009 (roofline).
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kervan.facts.hardware import Gpu
from kervan.profile import trace as traces
from kervan.profile.trace import Event, Interval, StepBatch, TorchTrace

Bound = Literal["memory", "compute", "communication", "copies", "unknown"]

_COMMUNICATION = re.compile(
    r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|multimem|one_shot|two_shot", re.I
)
_PRODUCT = re.compile(r"gemm|gemv|cutlass|cublas|nvjet|wgmma|splitk|matmul|\bmm_|_mm\b|marlin|fused_moe|xmma", re.I)
_ATTENTION = re.compile(r"flash|fmha|attn|attention|paged", re.I)
_TEMPLATE = re.compile(r"<.*>|\(.*\)$", re.S)
MAX_NAME = 80


@dataclass(frozen=True, slots=True)
class KernelTotal:
    """All runs of a kernel, or of an operation on a CPU. `share`: of the time of all."""

    name: str
    share: float
    calls: int
    seconds: float
    bound: Bound


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a GPU's time went to: `shares` of the window add up to 1."""

    shares: dict[str, float]
    kernels: tuple[KernelTotal, ...]
    num_kernels: int

    @property
    def waits_for(self) -> str:
        """What takes most of the window."""
        return max(self.shares, key=lambda name: self.shares[name])


def use(trace: TorchTrace, window: Interval, no_work: Sequence[Interval], gpu: Gpu | None) -> DeviceUse:
    """What the GPU did in a window of the trace's time.

    `no_work`: when the engine had no request. `gpu` None: not a GPU whose roofline is known.
    """
    work = [event for event in trace.gpu_work if event.end > window[0] and event.ts < window[1]]
    batches = sorted(traces.steps(trace), key=lambda step: step.begin_us)
    begins = [step.begin_us for step in batches]
    by_bound: dict[Bound, float] = defaultdict(float)
    by_name: dict[str, dict[Bound, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in work:
        place = bisect.bisect_right(begins, event.ts) - 1
        bound = bound_of(event, batches[place] if place >= 0 else None, gpu)
        by_bound[bound] += event.dur
        by_name[short_name(event.name)][bound].append(event.dur)
    busy = traces.within(((event.ts, event.end) for event in work), window)
    whole = max(window[1] - window[0], 1e-9)
    # Kernels of several streams may run beside each other: their times are scaled to the time in which one ran.
    scale = traces.length(busy) / max(sum(by_bound.values()), 1e-9)
    idle = traces.gaps(busy, window)
    nothing = traces.overlap(idle, traces.union(no_work))
    shares = {str(bound): time_us * scale / whole for bound, time_us in by_bound.items()}
    shares |= {"nothing to do": nothing / whole, "host": (traces.length(idle) - nothing) / whole}
    return DeviceUse(shares, _totals(by_name), len(work))


def bound_of(event: Event, step: StepBatch | None, gpu: Gpu | None) -> Bound:
    """Which side of the roofline a kernel is on, in a step of this batch."""
    if event.cat != "kernel":
        return "copies"
    if _COMMUNICATION.search(event.name):
        return "communication"
    if _ATTENTION.search(event.name):
        return "unknown" if step is None else "compute" if step.prefill_tokens > step.decodes else "memory"
    if _PRODUCT.search(event.name):
        if step is None or gpu is None:
            return "unknown"
        return "compute" if step.tokens >= gpu.bf16_flops / gpu.bandwidth_bytes_s else "memory"
    return "memory"  # norms, rotary embeddings, activations, sampling: a few operations for each number that is read


def short_name(name: str) -> str:
    """Of a kernel, without its template's arguments and parameters."""
    short = _TEMPLATE.sub("", name.removeprefix("void ")).strip() or name
    return short[:MAX_NAME]


def operations(trace: TorchTrace) -> tuple[KernelTotal, ...]:
    """On a CPU: torch's operations by the time that each took without those within it."""
    events = trace.of(traces.OPERATION)
    by_name: dict[str, dict[Bound, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place, time_us in traces.self_times_us(events).items():
        by_name[events[place].name]["unknown"].append(time_us)
    return _totals(by_name)


def _totals(by_name: dict[str, dict[Bound, list[float]]]) -> tuple[KernelTotal, ...]:
    whole_us = sum(sum(map(sum, bounds.values())) for bounds in by_name.values()) or 1.0
    totals = []
    for name, bounds in by_name.items():
        sums: dict[Bound, float] = {bound: sum(times) for bound, times in bounds.items()}
        time_us, calls = sum(sums.values()), sum(map(len, bounds.values()))
        totals.append(KernelTotal(name, time_us / whole_us, calls, time_us / 1e6, max(sums, key=lambda b: sums[b])))
    return tuple(sorted(totals, key=lambda total: (-total.seconds, total.name)))
