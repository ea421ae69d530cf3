"""One gateway as a Ray Serve replica: Serve keeps its lifecycle and health, it answers clients itself."""

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import ray

from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import GatewayEntry, StartFailure
from kervan.fleet.log_files import new_log, open_log
from kervan.fleet.vllm import failures
from kervan.gateway.server import Gateway, GatewayConfig
from kervan.serve import watchers
from kervan.serve.autoscaling import BUSY
from kervan.serve.cluster import home
from kervan.serve.directory.client import find_directory
from kervan.serve.shared_port import ANY_HOSTS, Neighbourhood, served_names

logger = logging.getLogger(__name__)

BEAT_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def _log_to(path: Path) -> None:
    """All that this process writes goes to `path`: kervan's logs, vLLM's, Serve's, and the last words of a crash."""
    with open_log(path) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(format=LOG_FORMAT)
    logging.getLogger("kervan").setLevel(logging.INFO)


def _gateway_config(config: FleetConfig, gateway_id: str, secret: str, others: Sequence[GatewayEntry]) -> GatewayConfig:
    """The settings of a gateway on this node. `others`: the gateways that are on its port already."""
    node = ray.util.get_node_ip_address()
    return GatewayConfig(
        gateway_id=gateway_id,
        node=node,
        engine_argv=config.engine_argv,
        secret=secret,
        host=config.host,
        port=config.port,
        internal_host=node,
        public_host=node if config.host in ANY_HOSTS else config.host,
        api_keys=config.api_keys,
        max_queued_streams=config.max_queued_streams,
        hold_timeout_s=config.hold_timeout_s,
        stop_timeout_s=config.drain_timeout_s,
        is_twin=config.engine == "twin",
        # Gateways share the port: clients must not meet this one before it can answer, if others can.
        opens_when_attached=any(other.is_ready for other in others),
        shared_port=config.shared_port,
        fleet_name=config.name,
        models=served_names(config),
        replay_s=config.replay_s,
        replay_max_bytes=config.replay_max_mib << 20,
    )


class GatewayReplica:
    """Answers clients itself, on a uvloop loop of its own thread, away from Ray's loops."""

    def __init__(self, config_json: str, version: str, *engines: Any) -> None:
        self._config = config = FleetConfig.from_json(config_json)
        self._version = version
        os.environ.update(config.env)
        # A gateway holds no GPU; vLLM must still see which kind this node has.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]
        gateway_id = f"gw-{uuid.uuid4().hex[:6]}"
        self._log_path = new_log(home() / "logs", f"{config.name}-{gateway_id}")
        _log_to(self._log_path)
        self._directory = find_directory(config.name)
        _, secret = self._directory.fleet().result(timeout_s=None)
        others = self._directory.snapshot().result(timeout_s=None).gateways
        self._neighbourhood = Neighbourhood(config)
        # Known before the port is open: a request for another fleet may be the first.
        self._neighbours = self._neighbourhood.look() if config.shared_port else []
        others += [gateway for neighbour in self._neighbours for gateway in neighbour.gateways]
        self._gateway_config = _gateway_config(config, gateway_id, secret, others)
        self._gateway: Gateway
        self._loop: asyncio.AbstractEventLoop
        watchers.keep(config.env, [ray.get_runtime_context().get_node_id()])
        self._is_stopping = False
        self._busy = 0.0
        self._begin()

    def _begin(self) -> None:
        started: Future[None] = Future()
        threading.Thread(target=self._run, args=(started,), daemon=True, name="gateway").start()
        try:
            started.result()
            if self._gateway_config.opens_when_attached:  # Serve ends an old gateway as soon as this returns
                asyncio.run_coroutine_threadsafe(self._gateway.wait_attached(), self._loop).result()
        except BaseException as error:  # vLLM's parser of arguments exits
            self._directory.report_failure(self._failure(error)).result(timeout_s=None)
            raise FleetError(f"gateway: {error}") from error

    def _run(self, started: "Future[None]") -> None:
        import uvloop

        async def main() -> None:
            try:
                await self._start_gateway(serve_http=True)
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                started.set_exception(error)
                return
            started.set_result(None)
            following_neighbours = asyncio.create_task(self._follow_neighbours())
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self._follow())
                group.create_task(self._beat_forever())
                await self._stopped.wait()
                following.cancel()
            following_neighbours.cancel()

        uvloop.run(main())

    async def _start_gateway(self, *, serve_http: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._gateway = Gateway(self._gateway_config)
        if self._gateway.shared_port is not None:
            self._gateway.shared_port.update(self._neighbours)
        await self._gateway.start(serve_http=serve_http)

    def _failure(self, error: BaseException) -> StartFailure:
        cause = failures.known(error) or error
        message = " ".join(str(cause).split())
        return StartFailure(self._gateway_config.gateway_id, type(cause).__name__, message, str(self._log_path))

    async def _follow(self) -> None:
        """Hand the directory's changes to the gateway; a directory that is away changes nothing."""
        async for snapshot in self._directory.follow(poll_s=BEAT_PERIOD_S, retry_s=BEAT_PERIOD_S):
            self._gateway.update(snapshot)
            if self._stopped.is_set():
                return

    async def _follow_neighbours(self) -> None:
        """Tell the gateway of the other fleets on its port."""
        if self._gateway.shared_port is not None:
            await self._neighbourhood.follow(self._gateway.shared_port.update)

    async def _beat_forever(self) -> None:
        cpu_s, wall_s = time.thread_time(), time.monotonic()
        while not self._stopped.is_set():
            before_s = cpu_s, wall_s
            cpu_s, wall_s = time.thread_time(), time.monotonic()
            if wall_s > before_s[1]:
                self._busy = (cpu_s - before_s[0]) / (wall_s - before_s[1])
            if not self._is_stopping:
                entry = msgspec.structs.replace(
                    self._gateway.entry(), version=self._version, log_path=str(self._log_path), busy=self._busy
                )
                self._directory.beat_gateway(entry)
            if self._gateway.failure is not None:
                await self._directory.report_failure(self._failure(self._gateway.failure))
                return
            await asyncio.sleep(BEAT_PERIOD_S)

    async def _in_gateway(self, job: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(job, self._loop))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler."""
        return {BUSY: self._busy}

    async def check_health(self) -> None:
        """Raises: FleetError when vLLM's app could not be built, or the gateway's loop does not answer."""
        if self._gateway.failure is not None:
            raise FleetError(f"gateway: {self._gateway.failure}")
        await asyncio.wait_for(self._in_gateway(asyncio.sleep(0)), HEALTH_TIMEOUT_S)

    async def __del__(self) -> None:
        """Stop accepting, let open requests end, leave."""
        if self._is_stopping or not hasattr(self, "_gateway"):
            return
        self._is_stopping = True
        with contextlib.suppress(FleetError):
            await self._directory.remove(self._gateway_config.gateway_id)
        await self._in_gateway(self._gateway.stop())
        self._loop.call_soon_threadsafe(self._stopped.set)


class IngressGatewayReplica(GatewayReplica):
    """Lets Serve's HAProxy bring the requests, and so runs on the loop on which Serve calls the app."""

    def _begin(self) -> None:
        """Serve asks for the app next."""

    async def __serve_build_asgi_app__(self) -> Any:  # the name by which Serve asks (BUILD_APP_METHOD)
        await self._start_gateway(serve_http=False)
        self._jobs = [asyncio.create_task(job) for job in (self._follow(), self._beat_forever())]
        return self._gateway.shell
