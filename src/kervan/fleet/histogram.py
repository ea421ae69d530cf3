"""A histogram of durations as Prometheus has them: counts of what is at most each bound."""

from bisect import bisect_left

# Seconds: from what nobody sees to the longest that a stream is held by default.
PAUSE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# Those of vLLM's own time to first token that matter at a replica.
TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Of values in seconds; `bounds` ascend."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.sum_s = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value_s: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value_s)] += 1
        self.sum_s += value_s

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound as Prometheus writes it, `+Inf` last, with how many values are at most so large."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets
