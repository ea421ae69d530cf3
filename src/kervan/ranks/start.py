"""Starts the ranks of this node and gives back what they report, row by row.

Each rank is a process that imports torch by itself, and reports over a Unix socket of ours: a GPU that it used is free
again when it has ended, and one that hangs can be ended. (Forked ones cannot use CUDA: torch 2.11 asks for the GPUs
when it is imported.) The ranks of one node are started here; those of several by torchrun on each node, whose
rendezvous they share. Ranks end when this process does, however it ends.
"""

import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError, EngineError
from kervan.ranks import ras, stacks
from kervan.ranks.rank import STORE, Doing, Ended, Failed, Job, Joined, Nodes, Work, stack_path

POLL_S = 0.2
STACKS_S = 1.0
LEAVE_S = 20.0
MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107
PROGRAM = "kervan.ranks.process"
# What a rank says when another one is gone: that one's words are the cause, if they come within `CAUSES_S`.
CONSEQUENCES = re.compile(r"Connection (reset|closed|refused)|Broken pipe|remote process exited|Socket closed", re.I)
CAUSES_S = 3.0
# What a rank says that has waited for another one, which may still be there.
WAITED = re.compile(r"time[d]?[- ]?out", re.I)


@dataclass
class _Member:
    """A rank that has joined."""

    joined: Joined
    what: str = "starting"
    end_s: float = math.inf


