"""One gateway as a Ray Serve replica: Serve keeps its lifecycle and health, it answers clients itself."""

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import ray

from kervan import logs
from kervan.config.api_keys import KeyTable
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.facts import weight_files
from kervan.facts.layout import Layout
from kervan.fleet.directory import GatewayEntry, Snapshot, StartFailure
from kervan.fleet.log_files import new_log, open_log
from kervan.gateway.control import GatewayFailed
from kervan.gateway.process import GatewayProcess
from kervan.gateway.program import Beats, failure_of
from kervan.gateway.server import Gateway, GatewayConfig
from kervan.gateway.shared_port import Neighbour
from kervan.gateway.tls import files_of
from kervan.serve import watchers
from kervan.serve.autoscaling import BUSY
from kervan.serve.cluster import log_directory
from kervan.serve.directory.client import find_directory
from kervan.serve.environment import process_environment, warm_owner_pid
from kervan.serve.shared_port import ANY_HOSTS, Neighbourhood, served_names

logger = logging.getLogger(__name__)

POLL_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 2.0


def _log_to(path: Path, config: FleetConfig, gateway_id: str) -> None:
    """All that this process writes goes to `path`: kervan's logs, vLLM's, Serve's, and the last words of a crash."""
    with open_log(path) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logs.configure(config.log_format, fleet=config.name, gateway=gateway_id)
    logging.getLogger("kervan").setLevel(logging.INFO)


def gpu_kind(resources: Iterable[str]) -> str:
    """The kind of GPU of the fleet, by Ray's name, from what the gateway was placed by; empty where Ray knows none."""
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in resources if name.startswith(prefix)), "")


def _gateway_config(
    config: FleetConfig, gateway_id: str, secrets: Sequence[str], keys: KeyTable, others: Sequence[GatewayEntry]
) -> GatewayConfig:
    """The settings of a gateway on this node. `others`: the gateways that are on its port already."""
    node = ray.util.get_node_ip_address()
    return GatewayConfig(
        gateway_id=gateway_id,
        node=node,
        engine_argv=config.engine_argv,
        secret=secrets[0],
        secret_before=secrets[1],
        encrypts=config.encrypts,
        tls=files_of(config),
        host=config.host,
        port=config.port,
        internal_host=node,
        public_host=node if config.host in ANY_HOSTS else config.host,
        keys=keys,
        max_queued_streams=config.max_queued_streams,
        hold_timeout_s=config.hold_timeout_s,
        routes_by_prefix=config.routing == "prefix",
        stop_timeout_s=config.drain_timeout_s,
        is_twin=config.engine == "twin",
        # Gateways share the port: clients must not meet this one before it can answer, if others can.
        opens_when_attached=any(other.is_ready for other in others),
        shared_port=config.shared_port,
        fleet_name=config.name,
        models=served_names(config),
        replay_s=config.replay_s,
        replay_max_bytes=config.replay_max_mib << 20,
        remembered_requests=config.remembered_requests,
        otlp=config.traces_url,
        log_format=config.log_format,
        about={
            "layout": str(Layout(tp=config.tp, pp=config.pp, ep=config.ep)),
            "gpu": config.gpu or gpu_kind(ray.get_runtime_context().get_assigned_resources()),
        },
    )


class _GatewayActor:
    """What each kind of gateway actor has to do with the directory."""

    def __init__(self, config_json: str, version: str) -> None:
        self._config = FleetConfig.from_json(config_json)
        self._version = version
        self._id = f"gw-{uuid.uuid4().hex[:6]}"
        self._log_path = new_log(log_directory(), f"{self._config.name}-{self._id}")
        _log_to(self._log_path, self._config, self._id)
        self._directory = find_directory(self._config.name)
        self._neighbourhood = Neighbourhood(self._config)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False
        watchers.keep(self._config.env, [ray.get_runtime_context().get_node_id()])

    async def _settings(self) -> tuple[GatewayConfig, list[Neighbour]]:
        """Of the gateway, and the other fleets on its port.

        These are known before the port is open: a request for another fleet may be the first.

        Raises: ConfigError when the model's files are not on this node.
        """
        node = ray.util.get_node_ip_address()
        if (missing := weight_files.problem_on_node(node, self._config.model, "dummy")) is not None:
            await self._directory.report_failure(self._failure(GatewayFailed("ConfigError", missing)))
            raise ConfigError(missing)
        _, *secrets = await self._directory.fleet()
        keys = await self._directory.keys()
        others = (await self._directory.snapshot()).gateways
        neighbours = await asyncio.to_thread(self._neighbourhood.look) if self._config.shared_port else []
        others += [gateway for neighbour in neighbours for gateway in neighbour.gateways]
        return _gateway_config(self._config, self._id, secrets, keys, others), neighbours

    async def _follow(self, on_change: Callable[[Snapshot], None]) -> None:
        """Hand on the directory's changes; a directory that is away changes nothing."""
        async for snapshot in self._directory.follow(poll_s=POLL_PERIOD_S, retry_s=POLL_PERIOD_S):
            on_change(snapshot)

    def _beat(self, entry: GatewayEntry) -> None:
        if not self._is_stopping:
            entry = msgspec.structs.replace(entry, version=self._version, log_path=str(self._log_path))
            self._directory.beat_gateway(entry)

    def _failure(self, failed: GatewayFailed) -> StartFailure:
        return StartFailure(self._id, failed.kind, failed.message, str(self._log_path))

    async def _tell_usage(self, last: GatewayEntry) -> None:
        """What was counted after the last beat."""
        with contextlib.suppress(FleetError):
            await self._directory.tell_usage(self._id, last.usage).within(REPORT_TIMEOUT_S)

    async def _leave(self) -> None:
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(FleetError):
            await self._directory.remove(self._id)


class GatewayReplica(_GatewayActor):
    """Keeps a gateway in a process of its own, away from Ray's threads, which answers clients itself.

    Serve calls `__init__`, `check_health` and `__del__` on one loop.
    """

    async def __init__(self, config_json: str, version: str, *engines: Any) -> None:  # type: ignore[misc]
        super().__init__(config_json, version)
        gateway_config, neighbours = await self._settings()
        self._process = GatewayProcess(
            gateway_config, log_path=self._log_path, on_entry=self._beat, on_failure=self._on_failure
        )
        jobs = [self._follow(self._process.update)]
        if gateway_config.shared_port:
            jobs.append(self._neighbourhood.follow(self._process.update_neighbours))
        self._tasks = [asyncio.create_task(job) for job in jobs]
        self._has_begun = False
        try:
            await self._process.start(
                neighbours,
                env=process_environment(self._config, is_on_cpu=self._config.engine == "twin" or not _has_gpus()),
                fork_for_pid=warm_owner_pid() if self._config.warm_start else None,
            )
        except FleetError as error:
            self._is_stopping = True
            if self._process.failure is not None:
                await self._directory.report_failure(self._failure(self._process.failure))
            raise FleetError(f"gateway: {error}") from error
        self._has_begun = True

    def _on_failure(self, failed: GatewayFailed) -> None:
        logger.error("%s: %s", failed.kind, failed.message)
        if self._has_begun:  # else `__init__` tells
            self._reporting = asyncio.create_task(self._report(failed))

    async def _report(self, failed: GatewayFailed) -> None:
        with contextlib.suppress(FleetError):
            await self._directory.report_failure(self._failure(failed)).within(REPORT_TIMEOUT_S)
        if self._process.ended.is_set():
            # Serve replaces an actor that is gone at once; a failing health check would take three periods.
            os._exit(1)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler."""
        entry = self._process.entry
        return {BUSY: entry.busy if entry is not None else 0.0}

    async def check_health(self) -> None:
        """Raises: FleetError when vLLM's app could not be built, or the gateway's loop does not answer."""
        if self._process.failure is not None:
            raise FleetError(f"gateway: {self._process.failure.message}")
        await asyncio.wait_for(self._process.ping(), HEALTH_TIMEOUT_S)

    async def __del__(self) -> None:
        """Stop accepting, let open requests end, leave."""
        if self._is_stopping or not hasattr(self, "_process"):
            return
        await self._leave()
        await self._process.stop()
        if (entry := self._process.entry) is not None:
            await self._tell_usage(entry)


def _has_gpus() -> bool:
    """Whether Ray counts GPUs on this node, though this actor has none."""
    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())


class IngressGatewayReplica(_GatewayActor):
    """Lets Serve's HAProxy bring the requests, and so runs in the actor, on the loop on which Serve calls the app."""

    def __init__(self, config_json: str, version: str, *engines: Any) -> None:
        super().__init__(config_json, version)
        os.environ.update(self._config.env)
        # A gateway holds no GPU; vLLM must still see which kind this node has.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]
        self._busy = 0.0

    async def __serve_build_asgi_app__(self) -> Any:  # the name by which Serve asks (BUILD_APP_METHOD)
        gateway_config, _ = await self._settings()
        self._gateway = Gateway(gateway_config)
        await self._gateway.start(serve_http=False)
        self._tasks = [asyncio.create_task(job) for job in (self._follow(self._gateway.update), self._beat_forever())]
        return self._gateway.shell

    async def _beat_forever(self) -> None:
        beats = Beats(self._gateway)
        while self._gateway.failure is None:
            entry = beats.next().entry
            self._busy = entry.busy
            self._beat(entry)
            await asyncio.sleep(POLL_PERIOD_S)
        await self._directory.report_failure(self._failure(failure_of(self._gateway.failure)))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler."""
        return {BUSY: self._busy}

    async def check_health(self) -> None:
        """Raises: FleetError when vLLM's app could not be built."""
        if hasattr(self, "_gateway") and self._gateway.failure is not None:
            raise FleetError(f"gateway: {self._gateway.failure}")

    async def __del__(self) -> None:
        """Stop accepting, let open requests end, leave."""
        if self._is_stopping or not hasattr(self, "_gateway"):
            return
        await self._leave()
        await self._gateway.stop()
        await self._tell_usage(self._gateway.entry())
