"""Work in processes of its own, one a rank, whose rows come back as they are made.

A GPU that such a process used is free again when it has ended, and one that hangs can be ended. The ranks of one node
are started here; those of several by torchrun on each node, whose rendezvous they share.
"""

import contextlib
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from kervan.comm import ras, stacks
from kervan.errors import EngineError

POLL_S = 0.2
STACKS_S = 1.0
LEAVE_S = 20.0
MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107
PROGRAM = "kervan.comm.rank_process"


@dataclass(frozen=True, slots=True)
class Rank:
    """Who a process is: its number among all, and among those of its node.

    `store`: a file, new for this group, by which its ranks find each other; empty: by torchrun's environment.
    """

    number: int
    of: int
    local: int = 0
    store: str = ""


# Called in the process of a rank with what it is to do; `keep` sends a row back.
Work = Callable[[Rank, Any, Callable[[Any], None]], None]


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes that ranks run on, in torchrun's words. `rendezvous`: HOST:PORT of node 0, the same on all."""

    count: int = 1
    number: int = 0
    rendezvous: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank gets to do."""

    work: Work
    arguments: Any


@dataclass(frozen=True, slots=True)
class Joined:
    """The first word of a rank."""

    number: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Doing:
    """What a rank does from now on, for the message when it does not end; it is no row.

    `limit_s`: how long it may take; None: until the time of all is over.
    """

    what: str
    limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word of a rank that failed."""

    message: str


def stack_path(address: str, number: int) -> Path:
    """Where a rank writes its stack when it is sent SIGUSR2."""
    return Path(address).with_name(f"stack-{number}")


