"""A process that has imported once what its children need, and is forked for each of them.

It has one thread and no device when it forks, or it refuses. A child gets its own environment, working directory,
output, session and control line; everything else that a process inherits is the same for all (`warm_start.identity`).

    client                                   server
      | connect, 3 descriptors ------------------>|  the request as a file, the control line, the log
      | <----------------------------- {"pid": N} |  or {"error": why}, and the connection is closed
      | <-------------------------- {"status": N} |  when the child has ended; it stays a zombie until the client
      | close ----------------------------------->|  is gone, so that nobody else gets its number

It ends when nobody has needed it for `linger_s`, and at once when no child and none of the processes is left for which
it has been started (`ForkRequest.owner_pid`; for Ray, the node's raylet).
"""

import contextlib
import fcntl
import gc
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from kervan import logs

logger = logging.getLogger(__name__)

POLL_S = 1.0
REQUEST_TIMEOUT_S = 5.0
NUM_DESCRIPTORS = 3
THREADS = Path("/proc/self/task")


class ForkRequest(msgspec.Struct, frozen=True):
    """What a client asks for. `asked_s`: `time.time()` then; `hints`: what else `program` needs imported before."""

    program: str
    env: dict[str, str]
    cwd: str
    owner_pid: int
    asked_s: float
    hints: list[str]


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: the child's `pid`, or the `error` that there is none; later its exit `status`, as Popen has it."""

    pid: int | None = None
    status: int | None = None
    error: str = ""


Prepare = Callable[[str, Sequence[str]], Callable[[], None] | None]
Run = Callable[[str, int, float], Any]


class NotForkableError(Exception):
    """The process has threads or a device that its children would not have."""


