"""One watcher of notices per node, as a Ray actor: who starts it, what it sees and does through Ray, and its end.

A replica or gateway has one started on its node, and again should it be gone; so nodes that join later get theirs
with the first replica. It ends by itself when no fleet has anything on the node: Ray takes a node with an actor for
busy, and would neither let a drained node end nor scale it down.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kervan import logs
from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import Drain, NodeEntry, Snapshot
from kervan.notices import state_file
from kervan.notices.detect import detect
from kervan.notices.metadata import Metadata
from kervan.notices.node import NodeWatch, watching
from kervan.notices.settings import NoticeSettings, from_environment
from kervan.serve import cluster, ray_internals
from kervan.serve.directory.client import NAMESPACE, actor_names, find_directory, fleet_names
from kervan.serve.node_guard import ClusterView, NodeGuard
from kervan.serve.ray_errors import as_fleet_error

logger = logging.getLogger(__name__)

KEEP_PERIOD_S = 30.0
CALL_TIMEOUT_S = 3.0
NAMES_PERIOD_S = 4.0
CRASH_PAUSE_S = 5.0
_PREFIX = "watcher-"


# ---- who starts it


def keep(env: Mapping[str, str], node_ids: Sequence[str]) -> None:
    """See to it that nodes have a watcher while this process lives; returns at once.

    `env`: the fleet's, which wins over the node's. Nothing is started, and nothing said, where nothing is to be
    watched; all nodes are taken to be in the same cloud as this one.
    """
    threading.Thread(target=_keep, args=(dict(env), node_ids), daemon=True, name="watcher").start()


def _keep(env: dict[str, str], node_ids: Sequence[str]) -> None:
    try:
        settings = from_environment({**os.environ, **env})
    except ConfigError as error:
        logger.error("this node has no watcher of notices: %s", error)
        return
    if not asyncio.run(has_something_to_watch(settings)):
        return
    own = {key: value for key, value in env.items() if key.startswith("KERVAN_NOTICES_")}
    while True:
        for node_id in node_ids:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                start(node_id, own)
        time.sleep(KEEP_PERIOD_S)


async def has_something_to_watch(settings: NoticeSettings) -> bool:
    """Whether the settings name something; for "auto", whether a cloud answers here."""
    if settings.state_file or any(word != "auto" for word in settings.watch):
        return True
    if "auto" not in settings.watch:
        return False
    async with Metadata() as metadata:
        return await detect(metadata, settings) is not None


def start(node_id: str, env: Mapping[str, str]) -> Any:
    """The watcher of a node, started if there is none."""
    actor: Any = WatcherActor  # Ray's decorator changed its type
    return actor.options(
        name=_PREFIX + node_id,
        namespace=NAMESPACE,
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(node_id, dict(env))


# ---- who asks it, who ends it


def announce(node_id: str, remaining_s: float) -> None:
    """Tell the watcher of a node, if it has one, that an operator wants the node empty."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        watcher = ray.get_actor(_PREFIX + node_id, namespace=NAMESPACE)
        ray.get(watcher.announce.remote(remaining_s), timeout=CALL_TIMEOUT_S)