def run(
    work: Work,
    arguments: Any,
    *,
    ranks: int = 1,
    for_s: float,
    nodes: Nodes = Nodes(),
    env: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """The rows of all ranks of this node, `ranks` of them. `work` is a function of a module; all is picklable.

    `env`: beside this process's environment. Raises: EngineError when a rank fails or ends early, or when not all have
    ended after `for_s`: then the ranks that the others wait for are named.
    """
    with _folder() as folder:
        group = _Group(folder, ranks, nodes, {**os.environ, **(env or {})}, Job(work, arguments))
        try:
            group.start()
            yield from group.rows(for_s)
        finally:
            group.end()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For the socket and the logs, only for this user; under /tmp where the usual place has too long a path."""
    place = tempfile.gettempdir()
    short = place if len(place) < MAX_SOCKET_PATH - 30 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="kervan-ranks-", dir=short, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass
class _Member:
    """A rank that has joined."""

    joined: Joined
    link: Connection
    what: str = "starting"
    end_s: float = math.inf


@dataclass
class _Group:
    folder: Path
    ranks: int
    nodes: Nodes
    env: dict[str, str]
    job: Job
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    members: dict[Connection, _Member] = field(default_factory=dict)
    failed_pids: list[int] = field(default_factory=list)
    num_ended: int = 0

    def start(self) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        address = str(self.folder / "rows")
        self.server.bind(address)
        self.server.listen(self.ranks)
        if self.nodes.count > 1:
            n = self.nodes
            arguments = ["torch.distributed.run", "--nnodes", str(n.count), "--node-rank", str(n.number),
                         "--nproc-per-node", str(self.ranks), "--rdzv-backend", "static", "--rdzv-endpoint",
                         n.rendezvous, "--max-restarts", "0", "-m"]  # fmt: skip
            self._spawn([*arguments, PROGRAM, address], {})
            return
        for number in range(self.ranks):
            who = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            self._spawn(
                [PROGRAM, address],
                {name: str(value) for name, value in who.items()} | {"KERVAN_RANK_STORE": str(self.folder / "store")},
            )

    def _spawn(self, module: list[str], who: Mapping[str, str]) -> None:
        with (self.folder / f"log-{len(self.processes)}").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *module],
                    env={**self.env, **who},
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def rows(self, for_s: float) -> Iterator[Any]:
        end_s = time.monotonic() + for_s
        while self.num_ended < self.ranks:
            if (now_s := time.monotonic()) > end_s:
                raise EngineError(self._not_ended(f"had not ended after {for_s:.0f} s"))
            if late := [m for m in self.members.values() if now_s > m.end_s]:
                raise EngineError(self._not_ended(f"made no progress: {late[0].what} takes too long"))
            ready = wait([self.server, *self.members], timeout=POLL_S)
            if self.server in ready:
                self._join()
            for link in ready:
                if link in self.members:
                    yield from self._row(link)
            if not ready:
                self._check_processes()
        if self.nodes.count > 1:  # torchrun waits for the other nodes, whose ranks may still need its store
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[0].wait(LEAVE_S)

    def _join(self) -> None:
        sock, _ = self.server.accept()
        link = Connection(sock.detach())
        joined = link.recv()
        self.members[link] = _Member(joined, link)
        link.send(sys.path)
        link.send_bytes(pickle.dumps(self.job))

    def _row(self, link: Connection) -> Iterator[Any]:
        try:
            row = link.recv()
        except (EOFError, ConnectionResetError):  # the rank has ended
            member = self.members.pop(link)
            self.num_ended += 1
            if self.nodes.count == 1:
                process = self.processes[member.joined.number]
                status = process.wait(10)
                if status:
                    raise EngineError(self._early_end(member.joined.number, status)) from None
            return
        if isinstance(row, Failed):
            raise EngineError(row.message + self._others(self.members.pop(link)))
        if isinstance(row, Doing):
            member = self.members[link]
            member.what, member.end_s = row.what, time.monotonic() + (row.limit_s or math.inf)
        else:
            yield row

    def _check_processes(self) -> None:
        """Raises: EngineError for one that ended before it joined."""
        joined = {member.joined.number for member in self.members.values()}
        for number, process in enumerate(self.processes):
            status = process.poll()
            if status and (self.nodes.count > 1 or number not in joined):
                raise EngineError(self._early_end(number, status))

    def _early_end(self, number: int, status: int) -> str:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        who = "torchrun" if self.nodes.count > 1 else f"rank {number} of {self.ranks}"
        lines = [line for line in self.log(number).splitlines() if line.strip()]
        return f"{who} {how} without a message" + (f"; its last line: {lines[-1].strip()[:300]}" if lines else "")

    def log(self, number: int) -> str:
        """What a process has printed."""
        return (self.folder / f"log-{number}").read_text(errors="replace")

    def _others(self, failed: _Member) -> str:
        """What the ranks do that wait for nobody, when one has failed: a rank that gives up has waited for such a one.

        The one that failed may still be there, and is ended with the others.
        """
        self.failed_pids.append(failed.joined.pid)
        failed.link.close()
        away = [a for a in self._look() if a.state in ("elsewhere", "stopped", "gone")]
        return f"; meanwhile {', '.join(map(str, away[:3]))}" if away else ""

    def _look(self) -> list[stacks.Activity]:
        members = sorted(self.members.values(), key=lambda member: member.joined.number)
        address = str(self.folder / "rows")
        return stacks.look(
            [(m.joined.number, m.joined.pid, stack_path(address, m.joined.number)) for m in members], wait_s=STACKS_S
        )

    def _not_ended(self, how: str) -> str:
        """Who has not ended, by what the stacks of the ranks say."""
        missing = self.ranks - self.num_ended
        text = f"{missing} of {self.ranks} ranks {how}"
        if self.num_ended + len(self.members) < self.ranks:
            return f"{text}, and {missing - len(self.members)} had not joined"
        verdict = stacks.judge(self._look())
        report = None if verdict.ranks else ras.ask(self.env, timeout_s=2 * STACKS_S)
        told = "; NCCL reports " + "; ".join(map(str, report.problems[:2])) if report and report.problems else ""
        doing = "; ".join(sorted({m.what for m in self.members.values()}))
        return f"{text} ({doing}): {verdict.reason}{told}"

    def end(self) -> None:
        for pid in [*self.failed_pids, *(member.joined.pid for member in self.members.values())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for link in self.members:
            link.close()
        self.server.close()
