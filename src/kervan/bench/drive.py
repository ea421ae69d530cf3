"""Runs a load over worker processes, with commands at given times, to its end or to Ctrl-C."""

import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from kervan.bench import worker
from kervan.bench.counting import FloorSketches, WorkerProgress
from kervan.bench.load import Endpoint, Load
from kervan.bench.load_client import Share
from kervan.bench.prompts import Alphabet
from kervan.bench.refusals import ENOUGH_FAILURES
from kervan.bench.sketch import Sketch
from kervan.bench.tally import RequestTally, merge_all
from kervan.config.workload import Slo
from kervan.errors import ConfigError, FleetError

# Gets the seconds since the start and each worker's newest report; true ends the run.
OnProgress = Callable[[float, list[WorkerProgress]], bool | None]

READY_TIMEOUT_S = 120.0
START_DELAY_S = 0.1
STOP_TIMEOUT_S = 15.0
LAST_S = 2.0  # that an action may still run when the load has ended
FILES_PER_PROCESS = 200


@dataclass(frozen=True, slots=True)
class Action:
    """A shell command to run at a moment of the run."""

    at_s: float
    command: str


@dataclass(slots=True)
class Event:
    """An action that was taken. `exit_code` None: it was still running when the run ended, and was killed.

    `duration_s`: how long the command ran, also then.
    """

    at_s: float
    command: str
    exit_code: int | None = None
    duration_s: float = 0.0
    output: str = ""


@dataclass(slots=True)
class Outcome:
    """What the workers measured, and what the client itself did meanwhile."""

    tally: RequestTally
    num_processes: int
    cpu_s: float
    wall_s: float
    busiest_share: float  # of one core, of the busiest worker
    lag: Sketch
    loop: str
    events: list[Event]
    was_interrupted: bool = False
    gave_up: bool = False  # all requests failed in a way that no later one mends
    missed_actions: list[Action] = field(default_factory=list)  # whose time had not come when the run ended
    clock_step_s: float = 0.0  # how far the real-time clock went from the monotonic one during the run
    floor: FloorSketches = field(default_factory=FloorSketches)


@dataclass(slots=True)
class _RunningAction:
    action: Action
    process: "subprocess.Popen[bytes]"
    begun_s: float


def drive(
    load: Load,
    endpoint: Endpoint,
    alphabet: Alphabet,
    *,
    slo: Slo = Slo(),  # noqa: B008 - frozen
    num_processes: int = 1,
    actions: Sequence[Action] = (),
    on_progress: OnProgress | None = None,
    is_calibration: bool = False,
) -> Outcome:
    """Send `load` and measure. Blocks. Ctrl-C ends the run early and still gives what was measured.

    `on_progress`: called about twice a second.

    Ends early when nothing can succeed: the first requests have all failed in a way that no later one mends, and no
    action may change that.

    Raises: ConfigError for a load that cannot be built; FleetError when a worker process dies.
    """
    raise_file_limit()
    context = multiprocessing.get_context("spawn")
    links: dict[Connection, BaseProcess] = {}
    try:
        for number in range(num_processes):
            share = Share(load, endpoint, alphabet, slo, number, num_processes, is_calibration)
            mine, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=worker.run, args=(share, theirs), name=f"kervan-bench-{number}", daemon=True
            )
            process.start()
            theirs.close()
            links[mine] = process
        return _DriverRun(links, actions, on_progress).run()
    finally:
        for link, process in links.items():
            link.close()
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()