def end_all() -> None:
    """End all watchers of the cluster. Raises: FleetError when Ray does not answer."""
    for name in actor_names(_PREFIX):
        with as_fleet_error(f"{name} could not be stopped"), contextlib.suppress(ValueError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


# ---- what it sees and does


class RayCluster:
    """`node_guard.Cluster` over Ray, for the node of this process."""

    def __init__(self, node_id: str):
        self._node_id = node_id
        self._snapshots: dict[str, Snapshot] = {}
        self._names: list[str] = []
        self._named_s = float("-inf")

    async def exchange(self, entry: NodeEntry) -> ClusterView:
        if time.monotonic() - self._named_s >= NAMES_PERIOD_S:
            self._names = await asyncio.to_thread(fleet_names)
            self._named_s = time.monotonic()
        await asyncio.gather(*(self._update(name, entry) for name in self._names))
        self._snapshots = {name: self._snapshots[name] for name in self._names if name in self._snapshots}
        if self._names and not self._snapshots:
            raise FleetError(f"no directory answers, of {', '.join(self._names)}")
        nodes = await asyncio.to_thread(cluster.nodes)
        with as_fleet_error("Ray did not list the drained nodes"):
            draining = await asyncio.to_thread(ray_internals.draining_nodes)
        drained_at_ms = draining.get(self._node_id)
        return ClusterView(
            self._snapshots,
            is_only_node=set(nodes) <= {self._node_id},
            is_drained=drained_at_ms is not None,
            drained_at_s=drained_at_ms / 1000 if drained_at_ms else None,
        )

    async def _update(self, name: str, entry: NodeEntry) -> None:
        """A directory that is away leaves the snapshot that was."""
        with contextlib.suppress(FleetError):
            directory = await asyncio.to_thread(find_directory, name)
            self._snapshots[name] = await directory.beat_node(entry).within(CALL_TIMEOUT_S)

    async def drain_node(self, remaining_s: float) -> None:
        await asyncio.to_thread(cluster.drain_node, self._node_id, remaining_s)

    async def drain_replica(self, fleet: str, replica_id: str, drain: Drain) -> None:
        directory = await asyncio.to_thread(find_directory, fleet)
        await directory.order(replica_id, drain).within(CALL_TIMEOUT_S)

    async def move_directories(self) -> None:
        for name in self._names:
            directory = await asyncio.to_thread(find_directory, name)
            if await directory.node_id().within(CALL_TIMEOUT_S) == self._node_id:
                directory.kill(restarts=True)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, lifetime="detached")
class WatcherActor:
    """The watcher of the node that it runs on. `env`: settings of the fleet that had it started."""

    async def __init__(self, node_id: str, env: Mapping[str, str]) -> None:  # type: ignore[misc]  # Ray awaits it
        self._node_id = node_id
        self._settings = from_environment({**os.environ, **env})
        self._log_format = logs.format_of({**os.environ, **env})
        self._watch: asyncio.Future[NodeWatch] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run())

    async def announce(self, remaining_s: float) -> None:
        """An operator wants the node empty in so many seconds."""
        watch = await self._watch
        watch.operator.announce(remaining_s=remaining_s, why="kervan drain")

    async def _run(self) -> None:
        logs.configure(self._log_format, node=ray.util.get_node_ip_address())
        logging.getLogger("kervan").setLevel(logging.INFO)
        try:
            logger.info("the watcher ends: %s", await self._guard())
        except Exception:  # supervised: Ray starts it again
            logger.exception("the watcher failed")
            await asyncio.sleep(CRASH_PAUSE_S)
            os._exit(1)
        # An actor that just exits would be started again.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _guard(self) -> str:
        node = ray.util.get_node_ip_address()
        place = self._settings.state_file.replace("{node}", node)
        since_s = _node_since_s()
        before = await asyncio.to_thread(_read, place) if place else None
        if before is not None and abs(before.since_s - since_s) < 1.0:
            before = None  # this node's own, of an earlier watcher
        # Signals come to Ray, which drains the node then, and a Ray actor could not handle one.
        watched = dataclasses.replace(
            self._settings, watch=tuple(word for word in self._settings.watch if word != "signal")
        )
        guard = NodeGuard(node, RayCluster(self._node_id), since_s=since_s, state_place=place, before=before)
        sources = watching(watched, guard.on_notice, node=node, on_withdrawn=guard.on_withdrawn, also=[guard.drained])
        async with sources as watch:
            self._watch.set_result(watch)
            return await guard.run(watch.watcher)


def _read(place: str) -> state_file.NodeState | None:
    """What is at `place`; whatever is wrong with it must not keep the node from being watched."""
    try:
        return state_file.read(place)
    except Exception as error:  # noqa: BLE001 - fsspec's stores raise what they like
        logger.warning("the account at %s cannot be read: %r", place, error)
        return None


def _node_since_s() -> float:
    """Unix time at which Ray started on this node: its raylet is the parent of all workers."""
    return psutil.Process(os.getppid()).create_time()
