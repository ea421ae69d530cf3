"""What an autoscaling policy sees, and what it decides. The live fleet and the simulator fill in the same state.

A policy is asked once a second. It has no clock, reads nothing, and keeps nothing but the `memory` that it is handed
again with the next state: the same states give the same decisions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

ReplicaPhase = Literal["starting", "ready", "draining", "unhealthy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What clients asked of the whole fleet, and what it gave them, in the last `window_s` seconds.

    Counts are of that window; gauges are of its end. Tokens of prompts are those that are to be computed, without what
    prefix caches have of them.
    """

    window_s: float
    arrived: int = 0
    """Requests, in streams; those that were refused too."""
    arrived_prompt_tokens: int = 0
    shed: int = 0
    """Refused because the queue was full."""
    finished: int = 0
    finished_output_tokens: int = 0
    """Whole lengths of the outputs that ended in the window."""
    generated_tokens: int = 0
    first_tokens: int = 0
    """Streams that got their first token in the window, and those of them that got it within the SLO."""
    first_tokens_good: int = 0
    finished_good: int = 0
    """Of `finished`: those that kept all bounds of the SLO."""
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    """Of the first tokens of the window; None without one."""
    tpot_p50_s: float | None = None
    tpot_p95_s: float | None = None
    """Seconds between tokens, of streams that generate; None without one."""
    # Gauges.
    held: int = 0
    """Streams that wait at gateways because no replica can take them."""
    held_tokens: int = 0
    """Tokens of their prompts, and of what they had generated."""
    queued: int = 0
    """Streams that were sent to a replica and have no token from there yet."""
    queued_tokens: int = 0
    """Tokens of those that are still to be computed."""
    running: int = 0
    """Streams that generate."""
    running_context_tokens: int = 0
    """Their prompts and outputs so far: what is in KV caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One replica that is listed. `age_s`: since its start began. `ready_for_s`: 0 until it is ready."""

    id: str
    pool: str
    phase: ReplicaPhase
    node: str = ""
    zone: str = ""
    age_s: float = 0.0
    ready_for_s: float = 0.0
    streams: int = 0
    context_tokens: int = 0
    """What moving its streams would compute again elsewhere."""
    queued_tokens: int = 0
    step_s: float | None = None
    """Seconds of a decode step, of late; None where none was seen."""
    is_outdated: bool = False
    """It has earlier settings, and leaves when one with the present ones is ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """One pool. `target`: what was asked for last. `room`: replicas that can be placed, those there included; None for
    a cluster that adds nodes. `start_s`: how long its replicas took to start, a quantile on the safe side.
    """

    name: str
    minimum: int
    maximum: int
    target: int
    room: int | None = None
    start_s: float = 60.0
    usd_per_hour: float | None = None
    """Of one replica."""
    losses_per_hour: float = 0.0
    """Of one replica, by its market: 0 for on-demand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetState:
    """The fleet at one second. `now_s` never goes back. `local_minute`: of the week, Monday 0:00 is 0, for schedules.

    `demand` is None while no gateway has told for `demand_age_s`: the numbers in `memory` are all there is.
    """

    now_s: float
    local_minute: int
    pools: tuple[PoolState, ...]
    replicas: tuple[ReplicaState, ...]
    demand: Demand | None
    demand_age_s: float = 0.0
    cover_after_s: float = 15.0
    """On-demand starts for spot that is missing for so long, and stops when none was missing for `cover_hold_s`."""
    cover_hold_s: float = 300.0

    def pool(self, name: str) -> PoolState:
        """Raises: KeyError."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise KeyError(name)

    def count(self, phase: ReplicaPhase, pool: str | None = None) -> int:
        """Replicas of a phase, of one pool or of all."""
        return sum(r.phase == phase and (pool is None or r.pool == pool) for r in self.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many replicas each pool should have. `leaving`: which of them go, those first that go first.

    `numbers`: what the reason stands on, for people and for metrics; units end their names. `memory`: for the next
    decision; it can be stored as JSON.
    """

    targets: Mapping[str, int]
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    leaving: tuple[str, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)


class Policy(Protocol):
    """An autoscaling policy, made once from the fleet's settings and what its replicas can do."""

    name: str

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """What the fleet should be. `memory`: of the last decision, empty at first and after what kept it was lost."""
        ...


class Prediction(Protocol):
    """What a replica would do under a steady load, in the tail (p99)."""

    @property
    def ttft_s(self) -> float:
        """Infinite in overload."""
        ...

    @property
    def tpot_s(self) -> float:
        """Of a request, the mean over its tokens."""
        ...

    @property
    def utilization(self) -> float:
        """Work over what it can do, above 1 in overload."""
        ...

    @property
    def kv_share(self) -> float:
        """Of the KV cache that running streams take, on average; above 1 where they do not fit."""
        ...

    @property
    def in_flight(self) -> float:
        """Requests that wait or run there, on average; infinite in overload."""
        ...


class ReplicaModel(Protocol):
    """What one replica can do, from the planner's step times."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of prompts, when nothing else is computed."""
        ...

    @property
    def kv_tokens(self) -> int:
        """That its KV cache holds."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at once."""
        ...

    def predict(
        self,
        *,
        requests_per_s: float,
        prompt_tokens: float,
        output_tokens: float,
        arrivals_cv2: float = 1.0,
        prompts_cv2: float = 0.0,
    ) -> Prediction:
        """One replica under so many requests per second, of mean lengths. Takes well under a millisecond.

        `arrivals_cv2`, `prompts_cv2`: squared coefficients of variation, of the distances between requests (1: Poisson)
        and of the lengths of prompts.
        """
        ...

    def step_s(self, *, sequences: int, context_tokens: float, prefill_tokens: int = 0) -> float:
        """Seconds of one step."""
        ...
