"""What processes use, and what a client saw, between two moments."""

import bisect
import math
import statistics
import threading
import time
from collections.abc import Sequence

import psutil

from kervan.bench.tally import Timeline

SAMPLE_PERIOD_S = 0.25
MIB = 2**20


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cpu_s(pids: Sequence[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def memory(pids: Sequence[int]) -> dict[str, float]:
    """Means over the processes, MiB: proportional set size, and what is theirs alone."""
    found = [psutil.Process(pid).memory_full_info() for pid in pids]
    return {
        "pss_mib": statistics.mean(one.pss for one in found) / MIB,
        "uss_mib": statistics.mean(one.uss for one in found) / MIB,
    }


class Sampler(threading.Thread):
    """CPU seconds of processes over time. `cpu_s(pid, at_s)` is interpolated; `at_s` is Unix time."""

    def __init__(self, pids: Sequence[int]):
        super().__init__(daemon=True)
        self.pids = pids
        self._at_s: list[float] = []
        self._seen: list[dict[int, float]] = []
        self._ended = threading.Event()

    def __enter__(self) -> "Sampler":
        self._look()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._look()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_PERIOD_S):
            self._look()

    def _look(self) -> None:
        seen = {pid: cpu_s([pid]) for pid in self.pids if psutil.pid_exists(pid)}
        self._at_s.append(time.time())
        self._seen.append(seen)

    def cpu_s(self, pid: int, at_s: float) -> float:
        after = min(max(1, bisect.bisect(self._at_s, at_s)), len(self._at_s) - 1)
        begin_s, end_s = self._at_s[after - 1], self._at_s[after]
        begin, end = self._seen[after - 1][pid], self._seen[after][pid]
        return begin + (end - begin) * (at_s - begin_s) / (end_s - begin_s)


def window(timeline: Timeline, begin_s: float, end_s: float) -> tuple[float, float, float]:
    """(begin, end, tokens) of the whole cells within two moments after the start of a run."""
    first, last = math.ceil(begin_s / timeline.width_s), math.floor(end_s / timeline.width_s)
    tokens = sum(timeline.cells[number].tokens for number in range(first, last) if number in timeline.cells)
    return first * timeline.width_s, last * timeline.width_s, tokens
