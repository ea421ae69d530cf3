"""Decides once a second how many replicas a fleet is to have, and keeps what was decided.

It has no Ray: `serve.directory.actor` feeds it, and publishes what it wants.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kervan.config.fleet import FleetConfig
from kervan.facts.markets import SPOT
from kervan.fleet.directory import Decided, GatewayEntry, Scaling, Snapshot
from kervan.policy.autoscale.state import Decision, FleetState, Policy
from kervan.serve.scaler import policies
from kervan.serve.scaler.observed import DemandWindow, fleet_state
from kervan.serve.scaler.rooms import Rooms
from kervan.serve.scaler.starts import Starts
from kervan.serve.scaler.wanted import Wanted

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
LATEST_S = 1.5  # after the last decision, if some gateway has not told
SETTLE_S = 2.5  # two beats
MAX_HISTORY = 20
WANTED_NUMBERS = ("needed", "wanted")  # of the policies: replicas that the load needs, room or not
STORE_PERIOD_S = 5.0
NEWS_S = 5.0  # without any for so long, it is told


class Stored(msgspec.Struct, frozen=True):
    """What outlives the directory's process. `now_s`: the policies' clock, which never goes back."""

    policy: str
    now_s: float
    memory: dict[str, Any]
    targets: dict[str, int]
    starts: dict[str, list[float]]
    history: list[Decided]
    since_s: float = 0.0
    changes: dict[str, dict[str, int]] = {}


class Scaler:
    """Of one fleet; all calls come from one thread. `clock`: seconds that pass evenly; `unix`: Unix time.

    `make`: the policy of a fleet, None where its settings leave no choice.
    """

    def __init__(
        self,
        config: FleetConfig,
        stored: bytes | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
        make: Callable[[FleetConfig, Sequence[str]], Policy | None] = policies.of_fleet,
    ) -> None:
        self._clock, self._unix, self._make = clock, unix, make
        before = _read(stored)
        self._memory: Mapping[str, Any] = before.memory if before else {}
        self._targets = dict(before.targets) if before else {}
        self._history = list(before.history) if before else []
        self._since_s = before.since_s if before else unix()
        self._changes = dict(before.changes) if before else {}
        self._starts = Starts(before.starts if before else None, prior_s=policies.start_prior_s(config))
        # Wall time only as far as it goes on from what was: it may have been set back meanwhile.
        self._begin_s = max(unix(), before.now_s if before else 0.0) - clock()
        self._rooms = Rooms()
        self._kinds: Mapping[str, Sequence[str]] = {}
        self._kind_of: Mapping[str, str] = {}
        self._window = DemandWindow()
        # One that goes on waits until all replicas have told that they are there: a fleet without any needs some.
        self._decided_s = clock() + (SETTLE_S if before else 0.0)
        self._stored_s = clock()
        self._reason, self._numbers, self._problem = "", dict[str, float](), ""
        self._policy_name = before.policy if before else ""
        self.state: FleetState | None = None
        self.wanted = Wanted({})
        self.set_config(config)

    def set_config(self, config: FleetConfig) -> None:
        """Follow new settings; the number of replicas stays where they allow it."""
        self._config = config
        self._make_policy()
        name = "fixed" if self._policy is None else self._policy.name
        if name != self._policy_name:
            self._memory = {}
        self._policy_name = name
        before = self._targets
        self._targets = {
            pool: min(max(before.get(pool, bounds.minimum), bounds.minimum), bounds.maximum)
            for pool, bounds in config.bounds.items()
        }
        for pool, target in self._targets.items():
            self._changes.setdefault(pool, {"up": 0, "down": 0})
            self._count_change(pool, before.get(pool, target), target)

    def _make_policy(self) -> None:
        self._policy_kinds = sorted({kind for kinds in self._kinds.values() for kind in kinds})
        try:
            self._policy, self._unmade = self._make(self._config, self._policy_kinds), ""
        except Exception as error:  # supervised: the directory must start, and the fleet goes on with what it has
            logger.exception("the policy of fleet %s cannot be made", self._config.name)
            self._policy, self._unmade = None, f"there is no policy ({type(error).__name__}: {error}); the numbers stay"

    @property
    def now_s(self) -> float:
        """The policies' clock: it goes on evenly, whatever is done to the machine's."""
        return self._begin_s + self._clock()

    # ---- what it is told

    def beat(self, entry: GatewayEntry) -> None:
        """A gateway has told."""
        self._window.beat(entry, self._clock())

    def look(
        self, placeable: Mapping[str, int], kinds: Mapping[str, Sequence[str]], kind_of: Mapping[str, str]
    ) -> None:
        """What the cluster has. `placeable`: replicas by pool; `kinds`: of its nodes by pool; `kind_of`: by node."""
        listed = dict.fromkeys(placeable, 0)
        for replica in self.state.replicas if self.state is not None else ():
            if replica.pool in listed and replica.phase in ("starting", "ready"):
                listed[replica.pool] += 1
        self._rooms.look(placeable, listed, self._targets, self._clock())
        self._kinds, self._kind_of = kinds, kind_of
        if sorted({kind for own in kinds.values() for kind in own}) != self._policy_kinds:
            self._make_policy()  # what a replica can do depends on it

    @property
    def has_just_decided(self) -> bool:
        """Whether it is too soon to decide again, whoever has told."""
        return self._clock() - self._decided_s < 0.5 * PERIOD_S

    def is_due(self, gateways: Sequence[GatewayEntry]) -> bool:
        """Whether to decide now: all gateways have told, or it is late."""
        is_late = self._clock() - self._decided_s >= LATEST_S
        return is_late or (not self.has_just_decided and self._window.is_complete(gateways))

    # ---- what it wants

    def decide(self, snapshot: Snapshot) -> None:
        """Decide once more; `wanted` and `scaling` are as of it then. What a policy raises changes no number."""
        self._decided_s = self._clock()
        self._starts.look(snapshot.replicas, self._kind_of, self._clock())
        demand, age_s = self._window.close(snapshot.gateways, self._clock())
        self.state = state = fleet_state(
            self._config,
            snapshot,
            now_s=self.now_s,
            demand=demand,
            demand_age_s=age_s,
            targets=self._targets,
            rooms=self._rooms,
            starts=self._starts,
            kinds=self._kinds,
            unix_s=self._unix(),
        )
        decision = self._decision(state)
        self._follow(decision, state)
        listed = {replica.id: replica.serve_id for replica in snapshot.replicas}
        others = policies.leaving(state)
        order = [*decision.leaving, *(name for name in others if name not in decision.leaving)]
        self.wanted = Wanted(dict(self._targets), [listed[name] for name in order if listed.get(name)])

    def _decision(self, state: FleetState) -> Decision:
        if self._policy is None:
            self._problem = self._unmade
            if self._unmade:
                return Decision(targets=self._targets, reason="there is no policy")
            return Decision(targets={pool.name: pool.maximum for pool in state.pools}, reason="fixed by the settings")
        try:
            decision = self._policy.decide(state, self._memory)
            targets = {pool.name: int(decision.targets[pool.name]) for pool in state.pools}
            numbers = {name: round(float(value), 4) for name, value in decision.numbers.items()}
            memory = msgspec.json.decode(msgspec.json.encode(decision.memory))
        except Exception as error:  # supervised: the fleet goes on with what it has, and says so
            problem = f"policy {self._policy.name} failed ({type(error).__name__}: {error}); the numbers stay"
            if _kind(problem) != _kind(self._problem):
                logger.exception("%s", problem)
                self._note(self._targets, problem, {})
            self._problem = problem
            return Decision(targets=self._targets, reason=self._reason, numbers=self._numbers)
        self._memory = memory
        bounded = {pool.name: self._bounded(pool.name, targets[pool.name], state) for pool in state.pools}
        problem = self._lack_of_room(targets, bounded, numbers, state)
        if state.demand is None and state.demand_age_s > NEWS_S and self._window.has_heard:
            problem = f"no gateway has told anything for {state.demand_age_s:.0f} s; the numbers stay"
        if problem and _kind(problem) != _kind(self._problem):
            logger.warning("%s", problem)
        self._problem = problem
        return Decision(
            targets=bounded,
            reason=decision.reason,
            numbers=numbers,
            leaving=decision.leaving,
            memory=memory,
        )

    def _bounded(self, name: str, target: int, state: FleetState) -> int:
        """Within the settings, and no more than can be placed beyond those that are to be there now."""
        pool = state.pool(name)
        # All spot that gets a node is asked for even without one: the cluster's autoscaler sees it. While replicas are
        # replaced, what waits for a node would hold that up.
        waits = name == SPOT and self._policy_name == "fill" and not any(r.is_outdated for r in state.replicas)
        if pool.room is not None and not waits:
            there = sum(r.pool == name and r.phase in ("starting", "ready") for r in state.replicas)
            target = min(target, max(pool.room, there))
        return min(max(target, pool.minimum), pool.maximum)

    @staticmethod
    def _lack_of_room(
        targets: Mapping[str, int], bounded: Mapping[str, int], numbers: Mapping[str, float], state: FleetState
    ) -> str:
        """In words; empty while all that is wanted can be placed, or nothing is known of the room."""
        wanted = max([sum(targets.values()), *(int(numbers.get(name, 0)) for name in WANTED_NUMBERS)])
        wanted = min(wanted, sum(pool.maximum for pool in state.pools))
        placed = sum(bounded.values())
        rooms = [pool.maximum if pool.room is None else min(pool.room, pool.maximum) for pool in state.pools]
        if wanted <= placed or sum(rooms) > placed:
            return ""
        return f"{wanted} replicas are wanted, and the cluster has room for {placed}"

    def _follow(self, decision: Decision, state: FleetState) -> None:
        self._reason, self._numbers = decision.reason, dict(decision.numbers)
        if dict(decision.targets) == self._targets:
            return
        for name, target in decision.targets.items():
            before = self._targets.get(name, 0)
            if target > before:
                self._starts.wanted(name, self._clock())
            self._count_change(name, before, target)
        self._note(decision.targets, decision.reason, self._numbers)
        self._targets = dict(decision.targets)
        self._since_s = self._unix()
        self._stored_s = float("-inf")

    def _count_change(self, pool: str, before: int, target: int) -> None:
        if target != before:
            self._changes[pool]["up" if target > before else "down"] += 1

    def _note(self, targets: Mapping[str, int], reason: str, numbers: dict[str, float]) -> None:
        entry = Decided(self._unix(), dict(self._targets), dict(targets), reason, numbers)
        self._history = [*self._history, entry][-MAX_HISTORY:]

    @property
    def memory(self) -> Mapping[str, Any]:
        """What the policy has kept for its next decision."""
        return self._memory

    @property
    def kinds(self) -> list[str]:
        """Of the nodes on which replicas may be."""
        return self._policy_kinds

    @property
    def scaling(self) -> Scaling:
        """What is told of it."""
        return Scaling(
            policy=self._policy_name,
            targets=self._targets,
            reason=self._reason,
            numbers=self._numbers,
            problem=self._problem,
            since_s=self._since_s,
            room={pool: self._rooms.room(pool) for pool in self._targets},
            history=self._history,
            changes=self._changes,
        )

    def to_store(self) -> bytes | None:
        """What is to be stored now, for one that goes on from here; None while that is not due."""
        if self._clock() - self._stored_s < STORE_PERIOD_S:
            return None
        self._stored_s = self._clock()
        return msgspec.json.encode(
            Stored(
                self._policy_name,
                self.now_s,
                dict(self._memory),
                self._targets,
                self._starts.known,
                self._history,
                self._since_s,
                self._changes,
            )
        )


def _kind(problem: str) -> str:
    return "".join(letter for letter in problem if not letter.isdigit())


def _read(stored: bytes | None) -> Stored | None:
    if stored is None:
        return None
    try:
        return msgspec.json.decode(stored, type=Stored)
    except msgspec.DecodeError as error:  # of another version of kervan
        logger.warning("what was stored of earlier decisions cannot be read, and is forgotten: %s", error)
        return None
