"""Which of a gateway's links lead to replicas that stand still."""

import time
from collections import deque
from collections.abc import Sequence

from kervan.fleet.link import ReplicaLink
from kervan.policy import stall

PERIOD_S = 0.25
LATE_S = 0.5  # a gateway that was itself held up for longer has signs of life to read first


class StallDetector:
    """Looks at links every `PERIOD_S`, and remembers when replicas began to stall lately."""

    def __init__(self) -> None:
        self._looked_s = time.monotonic()
        self._stalled_at_s: deque[float] = deque()
        self._found_after: dict[str, int] = {}  # by replica id, of those that are stalled

    def look(self, links: Sequence[ReplicaLink], prefill_tokens_per_s: float | None) -> dict[str, str]:
        """Mark the stalled links; returns replica id -> reason for those whose streams should move now."""
        now_s = time.monotonic()
        is_late, self._looked_s = now_s - self._looked_s > PERIOD_S + LATE_S, now_s
        if is_late:
            return {}
        while self._stalled_at_s and self._stalled_at_s[0] < now_s - stall.MEMORY_S:
            self._stalled_at_s.popleft()
        num_recent = len(self._stalled_at_s)
        decision = stall.decide(
            [_progress(link, now_s, self._found_after.get(link.replica_id)) for link in links],
            prefill_tokens_per_s=prefill_tokens_per_s,
            num_recent=num_recent,
        )
        self._found_after = {
            replica_id: self._found_after.get(replica_id, num_recent) for replica_id in decision.reasons
        }
        for link in links:
            is_stalled = link.replica_id in decision.reasons
            if is_stalled and not link.load.is_stalled:
                self._stalled_at_s.append(now_s)
                link.found_stalled(now_s)
                link.load.is_on_trial = True
            link.load.is_stalled = is_stalled
        return decision.reasons if decision.can_move else {}


def _progress(link: ReplicaLink, now_s: float, found_after: int | None) -> stall.StepProgress:
    return stall.StepProgress(
        link.replica_id,
        stalled_s=link.stalled_s(now_s),
        step_s=link.step_s,
        prefill_tokens=_prefill_tokens(link),
        takes_streams=not link.is_draining,
        expected_step_s=link.pong.expected_step_s,
        found_after=found_after,
    )


def _prefill_tokens(link: ReplicaLink) -> int:
    """The most that its present step may prefill: of this gateway's streams, and of others' if some wait there."""
    most = link.facts.max_num_batched_tokens or link.facts.max_model_len
    own = [s.prompt_tokens + len(s.generated) for s in link.streams.values() if not s.gave_token]
    return most if link.pong.waiting > len(own) else min(most, sum(own))