class ForkServer:
    """Forks `run(program, control_fd, asked_s)` for each client of `listener`.

    `prepare(program, hints)` imports, before each fork; what it returns, if anything, is called when no client waits
    any more: imports that the next child of this kind will not have to make. `harmless_threads`: see `check_forkable`.
    `may_end` is asked before it ends unneeded: a client may be on its way.
    """

    def __init__(
        self,
        listener: socket.socket,
        prepare: Prepare,
        run: Run,
        *,
        linger_s: float,
        harmless_threads: Sequence[str] = (),
        may_end: Callable[[], bool] = lambda: True,
    ):
        self._listener = listener
        self._prepare = prepare
        self._run = run
        self._linger_s = linger_s
        self._harmless_threads = harmless_threads
        self._may_end = may_end
        self._selector = selectors.DefaultSelector()
        self._owners: dict[int, int] = {}  # pid -> pidfd
        self._clients: dict[socket.socket, int] = {}  # connection -> pid of its child
        self._children: dict[int, int] = {}  # pid -> pidfd, until it is reaped
        self._postponed: list[Callable[[], None]] = []
        self._idle_since_s = time.monotonic()

    def serve(self) -> None:
        """Until nobody needs it. Raises: NotForkableError."""
        check_forkable(self._harmless_threads)
        gc.collect()
        gc.freeze()  # or each child's first collection would copy all pages
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        while self._is_needed() or not self._may_end():
            ready = self._selector.select(0.0 if self._postponed else POLL_S)
            for key, _ in ready:
                key.data()
            if not ready and self._postponed:
                self._postponed.pop(0)()
                check_forkable(self._harmless_threads)

    def _is_needed(self) -> bool:
        now_s = time.monotonic()
        if self._clients or self._children:
            self._idle_since_s = now_s
            return True
        for pid in [pid for pid, pidfd in self._owners.items() if has_ended(pidfd)]:
            os.close(self._owners.pop(pid))
            if not self._owners:
                return False
        return now_s - self._idle_since_s < self._linger_s

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(REQUEST_TIMEOUT_S)
        descriptors: list[int] = []
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, 1, NUM_DESCRIPTORS)
            if not message or len(descriptors) != NUM_DESCRIPTORS:
                connection.close()  # it only looked whether anybody is here
                return
            with os.fdopen(os.dup(descriptors[0]), "rb") as file:
                file.seek(0)
                request = msgspec.json.decode(file.read(), type=ForkRequest)
            self._follow_owner(request.owner_pid)
            if (later := self._prepare(request.program, request.hints)) is not None:
                self._postponed.append(later)
            check_forkable(self._harmless_threads)
            pid = self._fork(request, connection, *descriptors)
        except (OSError, msgspec.DecodeError) as error:
            _reply(connection, Reply(error=f"the request cannot be read: {error}"))
            connection.close()
        else:
            self._follow(connection, pid)
            _reply(connection, Reply(pid=pid))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _follow_owner(self, pid: int) -> None:
        if pid not in self._owners:
            self._owners[pid] = os.pidfd_open(pid)

    def _follow(self, connection: socket.socket, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._clients[connection] = pid
        self._children[pid] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._child_ended(connection, pid))
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._client_left(connection))

    def _child_ended(self, connection: socket.socket, pid: int) -> None:
        pidfd = self._children[pid]
        self._selector.unregister(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        assert result is not None
        if connection in self._clients:
            is_exit = result.si_code == os.CLD_EXITED
            _reply(connection, Reply(status=result.si_status if is_exit else -result.si_status))
        else:
            self._reap(pid)

    def _client_left(self, connection: socket.socket) -> None:
        pid = self._clients.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        if has_ended(self._children[pid]):
            with contextlib.suppress(KeyError):  # its end may have been seen already
                self._selector.unregister(self._children[pid])
            self._reap(pid)

    def _reap(self, pid: int) -> None:
        os.close(self._children.pop(pid))
        os.waitpid(pid, 0)

    def _fork(self, request: ForkRequest, connection: socket.socket, file: int, control: int, log: int) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        is_leader, leads = os.pipe()
        pid = os.fork()
        if pid == 0:
            for descriptor in (file, is_leader):
                os.close(descriptor)
            connection.close()
            self._become_child(request, control, log, leads)
        os.close(leads)
        os.read(is_leader, 1)  # who is told its number may signal its group at once
        os.close(is_leader)
        return pid

    def _become_child(self, request: ForkRequest, control: int, log: int, leads: int) -> NoReturn:
        status = 1
        try:
            os.setsid()
            os.close(leads)
            for descriptor in (*self._owners.values(), *self._children.values()):
                os.close(descriptor)
            for connection in self._clients:
                connection.close()
            self._selector.close()
            self._listener.close()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            os.environ.clear()
            os.environ.update(request.env)
            os.chdir(request.cwd)
            status = self._run(request.program, control, request.asked_s) or 0
        except BaseException:
            logger.exception("a forked process failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def check_forkable(harmless_threads: Sequence[str] = ()) -> None:
    """Raises: NotForkableError when a fork of this process would lose a thread.

    `harmless_threads`: beginnings of the names of those that a child can do without.
    """
    # OpenBLAS ends its threads when their process forks and starts them again when it computes.
    if len(_threads()) > 1:
        in_a_fork(lambda: True)
    others = [name for name in _threads()[1:] if not name.startswith(tuple(harmless_threads))]
    if others:
        raise NotForkableError(
            f"{len(others) + 1} threads run after the imports ({', '.join(others)}), and a fork has one"
        )


def in_a_fork(check: Callable[[], bool]) -> bool:
    """What `check` says in a child of this process that does nothing else."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _threads() -> list[str]:
    """Names of this process's threads, the first one's first."""
    return [(task / "comm").read_text().strip() for task in sorted(THREADS.iterdir(), key=lambda task: int(task.name))]


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, reaped or not."""
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        return bool(selector.select(0))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time: clients connect, and a server ends, with its lock held."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reply(connection: socket.socket, reply: Reply) -> None:
    with contextlib.suppress(OSError):  # a client that has left needs no reply
        connection.sendall(msgspec.json.encode(reply) + b"\n")


@contextlib.contextmanager
def _ending_with(pid: int) -> Iterator[None]:
    """End this process when that one has ended; looked at by a timer, as a thread would be in the way of a fork."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(0)

    def look(*_: object) -> None:
        if has_ended(pidfd):
            os._exit(0)

    signal.signal(signal.SIGALRM, look)
    signal.siginterrupt(signal.SIGALRM, False)  # system calls of the libraries that are imported go on
    signal.setitimer(signal.ITIMER_REAL, POLL_S, POLL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.close(pidfd)


def main(
    prepare: Prepare,
    run: Run,
    *,
    linger_s: float,
    harmless_threads: Sequence[str] = (),
) -> NoReturn:
    """`FD PLACE PID`: prepare for no program yet, then serve on the listening socket FD. PLACE: see `warm_start`.

    PID: the process for which it is started. When that ends during the imports, this one ends too.
    """
    logs.configure(level=logging.INFO)
    if os.fork():  # nobody's child: who started it may end before it, and take its children along
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener, place = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])

    def may_end() -> bool:
        with locked(place.with_suffix(".lock")):
            with selectors.DefaultSelector() as selector:
                selector.register(listener, selectors.EVENT_READ)
                if selector.select(0):
                    return False
            place.with_suffix(".sock").unlink(missing_ok=True)
        return True

    status = 0
    try:
        with _ending_with(int(sys.argv[3])):
            prepare("", ())
        server = ForkServer(
            listener, prepare, run, linger_s=linger_s, harmless_threads=harmless_threads, may_end=may_end
        )
        server.serve()
    except NotForkableError as error:
        logger.warning("nothing can be forked: %s", error)
        place.with_suffix(".refused").write_text(str(error))  # the next ones need not wait to hear it
        status = 3
    os._exit(status)
