"""A histogram of durations as Prometheus has them: counts of what is at most each bound."""

from bisect import bisect_left
from collections.abc import Sequence

# Seconds: from what nobody sees to the longest that a stream is held by default.
PAUSE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# Those of vLLM's own time to first token that matter at a replica.
TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# From a small model on a fast GPU to what nobody reads along with; vLLM's own begin at 10 ms.
TPOT_BOUNDS_S = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0)
# Starts of replicas: forked twins to weights of hundreds of GiB from a slow disk.
START_BOUNDS_S = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


def bounds_with(bounds: Sequence[float], bound_s: float | None) -> tuple[float, ...]:
    """These, and one of an SLO: how many kept it is read off its bucket, not guessed between two."""
    return tuple(sorted({*bounds, *(() if bound_s is None else (bound_s,))}))


class Histogram:
    """Of values in seconds; `bounds` ascend. `counts`: those so far, one per bound and one above, if there are any."""

    def __init__(self, bounds: tuple[float, ...], counts: Sequence[int] = (), sum_s: float = 0.0) -> None:
        self.bounds = bounds
        self.sum_s = sum_s
        self.counts = [*counts] or [0] * (len(bounds) + 1)

    def observe(self, value_s: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value_s)] += 1
        self.sum_s += value_s

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound as Prometheus writes it, `+Inf` last, with how many values are at most so large."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets
