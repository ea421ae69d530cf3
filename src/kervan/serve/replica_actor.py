"""One engine replica as a Ray Serve replica: it starts, watches and ends the engine process."""

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid

import msgspec
import ray
from ray.util import placement_group_table

from kervan.config.fleet import FleetConfig
from kervan.errors import EngineError, FleetError
from kervan.fleet.control import EngineSpec, WorkerPlacement
from kervan.fleet.directory import Drain, Order, ReplicaEntry, ReplicaState, StartFailure, Strike
from kervan.fleet.log_files import new_log
from kervan.fleet.process import TWIN_ENGINE, VLLM_ENGINE, EngineProcess
from kervan.serve import watchers
from kervan.serve.cluster import home
from kervan.serve.directory.client import DirectoryResponse, find_directory
from kervan.serve.environment import process_environment
from kervan.twin import settings as twins
from kervan.twin.replica import TwinSpec

logger = logging.getLogger(__name__)

BEAT_PERIOD_S = 1.0
BEAT_TIMEOUT_S = 2.0
DRAIN_POLL_S = 0.1
# Gateways hear of a drain within a ping period; before that an idle-looking replica may still get work.
DRAIN_NOTICE_S = 1.0
SHOWN_STALL_S = 2.0
STOP_TIMEOUT_S = 10.0


class EngineReplica:
    """Serve calls `__init__` (returns when the engine has produced a token), `check_health`, and `__del__`."""

    # Serve awaits it, and calls `__del__` on the same loop: were it to block, a replica that still starts could not be
    # told to end, and `kervan down` would wait until the engine is ready.
    async def __init__(self, config_json: str, pool: str, version: str) -> None:  # type: ignore[misc]
        self._config = FleetConfig.from_json(config_json)
        self._pool = pool
        self._version = version
        self._id = f"{pool}-{uuid.uuid4().hex[:6]}"
        self._node = ray.util.get_node_ip_address()
        self._state: ReplicaState = "starting"
        self._reason = ""
        self._since_s = time.monotonic()
        self._ready_s: float | None = None
        self._is_draining = False
        self._drained = threading.Event()
        self._drain_deadline_s: float | None = None
        self._directory = find_directory(self._config.name)
        _, secret = await self._directory.fleet()
        log_path = new_log(home() / "logs", f"{self._config.name}-{self._id}")
        group = _placement(self._config)
        node_ids = _node_ids(group) if group is not None else [ray.get_runtime_context().get_node_id()]
        self._nodes = _addresses(node_ids) if group is not None else []
        spec, module = _spec(self._config, self._id, self._node, secret, group)
        self._process = EngineProcess(
            spec,
            log_path=log_path,
            env=process_environment(self._config, is_on_cpu=_is_on_cpu(self._config)),
            module=module,
            # The parent is the node's raylet, which outlives replicas.
            fork_for_pid=os.getppid() if module == VLLM_ENGINE and self._config.warm_start else None,
            on_change=self._on_change,
        )
        threading.Thread(target=self._beat_forever, daemon=True, name="beat").start()
        watchers.keep(self._config.env, node_ids)
        while self._process.ready is None and self._process.failure is None:  # noqa: ASYNC110 - told by another thread
            await asyncio.sleep(DRAIN_POLL_S)
        if self._is_draining:  # told to go before it was ready, which is no failure
            await asyncio.to_thread(self._drained.wait)
            raise EngineError(f"replica {self._id} was stopped before it was ready")
        if (failure := self._process.failure) is not None:
            self._process.kill()
            self._is_draining = True
            self._drained.set()
            report = StartFailure(self._id, failure.kind, failure.message, str(log_path))
            await self._directory.report_failure(report)
            await self._directory.remove(self._id)
            raise EngineError(f"{failure.message} (log: {log_path})")
        self._state, self._ready_s = "ready", time.monotonic()
        self._beat()

    def _on_change(self) -> None:
        process = getattr(self, "_process", None)
        if process is None or not process.ended.is_set() or self._state == "starting" or self._is_draining:
            return
        # Serve replaces an actor that is gone at once; a failing health check would take three periods.
        self._state, self._reason = "unhealthy", "the engine process ended"
        with contextlib.suppress(FleetError):
            self._beat().result(BEAT_TIMEOUT_S)
        os._exit(1)

    def _entry(self) -> ReplicaEntry:
        ready, load = self._process.ready, self._process.load
        reason = self._reason
        if self._state == "starting":
            reason = f"for {time.monotonic() - self._since_s:.0f} s"
        elif self._state == "ready":
            stalled_s = self._process.stalled_s
            stalled = f"has work but made no step for {stalled_s:.0f} s" if stalled_s > SHOWN_STALL_S else ""
            reason = ", ".join(word for word in (stalled, load.note) if word)
        return ReplicaEntry(
            id=self._id,
            pool=self._pool,
            node=self._node,
            pid=self._process.pid,
            state=self._state,
            address=ready.address if ready else "",
            engine_version=ready.engine_version if ready else "",
            running=load.running,
            waiting=load.waiting,
            kv_cache_usage=load.kv_cache_usage,
            reason=reason,
            log_path=str(self._process.log_path),
            version=self._version,
            nodes=self._nodes,
            start_s=self._process.start_s,
            ready_for_s=0.0 if self._ready_s is None else time.monotonic() - self._ready_s,
            leaves_in_s=None if self._drain_deadline_s is None else max(0.0, self._drain_deadline_s - time.monotonic()),
        )

    def _beat(self) -> DirectoryResponse[list[Order]]:
        return self._directory.beat_replica(self._entry())

    def _beat_forever(self) -> None:
        while not self._is_draining or self._state == "draining":
            with contextlib.suppress(FleetError):  # a directory that is away changes nothing
                for order in self._beat().result(BEAT_TIMEOUT_S):
                    self._carry_out(order)
            time.sleep(BEAT_PERIOD_S)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Strike):
            self._process.strike(order.how)
        elif not isinstance(order, Drain):
            self._process.suffer(order.fault)
        elif self._is_draining:  # a deadline can only come nearer
            if self._drain_deadline_s is not None:
                self._drain_deadline_s = min(self._drain_deadline_s, time.monotonic() + order.deadline_s)
        else:
            self._is_draining = True
            threading.Thread(target=self._drain_and_exit, args=(order.deadline_s,), daemon=True, name="drain").start()

    def _drain_and_exit(self, deadline_s: float) -> None:
        """Drain and end, without Serve having asked for it: it starts another replica then."""
        asyncio.run(self._drain(deadline_s))
        self._drained.set()
        os._exit(0)

    def check_health(self) -> None:
        """Raises: EngineError when the engine is gone or stalled; it is ended then."""
        health = self._process.health(self._config.stall_timeout_s)
        if not health.is_healthy and not self._is_draining:
            self._state, self._reason = "unhealthy", health.reason
            self._process.kill()
            raise EngineError(f"replica {self._id}: {health.reason}")

    async def __del__(self) -> None:
        """Drain: announce it, wait until the gateways have moved the streams, end the engine."""
        process: EngineProcess | None = getattr(self, "_process", None)
        if process is None:
            return
        if self._is_draining:  # as it was told to; Serve ends the actor when this returns
            await asyncio.to_thread(self._drained.wait)
            return
        self._is_draining = True
        await self._drain(self._config.drain_timeout_s)
        self._drained.set()

    async def _drain(self, deadline_s: float) -> None:
        process = self._process
        if process.ready is None:  # nobody has been told of it
            await asyncio.to_thread(process.kill)
        elif not process.ended.is_set():
            begin_s = time.monotonic()
            self._state, self._drain_deadline_s = "draining", begin_s + deadline_s
            self._beat()
            process.drain()
            while (now_s := time.monotonic()) < self._drain_deadline_s:
                if now_s - begin_s > DRAIN_NOTICE_S and not process.load.has_work:
                    break
                await asyncio.sleep(DRAIN_POLL_S)
        await asyncio.to_thread(process.stop, STOP_TIMEOUT_S)
        self._state = "unhealthy"
        with contextlib.suppress(FleetError):  # of a fleet that ends, the directory may have ended before
            await self._directory.remove(self._id)


