"""A replica of the simulated fleet: its engine, where it runs, and what becomes of it."""

import math
from dataclasses import dataclass, field

from kervan.policy.autoscale.state import ReplicaPhase
from kervan.simulate.engine import EngineTimes, SimulatedEngine
from kervan.simulate.gateway import Link
from kervan.simulate.stream import SimulatedStream


@dataclass(slots=True, eq=False, kw_only=True)
class SimulatedReplica:
    """One replica, from the decision to start it on. `number`: its place in the fleet's list; `links`: by gateway.

    `decided_s`: when it was asked for, from when on it is paid. `ready_s`: when it will be, or was, ready; infinite
    while it waits for a node. `gone_s`: when it ended. `leaves_s`: when its node goes, if that is known.
    """

    number: int
    id: str
    pool: str
    times: EngineTimes
    caches_prefixes: bool = False
    decided_s: float
    paid_from_s: float
    node: str = ""
    zone: str = ""
    ready_s: float = math.inf
    phase: ReplicaPhase = "starting"
    gone_s: float = math.inf
    leaves_s: float | None = None
    drains_from_s: float = 0.0
    may_linger: bool = False
    engine: SimulatedEngine = field(init=False)
    links: list[Link] = field(default_factory=list)
    streams: dict[SimulatedStream, None] = field(default_factory=dict)
    num_placed: int = 0
    outputs_free_s: float = 0.0
    stops: list[tuple[int, int, int, SimulatedStream]] = field(default_factory=list)
    steps_seen: float = 0.0  # at the last look, for the pace
    step_s: float | None = None  # between two tokens of a stream, of late

    def __post_init__(self) -> None:
        self.engine = SimulatedEngine(self.times, caches_prefixes=self.caches_prefixes)
