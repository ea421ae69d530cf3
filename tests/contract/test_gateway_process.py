"""A gateway in a process of its own, forked and started anew, over a twin: it answers, leaves, fails and dies."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from harness.live import eventually_async, is_alive
from harness.shared_fleet import Models
from harness.twin_bench import FAST, LIMITS, SECRET
from harness.warm_place import WarmPlace

from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.gateway.control import GatewayFailed
from kervan.gateway.process import GatewayProcess
from kervan.gateway.server import GatewayConfig
from kervan.ports import free_port
from kervan.twin.replica import TwinSpec
from kervan.twin.token_engine import TwinSettings, answer

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
async def twin(tmp_path: Path) -> AsyncIterator[ReplicaEntry]:
    spec = TwinSpec("twin", "127.0.0.1", SECRET, TwinSettings(FAST, LIMITS))
    process = EngineProcess(spec, log_path=tmp_path / "twin.log", module=TWIN_ENGINE)
    await eventually_async(lambda: process.ready, "the twin is ready", 60)
    assert process.ready is not None
    yield ReplicaEntry("twin", "on-demand", "127.0.0.1", process.pid, "ready", process.ready.address,
                       public_key=process.ready.public_key)  # fmt: skip
    process.kill()


def config_of(models: Models, port: int, *, opens_when_attached: bool = False, **engine_args: Any) -> GatewayConfig:
    fleet = FleetConfig(model=str(models.demo), engine_args={"max_model_len": 2048, **engine_args})
    return GatewayConfig(
        gateway_id=f"gw-{port}",
        node="127.0.0.1",
        engine_argv=fleet.engine_argv,
        secret=SECRET,
        host="127.0.0.1",
        port=port,
        internal_host="127.0.0.1",
        public_host="127.0.0.1",
        max_queued_streams=64,
        hold_timeout_s=30.0,
        stop_timeout_s=30.0,
        opens_when_attached=opens_when_attached,
        is_twin=True,
        shared_port=False,
        fleet_name="toy",
        models=(),
        replay_s=0.0,
        replay_max_bytes=0,
    )


class Gateways:
    """Gateway processes of one test."""

    def __init__(self, models: Models, directory: Path, twin: ReplicaEntry, warm: WarmPlace) -> None:
        self.models, self.directory, self.twin, self.warm = models, directory, twin, warm
        self.failures: list[GatewayFailed] = []
        self.all: list[GatewayProcess] = []

    async def start(self, *, port: int | None = None, is_forked: bool = True, **more: Any) -> GatewayProcess:
        config = config_of(self.models, port or free_port(), **more)
        log = self.directory / f"{len(self.all)}.log"
        gateway = GatewayProcess(config, log_path=log, on_failure=self.failures.append)
        self.all.append(gateway)
        gateway.update(Snapshot(1, [self.twin], [], []))  # before there is a process: it hears of it all the same
        await gateway.start([], env=self.warm.environment, fork_for_pid=os.getpid() if is_forked else None)
        return gateway


@pytest.fixture
async def gateways(models: Models, tmp_path: Path, twin: ReplicaEntry, warm: WarmPlace) -> AsyncIterator[Gateways]:
    made = Gateways(models, tmp_path, twin, warm)
    yield made
    await asyncio.gather(*(gateway.stop() for gateway in made.all if not gateway.ended.is_set()))


async def tokens(gateway: GatewayProcess, num_tokens: int) -> list[int]:
    url = f"http://127.0.0.1:{gateway.config.port}"
    body = {"prompt": [5, 6, 7], "max_tokens": num_tokens, "ignore_eos": True, "return_token_ids": True}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    told: list[int] = response.json()["choices"][0]["token_ids"]
    return told


async def is_ready(gateway: GatewayProcess) -> None:
    check: Callable[[], Any] = lambda: gateway.entry is not None and gateway.entry.is_ready  # noqa: E731
    await eventually_async(check, "it is ready", 120)


async def test_forked_gateways_answer_as_one_that_was_started_anew(gateways: Gateways) -> None:
    anew, first, second = await asyncio.gather(
        gateways.start(is_forked=False), gateways.start(), gateways.start(opens_when_attached=True)
    )
    for gateway in (anew, first, second):
        await is_ready(gateway)
        await gateway.ping()
        assert await tokens(gateway, 30) == answer([5, 6, 7], 30, LIMITS)
    pids = {gateway: gateway.entry.pid for gateway in (anew, first, second) if gateway.entry is not None}
    servers = {gateway: psutil.Process(pid).ppid() for gateway, pid in pids.items()}
    assert servers[anew] == os.getpid() != servers[first] == servers[second]
    assert psutil.Process(pids[first]).cmdline()[0] == f"kervan gateway {first.config.gateway_id} of toy"

    # Told to stop, it lets an open request end.
    last = asyncio.create_task(tokens(second, 1500))
    await eventually_async(lambda: second.entry is not None and second.entry.streams, "its stream is open", 60)
    await second.stop()
    assert await last == answer([5, 6, 7], 1500, LIMITS)
    assert not is_alive(pids[second])
    assert gateways.failures == []

    # Killed, its end is told, and the others go on.
    os.kill(pids[first], signal.SIGKILL)
    await asyncio.wait_for(first.ended.wait(), 30)
    (failure,) = gateways.failures
    assert failure.message.startswith("the gateway's process ended with signal SIGKILL")
    with pytest.raises(FleetError, match="has ended"):
        await first.ping()
    assert await tokens(anew, 5) == answer([5, 6, 7], 5, LIMITS)

    # The next has all imported before it is there.
    third = await gateways.start()
    assert third.entry is None or psutil.Process(third.entry.pid).ppid() == servers[second]


async def test_a_gateway_that_cannot_start_says_why(gateways: Gateways) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FleetError, match="cannot be used"):
            await gateways.start(port=taken.getsockname()[1])
    with pytest.raises(FleetError):
        await gateways.start(opens_when_attached=True, dtype="foo")
    assert ["cannot be used" in failure.message for failure in gateways.failures] == [True, False]
    assert "dtype" in gateways.failures[1].message


async def test_one_that_is_told_to_stop_while_it_starts(gateways: Gateways) -> None:
    starting = asyncio.create_task(gateways.start(opens_when_attached=True))
    await eventually_async(lambda: gateways.all, "it is on its way", 30)
    (gateway,) = gateways.all
    await gateway.stop()
    with pytest.raises(FleetError, match="was stopped while it started"):
        await starting
    await asyncio.wait_for(gateway.ended.wait(), 30)
    assert gateways.failures == []