def _spec(
    config: FleetConfig, replica_id: str, host: str, secret: str, placement: WorkerPlacement | None
) -> tuple[msgspec.Struct, str]:
    """The first message to an engine process, and the module it runs."""
    if config.engine == "twin":
        return TwinSpec(replica_id, host, secret, twins.settings(config)), TWIN_ENGINE
    shares_gpu = config.gpu_share < 1
    return EngineSpec(replica_id, list(config.engine_argv), host, secret, placement, shares_gpu), VLLM_ENGINE


def _placement(config: FleetConfig) -> WorkerPlacement | None:
    """The bundles that Serve has reserved for this replica, this node's first; None when it has one node."""
    group = ray.util.get_current_placement_group()
    if group is None or config.nodes_per_replica < 2:
        return None
    context = ray.get_runtime_context()
    node_of = placement_group_table(group)["bundles_to_node_id"]
    bundles = sorted(node_of, key=lambda bundle: (node_of[bundle] != context.get_node_id(), bundle))
    return WorkerPlacement(group.id.hex(), context.gcs_address, bundles, config.world_size // config.nodes_per_replica)


def _node_ids(placement: WorkerPlacement) -> list[str]:
    """Ray's ids of the nodes of the stages, in their order."""
    node_of = placement_group_table(ray.util.get_current_placement_group())["bundles_to_node_id"]
    return [node_of[bundle] for bundle in placement.bundles]


def _addresses(node_ids: list[str]) -> list[str]:
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [addresses[node_id] for node_id in node_ids]


def _is_on_cpu(config: FleetConfig) -> bool:
    return not (config.device == "GPU" or ray.get_runtime_context().get_accelerator_ids().get("GPU"))
