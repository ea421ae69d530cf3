"""Three gateways with vLLM's app over a twin, in a process of their own: two that answer, and one that finds no replica.

Their settings make them refuse, store and load: an API key, CORS for one page, named requests, a middleware, stored
responses, adapters at run time.
"""

import asyncio
import dataclasses
import multiprocessing
import os
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kervan.ports import free_port

if TYPE_CHECKING:
    from kervan.fleet.process import EngineProcess
    from kervan.gateway.server import Gateway

START_S = 400.0
KEY = "k3y"
ORIGIN = "https://page.example"
ENGINE_ARGS = {
    "max_model_len": 2048,
    "enable_lora": True,
    "allowed_origins": f'["{ORIGIN}"]',
    "allowed_methods": '["GET", "POST"]',
    "allowed_headers": '["authorization", "x-request-id"]',
    "allow_credentials": True,
    "enable_request_id_headers": True,
    "middleware": f"{__name__}.Marked",
}
ENVIRONMENT = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
FLEET_NAME = "trio"


class Marked:
    """A middleware of the user's."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-marked", b"yes"))
            await send(message)

        await self._app(scope, receive, marked if scope["type"] == "http" else send)


class GatewayTrio:
    """The process. `urls`: of gateways a and b; `lone_url`: of the one without a replica; `log_path`: what it writes."""

    def __init__(self, model: Path, scratch: Path) -> None:
        self.log_path = scratch / "gateways.log"
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(model), str(scratch)))
        self._process.start()
        theirs.close()
        assert self._connection.poll(START_S), f"the gateways did not start: {self.log_path}"
        *self.urls, self.lone_url = self._connection.recv()

    def ask(self, command: str) -> Any:
        """`join`: another gateway comes, and its URL; `leave`: it ends without a word to the others.

        `left`: how many of each kind of thing there are that end with requests.
        """
        self._connection.send(command)
        assert self._connection.poll(START_S), command
        return self._connection.recv()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _serve(connection: Connection, model: str, scratch: str) -> None:
    os.environ |= ENVIRONMENT
    with (Path(scratch) / "gateways.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    asyncio.run(_run(connection, model, Path(scratch)))


async def _run(connection: Connection, model: str, scratch: Path) -> None:
    from harness.live import until
    from harness.twin_bench import FAST, LIMITS, SECRET
    from kervan.config.api_keys import table_of
    from kervan.config.fleet import FleetConfig
    from kervan.fleet.directory import ReplicaEntry, Snapshot
    from kervan.fleet.process import TWIN_ENGINE, EngineProcess
    from kervan.gateway.server import Gateway, GatewayConfig
    from kervan.twin.replica import TwinSpec
    from kervan.twin.token_engine import TwinSettings

    spec = TwinSpec("twin", "127.0.0.1", SECRET, TwinSettings(FAST, LIMITS))
    twin = EngineProcess(spec, log_path=scratch / "twin.log", module=TWIN_ENGINE)
    settings = GatewayConfig(
        gateway_id="",
        node="127.0.0.1",
        engine_argv=FleetConfig(model=model, engine_args=ENGINE_ARGS).engine_argv,
        secret=SECRET,
        host="127.0.0.1",
        port=0,
        internal_host="127.0.0.1",
        public_host="127.0.0.1",
        keys=table_of((KEY,), None),
        max_queued_streams=64,
        hold_timeout_s=30.0,
        stop_timeout_s=0.0,
        opens_when_attached=False,
        is_twin=True,
        shared_port=False,
        fleet_name=FLEET_NAME,
        models=(),
        replay_s=0.0,
        replay_max_bytes=0,
    )
    gateways: dict[str, Gateway] = {}

    async def start(name: str) -> Gateway:
        gateways[name] = Gateway(dataclasses.replace(settings, gateway_id=f"gw-{name}", port=free_port()))
        await gateways[name].start()
        return gateways[name]

    def follow() -> None:
        assert twin.ready is not None
        replica = ReplicaEntry("twin", "on-demand", "127.0.0.1", twin.pid, "ready", twin.ready.address,
                               public_key=twin.ready.public_key)  # fmt: skip
        entries = [gateway.entry() for gateway in gateways.values()]
        for name, gateway in gateways.items():
            gateway.update(Snapshot(1, [] if name == "lone" else [replica], entries, []))

    try:
        for name in ("a", "b", "lone"):
            await start(name)
        await until(lambda: twin.ready or twin.failure)
        follow()
        for name in ("a", "b"):
            await gateways[name].wait_attached()
        follow()
        connection.send([gateway.entry().url for gateway in gateways.values()])
        while (command := await asyncio.to_thread(_receive, connection)) is not None:
            if command == "left":
                connection.send(_left(gateways.values(), twin))
            elif command == "join":
                gateway = await start("c")
                follow()
                await gateway.wait_attached()
                follow()
                connection.send(gateway.entry().url)
            else:
                await gateways.pop("c").stop()
                follow()
                connection.send(None)
    finally:
        twin.kill()
    os._exit(0)


def _left(gateways: "Iterable[Gateway]", twin: "EngineProcess") -> dict[str, int]:
    attached = [gateway for gateway in gateways if gateway.frontend is not None]
    return {
        "http requests": sum(gateway.num_open for gateway in attached),
        "streams": sum(gateway.fleet.num_streams for gateway in attached),
        "places": sum(gateway.fleet.num_outstanding for gateway in attached),
        "requests": sum(len(gateway.frontend.engine.output_processor.request_states) for gateway in attached),
        "running": twin.load.running + twin.load.waiting,
        "tasks": len(asyncio.all_tasks()),
    }


def _receive(connection: Connection) -> str | None:
    try:
        command: str = connection.recv()
    except EOFError:
        return None
    return command
