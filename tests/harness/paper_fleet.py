"""A fleet on paper, in whole seconds, for the tests of autoscaling policies: requests come and go as fluids.

Each ready replica takes `rate` requests per second; what comes above that waits. One that is asked for is ready `start_s`
later. `PaperReplica` is the model that belongs to it.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kervan.policy.autoscale.state import Decision, Demand, FleetState, Policy, PoolState, ReplicaState
from kervan.sim.capacity import LoadPrediction

STAY_S = 10.0
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 100


@dataclass(frozen=True)
class PaperReplica:
    """A replica that takes `rate` requests/s of 1,000 and 100 tokens, each of which stays 10 s, and not one more."""

    rate: float = 1.0
    prefill_tokens_per_s: float = 10_000.0
    kv_tokens: int = 1_000_000
    max_num_seqs: int = 256

    def predict(
        self, *, requests_per_s: float, prompt_tokens: float, output_tokens: float, arrivals_cv2: float = 1.0,
        prompts_cv2: float = 0.0,
    ) -> LoadPrediction:  # fmt: skip
        work = requests_per_s * (0.5 * prompt_tokens / PROMPT_TOKENS + 0.5 * output_tokens / OUTPUT_TOKENS) / self.rate
        if work > 1:
            return LoadPrediction(math.inf, 0.05, work, work, math.inf)
        return LoadPrediction(0.1, 0.05, work, work, requests_per_s * STAY_S)

    def step_s(self, *, sequences: int, context_tokens: float, prefill_tokens: int = 0) -> float:
        return 0.05


@dataclass
class PaperFleet:
    """`run` asks the policy each second, as the live fleet does; its memory goes through JSON now and then."""

    policy: Policy
    minimum: int = 1
    maximum: int = 8
    start_s: float = 100.0
    rate: float = 1.0
    room: int | None = None
    now_s: float = 0.0
    target: int = 0
    queue: float = 0.0
    late: float = 0.0
    came: float = 0.0
    replica_seconds: float = 0.0
    memory: Mapping[str, Any] = field(default_factory=dict)
    ready_at_s: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    has_news: Callable[[float], bool] = lambda _: True
    _fraction: float = 0.0

    def __post_init__(self) -> None:
        self.target = self.target or self.minimum
        self.ready_at_s = [-3600.0] * self.target

    def run(self, load: Callable[[float], float], seconds: int) -> "PaperFleet":
        """`load`: requests per second at a time."""
        for _ in range(seconds):
            self.now_s += 1.0
            self._decide(self._second(load(self.now_s)))
        return self

    @property
    def changes(self) -> int:
        """How often the target changed."""
        return sum(after != before for before, after in itertools.pairwise(self.targets))

    @property
    def reversals(self) -> int:
        """How often it went the other way."""
        steps = [b - a for a, b in itertools.pairwise(self.targets) if a != b]
        return sum((one > 0) != (other > 0) for one, other in itertools.pairwise(steps))

    def _second(self, rate: float) -> Demand:
        self._fraction += rate
        arrived = int(self._fraction)
        self._fraction -= arrived
        ready = sum(at_s <= self.now_s for at_s in self.ready_at_s)
        self.came += arrived
        takes = ready * self.rate
        served = min(self.queue + arrived, takes)
        self.queue += arrived - served
        if self.queue > 1.5 * max(takes, 1e-9):
            self.late += arrived
        good = round(served) if self.queue <= 1.5 * takes else 0
        return Demand(
            window_s=1.0, arrived=arrived, arrived_prompt_tokens=arrived * PROMPT_TOKENS, finished=round(served),
            finished_output_tokens=round(served) * OUTPUT_TOKENS, first_tokens=round(served), first_tokens_good=good,
            finished_good=good, tpot_p50_s=0.05, tpot_p95_s=0.05, ttft_p95_s=0.1 + self.queue / max(takes, 1.0),
            held=0 if ready else round(self.queue), queued=round(self.queue) if ready else 0,
            queued_tokens=round(self.queue) * PROMPT_TOKENS, running=round(min(rate, takes) * STAY_S),
        )  # fmt: skip

    def state(self, demand: Demand | None) -> FleetState:
        """What the policy sees."""
        replicas = tuple(
            ReplicaState(
                id=f"r{number}", pool="on-demand", phase="ready" if at_s <= self.now_s else "starting",
                age_s=self.now_s - (at_s - self.start_s), ready_for_s=max(0.0, self.now_s - at_s),
            )
            for number, at_s in enumerate(self.ready_at_s)
        )  # fmt: skip
        pool = PoolState(
            name="on-demand", minimum=self.minimum, maximum=self.maximum, target=self.target, start_s=self.start_s,
            room=self.room,
        )  # fmt: skip
        return FleetState(
            now_s=self.now_s, local_minute=int(self.now_s // 60) % 10_080, pools=(pool,), replicas=replicas,
            demand=demand,
        )  # fmt: skip

    def _decide(self, demand: Demand) -> Decision:
        decision = self.policy.decide(self.state(demand if self.has_news(self.now_s) else None), self.memory)
        self.memory = json.loads(json.dumps(decision.memory)) if self.now_s % 20 == 0 else decision.memory
        self.target = decision.targets["on-demand"]
        self.targets.append(self.target)
        self.reasons.append(decision.reason)
        while len(self.ready_at_s) < self.target:
            self.ready_at_s.append(self.now_s + self.start_s)
        self.ready_at_s = sorted(self.ready_at_s)[: self.target]
        self.replica_seconds += self.target
        return decision
