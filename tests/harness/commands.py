"""Runs `kervan` commands for the tests, as forks of `command_server.py`: with less than half of the CPU."""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

SERVER = Path(__file__).with_name("command_server.py")
LEAVE_S = 20.0

_lock = threading.Lock()
_server: "_Server | None" = None


class _Server:
    """The process, and the socket on which it is asked."""

    def __init__(self, env: Mapping[str, str], cwd: Path):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", SERVER, str(theirs.fileno())],
                env=env, cwd=cwd, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip


def run(args: list[str], env: Mapping[str, str], cwd: Path, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """`python -m kervan args`, ended; as `subprocess.run` with pipes.

    Raises: TimeoutExpired, when the command has been killed; RuntimeError, when the server is gone.
    """
    global _server  # noqa: PLW0603 - one for all tests of the session
    with _lock:
        if _server is None:
            _server = _Server({key: value for key, value in env.items() if not key.startswith("RAY_")}, cwd)
    request = json.dumps({"args": args, "env": dict(env), "cwd": str(cwd)}).encode()
    said: dict[int, bytearray] = {}
    given = [os.open(os.devnull, os.O_RDONLY)]
    for _ in range(3):
        reader, writer = os.pipe()
        said[reader] = bytearray()
        given.append(writer)
    out, err, line = said
    try:
        try:
            socket.send_fds(_server.socket, [request], given)
        finally:
            for descriptor in given:
                os.close(descriptor)
        is_in_time = _read(said, timeout_s)
        if not is_in_time:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(said[line].split()[0]), signal.SIGKILL)
            raise subprocess.TimeoutExpired(args, timeout_s, bytes(said[out]), bytes(said[err]))
    finally:
        for descriptor in said:
            os.close(descriptor)
    numbers = said[line].split()
    if len(numbers) != 2:
        raise RuntimeError("the process that runs commands has ended; its error is in the output of the tests")
    return subprocess.CompletedProcess(args, int(numbers[1]), said[out].decode(), said[err].decode())


def _read(said: dict[int, bytearray], timeout_s: float) -> bool:
    """Read all to their ends; whether they came in time."""
    deadline_s = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for descriptor in said:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            if (left_s := deadline_s - time.monotonic()) < 0:
                return False
            for key, _ in selector.select(left_s):
                if piece := os.read(key.fd, 1 << 16):
                    said[key.fd] += piece
                else:
                    selector.unregister(key.fd)
    return True


def server_pid() -> int | None:
    """Of the process that runs commands, which stays until `end`; None while there is none."""
    return None if _server is None else _server.process.pid


def end() -> None:
    """End the process that runs commands."""
    global _server  # noqa: PLW0603
    with _lock:
        if _server is not None:
            _server.socket.close()
            _server.process.wait(LEAVE_S)
            _server = None
