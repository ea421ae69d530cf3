"""A process beside this one that is told by a control line what to be: how it is started, and how it has ended."""

import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kervan.fleet import log_causes, warm_start
from kervan.fleet.control import ControlEnd
from kervan.fleet.log_files import open_log
from kervan.fleet.warm_start import ForkedProcess, WarmStartError

WARM_PROCESS = "kervan.fleet.vllm.warm_process"
Child = subprocess.Popen[bytes] | ForkedProcess


def spawn(program: str, *, env: Mapping[str, str], log_path: Path) -> tuple[Child, ControlEnd]:
    """`python -m program FD` in a session of its own; FD is its end of the control line, of which this end comes back.

    `env` is its whole environment. Raises: OSError when it cannot be started.
    """
    ours, theirs = socket.socketpair()
    with open_log(log_path) as log, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", program, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=env,
        )
    return process, ControlEnd(ours)


def fork_or_spawn(
    program: str, *, env: Mapping[str, str], log_path: Path, owner_pid: int, hints: Sequence[str] = ()
) -> tuple[Child, ControlEnd]:
    """As `spawn`, but forked from this node's fork server if it can be (`warm_start.fork`); else the log says why not.

    Blocks while the server imports. Raises: OSError when it cannot be started either way.
    """
    ours, theirs = socket.socketpair()
    with open_log(log_path) as log, theirs:
        try:
            process = warm_start.fork(
                WARM_PROCESS, program, env=env, control=theirs, log_fd=log.fileno(), hints=hints, owner_pid=owner_pid
            )
        except WarmStartError as error:
            ours.close()  # should there be a process all the same, it ends by this
            log.write(f"starts anew: {error}\n".encode())
        else:
            return process, ControlEnd(ours)
    return spawn(program, env=env, log_path=log_path)


def post_mortem(status: int | None, log_path: Path) -> str:
    """How a process ended, and the last error, or else the last line, in its log. `status`: as of `Child.wait`."""
    if status is None:
        how = "an exit status that nobody knows, as the process that forked it ended too"
    else:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    if status == -signal.SIGKILL:
        how += " (killed; when the machine was out of memory, by its kernel)"
    log = log_causes.tail(log_path)
    if found := log_causes.causes(log):
        return f"{how}; its last error: {found[-1]}"
    last = [line for line in log.splitlines() if line.strip()][-1:]
    return f"{how}; its last line: {' '.join(last)[:300]}"
