"""One engine replica as a Ray Serve replica: it starts, watches and ends the engine process."""

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence

import msgspec
import ray
from ray import serve
from ray.util import placement_group_table

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, EngineError, FleetError
from kervan.facts import weight_files
from kervan.fleet.control import EngineSpec, WorkerPlacement
from kervan.fleet.directory import Drain, Order, Profile, ReplicaEntry, ReplicaState, StartFailure, Strike
from kervan.fleet.log_files import new_log
from kervan.fleet.process import TWIN_ENGINE, VLLM_ENGINE, EngineProcess
from kervan.serve import preflights, watchers
from kervan.serve.cluster import log_directory
from kervan.serve.directory.client import DirectoryResponse, find_directory
from kervan.serve.environment import process_environment, warm_owner_pid
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
MIN_LIFE_S = 10.0


class _Engine:
    """One engine process of a replica, with what is told of it."""

    def __init__(self, engine_id: str, process: EngineProcess) -> None:
        self.id = engine_id
        self.process = process
        self.state: ReplicaState = "starting"
        self.reason = ""
        self.since_s = time.monotonic()
        self.is_over = False
        self.why_stalled = self.logged_hang = ""
        self.preflight_s = 0.0
        self._ready_s: float | None = None

    @property
    def has_started(self) -> bool:
        """Whether it is ready, or will never be."""
        return self.process.ready is not None or self.process.failure is not None

    @property
    def start_s(self) -> dict[str, float]:
        """Seconds of the parts of its start, with what came before its process; empty until it is known."""
        parts = self.process.start_s
        return {"preflight": round(self.preflight_s, 2), **parts} if parts and self.preflight_s else parts

    @property
    def ready_for_s(self) -> float:
        return 0.0 if self._ready_s is None else time.monotonic() - self._ready_s

    @property
    def start_failure(self) -> StartFailure:
        """What the directory is told of a start that failed."""
        failure = self.process.failure
        assert failure is not None
        return StartFailure(self.id, failure.kind, failure.message, str(self.process.log_path))

    def become_ready(self) -> None:
        """It may get requests, unless it drains already."""
        if self.state == "starting":
            self._ready_s, self.reason, self.state = time.monotonic(), "", "ready"


