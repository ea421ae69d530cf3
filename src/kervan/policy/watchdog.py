"""Whether an engine replica still works: its process reports, and it steps while it has work.

An engine that stands still is ended, and that costs all of its streams a prefill. A step that computes many tokens is
not standing still: it may take `STEPS` times as long as expected. And a request is suspected when a replica stood still
over it: the next one that tries it is given `TRIAL_TIMEOUT_S`, for what ended one engine by being long would end each.
"""

from dataclasses import dataclass

STEPS = 3
TRIAL_TIMEOUT_S = 600.0
# While an engine's speed is not known: slower than a large model on a few CPU cores.
CAUTIOUS_TOKENS_PER_S = 100.0


@dataclass(frozen=True, slots=True)
class EngineSample:
    """One look at an engine. Times are seconds on the observer's monotonic clock.

    `expected_step_s`: what the step in progress should take, 0 when none is. `num_suspects`: requests that it tries
    since another replica was lost, or stood still, before it gave them a token. `hang`: what its ranks wait for, once
    it is sure that they do; empty while the step may be a long one.
    """

    now_s: float
    last_report_s: float
    last_step_s: float
    has_work: bool
    expected_step_s: float = 0.0
    num_suspects: int = 0
    hang: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """`reason` says why when not healthy."""

    is_healthy: bool
    reason: str


def step_limit_s(*, expected_step_s: float, num_suspects: int, stall_timeout_s: float) -> float:
    """How long an engine with work may make no step."""
    if expected_step_s <= 0:  # it is in no step: it should begin one
        return stall_timeout_s
    return max(stall_timeout_s, STEPS * expected_step_s, TRIAL_TIMEOUT_S if num_suspects else 0.0)


def decide(sample: EngineSample, *, stall_timeout_s: float) -> Health:
    """Unhealthy when silent for longer than `stall_timeout_s`, or with work but no step for longer than it may."""
    silent_s = sample.now_s - sample.last_report_s
    if silent_s > stall_timeout_s:
        return Health(False, f"no report for {silent_s:.0f} s (limit {stall_timeout_s:.0f} s)")
    stalled_s = sample.now_s - sample.last_step_s
    # In a hang, waiting for as long as the step may take helps nobody.
    expected_step_s = 0.0 if sample.hang else sample.expected_step_s
    limit_s = step_limit_s(
        expected_step_s=expected_step_s, num_suspects=sample.num_suspects, stall_timeout_s=stall_timeout_s
    )
    if sample.has_work and stalled_s > limit_s:
        why = f"; {sample.hang}" if sample.hang else ""
        return Health(False, f"has work but made no step for {stalled_s:.0f} s (limit {limit_s:.0f} s){why}")
    return Health(True, "")
