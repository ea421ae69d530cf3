"""What a run of chaos is to do: plain values, checked when they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kervan.bench.load import Load
from kervan.chaos import schedule
from kervan.chaos.schedule import DisruptionKind, Moment
from kervan.config import node_trace
from kervan.config.node_trace import NodeTrace
from kervan.errors import ConfigError

MAX_NODES = 32
STREAM_TIMEOUT_S = 400.0  # longer than a stream is held without a replica (300 s by default)


@dataclass(frozen=True, kw_only=True)
class DisruptionPlan:
    """Disruptions under a closed loop. `periods_s`: one of each kind comes once in so long. `deadline_s`: of drains."""

    periods_s: Mapping[DisruptionKind, float]
    duration_s: float = 60.0
    streams: int = 64
    min_ready: int = 1
    deadline_s: float = 30.0
    isl: str = "16..64"
    osl: str = "20..200"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not self.periods_s:
            raise ConfigError("nothing would be disturbed; give --kill-every, --drain-every or --hang-every")
        for kind, period_s in self.periods_s.items():
            if not 0 < period_s < self.duration_s:
                raise ConfigError(
                    f"--{kind}-every {period_s:g} s is not between 0 and the {self.duration_s:g} s of --for"
                )
        if self.min_ready < 0:
            raise ConfigError(f"--min-ready {self.min_ready} is below 0")

    @property
    def moments(self) -> list[Moment]:
        """When each disruption is due, in order of time."""
        return schedule.moments(self.periods_s, self.duration_s)

    def load(self, streams: int, *, num_requests: int | None = None, duration_s: float | None = None) -> Load:
        """A closed loop of `streams`, with this plan's lengths and seed."""
        return Load(
            streams=streams,
            num_requests=num_requests,
            duration_s=duration_s,
            isl=self.isl,
            osl=self.osl,
            seed=self.seed,
            timeout_s=STREAM_TIMEOUT_S,
        )


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """Nodes that come and go, under a trace of requests.

    `nodes` and `trace`: files; `speed`: of the nodes, `trace_speed`: of the requests. `deadline_s`: how long before its
    end a node is told of it; 0: never, it is killed. `duration_s`: at most so long, None for the whole trace of nodes.
    """

    nodes: str
    trace: str
    speed: float = 1.0
    trace_speed: float = 1.0
    max_nodes: int = 2
    deadline_s: float = 30.0
    duration_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        for option, value in (("--speed", self.speed), ("--trace-speed", self.trace_speed)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{option} {value:g} is not above 0; give for example 10")
        if not 1 <= self.max_nodes <= MAX_NODES:
            raise ConfigError(f"--max-nodes {self.max_nodes} is outside 1..{MAX_NODES}")
        if self.duration_s is not None and self.duration_s <= 0:
            raise ConfigError(f"--for {self.duration_s:g} s is not above 0")

    def course(self) -> NodeTrace:
        """What happens to the nodes, and when it is over.

        Raises: ConfigError for a trace that cannot be read, or in which no node goes in that time.
        """
        whole = node_trace.scaled(node_trace.read(Path(self.nodes)), max_nodes=self.max_nodes, speed=self.speed)
        end_s = whole.end_s if self.duration_s is None else min(whole.end_s, self.duration_s)
        course = NodeTrace(tuple(change for change in whole.changes if change.at_s < end_s), end_s)
        if not any(change.word == "remove" for change in course.changes):
            raise ConfigError(
                f"in the {end_s:g} s that {self.nodes} is played, no node goes; "
                + ("use a trace in which one does" if self.duration_s is None else "leave --for out, or give more")
            )
        return course

    def load(self, duration_s: float) -> Load:
        """The requests of `trace`, for so long."""
        return Load(
            trace=self.trace,
            trace_speed=self.trace_speed,
            duration_s=duration_s,
            seed=self.seed,
            timeout_s=STREAM_TIMEOUT_S,
        )
