"""Reads the trace that torch's profiler writes: Chrome's JSON, its times in microseconds after a base. Pure."""

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from kervan.errors import EngineError

GPU_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
RANGE = "user_annotation"
OPERATION = "cpu_op"
_BATCH = re.compile(r"context_(\d+)\((\d+)[^)]*\)_generation_(\d+)\((\d+)")


Interval = tuple[float, float]  # begin and end, in microseconds


class Event(msgspec.Struct, gc=False):
    """Something that took `dur` from `ts`, in microseconds of the trace. `cat`: what kind of thing."""

    name: str = ""
    ph: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: int | str = 0
    tid: int | str = 0

    @property
    def end(self) -> float:
        """When it was over."""
        return self.ts + self.dur


class _Device(msgspec.Struct):
    name: str = ""


class _File(msgspec.Struct):
    traceEvents: list[Event]  # noqa: N815 - the file's word
    baseTimeNanoseconds: int = 0  # noqa: N815
    deviceProperties: list[_Device] = []  # noqa: N815


@dataclass(frozen=True, slots=True)
class TorchTrace:
    """Events with a duration, by begin. `base_ns`: when its time began, since 1970. `gpu`: its name, or empty."""

    events: tuple[Event, ...]
    base_ns: int
    gpu: str

    def of(self, *categories: str) -> list[Event]:
        """Those of some categories."""
        return [event for event in self.events if event.cat in categories]

    @property
    def gpu_work(self) -> list[Event]:
        """What a GPU did; empty on a CPU."""
        return [event for event in self.events if event.cat in GPU_WORK]

    def at_us(self, unix_ns: int) -> float:
        """A moment in the trace's time."""
        return (unix_ns - self.base_ns) / 1e3


_decoder = msgspec.json.Decoder(_File)


def read(data: bytes) -> TorchTrace:
    """Plain or compressed with gzip. Raises: EngineError for what is no such trace."""
    try:
        file = _decoder.decode(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (msgspec.DecodeError, OSError, EOFError) as error:
        raise EngineError(
            f"torch's profiler wrote no trace that can be read ({error}); profile fewer --steps"
        ) from error
    events = sorted((event for event in file.traceEvents if event.ph == "X"), key=lambda event: event.ts)
    device = next((device.name for device in file.deviceProperties if device.name), "")
    return TorchTrace(tuple(events), file.baseTimeNanoseconds, device)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step computed, from the name that vLLM gives it: requests, and their tokens."""

    begin_us: float
    end_us: float
    prefills: int
    prefill_tokens: int
    decodes: int
    decode_tokens: int

    @property
    def tokens(self) -> int:
        """That go through each matrix product."""
        return self.prefill_tokens + self.decode_tokens

    @property
    def kind(self) -> str:
        """prefill, decode, or mixed."""
        return "mixed" if self.prefills and self.decodes else "prefill" if self.prefills else "decode"


def steps(trace: TorchTrace) -> list[StepBatch]:
    """The steps on the GPU's timeline where it has them, else on the host's."""
    return _steps(trace.of("gpu_user_annotation") or trace.of(RANGE))


def steps_on_host(trace: TorchTrace) -> list[StepBatch]:
    """The steps as the host's thread ran them; on a GPU it is ahead."""
    return _steps(trace.of(RANGE))


def _steps(events: Iterable[Event]) -> list[StepBatch]:
    found = []
    for event in events:
        if batch := _BATCH.search(event.name):
            found.append(StepBatch(event.ts, event.end, *map(int, batch.groups())))
    return found


def waits_for_gpu(trace: TorchTrace) -> list[Interval]:
    """When the thread that runs the steps waited for results of the GPU."""
    threads = {(event.pid, event.tid) for event in trace.of(RANGE) if _BATCH.search(event.name)}
    return [
        (event.ts, event.end)
        for event in trace.of("cuda_runtime")
        if (event.pid, event.tid) in threads and event.name.endswith("Synchronize")
    ]


def self_times_us(events: Iterable[Event]) -> dict[int, float]:
    """Time of each event without that of events within it, by its place in `events`, which are sorted by begin."""
    listed = list(events)
    left = {place: event.dur for place, event in enumerate(listed)}
    open_by_thread: dict[tuple[int | str, int | str], list[int]] = defaultdict(list)
    for place, event in enumerate(listed):
        around = open_by_thread[event.pid, event.tid]
        while around and listed[around[-1]].end <= event.ts:
            around.pop()
        if around:
            left[around[-1]] -= event.dur
        around.append(place)
    return {place: max(0.0, time_us) for place, time_us in left.items()}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in intervals that do not touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def within(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """What of them is in a window."""
    return union((max(begin, window[0]), min(end, window[1])) for begin, end in intervals)


def gaps(busy: Iterable[Interval], window: Interval) -> list[Interval]:
    """The time of a window in which nothing of `busy` is; `busy` in order and apart."""
    found, at = [], window[0]
    for begin, end in within(busy, window):
        if begin > at:
            found.append((at, begin))
        at = end
    return [*found, (at, window[1])] if window[1] > at else found


def length(intervals: Iterable[Interval]) -> float:
    """Of intervals that do not touch."""
    return sum(end - begin for begin, end in intervals)


def overlap(first: Iterable[Interval], second: Iterable[Interval]) -> float:
    """Time that is in both; each in order and apart."""
    ones, others = list(first), list(second)
    total, i, j = 0.0, 0, 0
    while i < len(ones) and j < len(others):
        total += max(0.0, min(ones[i][1], others[j][1]) - max(ones[i][0], others[j][0]))
        if ones[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return total
