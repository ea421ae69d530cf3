"""Which replicas stand still: alive, with work, and without a step for longer than a step can take.

A gateway that notices moves their streams away in seconds; if the engine goes on, nothing is lost but a prefill. Ending
such an engine is another matter, decided with more patience by `watchdog`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_PATIENCE_S = 1.5
DECODE_STEPS = 20  # so many usual steps may one step take that only decodes,
PREFILL_STEPS = 3  # and so many times its prefill one that also prefills
CAUTIOUS_PREFILL_TOKENS_PER_S = 1_000.0  # while the engines' speed is not known: slower than a small model on CPU cores
# Where engines compile or load something at their first use, one after the other stands still for a while.
MEMORY_S = 60.0
MAX_DOUBLINGS = 4
# Streams go to replicas that have stepped, or had nothing to do, so lately; else all may wait for the same thing.
RECENT_STEP_S = 1.0


@dataclass(frozen=True, slots=True)
class StepProgress:
    """What a gateway knows of one replica. `stalled_s`: it has had work and made no step for so long.

    `step_s`: between its last steps on average, None if not known. `prefill_tokens`: the most that the step it is in
    may prefill, 0 when nothing there waits for its first token. `takes_streams`: it does not drain. `expected_step_s`:
    what the engine itself expects of the step it is in, 0 if that is not known. `found_after`: of one that was found to
    stand still, `num_recent` then; None for others.
    """

    replica_id: str
    stalled_s: float
    step_s: float | None
    prefill_tokens: int
    takes_streams: bool = True
    expected_step_s: float = 0.0
    found_after: int | None = None


@dataclass(frozen=True, slots=True)
class StallDecision:
    """`reasons`: why, by the id of each stalled replica. `can_move`: some other one can take their streams."""

    reasons: dict[str, str]
    can_move: bool


def patience_s(progress: StepProgress, *, prefill_tokens_per_s: float | None, num_recent: int) -> float:
    """How long a step may take; `num_recent` replicas were found stalled in the last `MEMORY_S`."""
    prefill_s = progress.prefill_tokens / (prefill_tokens_per_s or CAUTIOUS_PREFILL_TOKENS_PER_S)
    prefill_s = max(prefill_s, progress.expected_step_s)
    longest_s = max(MIN_PATIENCE_S, DECODE_STEPS * (progress.step_s or 0.0), PREFILL_STEPS * prefill_s)
    return longest_s * 2.0 ** min(num_recent, MAX_DOUBLINGS)


def decide(replicas: Sequence[StepProgress], *, prefill_tokens_per_s: float | None, num_recent: int) -> StallDecision:
    """Which of `replicas` stand still.

    `prefill_tokens_per_s`: as learned from first tokens, None while it is not known. `num_recent`: see `patience_s`.
    """
    reasons = {}
    for replica in replicas:
        # What it was found with holds until it steps: its own stall would double the patience with it.
        recent = num_recent if replica.found_after is None else replica.found_after
        limit_s = patience_s(replica, prefill_tokens_per_s=prefill_tokens_per_s, num_recent=recent)
        if replica.stalled_s > limit_s:
            stalled_s = replica.stalled_s
            reasons[replica.replica_id] = f"has work but made no step for {stalled_s:.1f} s (patience {limit_s:.1f} s)"
    can_move = any(
        replica.takes_streams and replica.stalled_s <= RECENT_STEP_S and replica.replica_id not in reasons
        for replica in replicas
    )
    return StallDecision(reasons, can_move)