class _DriverRun:
    def __init__(
        self,
        links: dict[Connection, BaseProcess],
        actions: Sequence[Action],
        on_progress: OnProgress | None,
    ) -> None:
        self._links = links
        self._actions = sorted(actions, key=lambda action: action.at_s)
        self._on_progress = on_progress
        self._running: list[_RunningAction] = []
        self._events: list[Event] = []
        self._reports: dict[int, WorkerProgress] = {}
        self._finished: dict[Connection, worker.WorkerFinished] = {}
        self._start_s = 0.0
        self._is_stopping = False
        self._may_recover = bool(actions)
        self._gave_up = False

    def run(self) -> Outcome:
        interrupted = False
        try:
            self._wait_until_ready()
            self._start_s = time.time() + START_DELAY_S
            clock_s = time.time() - time.monotonic()
            self._send("start", self._start_s)
            try:
                while len(self._finished) < len(self._links):
                    self._step()
            except KeyboardInterrupt:
                interrupted = True
                self._send("stop")
                end_s = time.monotonic() + STOP_TIMEOUT_S
                while len(self._finished) < len(self._links) and time.monotonic() < end_s:
                    self._step()
                if not self._finished:
                    raise
        finally:
            self._end_actions()
        finished = list(self._finished.values())
        lag, floor = Sketch(), FloorSketches()
        for worker_report in finished:
            lag.merge(worker_report.lag)
            if worker_report.floor is not None:
                floor.merge(worker_report.floor)
        return Outcome(
            tally=merge_all(worker_report.tally for worker_report in finished),
            num_processes=len(self._links),
            cpu_s=sum(worker_report.cpu_s for worker_report in finished),
            wall_s=max(worker_report.wall_s for worker_report in finished),
            busiest_share=max(worker_report.cpu_s / max(worker_report.wall_s, 1e-9) for worker_report in finished),
            lag=lag,
            loop=finished[0].loop,
            events=self._events,
            was_interrupted=interrupted,
            gave_up=self._gave_up,
            missed_actions=self._actions,
            clock_step_s=time.time() - time.monotonic() - clock_s,
            floor=floor,
        )

    def _send(self, *command: object) -> None:
        for link in self._links:
            with suppress(OSError):
                link.send(command)

    def _wait_until_ready(self) -> None:
        waiting = set(self._links)
        end_s = time.monotonic() + READY_TIMEOUT_S
        while waiting:
            for link in wait(list(waiting), timeout=1.0):
                assert isinstance(link, Connection)
                self._receive(link)
                waiting.discard(link)
            if time.monotonic() > end_s:
                raise FleetError(f"{len(waiting)} client processes are not ready after {READY_TIMEOUT_S:.0f} s")

    def _receive(self, link: Connection) -> object:
        try:
            message = link.recv()
        except (EOFError, OSError):
            self._links[link].join(1)
            code = self._links[link].exitcode
            raise FleetError(f"a client process died (exit status {code}); is there enough memory?") from None
        if isinstance(message, worker.WorkerFailed):
            raise ConfigError(message.message)
        return message

    def _step(self) -> None:
        """Wait a moment for reports, take the actions that are due, show progress."""
        open_links = [link for link in self._links if link not in self._finished]
        now_s = time.time() - self._start_s
        timeout_s = 0.25 if not self._actions else min(0.25, max(0.0, self._actions[0].at_s - now_s))
        fresh = False
        for link in wait(open_links, timeout=timeout_s):
            assert isinstance(link, Connection)
            message = self._receive(link)
            if isinstance(message, worker.WorkerFinished):
                self._finished[link] = message
            elif isinstance(message, WorkerProgress):
                self._reports[message.worker] = message
                fresh = True
        now_s = time.time() - self._start_s
        while self._actions and self._actions[0].at_s <= now_s:
            action = self._actions.pop(0)
            process = subprocess.Popen(
                action.command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            self._running.append(_RunningAction(action, process, now_s))
        for running in [r for r in self._running if r.process.poll() is not None]:
            self._end_action(running, now_s)
        if not fresh:
            return
        reports = list(self._reports.values())
        enough = self._on_progress is not None and self._on_progress(now_s, reports)
        self._gave_up = self._gave_up or (not self._may_recover and _is_hopeless(reports))
        if (enough or self._gave_up) and not self._is_stopping:
            self._is_stopping = True
            self._send("stop")

    def _end_action(self, running: _RunningAction, now_s: float) -> None:
        """Count an action that has ended, or kill it with all that it started."""
        self._running.remove(running)
        assert running.process.stdout is not None
        code = running.process.poll()
        if code is None:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
        os.set_blocking(running.process.stdout.fileno(), False)
        output = (running.process.stdout.read() or b"")[-2000:].decode(errors="replace").strip()
        running.process.stdout.close()
        self._events.append(Event(running.begun_s, running.action.command, code, now_s - running.begun_s, output))

    def _end_actions(self) -> None:
        for running in list(self._running):
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(LAST_S)
            self._end_action(running, time.time() - self._start_s)
        self._events.sort(key=lambda event: event.at_s)


def _is_hopeless(reports: Sequence[WorkerProgress]) -> bool:
    """Whether all that ended failed in a way that no later request mends, and that is not by chance."""
    hopeless, in_flight = sum(r.hopeless for r in reports), sum(r.in_flight for r in reports)
    is_all = all(r.ok == 0 and r.errors == r.hopeless for r in reports)
    return is_all and hopeless >= ENOUGH_FAILURES and hopeless > 4 * in_flight


def raise_file_limit() -> None:
    """As many open connections as the system allows this user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_file_limit(streams: int, num_processes: int) -> None:
    """Raises: ConfigError when the streams need more files than a process may open."""
    raise_file_limit()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = -(-streams // num_processes) + FILES_PER_PROCESS
    if need > soft:
        raise ConfigError(
            f"{streams} streams in {num_processes} processes need {need} open files each, and the limit is {soft}; "
            f"raise it (ulimit -n {need}), or use --processes {-(-streams // max(1, soft - FILES_PER_PROCESS))}"
        )
