"""What becomes of a node's notices: the fleets are told, the node is emptied by the deadline, and leaves word.

Knows no Ray: what it sees of the cluster and does to it is a `Cluster` (`kervan.serve.watchers` has Ray's).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import psutil

from kervan.errors import FleetError, KervanError
from kervan.fleet.directory import Drain, GatewayEntry, NodeEntry, NodeNotice, ReplicaEntry, Snapshot
from kervan.notices import state_file
from kervan.notices.events import Notice
from kervan.notices.operator import OperatorSource
from kervan.notices.source import PushSource
from kervan.notices.state_file import NodeState
from kervan.notices.watcher import Watcher

T = TypeVar("T")

logger = logging.getLogger(__name__)

IDLE_PERIOD_S = 4.0  # directories forget a node after 10 s
DRAINING_PERIOD_S = 0.5
LINGER_S = 30.0  # without a replica or gateway, which may only be replaced
# A fleet without a ready replica elsewhere goes on here until so long before the end.
LAST_DRAIN_S = 5.0
MIN_DEADLINE_S = 1.0  # less than a replica's beat is no time to hear of it
SAME_DEADLINE_S = 1.0
NO_HURRY_S = 90.0  # for a notice without a deadline; as `kervan drain` without one
SETTLE_S = 1.5  # after which all gateways have told what they moved
WRITE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a look at the cluster shows. `snapshots`: of all fleets, by name.

    `is_only_node`: no other node is alive. `is_drained`: Ray puts nothing on this node any more; `drained_at_s`: Unix
    time at which that ends the node, None if that is not known.
    """

    snapshots: Mapping[str, Snapshot]
    is_only_node: bool
    is_drained: bool
    drained_at_s: float | None = None


class Cluster(Protocol):
    """The cluster as a node's watcher meets it."""

    async def exchange(self, entry: NodeEntry) -> ClusterView:
        """Tell all fleets of this node; what they and Ray say.

        Raises: KervanError while that cannot be known.
        """
        ...

    async def drain_node(self, remaining_s: float) -> None:
        """Let Ray put nothing more on this node. Raises: KervanError."""
        ...

    async def drain_replica(self, fleet: str, replica_id: str, drain: Drain) -> None:
        """Let a replica give up its streams and end. Raises: KervanError."""
        ...

    async def move_directories(self) -> None:
        """Let Ray start the directories that are on this node elsewhere. Raises: KervanError."""
        ...


class DrainedSource(PushSource):
    """A drain of the node that Ray was told of by others: SIGTERM to `ray start --block`, `ray drain-node`."""

    name = "ray"

    def see(self, view: ClusterView) -> None:
        """Put a notice if Ray drains the node."""
        if view.is_drained:
            self.put(
                Notice(
                    kind="sigterm",
                    source="ray",
                    node=self.node,
                    event_id="drain",
                    deadline_s=view.drained_at_s,
                    seen_s=self.wall(),
                    is_certain=True,
                    detail="Ray drains the node",
                )
            )


