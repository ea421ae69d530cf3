"""Starts, follows and ends the process of one gateway."""

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from kervan.errors import FleetError
from kervan.fleet import child
from kervan.fleet.child import Child
from kervan.fleet.control import ControlEnd
from kervan.fleet.directory import GatewayEntry, Snapshot
from kervan.fleet.process_group import end_group
from kervan.gateway.control import (
    Attached,
    Beat,
    GatewayFailed,
    GatewaySpec,
    LoopPing,
    LoopPong,
    Opened,
    Report,
    Stop,
    Update,
    UpdateNeighbours,
)
from kervan.gateway.server import GatewayConfig
from kervan.gateway.shared_port import Neighbour

logger = logging.getLogger(__name__)

PROGRAM = "kervan.gateway.program"
END_S = 10.0  # for what is left when open requests have ended


class GatewayProcess:
    """A gateway in a process group of its own; all methods are for one event loop.

    `failure` and `entry` hold the latest reports, `on_entry` is called with each of the latter; `on_failure` when
    vLLM's app cannot be built although the port is open, or when the process has ended without being told to.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        log_path: Path,
        on_entry: Callable[[GatewayEntry], None] = lambda _: None,
        on_failure: Callable[[GatewayFailed], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.log_path = log_path
        self.entry: GatewayEntry | None = None
        self.failure: GatewayFailed | None = None
        self.ended = asyncio.Event()
        self._on_entry = on_entry
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._process: Child | None = None
        self._control: ControlEnd | None = None
        self._is_stopping = False
        self._snapshot: Snapshot | None = None
        self._changed = asyncio.Event()
        self._is_open = self._is_attached = False
        self._pings = itertools.count(1)
        self._pongs: dict[int, asyncio.Future[None]] = {}

    async def start(
        self, neighbours: Sequence[Neighbour], *, env: Mapping[str, str], fork_for_pid: int | None = None
    ) -> None:
        """Start it; returns when its port is open, or with `opens_when_attached` when vLLM's app answers.

        `env` is its whole environment. `fork_for_pid`: fork it from this node's fork server, which stays as long as
        that process does, and start it anew only where that fails. Raises: FleetError when it cannot; `failure` says
        why, unless it was stopped meanwhile.
        """
        start = functools.partial(child.spawn, PROGRAM, env=env, log_path=self.log_path)
        if fork_for_pid is not None:
            start = functools.partial(
                child.fork_or_spawn, PROGRAM, env=env, log_path=self.log_path, owner_pid=fork_for_pid
            )
        try:
            process, control = await asyncio.to_thread(start)
        except OSError as error:
            self._fail(GatewayFailed("FleetError", f"the gateway's process could not be started: {error}"))
            self.ended.set()
            raise FleetError(str(error)) from error
        self._process, self._control = process, control
        self._send(GatewaySpec(self.config, list(neighbours)))
        if self._snapshot is not None:
            self._send(Update(self._snapshot))
        control.follow(self._on_line, lambda: self._on_end(process))
        if self._is_stopping:
            end_group(process.pid)
        while not (self._is_attached if self.config.opens_when_attached else self._is_open):
            if self.failure is not None or self.ended.is_set():
                raise FleetError(self.failure.message if self.failure else "the gateway was stopped while it started")
            await self._changed.wait()
            self._changed.clear()

    def _on_line(self, line: bytes) -> None:
        report = msgspec.json.decode(line, type=Report)
        self._loop.call_soon_threadsafe(self._take, report)

    def _on_end(self, process: Child) -> None:
        end_group(process.pid)
        how = child.post_mortem(process.wait(), self.log_path)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            self._loop.call_soon_threadsafe(self._take_end, how)

    def _take(self, report: Report) -> None:
        if isinstance(report, Beat):
            self.entry = report.entry
            self._on_entry(report.entry)
        elif isinstance(report, LoopPong):
            if (waiting := self._pongs.pop(report.number, None)) is not None and not waiting.done():
                waiting.set_result(None)
        elif isinstance(report, GatewayFailed):
            self._fail(report)
        elif isinstance(report, Opened):
            self._is_open = True
        else:
            assert isinstance(report, Attached)
            self._is_attached = True
        self._changed.set()

    def _take_end(self, how: str) -> None:
        self.ended.set()
        self._changed.set()
        if not self._is_stopping and self.failure is None:
            self._fail(GatewayFailed("FleetError", f"the gateway's process ended with {how}"))

    def _fail(self, failure: GatewayFailed) -> None:
        self.failure = failure
        self._changed.set()
        self._on_failure(failure)

    def update(self, snapshot: Snapshot) -> None:
        """Let it follow the directory; what is said before there is a process is said to it then."""
        self._snapshot = snapshot
        self._send(Update(snapshot))

    def update_neighbours(self, neighbours: Sequence[Neighbour]) -> None:
        """Tell it of the other fleets on its port."""
        self._send(UpdateNeighbours(list(neighbours)))

    async def ping(self) -> None:
        """Returns when its loop has answered. Raises: FleetError when it is gone."""
        number = next(self._pings)
        self._pongs[number] = pong = self._loop.create_future()
        self._send(LoopPing(number))
        ended = asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait((pong, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            self._pongs.pop(number, None)
        if not pong.done():
            raise FleetError("the gateway's process has ended")

    async def stop(self) -> None:
        """Let open requests end (`stop_timeout_s`), then end it; also while it starts."""
        self._is_stopping = True
        if self._is_open:
            self._send(Stop())
        elif self._process is not None:
            end_group(self._process.pid)
        else:  # `start` sees it
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), self.config.stop_timeout_s + END_S)
        if not self.ended.is_set() and self._process is not None:
            logger.warning("the gateway's process does not end by itself")
            end_group(self._process.pid)

    def _send(self, command: msgspec.Struct) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):  # it has ended: `_on_end` tells how
                self._control.send(command)
