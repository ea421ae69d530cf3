"""How long calls take on a device: on a GPU without the host's time, by CUDA events around the replay of a graph."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Call = Callable[[], object]

TARGET_S = 4e-3  # of one replay: long against the resolution of events (about 0.5 us), short enough to do often
MAX_CALLS = 400
REPEATS = 7


class Clock(Protocol):
    """Times calls on one device."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one call: the median of several repeats over `calls`, at least one, in turn.

        Several calls that do the same on other data keep that data out of the cache.
        """
        ...


def num_calls(estimate_s: float, at_least: int) -> int:
    """Calls in one repeat, such that it takes about TARGET_S and has each of `at_least` different calls."""
    return max(at_least, min(MAX_CALLS, round(TARGET_S / max(estimate_s, 1e-7))), 1)


class CpuClock:
    """The wall clock of this process."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """Wall-clock seconds of one call, as in `Clock`."""
        for call in calls:
            call()
        begin_s = time.perf_counter()
        calls[0]()
        count = num_calls(time.perf_counter() - begin_s, len(calls))
        took_s = []
        for _ in range(REPEATS):
            begin_s = time.perf_counter()
            for i in range(count):
                calls[i % len(calls)]()
            took_s.append((time.perf_counter() - begin_s) / count)
        return statistics.median(took_s)


class CudaClock:
    """CUDA events around the replay of a graph of the calls."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """GPU seconds of one call, as in `Clock`; a CUDA graph must be able to hold the calls."""
        import torch

        graph, count = capture(calls)
        took_s = []
        for _ in range(1 + REPEATS):
            took_s.append(elapsed_s(graph.replay) / count)
        del graph
        torch.cuda.synchronize()
        return statistics.median(took_s[1:])


def capture(calls: Sequence[Call], count: int | None = None) -> tuple[Any, int]:
    """A CUDA graph of `count` calls (as many as fill TARGET_S), and that number. All ranks of a group must agree on it.

    The calls run a few times before, on another stream, as libraries allocate and choose kernels on first use.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in [*calls, calls[0]]:
            call()
        estimate_s = elapsed_s(calls[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    count = num_calls(estimate_s, len(calls)) if count is None else count
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread may ask the driver something meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(count):
            calls[i % len(calls)]()
    return graph, count


def elapsed_s(call: Call) -> float:
    """GPU seconds between two events around `call`; waits for the end."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
