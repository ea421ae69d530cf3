"""Starts, follows and ends the process of one engine replica."""

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from kervan import logs
from kervan.config.fault import Fault
from kervan.config.profile import ProfileAsk
from kervan.fleet import child, log_causes
from kervan.fleet.child import Child
from kervan.fleet.control import Command, ControlEnd, EngineFailed, EngineLoad, EngineSpec, Ready, Report
from kervan.fleet.process_group import end_group
from kervan.fleet.rank_watch import RankWatch
from kervan.fleet.vllm import failures, start_parts
from kervan.fleet.vllm.head_start import model_classes
from kervan.policy.watchdog import EngineSample, Health
from kervan.policy.watchdog import decide as judge

VLLM_ENGINE = "kervan.fleet.vllm.__main__"
TWIN_ENGINE = "kervan.twin.replica"
# Nobody removes the sockets over which vLLM's workers talk, so they get a directory that goes with the engine. The path
# of a Unix socket has at most 107 bytes, 37 of them vLLM's name for it.
MAX_SOCKET_DIRECTORY = 70


class EngineProcess:
    """One engine replica in a process group of its own.

    `spec` is what `module` reads first; `env` is its whole environment (None: this process's). `fork_for_pid`: fork a
    vLLM engine from this node's fork server, which stays as long as that process does, and start it anew only where
    that fails. `ready`, `load` and `failure` hold the latest reports, `start_s` the seconds of a start by part;
    `on_change` is called from a thread after each report.
    """

    def __init__(
        self,
        spec: msgspec.Struct,
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        module: str = VLLM_ENGINE,
        fork_for_pid: int | None = None,
        on_change: Callable[[], None] = lambda: None,
    ):
        self.spec = spec
        self.log_path = log_path
        self.ready: Ready | None = None
        self.start_s: dict[str, float] = {}
        self.load = EngineLoad(0, 0, 0.0, 0, False)
        self.failure: EngineFailed | None = None
        self._on_change = on_change
        self._last_report_s = self._last_step_s = time.monotonic()
        environment = dict(os.environ if env is None else env)
        self._sockets_of_workers = tempfile.TemporaryDirectory(prefix="kervan-", ignore_cleanup_errors=True)
        self.rank_watch = RankWatch(Path(self._sockets_of_workers.name), environment)
        if isinstance(spec, EngineSpec):
            self.spec = msgspec.structs.replace(spec, stacks_dir=self._sockets_of_workers.name)
        if len(self._sockets_of_workers.name) <= MAX_SOCKET_DIRECTORY:
            environment.setdefault("VLLM_RPC_BASE_PATH", self._sockets_of_workers.name)
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._process: Child | None = None
        self._control: ControlEnd | None = None
        if fork_for_pid is None:
            self._begin(*child.spawn(module, env=environment, log_path=log_path))
        else:
            threading.Thread(
                target=self._fork_or_spawn, args=(environment, fork_for_pid), daemon=True, name="engine-start"
            ).start()

    def _fork_or_spawn(self, environment: Mapping[str, str], owner_pid: int) -> None:
        hints = model_classes(self.spec.engine_argv) if isinstance(self.spec, EngineSpec) else []
        try:
            started = child.fork_or_spawn(
                VLLM_ENGINE, env=environment, log_path=self.log_path, owner_pid=owner_pid, hints=hints
            )
        except OSError as error:  # no memory, processes or files are left: nobody waits for this thread
            self.failure = EngineFailed("EngineError", f"the engine process could not be started: {error}")
            self.ended.set()
            self._on_change()
        else:
            self._begin(*started)

    def _begin(self, process: Child, control: ControlEnd) -> None:
        with self._lock:
            self._process, self._control = process, control
            is_wanted = not self.ended.is_set()
        if not is_wanted:  # killed before it was there
            end_group(process.pid)
            control.close()
            process.wait()
            return
        with contextlib.suppress(OSError):  # it has ended: `_on_end` tells how
            control.send(self.spec)
        control.follow(self._on_line, lambda: self._on_end(process))

    @property
    def pid(self) -> int:
        """Of the engine process, which leads the group; 0 before there is a process."""
        return 0 if self._process is None else self._process.pid

    def _on_line(self, line: bytes) -> None:
        report = msgspec.json.decode(line, type=Report)
        self._last_report_s = time.monotonic()
        if isinstance(report, Ready):
            self.start_s = start_parts.split(report.start_s, logs.plain(self.log_path.read_text(errors="replace")))
            self.ready = report
        elif isinstance(report, EngineFailed):
            self.failure = failures.with_cause(report, log_causes.tail(self.log_path))
        else:
            if report.num_steps != self.load.num_steps or not report.has_work:
                self._last_step_s = self._last_report_s
            self.load = report
        self._on_change()

    def _on_end(self, process: Child) -> None:
        # The core is gone; its workers would hold their GPU memory for seconds more.
        end_group(process.pid)
        status = process.wait()
        self._sockets_of_workers.cleanup()
        if self.ready is None and self.failure is None:
            how = child.post_mortem(status, self.log_path)
            self.failure = failures.of_end(how, log_causes.tail(self.log_path))
        self.ended.set()
        self._on_change()

    def health(self, stall_timeout_s: float) -> Health:
        """Whether a ready engine still reports, and steps while it has work."""
        if self.ended.is_set():
            return Health(False, "the engine process ended")
        if self.ready is None:
            return Health(True, "")
        sample = EngineSample(
            time.monotonic(),
            self._last_report_s,
            self._last_step_s,
            self.load.has_work,
            self.load.expected_step_s,
            self.load.num_suspects,
            self.rank_watch.hang,
        )
        return judge(sample, stall_timeout_s=stall_timeout_s)

    @property
    def stalled_s(self) -> float:
        """Seconds for which it has had work and made no step, as far as its reports tell."""
        return time.monotonic() - self._last_step_s if self.load.has_work else 0.0

    def why_stalled(self) -> str:
        """What its ranks do while it makes no step; empty for one process, and until it has stood still for a while.

        Takes up to a second then. Called by one thread.
        """
        return self.rank_watch.look(self.stalled_s)

    def drain(self) -> None:
        """Announce to all gateways that this replica drains."""
        self._command("drain")

    def suffer(self, fault: Fault) -> None:
        """Let a twin suffer; an engine takes no notice."""
        self._command("fault", fault)

    def profile(self, ask: ProfileAsk) -> None:
        """Let the engine profile itself; a twin takes no notice."""
        self._send(Command("profile", profile=ask))

    def strike(self, how: Literal["kill", "hang"]) -> None:
        """Do to the engine's process what a fault would: it dies, or gets no CPU any more."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    def stop(self, timeout_s: float) -> None:
        """End the engine: asked first, killed after `timeout_s`."""
        self._command("stop")
        if not self.ended.wait(timeout_s):
            self.kill()

    def kill(self) -> None:
        """End the engine and its workers now."""
        with self._lock:
            if self._process is None:
                self.failure = EngineFailed("EngineError", "stopped before it had started")
                self.ended.set()
            elif not self.ended.is_set():  # after that the number may be another's
                end_group(self._process.pid)
        self.ended.wait(10.0)

    def _command(self, command: Literal["drain", "stop", "fault"], fault: Fault | None = None) -> None:
        self._send(Command(command, fault))

    def _send(self, command: Command) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(command)
