"""Whether an engine replica still works: its process reports, and it steps while it has work."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSample:
    """One look at an engine. Times are seconds on the observer's monotonic clock."""

    now_s: float
    last_report_s: float
    last_step_s: float
    has_work: bool


@dataclass(frozen=True, slots=True)
class Health:
    """`reason` says why when not healthy."""

    is_healthy: bool
    reason: str


def decide(sample: EngineSample, *, stall_timeout_s: float) -> Health:
    """Unhealthy when silent, or with work but no step, for longer than `stall_timeout_s`."""
    silent_s = sample.now_s - sample.last_report_s
    if silent_s > stall_timeout_s:
        return Health(False, f"no report for {silent_s:.0f} s (limit {stall_timeout_s:.0f} s)")
    stalled_s = sample.now_s - sample.last_step_s
    if sample.has_work and stalled_s > stall_timeout_s:
        return Health(False, f"has work but made no step for {stalled_s:.0f} s (limit {stall_timeout_s:.0f} s)")
    return Health(True, "")