class NodeGuard:
    """Call `run` with the node's watcher, and let that call `on_notice` and `on_withdrawn`.

    `since_s`: Unix time at which the node started. `state_place`: where its account goes, "" for nowhere; `before`:
    what was found there.
    """

    def __init__(
        self,
        node: str,
        cluster: Cluster,
        *,
        since_s: float,
        state_place: str = "",
        before: NodeState | None = None,
        wall: Callable[[], float] = time.time,
        linger_s: float = LINGER_S,
        settle_s: float = SETTLE_S,
    ):
        self.drained = DrainedSource(node, wall=wall)
        self._node = node
        self._cluster = cluster
        self._since_s = since_s
        self._place = state_place
        self._before = {} if before is None else _numbers(before)
        if before is not None:
            logger.info("node %s: before it, %s has left this account: %s", node, before.node, self._before)
        self._wall = wall
        self._linger_s = linger_s
        self._settle_s = settle_s
        self._woken = asyncio.Event()
        self._processes: dict[int, psutil.Process] = {}
        self._replica_ids: set[str] = set()
        self._counted: dict[tuple[str, str], tuple[int, int]] = {}
        self._has_drained = False
        self._written: NodeState | None = None
        self._writing: asyncio.Task[None] | None = None
        self._problems: dict[str, str] = {}

    async def on_notice(self, notice: Notice) -> None:
        """Look at the cluster at once; for the node's watcher to call."""
        logger.warning("node %s: %s", self._node, notice_entry(notice).describe(self._wall()))
        self._woken.set()

    async def on_withdrawn(self, notice: Notice) -> None:
        """Look at the cluster at once; for the node's watcher to call."""
        logger.warning("node %s: %s is withdrawn (%s)", self._node, notice.kind, notice.source)
        self._woken.set()

    async def run(self, watcher: Watcher) -> str:
        """Watch until nothing is left to watch for; the reason."""
        is_drained, empty_since_s = False, time.monotonic()
        while True:
            self._woken.clear()
            notice = watcher.soonest
            entry = self._entry(watcher, is_drained=is_drained)
            view = await self._try("look", self._cluster.exchange(entry))
            if view is not None:
                self._count(view)
                is_drained = view.is_drained
                if notice is not None:
                    await self._evacuate(view, notice)
                    self._write(self._state(view, notice))
                elif is_drained and not self._has_drained:
                    self.drained.see(view)
                is_empty = not any(self._here(view)) and not self._is_any_alive()
                if not is_empty:
                    empty_since_s = time.monotonic()
                empty_s = time.monotonic() - empty_since_s
                if is_empty and is_drained and empty_s >= self._settle_s:
                    await self._finish(watcher, view)
                    return "the node is drained and empty"
                if not view.snapshots:
                    return "no fleet is left"
                if is_empty and empty_s >= self._linger_s:
                    return "no fleet has anything here"
            with contextlib.suppress(TimeoutError):
                period_s = IDLE_PERIOD_S if watcher.soonest is None and not is_drained else DRAINING_PERIOD_S
                await asyncio.wait_for(self._woken.wait(), period_s)

    async def _try(self, what: str, action: Awaitable[T]) -> T | None:
        """The result, or None after a failure, which the next look tries again; logged when it is another one."""
        result, problem = None, ""
        try:
            result = await action
        except KervanError as error:
            problem = str(error)
        if problem and problem != self._problems.get(what):
            logger.warning("node %s: %s", self._node, problem)
        self._problems[what] = problem
        return result

    # ---- what is here

    def _here(self, view: ClusterView) -> Iterator[tuple[str, ReplicaEntry | GatewayEntry]]:
        """(fleet, what it has on this node)."""
        for fleet, snapshot in view.snapshots.items():
            yield from ((fleet, r) for r in snapshot.replicas if self._node in (r.node, *r.nodes))
            yield from ((fleet, g) for g in snapshot.gateways if g.node == self._node)

    def _count(self, view: ClusterView) -> None:
        """Take note of processes here, and of what gateways tell of replicas here."""
        for _, part in self._here(view):
            if isinstance(part, ReplicaEntry):
                self._replica_ids.add(part.id)
            if part.node == self._node and part.pid and part.pid not in self._processes:
                with contextlib.suppress(psutil.Error):
                    self._processes[part.pid] = psutil.Process(part.pid)
        for snapshot in view.snapshots.values():
            for gateway in snapshot.gateways:
                for replica_id, traffic in gateway.traffic.items():
                    if replica_id in self._replica_ids:
                        self._counted[gateway.id, replica_id] = (traffic.num_served, traffic.num_moved)

    def _is_any_alive(self) -> bool:
        """Whether a process of a replica or gateway is left: a gateway is no longer listed while its streams end."""
        for pid, process in list(self._processes.items()):
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            del self._processes[pid]
        return bool(self._processes)

    def _entry(self, watcher: Watcher, *, is_drained: bool) -> NodeEntry:
        watches = [name for name in watcher.health if name not in (self.drained.name, OperatorSource.name)]
        problems = [
            f"{name} cannot be read: {health.problem}" for name, health in watcher.health.items() if health.problem
        ]
        notices = [notice_entry(notice) for notice in watcher.pending]
        return NodeEntry(self._node, watches, notices, "; ".join(problems), is_drained, self._before)

    # ---- evacuation

    async def _evacuate(self, view: ClusterView, notice: Notice) -> None:
        """Drain what is not drained yet. It remembers little, so a directory or a watcher may start again."""
        remaining_s = notice.remaining_s(self._wall())
        if remaining_s is None:
            remaining_s = max(0.0, notice.seen_s + NO_HURRY_S - self._wall())
        ends_s = self._wall() + remaining_s
        is_late = view.drained_at_s is None or view.drained_at_s > ends_s + SAME_DEADLINE_S
        if not view.is_only_node and (not view.is_drained or is_late):
            await self._try("drain", self._drain(remaining_s))
        for fleet, part in self._here(view):
            if isinstance(part, ReplicaEntry) and self._needs_drain(part, view.snapshots[fleet], remaining_s):
                # A person waits for an empty node; a cloud takes it at the deadline.
                drain = Drain(max(MIN_DEADLINE_S, remaining_s), may_linger=notice.kind != "operator")
                await self._try(f"drain of {part.id}", self._cluster.drain_replica(fleet, part.id, drain))

    async def _drain(self, remaining_s: float) -> None:
        await self._cluster.drain_node(remaining_s)
        self._has_drained = True

    def _needs_drain(self, replica: ReplicaEntry, snapshot: Snapshot, remaining_s: float) -> bool:
        leaves_in_s = replica.leaves_in_s if replica.state == "draining" else None
        if leaves_in_s is not None and leaves_in_s <= max(MIN_DEADLINE_S, remaining_s) + SAME_DEADLINE_S:
            return False
        elsewhere = any(r.state == "ready" and self._node not in (r.node, *r.nodes) for r in snapshot.replicas)
        return elsewhere or remaining_s <= LAST_DRAIN_S

    async def _finish(self, watcher: Watcher, view: ClusterView) -> None:
        """The last account, and word to the cloud that it may have the node."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=WRITE_TIMEOUT_S)
        if (notice := watcher.soonest) is not None:
            self._write(self._state(view, notice))
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=WRITE_TIMEOUT_S)
        for notice in watcher.pending:
            if notice.is_certain and await watcher.acknowledge(notice):
                logger.warning("node %s is empty, and %s was notified", self._node, notice.source)
        await self._try("directories", self._cluster.move_directories())

    # ---- its account

    def _state(self, view: ClusterView, notice: Notice) -> NodeState:
        return NodeState(
            node=self._node,
            since_s=self._since_s,
            written_s=self._wall(),
            requests_served=sum(served for served, _ in self._counted.values()),
            streams_in_flight=sum(
                part.running + part.waiting for _, part in self._here(view) if isinstance(part, ReplicaEntry)
            ),
            streams_moved=sum(moved for _, moved in self._counted.values()),
            notice=notice,
        )

    def _write(self, state: NodeState) -> None:
        """Put the account in its place if it says something new. One at a time: what is slow is not asked again."""
        if not self._place or (self._writing is not None and not self._writing.done()):
            return
        if self._written is None or msgspec.structs.replace(self._written, written_s=state.written_s) != state:
            self._writing = asyncio.create_task(self._write_now(state))

    async def _write_now(self, state: NodeState) -> None:
        async def write() -> None:
            try:
                await asyncio.to_thread(state_file.write, state, self._place)
            except Exception as error:
                # fsspec's stores raise what they like, and no account is worth a stream.
                raise FleetError(f"its account cannot be written to {self._place}: {error!r}") from error
            self._written = state

        await self._try("account", write())


def notice_entry(notice: Notice) -> NodeNotice:
    """A notice as the directory lists it."""
    return NodeNotice(notice.kind, notice.source, notice.is_certain, notice.deadline_s, notice.seen_s)


def _numbers(state: NodeState) -> dict[str, float]:
    names = ("since_s", "written_s", "requests_served", "streams_in_flight", "streams_moved")
    return {name: getattr(state, name) for name in names}