class EngineReplica:
    """Serve calls `__init__` (returns when the engine has produced a token), `check_health`, and `__del__`.

    An engine that ends gets another one in its place, with another id: Serve and Ray take seconds for a new actor. One
    that lived for less than `MIN_LIFE_S` does not: something may be wrong here, and Serve may choose another node.
    """

    # Serve awaits it, and calls `__del__` on the same loop: were it to block, a replica that still starts could not be
    # told to end, and `kervan down` would wait until the engine is ready.
    async def __init__(self, config_json: str, pool: str, version: str) -> None:  # type: ignore[misc]
        self._config = FleetConfig.from_json(config_json)
        self._pool = pool
        self._version = version
        self._node = ray.util.get_node_ip_address()
        self._serve_id = serve.get_replica_context().replica_id.unique_id
        self._is_draining = False
        self._lock = threading.Lock()
        self._drained = threading.Event()
        self._drain_deadline_s: float | None = None
        self._directory = find_directory(self._config.name)
        _, *self._secrets = await self._directory.fleet()
        self._placement = _placement(self._config)
        self._is_on_cpu = _is_on_cpu(self._config)
        here = [ray.get_runtime_context().get_node_id()]
        node_ids = here if self._placement is None else _node_ids(self._placement)
        self._nodes = [] if self._placement is None else _addresses(node_ids)
        await self._check_model()
        preflight_s = await self._check_links()
        self._engine = engine = self._start()
        engine.preflight_s = preflight_s
        threading.Thread(target=self._beat_forever, daemon=True, name="beat").start()
        watchers.keep(self._config.env, node_ids)
        while not engine.has_started:  # noqa: ASYNC110 - told by another thread
            await asyncio.sleep(DRAIN_POLL_S)
        if self._is_draining:  # told to go before it was ready, which is no failure
            await asyncio.to_thread(self._drained.wait)
            raise EngineError(f"replica {engine.id} was stopped before it was ready")
        if (failure := engine.process.failure) is not None:
            engine.process.kill()
            self._is_draining = True
            self._drained.set()
            await self._directory.report_failure(engine.start_failure)
            await self._directory.remove(engine.id)
            raise EngineError(f"{failure.message} (log: {engine.process.log_path})")
        engine.become_ready()
        self._beat()
        self._on_change()  # it may have ended already

    async def _check_model(self) -> None:
        """Raises: ConfigError when the model is not on this node, which the directory is told: vLLM says it later."""
        missing = weight_files.problem_on_node(self._node, self._config.model, self._config.weights_format)
        if missing is not None:
            await self._directory.report_failure(StartFailure(f"{self._pool} on {self._node}", "ConfigError", missing))
            raise ConfigError(missing)

    async def _check_links(self) -> float:
        """Seconds that the preflight took, 0 without one.

        Raises: EngineError when this replica's GPUs do not reach each other, which the directory is told.
        """
        if not preflights.is_needed(self._config):
            return 0.0
        begin_s = time.monotonic()
        problem = await preflights.problem(self._config, self._placement, is_on_cpu=self._is_on_cpu)
        if problem:
            who = f"{self._pool} on {self._node}"
            await self._directory.report_failure(StartFailure(who, "EngineError", problem))
            raise EngineError(problem)
        return time.monotonic() - begin_s

    def _start(self) -> "_Engine":
        engine_id = f"{self._pool}-{uuid.uuid4().hex[:6]}"
        spec, module = _spec(self._config, engine_id, self._node, self._secrets, self._placement)
        process = EngineProcess(
            spec,
            log_path=new_log(log_directory(), f"{self._config.name}-{engine_id}"),
            env=process_environment(self._config, is_on_cpu=self._is_on_cpu),
            module=module,
            fork_for_pid=warm_owner_pid() if module == VLLM_ENGINE and self._config.warm_start else None,
            on_change=self._on_change,
        )
        return _Engine(engine_id, process)

    def _on_change(self) -> None:
        engine: _Engine | None = getattr(self, "_engine", None)
        if engine is None or not engine.process.ended.is_set() or engine.state == "starting" or self._is_draining:
            return
        with self._lock:
            if engine.is_over:
                return
            engine.is_over = True
        if engine.state != "unhealthy":  # else it was ended for that
            engine.state, engine.reason = "unhealthy", "the engine process ended"
        with contextlib.suppress(FleetError):
            self._beat().result(BEAT_TIMEOUT_S)
        if self._placement is None and engine.ready_for_s >= MIN_LIFE_S:
            try:
                self._restart(engine)
            except Exception:  # no process, memory or disk is left for another: without an engine this actor is no use
                logger.exception("no engine can be started in the place of %s", engine.id)
                os._exit(1)
        else:
            os._exit(1)  # Serve replaces an actor that is gone at once; a failing health check would take three periods

    def _restart(self, ended: "_Engine") -> None:
        """Another engine here, sooner than Serve would have another actor; Serve has its turn if it does not start."""
        self._engine = engine = self._start()
        engine.reason = f", in place of {ended.id}: {ended.reason}"
        logger.warning("%s: %s; %s starts in its place", ended.id, ended.reason, engine.id)
        self._directory.remove(ended.id)
        self._beat()
        while not engine.has_started:
            time.sleep(DRAIN_POLL_S)
        if self._is_draining:  # whoever drains ends it
            return
        if engine.process.failure is not None:
            with contextlib.suppress(FleetError):
                self._directory.report_failure(engine.start_failure).result(BEAT_TIMEOUT_S)
                self._directory.remove(engine.id).result(BEAT_TIMEOUT_S)
            os._exit(1)
        engine.become_ready()
        self._beat()
        self._on_change()  # it may have ended already

    def _entry(self) -> ReplicaEntry:
        engine = self._engine
        ready, load = engine.process.ready, engine.process.load
        reason = engine.reason
        if engine.state == "starting":
            reason = f"for {time.monotonic() - engine.since_s:.0f} s{engine.reason}"
        elif engine.state == "ready":
            stalled_s = engine.process.stalled_s
            stalled = f"has work but made no step for {stalled_s:.0f} s" if stalled_s > SHOWN_STALL_S else ""
            reason = ", ".join(word for word in (stalled, engine.why_stalled, load.note) if word)
        return ReplicaEntry(
            id=engine.id,
            pool=self._pool,
            node=self._node,
            pid=engine.process.pid,
            state=engine.state,
            address=ready.address if ready else "",
            public_key=ready.public_key if ready else "",
            engine_version=ready.engine_version if ready else "",
            running=load.running,
            waiting=load.waiting,
            kv_cache_usage=load.kv_cache_usage,
            reason=reason,
            log_path=str(engine.process.log_path),
            version=self._version,
            nodes=self._nodes,
            start_s=engine.start_s,
            ready_for_s=engine.ready_for_s,
            serve_id=self._serve_id,
            age_s=time.monotonic() - engine.since_s,
            leaves_in_s=None if self._drain_deadline_s is None else max(0.0, self._drain_deadline_s - time.monotonic()),
        )

    def _beat(self) -> DirectoryResponse[list[Order]]:
        return self._directory.beat_replica(self._entry())

    def _beat_forever(self) -> None:
        while not self._is_draining or self._engine.state == "draining":
            self._look_at_ranks(self._engine)
            with contextlib.suppress(FleetError):  # a directory that is away changes nothing
                for order in self._beat().result(BEAT_TIMEOUT_S):
                    self._carry_out(order)
            time.sleep(BEAT_PERIOD_S)

    def _look_at_ranks(self, engine: "_Engine") -> None:
        """Find out why an engine with several ranks makes no step, and log it when it is sure."""
        engine.why_stalled = engine.process.why_stalled()
        if (hang := engine.process.rank_watch.hang) and hang != engine.logged_hang:
            logger.error("%s on %s: %s", engine.id, self._node, hang)
        engine.logged_hang = hang

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Strike):
            self._engine.process.strike(order.how)
        elif isinstance(order, Profile):
            self._engine.process.profile(order.ask)
        elif not isinstance(order, Drain):
            self._engine.process.suffer(order.fault)
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
        """End an engine that is stalled; another one takes its place. Raises: EngineError when it cannot be ended."""
        engine = self._engine
        health = engine.process.health(self._config.stall_timeout_s)
        if health.is_healthy or self._is_draining or engine.process.ended.is_set():
            return
        engine.state, engine.reason = "unhealthy", health.reason
        engine.process.kill()
        if not engine.process.ended.is_set():
            raise EngineError(f"replica {engine.id}: {health.reason}, and its process does not end")

    async def __del__(self) -> None:
        """Drain: announce it, wait until the gateways have moved the streams, end the engine."""
        if not hasattr(self, "_engine"):
            return
        if self._is_draining:  # as it was told to; Serve ends the actor when this returns
            await asyncio.to_thread(self._drained.wait)
            return
        self._is_draining = True
        await self._drain(self._config.drain_timeout_s)
        self._drained.set()

    async def _drain(self, deadline_s: float) -> None:
        engine = self._engine
        process = engine.process
        if process.ready is None:  # nobody has been told of it
            await asyncio.to_thread(process.kill)
        elif not process.ended.is_set():
            begin_s = time.monotonic()
            engine.state, self._drain_deadline_s = "draining", begin_s + deadline_s
            self._beat()
            process.drain()
            while (now_s := time.monotonic()) < self._drain_deadline_s:
                if now_s - begin_s > DRAIN_NOTICE_S and not process.load.has_work:
                    break
                await asyncio.sleep(DRAIN_POLL_S)
        await asyncio.to_thread(process.stop, STOP_TIMEOUT_S)
        engine.state = "unhealthy"
        with contextlib.suppress(FleetError):  # of a fleet that ends, the directory may have ended before
            await self._directory.remove(engine.id)


def _spec(
    config: FleetConfig, replica_id: str, host: str, secrets: Sequence[str], placement: WorkerPlacement | None
) -> tuple[msgspec.Struct, str]:
    """The first message to an engine process, and the module it runs. `secrets`: the present one, the one before."""
    secret, before = secrets
    if config.engine == "twin":
        return TwinSpec(replica_id, host, secret, twins.settings(config), config.encrypts, before), TWIN_ENGINE
    shares_gpu = config.gpu_share < 1
    return EngineSpec(
        replica_id, list(config.engine_argv), host, secret, placement, shares_gpu, config.encrypts, before
    ), VLLM_ENGINE


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
