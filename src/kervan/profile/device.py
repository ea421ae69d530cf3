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
import functools
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
# Beside products and attention, and of their names, yet they only read and write: sums of partial results, caches.
_MOVES_DATA = re.compile(r"splitk_?reduce|FlashAttnFwdCombine|reshape_and_cache|concat_and_cache|prepare_varlen", re.I)
# Templates that say nothing of what runs: the kernel is their first argument.
_WRAPPER = re.compile(r"^cutlass::(device_kernel|Kernel2?)$|(^|::)enable_\w+$")
_CLOSES = {"(": ")", "<": ">"}
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
    """What a GPU's time went to: `shares` of the window add up to 1.

    `cache_reading`: the share of attention that waits for memory, for the keys and values of the streams' contexts. It
    is a part of `memory`.
    """

    shares: dict[str, float]
    kernels: tuple[KernelTotal, ...]
    num_kernels: int
    cache_reading: float = 0.0

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
    reading_us = 0.0
    for event in work:
        place = bisect.bisect_right(begins, event.ts) - 1
        bound = bound_of(event, batches[place] if place >= 0 else None, gpu)
        name = short_name(event.name)
        by_bound[bound] += event.dur
        by_name[name][bound].append(event.dur)
        if bound == "memory" and _ATTENTION.search(name):
            reading_us += event.dur
    busy = traces.within(((event.ts, event.end) for event in work), window)
    whole = max(window[1] - window[0], 1e-9)
    # Kernels of several streams may run beside each other: their times are scaled to the time in which one ran.
    scale = traces.length(busy) / max(sum(by_bound.values()), 1e-9)
    idle = traces.gaps(busy, window)
    nothing = traces.overlap(idle, traces.union(no_work))
    shares = {str(bound): time_us * scale / whole for bound, time_us in by_bound.items()}
    shares |= {"nothing to do": nothing / whole, "host": (traces.length(idle) - nothing) / whole}
    return DeviceUse(shares, _totals(by_name), len(work), reading_us * scale / whole)


def bound_of(event: Event, step: StepBatch | None, gpu: Gpu | None) -> Bound:
    """Which side of the roofline a kernel is on, in a step of this batch."""
    if event.cat != "kernel":
        return "copies"
    name = short_name(event.name)  # the arguments of templates name much that a kernel is not
    if _COMMUNICATION.search(name):
        return "communication"
    if _MOVES_DATA.search(name):
        return "memory"
    if _ATTENTION.search(name):
        return "unknown" if step is None else "compute" if step.prefill_tokens > step.decodes else "memory"
    if _PRODUCT.search(name):
        if step is None or gpu is None:
            return "unknown"
        return "compute" if step.tokens >= gpu.bf16_flops / gpu.bandwidth_bytes_s else "memory"
    return "memory"  # norms, rotary embeddings, activations, sampling: a few operations for each number that is read


@functools.lru_cache(maxsize=4096)
def short_name(name: str) -> str:
    """Of a kernel, without what it returns, its template's arguments and its parameters.

    >>> short_name("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<int> > >(int)")
    'flash::FlashAttnFwdSm90'
    """
    head, argument = _cut(name)
    while argument and _WRAPPER.search(head):
        head, argument = _cut(argument)
    return (head or name)[:MAX_NAME]


def _cut(name: str) -> tuple[str, str]:
    """A C++ name without what is in brackets or comes before it, and its template's first argument.

    Brackets that never close, as of a name that was cut off, hold the rest.
    """
    name = name.replace("(anonymous namespace)::", "")
    head, arguments, opened = "", "", ""
    for sign in name:
        if opened and sign == _CLOSES.get(opened[-1]):
            opened = opened[:-1]
            arguments += sign if opened else ","
        elif sign in _CLOSES:
            if sign == "(" and not opened and head:
                # Parameters: what stands before the name is the type returned. A copy's kind has a space before it.
                return (head.rsplit(maxsplit=1)[-1] if head[-1] != " " else head.strip()), _first(arguments)
            arguments += sign if opened else ""
            opened += sign
        elif opened:
            arguments += sign
        else:
            head += sign
    return head.strip().removeprefix("void "), _first(arguments)


def _first(arguments: str) -> str:
    """Of a list with commas, those in brackets not counted."""
    depth = 0
    for place, sign in enumerate(arguments):
        depth += (sign in "(<") - (sign in ")>")
        if sign == "," and not depth:
            return arguments[:place].strip()
    return arguments.strip()


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
