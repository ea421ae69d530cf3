"""Starts the ranks of this node and gives back what they report, row by row.

A child runs torch's elastic agent (`kervan.ranks.agent`), which forks the ranks: torch is imported once, and never
here. Each rank connects to a Unix socket of ours. A rank that hangs is ended, and ranks end when this process does.
"""

import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError, EngineError

CLOSE_S = 40.0  # the agent gives ranks 30 s to end after SIGTERM
LOG_LINES = 3


@dataclass(frozen=True, slots=True)
class Nodes:
    """The hosts that take part, each with its own command: how many, which one this is, and where they meet.

    `rendezvous`: HOST:PORT of node 0, as torchrun's `--rdzv-endpoint`; not needed for one node.
    """

    count: int = 1
    number: int = 0
    rendezvous: str = ""

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not 0 <= self.number < self.count:
            raise ConfigError(
                f"--node-rank {self.number} is not below --nodes {self.count}; number the nodes from 0 to "
                f"{self.count - 1}"
            )
        host, _, port = self.rendezvous.rpartition(":")
        if self.count > 1 and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--nodes {self.count} needs --rendezvous HOST:PORT, a free port of node 0 that all nodes reach, and "
                f"was given {self.rendezvous!r}; write for example --rendezvous 10.0.0.1:29500"
            )


@dataclass(frozen=True, slots=True)
class Rank:
    """Who a process is: its number of all, and its number on its node (the GPU that it takes)."""

    number: int
    of: int
    local: int
    local_of: int


Keep = Callable[[Any], None]
# Called in the process of a rank. Environment variables are set as by torchrun; `keep` sends a row back.
Work = Callable[[Rank, Any, Keep], None]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last row of a rank that raised. `is_config`: what was asked for is wrong."""

    message: str
    is_config: bool = False


class Ranks:
    """The ranks of one command on this node; a context that ends them. Iterate for their rows.

    `work` is a function of a module, and it and `arguments` are picklable. Rows of all ranks of this node come as
    they are made.
    """

    def __init__(self, work: Work, arguments: Any, *, ranks: int, nodes: Nodes = Nodes(), for_s: float) -> None:
        self._ranks, self._for_s = ranks, for_s
        self._end_s = time.monotonic() + for_s
        self._folder = tempfile.TemporaryDirectory(prefix="kervan-ranks-")
        place = Path(self._folder.name)
        self._log = place / "log"
        key = secrets.token_bytes(16)
        self._listener = Listener(str(place / "rows"), family="AF_UNIX", authkey=key, backlog=max(ranks, 1))
        environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(place / "error.json")}
        with self._log.open("wb") as log:
            self._agent = subprocess.Popen(
                [sys.executable, "-m", "kervan.ranks.agent"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )  # fmt: skip
        assert self._agent.stdin is not None
        with suppress(BrokenPipeError):  # its end is noticed below
            pickle.dump((work, arguments, str(place / "rows"), key, ranks, nodes), self._agent.stdin)
            self._agent.stdin.flush()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def terminate(self) -> None:
        """SIGTERM for all ranks, which may save what they have; their rows go on. Safe in a signal handler."""
        with suppress(ProcessLookupError):
            self._agent.terminate()

    def close(self) -> None:
        """End what still runs."""
        if self._agent.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._agent.pid, signal.SIGKILL)
        self._agent.wait()
        assert self._agent.stdin is not None
        with suppress(BrokenPipeError):
            self._agent.stdin.close()
        self._listener.close()
        self._folder.cleanup()

    def __iter__(self) -> Iterator[Any]:
        """Rows. Raises: EngineError when a rank fails, ends early or has not ended in time; ConfigError as a rank."""
        waiting = self._listener._listener._socket  # type: ignore[attr-defined]  # a listener cannot be waited for
        links: list[Connection] = []
        ended = 0
        while ended < self._ranks:
            if time.monotonic() > self._end_s:
                raise EngineError(
                    f"{self._ranks - ended} of {self._ranks} ranks had not ended after {self._for_s:.0f} s; a "
                    "rank that "
                    "waits for another one shows so: look whether one was ended by something else"
                )
            ready = wait([waiting, *links], timeout=0.5)
            if not ready and self._agent.poll() is not None:
                break
            for link in ready:
                if link is waiting:
                    links.append(self._listener.accept())
                    continue
                assert isinstance(link, Connection)
                try:
                    row = link.recv()
                except EOFError:
                    links.remove(link)
                    ended += 1
                    continue
                if isinstance(row, Failed):
                    raise (ConfigError if row.is_config else EngineError)(row.message)
                yield row
        try:
            status = self._agent.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            raise EngineError(f"the launcher of the ranks had not ended {CLOSE_S:.0f} s after them") from None
        if status and not self._was_terminated(status):
            raise EngineError(f"a rank ended with no message, and the launcher with status {status}: {self._said()}")

    def _was_terminated(self, status: int) -> bool:
        return status in (-signal.SIGTERM, 128 + signal.SIGTERM)

    def _said(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-LOG_LINES:])[-600:] or "it printed nothing"


def run(work: Work, arguments: Any, *, ranks: int = 1, nodes: Nodes = Nodes(), for_s: float) -> Iterator[Any]:
    """The rows of all ranks of this node. Raises: as iterating `Ranks`."""
    with Ranks(work, arguments, ranks=ranks, nodes=nodes, for_s=for_s) as started:
        yield from started