class Ranks:
    """The ranks of one command on this node; a context that ends them. Iterate once for their rows.

    `work` is a function of a module, and it and `arguments` are picklable. Rows of all ranks of this node come as
    they are made. `env`: beside this process's environment.
    """

    def __init__(
        self, work: Work, arguments: Any, *, ranks: int, nodes: Nodes = Nodes(), for_s: float,  # noqa: B008 - frozen
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._ranks, self._nodes, self._for_s = ranks, nodes, for_s
        self._end_s = time.monotonic() + for_s
        self._job = pickle.dumps(Job(work, arguments))
        self._env = _environment(env or {}, ranks)
        self._members: dict[Connection, _Member] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._joined: dict[int, Connection] = {}
        self._num_ended, self._is_told = 0, False
        self._folder = _folder()
        self._place = Path(self._folder.name)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._place / "rows"))
        self._server.listen(ranks)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def terminate(self) -> None:
        """SIGTERM for all ranks: work that looks at `told.is_told` may save what it has; rows go on.

        Safe in a signal handler, and in another thread.
        """
        self._is_told = True
        for member in list(self._members.values()):
            _signal(member.joined.pid, signal.SIGTERM)

    def close(self) -> None:
        """End what still runs."""
        for member in list(self._members.values()):
            _signal(member.joined.pid, signal.SIGKILL)
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for link in self._joined.values():
            link.close()
        self._server.close()
        self._folder.cleanup()

    def __iter__(self) -> Iterator[Any]:
        """Rows. Raises: ConfigError as a rank; EngineError when one fails or ends early, or for ranks that hang.

        Those are named for which the others wait, when not all have ended in time or `Doing` has taken too long.
        """
        failures: list[Failed] = []
        causes_end_s = math.inf
        while self._num_ended < self._ranks:
            now_s = time.monotonic()
            if failures and (now_s > causes_end_s or not self._members):
                raise EngineError(failures[0].message + self._away())
            self._check_time(now_s)
            ready = wait([self._server, *self._members], timeout=POLL_S)
            for link in ready:
                if link is self._server:
                    self._join()
                    continue
                assert isinstance(link, Connection)
                row = self._received(link)
                if isinstance(row, Failed):
                    if row.is_config or not CONSEQUENCES.search(row.message):
                        raise _error(row, self._away() if WAITED.search(row.message) else "")
                    failures.append(row)
                    causes_end_s = min(causes_end_s, now_s + CAUSES_S)
                elif row is not None:
                    yield row
            if not ready:
                self._check_processes()
        if self._nodes.count > 1:  # torchrun waits for the other nodes, whose ranks may still need its store
            with suppress(subprocess.TimeoutExpired):
                self._processes[0].wait(LEAVE_S)

    # ---- processes

    def _start(self) -> None:
        address = str(self._place / "rows")
        if self._nodes.count > 1:
            n = self._nodes
            torchrun = ["torch.distributed.run", "--nnodes", str(n.count), "--node-rank", str(n.number),
                        "--nproc-per-node", str(self._ranks), "--rdzv-backend", "static", "--rdzv-endpoint",
                        n.rendezvous, "--max-restarts", "0", "-m"]  # fmt: skip
            self._spawn([*torchrun, PROGRAM, address], {})
            return
        for number in range(self._ranks):
            who = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": self._ranks, "LOCAL_WORLD_SIZE": self._ranks}
            self._spawn(
                [PROGRAM, address],
                {name: str(value) for name, value in who.items()} | {STORE: str(self._place / "store")},
            )

    def _spawn(self, module: list[str], who: Mapping[str, str]) -> None:
        with (self._place / f"log-{len(self._processes)}").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *module],
                    env={**self._env, **who},
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _join(self) -> None:
        sock, _ = self._server.accept()
        link = Connection(sock.detach())
        try:
            joined = link.recv()
            link.send_bytes(self._job)
        except (EOFError, OSError):  # it has ended at once; `_check_processes` says how
            link.close()
            return
        self._members[link] = _Member(joined)
        self._joined[joined.number] = link
        if self._is_told:
            _signal(joined.pid, signal.SIGTERM)

    def _received(self, link: Connection) -> Any:
        """A row; None for what is none, and for an end. `Failed` also for a rank that is gone without a last word."""
        member = self._members[link]
        try:
            row = link.recv()
        except (EOFError, OSError):
            row = self._early_end(member.joined)
        if isinstance(row, Doing):
            member.what, member.end_s = row.what, time.monotonic() + (row.limit_s or math.inf)
            return None
        if isinstance(row, Ended | Failed):
            del self._members[link]  # open until it has ended: a rank whose link is closed has lost its parent
            if isinstance(row, Ended):
                self._num_ended += 1
                return None
        return row

    def _early_end(self, joined: Joined) -> Ended | Failed:
        """Of a rank that has joined; after `terminate`, ranks may end as they like."""
        if self._is_told:
            return Ended()
        if self._nodes.count > 1:
            return Failed(f"{joined} ended without a message{self._said(0)}")
        return Failed(self._exit(joined.number, self._processes[joined.number].wait(10)))

    def _check_processes(self) -> None:
        """Raises: EngineError for one that ended before it joined."""
        for number, process in enumerate(self._processes):
            status = process.poll()
            if status and (self._nodes.count > 1 or number not in self._joined):
                raise EngineError(self._exit(number, status))

    def _exit(self, number: int, status: int) -> str:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        who = "torchrun" if self._nodes.count > 1 else f"rank {number} of {self._ranks}"
        return f"{who} {how} without a message{self._said(number)}"

    def _said(self, number: int) -> str:
        """The last line that a process has printed."""
        text = (self._place / f"log-{number}").read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return f"; its last line: {lines[-1].strip()[:300]}" if lines else ""

    # ---- ranks that hang

    def _check_time(self, now_s: float) -> None:
        if now_s > self._end_s:
            raise EngineError(self._not_ended(f"had not ended after {self._for_s:.0f} s"))
        if late := [m for m in list(self._members.values()) if now_s > m.end_s]:
            raise EngineError(self._not_ended(f"made no progress: {late[0].what} takes too long"))

    def _away(self) -> str:
        """What the ranks do that wait for nobody, when one has failed that has waited for them."""
        away = [a for a in self._look() if a.state in ("elsewhere", "stopped", "gone")]
        return f"; meanwhile {', '.join(map(str, away[:3]))}" if away else ""

    def _look(self) -> list[stacks.Activity]:
        joined = sorted((member.joined for member in self._members.values()), key=lambda one: one.number)
        address = str(self._place / "rows")
        return stacks.look([(one.number, one.pid, stack_path(address, one.number)) for one in joined], wait_s=STACKS_S)

    def _not_ended(self, how: str) -> str:
        """Who has not ended, by what the stacks of the ranks say."""
        missing = self._ranks - self._num_ended
        text = f"{missing} of {self._ranks} ranks {how}"
        if len(self._members) < missing:
            return f"{text}, and {missing - len(self._members)} had not joined"
        verdict = stacks.judge(self._look())
        report = None if verdict.ranks else ras.ask(self._env, timeout_s=2 * STACKS_S)
        told = "; NCCL reports " + "; ".join(map(str, report.problems[:2])) if report and report.problems else ""
        doing = "; ".join(sorted({m.what for m in self._members.values()}))
        return f"{text} ({doing}): {verdict.reason}{told}"


def run(
    work: Work, arguments: Any, *, ranks: int = 1, nodes: Nodes = Nodes(), for_s: float,  # noqa: B008 - frozen
    env: Mapping[str, str] | None = None,
) -> Iterator[Any]:  # fmt: skip
    """The rows of all ranks of this node. Raises: as iterating `Ranks`."""
    with Ranks(work, arguments, ranks=ranks, nodes=nodes, for_s=for_s, env=env) as started:
        yield from started


def _environment(env: Mapping[str, str], ranks: int) -> dict[str, str]:
    """Of a rank: what can be imported here can be there. A program's own threads are for it to choose; without

    these, each rank takes all cores, and threads that spin take them from other ranks.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks // 2)
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        **env,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _folder() -> "tempfile.TemporaryDirectory[str]":
    """For the socket and the logs, only for this user; under /tmp where the usual place has too long a path."""
    place = tempfile.gettempdir()
    short = place if len(place) < MAX_SOCKET_PATH - 30 else "/tmp"
    return tempfile.TemporaryDirectory(prefix="kervan-ranks-", dir=short, ignore_cleanup_errors=True)


def _error(failed: Failed, beside: str) -> EngineError | ConfigError:
    return ConfigError(failed.message) if failed.is_config else EngineError(failed.message + beside)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
