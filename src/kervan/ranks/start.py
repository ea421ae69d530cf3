"""Starts the ranks of this node and gives back what they report, row by row.

A child runs torch's elastic agent (`kervan.ranks.agent`), which forks the ranks: torch is imported once, and never
here. Each rank connects to a Unix socket of ours. A rank that hangs is ended, and ranks end when this process does.
"""

import os
import pickle
import re
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


@dataclass(frozen=True, slots=True)
class Hello:
    """The first row of a rank."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"rank {self.number} of {self.of}"


@dataclass(frozen=True, slots=True)
class Ended:
    """The last row of a rank whose work is done; made here for one that is gone without."""

    has_finished: bool = True


def _received(link: Connection) -> Any:
    try:
        return link.recv()
    except (EOFError, OSError):
        return Ended(has_finished=False)


# What a rank says when another one is gone: that one's words are the cause.
CONSEQUENCES = re.compile(r"Connection (reset|closed|refused)|Broken pipe|remote process exited|Socket closed", re.I)
CAUSES_S = 3.0


def _error(failures: list[Failed]) -> EngineError | ConfigError:
    """Of the failure that is no consequence of another one, if one is not."""
    cause = next((one for one in failures if not CONSEQUENCES.search(one.message)), failures[0])
    return (ConfigError if cause.is_config else EngineError)(cause.message)


class Ranks:
    """The ranks of one command on this node; a context that ends them. Iterate for their rows.

    `work` is a function of a module, and it and `arguments` are picklable. Rows of all ranks of this node come as
    they are made.
    """

    def __init__(self, work: Work, arguments: Any, *, ranks: int, nodes: Nodes = Nodes(), for_s: float) -> None:
        self._ranks, self._for_s, self._is_told = ranks, for_s, False
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
        self._is_told = True
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
        links: dict[Connection, Hello | None] = {}
        done, failures, first_failure_s = 0, list[Failed](), 0.0
        while done < self._ranks:
            now_s = time.monotonic()
            if failures and (now_s > first_failure_s + CAUSES_S or not links):
                raise _error(failures)
            if now_s > self._end_s:
                raise EngineError(
                    f"{self._ranks - done} of {self._ranks} ranks had not ended after {self._for_s:.0f} s; a rank that "
                    "waits for another one shows so: look whether one was ended by something else"
                )
            ready = wait([waiting, *links], timeout=0.2)
            if not ready and not links and self._agent.poll() is not None:
                raise EngineError(f"the launcher ended with status {self._agent.returncode}: {self._said()}")
            for link in ready:
                if link is waiting:
                    links[self._listener.accept()] = None
                    continue
                assert isinstance(link, Connection)
                row = _received(link)
                if isinstance(row, Hello):
                    links[link] = row
                elif isinstance(row, Failed | Ended):
                    who = links.pop(link)
                    if isinstance(row, Failed):
                        failures.append(row)
                    elif row.has_finished or self._is_told:
                        done += 1
                    else:
                        failures.append(Failed(f"{who or 'a rank'} ended with no message: {self._said()}"))
                    first_failure_s = first_failure_s or (now_s if failures else 0.0)
                else:
                    yield row

    def _said(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-LOG_LINES:])[-600:] or "it printed nothing"


def run(work: Work, arguments: Any, *, ranks: int = 1, nodes: Nodes = Nodes(), for_s: float) -> Iterator[Any]:
    """The rows of all ranks of this node. Raises: as iterating `Ranks`."""
    with Ranks(work, arguments, ranks=ranks, nodes=nodes, for_s=for_s) as started:
        yield from started
