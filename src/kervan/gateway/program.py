"""`python -m kervan.gateway.program FD`: a gateway in a process of its own; FD is this end of the control line.

It runs on a uvloop loop that nothing else uses, and ends at once when the process that started it does.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from typing import NoReturn

import msgspec
import psutil
import uvloop

from kervan import logs
from kervan.fleet.control import ControlEnd
from kervan.fleet.directory import Snapshot
from kervan.fleet.vllm import failures
from kervan.gateway.active import active_s
from kervan.gateway.control import (
    Attached,
    Beat,
    Command,
    GatewayFailed,
    GatewaySpec,
    LoopPing,
    LoopPong,
    Opened,
    Stop,
    Update,
    UpdateNeighbours,
)
from kervan.gateway.server import Gateway

logger = logging.getLogger(__name__)

BEAT_PERIOD_S = 1.0


def failure_of(error: BaseException) -> GatewayFailed:
    """What stopped a gateway, in one line."""
    cause = failures.diagnosed(error) or error
    return GatewayFailed(type(cause).__name__, " ".join(str(cause).split()))


class Beats:
    """How busy a gateway's loop was between one beat and the next: its thread ran, or waited for a core."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._active_s, self._wall_s = active_s(), time.monotonic()
        self._busy = 0.0

    def next(self) -> Beat:
        """To be called in the loop's thread."""
        before_s = self._active_s, self._wall_s
        self._active_s, self._wall_s = active_s(), time.monotonic()
        if self._wall_s > before_s[1]:
            self._busy = (self._active_s - before_s[0]) / (self._wall_s - before_s[1])
        return Beat(msgspec.structs.replace(self._gateway.entry(), busy=self._busy))


class _Program:
    """Runs a gateway as the other end of the control line wants."""

    def __init__(self, control: ControlEnd, spec: GatewaySpec) -> None:
        self._control = control
        self._gateway = Gateway(spec.config)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._is_started = False
        self._snapshot: Snapshot | None = None
        if self._gateway.shared_port is not None:
            self._gateway.shared_port.update(spec.neighbours)

    async def run(self) -> int:
        """Until it is told to stop: the exit status."""
        self._control.follow(self._on_line, lambda: os._exit(1))
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done() or not starting.result():
            return 1  # told to go before it was there, or it has failed
        others = [asyncio.create_task(job) for job in (self._beat_forever(), self._attach())]
        await self._stopping.wait()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._gateway.stop()
        self._send(Beat(self._gateway.entry()))  # what was counted meanwhile
        return 0

    async def _start(self) -> bool:
        try:
            await self._gateway.start()
        except BaseException as error:  # noqa: BLE001 - vLLM's parser of arguments exits
            self._send(failure_of(error))
            return False
        self._is_started = True
        if self._snapshot is not None:
            self._gateway.update(self._snapshot)
        self._send(Opened())
        return True

    async def _attach(self) -> None:
        try:
            await self._gateway.wait_attached()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - as above
            self._send(failure_of(error))
        else:
            from kervan.fleet.vllm.frontend import settle_environment  # this process has no other use

            settle_environment()
            self._send(Attached())

    async def _beat_forever(self) -> None:
        beats = Beats(self._gateway)
        while self._gateway.failure is None:
            self._send(beats.next())
            await asyncio.sleep(BEAT_PERIOD_S)

    def _on_line(self, line: bytes) -> None:
        command = msgspec.json.decode(line, type=Command)
        self._loop.call_soon_threadsafe(self._carry_out, command)

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, Update):
            self._snapshot = command.snapshot
            if self._is_started:
                self._gateway.update(command.snapshot)
        elif isinstance(command, UpdateNeighbours):
            if self._gateway.shared_port is not None:
                self._gateway.shared_port.update(command.neighbours)
        elif isinstance(command, LoopPing):
            self._send(LoopPong(command.number))
        else:
            assert isinstance(command, Stop)
            self._stopping.set()

    def _send(self, report: msgspec.Struct) -> None:
        with contextlib.suppress(OSError):  # the other end is gone, and this one ends at once
            self._control.send(report)


async def _main(control: ControlEnd, spec: GatewaySpec) -> int:
    return await _Program(control, spec).run()


def _set_title(title: str) -> None:
    """What `ps` shows; a fork would have its server's command."""
    with contextlib.suppress(ImportError):  # vLLM has it
        from setproctitle import setproctitle

        setproctitle(title)


def run(control_fd: int, asked_s: float, *, is_forked: bool = False) -> NoReturn:
    """Be the gateway that the other end of the control line asks for.

    `asked_s`: `time.time()` when it was wanted; `is_forked`: this process had vLLM imported before.
    """
    logs.configure(force=True)
    logging.getLogger("kervan").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = ControlEnd(socket.socket(fileno=control_fd))
    if not (line := control.receive()):
        os._exit(1)
    spec = msgspec.json.decode(line, type=GatewaySpec)
    config = spec.config
    logs.configure(config.log_format, force=True, fleet=config.fleet_name, gateway=config.gateway_id)
    _set_title(f"kervan gateway {spec.config.gateway_id} of {spec.config.fleet_name}")
    logger.info("%s %.1f s after it was asked for", "forked" if is_forked else "started", time.time() - asked_s)
    status = uvloop.run(_main(control, spec))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run(int(sys.argv[1]), psutil.Process().create_time())
