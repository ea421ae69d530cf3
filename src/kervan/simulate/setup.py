"""What is to be simulated: a fleet, its load, and what may happen to it. Plain facts that travel between processes."""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kervan.bench.arrivals import Process, Stage, offsets_s
from kervan.config.autoscale import Autoscaling
from kervan.config.node_trace import NodeTrace
from kervan.config.workload import Lengths, Slo, TraceRow
from kervan.simulate.duration import DurationDistribution
from kervan.simulate.engine import EngineFacts
from kervan.simulate.market import MarketModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSetup:
    """One pool. `usd_per_hour`: of a replica, None if no price is known. `start`: seconds from the decision to ready.

    `nodes`: of a spot market, when nodes come and go, one replica each; a model makes a market for each seed. None: as
    many as are asked for.
    """

    name: str
    minimum: int
    maximum: int
    usd_per_hour: float | None = None
    start: DurationDistribution
    nodes: NodeTrace | MarketModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSetup:
    """The requests: `stages` with lengths drawn from `isl` and `osl`; or the rows of `trace`, `trace_speed` times as
    fast.
    """

    stages: tuple[Stage, ...] = ()
    process: Process = "poisson"
    burstiness: float = 1.0
    isl: Lengths | None = None
    osl: Lengths | None = None
    trace: Sequence[TraceRow] = ()
    trace_speed: float = 1.0
    counts_from_s: float = 0.0
    """Requests before are sent, and not counted in `Outcome.counted`."""

    def at_rate(self, stage: Stage) -> "LoadSetup":
        """Requests like these at another rate; a trace's lengths follow each other as in the trace, over and over."""
        return dataclasses.replace(self, stages=(stage,))

    def expected_after(self, at_s: float) -> float:
        """Requests of the only stage from then on, about."""
        stage = self.stages[0]
        return stage.expected_arrivals * (1 - at_s / stage.duration_s)

    @property
    def mean_output_tokens(self) -> float:
        """Of a request."""
        if self.trace:
            return sum(max(1, row.output_tokens) for row in self.trace) / len(self.trace)
        assert self.osl is not None
        return self.osl.mean

    @property
    def has_hashes(self) -> bool:
        """Whether it says what prompts share."""
        return not self.stages and any(row.hash_ids for row in self.trace)

    def requests(self, seed: int) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
        """(seconds, prompt tokens, output tokens, hashes of the prompt's blocks) in order of time."""
        if self.trace and self.stages:
            offsets = offsets_s(self.stages, self.process, burstiness=self.burstiness, seed=seed)
            for at_s, row in zip(offsets, itertools.cycle(self.trace), strict=False):
                yield at_s, row.input_tokens, max(1, row.output_tokens), ()
            return
        if self.trace:
            for row in self.trace:
                yield row.at_s / self.trace_speed, row.input_tokens, max(1, row.output_tokens), row.hash_ids
            return
        assert self.isl is not None and self.osl is not None
        rng = random.Random(f"lengths {seed}")
        isl, osl = self.isl, self.osl
        for at_s in offsets_s(self.stages, self.process, burstiness=self.burstiness, seed=seed):
            yield at_s, isl.sample(rng), osl.sample(rng), ()

    @property
    def duration_s(self) -> float:
        """From the start to the end of the last stage, or to the last row."""
        if not self.stages:
            return self.trace[-1].at_s / self.trace_speed
        return sum(stage.duration_s for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSetup:
    """The fleet. `stop_s`: from being empty to gone. `notice_s`: before a spot node goes; 0 for none.

    `losses_per_hour`: of one on-demand replica, without notice. `local_minute`: of the week, at the start.
    """

    engine: EngineFacts
    pools: tuple[PoolSetup, ...]
    load: LoadSetup
    slo: Slo
    gateways: int = 1
    max_queued_streams: int = 1024
    hold_timeout_s: float = 300.0
    drain_timeout_s: float = 60.0
    caches_prefixes: bool = True
    """As vLLM does unless told otherwise; it matters where a trace says what prompts share."""
    routing: Literal["least-load", "prefix"] = "prefix"
    stop_s: float = 1.0
    notice_s: float = 120.0
    losses_per_hour: float = 0.0
    local_minute: int = 0
    decides_every_s: float = 1.0
    """As live; in loads of days, seldom enough that a day takes seconds to compute."""
    autoscaling: Autoscaling | None = None
    """What the user asks of the policies; None: nothing but `slo`."""
    initial: int | None = None
    """Replicas at the start, of the first pool; the others begin with their least. None: all do."""
