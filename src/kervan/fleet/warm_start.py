"""Starts engines and gateways as forks of a process of this node that has vLLM imported already (`fork_server`).

That process is found by a Unix socket named after its identity: all that a child inherits from it. A child that
differs in any of that gets another one. The first child on a node starts it and waits for its imports, which it would
have made itself; those after it wait for nothing.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from kervan.errors import EngineError
from kervan.fleet.fork_server import ForkRequest, Reply, locked

# Imports take 5 to 20 s; on a machine so busy that they take this long, its children start without it.
START_TIMEOUT_S = 180.0
# What may differ between children of one server: they read it after the fork.
PER_CHILD = frozenset({"CUDA_VISIBLE_DEVICES", "KERVAN_HOME", "VLLM_RPC_BASE_PATH"})
PER_CHILD_PREFIXES = ("RAY_", "KERVAN_NOTICES_")
MAX_SOCKET_PATH = 107  # bytes of a Unix socket's address on Linux, less its end
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


class WarmStartError(EngineError):
    """No process could be forked; the message says why."""


class ForkedProcess:
    """A child of the fork server, with what `subprocess.Popen` offers of a child: `pid` and `wait`."""

    def __init__(self, pid: int, connection: socket.socket):
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._connection = connection

    def wait(self) -> int | None:
        """Wait for its end: the exit status, negative for a signal; None when the server ended before it.

        Its number is not given to another process until this returns.
        """
        line = _read_line(self._connection)
        with selectors.DefaultSelector() as selector:  # without a server, for the child itself
            selector.register(self._pidfd, selectors.EVENT_READ)
            selector.select()
        os.close(self._pidfd)
        self._connection.close()
        return msgspec.json.decode(line, type=Reply).status if line else None


def fork(
    module: str,
    program: str,
    *,
    env: Mapping[str, str],
    control: socket.socket,
    log_fd: int,
    hints: Sequence[str] = (),
    owner_pid: int | None = None,
) -> ForkedProcess:
    """`program`, forked from the server `module` of this node, which is started where there is none.

    `env` is its whole environment, `control` its end of the control line, `log_fd` where it writes. `hints`: what the
    server had better import before. `owner_pid`: the process for which the server stays (None: this one).
    Blocks while the server imports. Raises: WarmStartError when none can be forked.
    """
    request = ForkRequest(program, dict(env), str(Path.cwd()), owner_pid or os.getpid(), time.time(), list(hints))
    try:
        connection = _connect(module, env, request.owner_pid)
        with tempfile.TemporaryFile() as file:
            file.write(msgspec.json.encode(request))
            file.flush()
            connection.settimeout(START_TIMEOUT_S)
            socket.send_fds(connection, [b"?"], [file.fileno(), control.fileno(), log_fd])
            line = _read_line(connection)
        connection.settimeout(None)
    except OSError as error:
        raise WarmStartError(f"the fork server cannot be reached: {error}") from error
    if not line:
        raise WarmStartError(_ended(_place(module, env)))
    reply = msgspec.json.decode(line, type=Reply)
    if reply.pid is None:
        raise WarmStartError(reply.error)
    return ForkedProcess(reply.pid, connection)


def identity(module: str, env: Mapping[str, str]) -> str:
    """Names what a child inherits from its server: environment, limits, priority, cores, namespaces, code."""
    shared = {
        name: value for name, value in env.items() if name not in PER_CHILD and not name.startswith(PER_CHILD_PREFIXES)
    }
    limits = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
    inherited = [
        module,
        sys.executable,
        sorted(shared.items()),
        [resource.getrlimit(getattr(resource, name)) for name in limits],
        os.getpriority(os.PRIO_PROCESS, 0),
        sorted(os.sched_getaffinity(0)),
        Path("/proc/self/cgroup").read_text(),
        [str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMESPACES],
        _code(),
    ]
    return hashlib.sha256(json.dumps(inherited).encode()).hexdigest()[:16]


@functools.cache
def _code() -> list[tuple[str, int, int]]:
    """Files whose change makes another program: kervan's, and vLLM's first."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    if (vllm := importlib.util.find_spec("vllm")) is not None and vllm.origin:
        files.append(Path(vllm.origin))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]


def _place(module: str, env: Mapping[str, str]) -> Path:
    """Where the server's socket, lock and log are, without their endings.

    Raises: WarmStartError when others may write there.
    """
    directory = Path(tempfile.gettempdir()) / f"kervan-warm-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o77:
        raise WarmStartError(f"{directory} is not this user's alone: chmod 700, or remove it")
    return directory / identity(module, env)


def _connect(module: str, env: Mapping[str, str], owner_pid: int) -> socket.socket:
    place = _place(module, env)
    path = place.with_suffix(".sock")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise WarmStartError(f"{path} has more than the {MAX_SOCKET_PATH} bytes of a socket's address; set TMPDIR")
    if place.with_suffix(".refused").exists():
        raise WarmStartError(_ended(place))
    with locked(place.with_suffix(".lock")):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            _start(module, env, place, owner_pid)
            try:
                connection.connect(str(path))
            except ConnectionRefusedError:
                raise WarmStartError(_ended(place)) from None
        return connection


def _start(module: str, env: Mapping[str, str], place: Path, owner_pid: int) -> None:
    """Start a server that listens already when this returns; it takes connections when it has imported."""
    path = place.with_suffix(".sock")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, place.with_suffix(".log").open("w") as log:
        listener.bind(str(path))
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(listener.fileno()), str(place), str(owner_pid)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            env={name: value for name, value in env.items() if name not in PER_CHILD},
        )
    process.wait()  # it leaves a process behind at once: `fork_server.main`


def _ended(place: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return place.with_suffix(".refused").read_text()
    return f"the fork server ended; see {place.with_suffix('.log')}"


def _read_line(connection: socket.socket) -> bytes:
    """The line that comes; empty when the other end is gone. Replies are one line each, so nothing follows it."""
    line = b""
    with contextlib.suppress(ConnectionError):
        while not line.endswith(b"\n") and (piece := connection.recv(4096)):
            line += piece
    return line if line.endswith(b"\n") else b""
