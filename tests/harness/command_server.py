"""`python -P command_server.py FD`: runs `kervan` commands in forks of a process that has imported what they import.

Most of a command's CPU time is imports of other people's packages. This process imports those, and neither kervan nor
Ray: a command imports these itself, in its own environment, as `python -m kervan` does. It ends when FD is closed.

    test                              this process
      | request, 4 descriptors ---------->|  stdin, stdout, stderr, and a pipe for the two lines below
      | <------------------------- pid ---|
      | <--------- status, as Popen's ----|  when the command has ended
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

IMPORTED = (
    *("aiohttp", "click", "fastapi", "filelock", "google.protobuf.json_format", "grpc.aio", "httptools", "jsonschema"),
    *("msgpack", "msgspec", "numpy", "opentelemetry.trace", "prometheus_client", "psutil", "pydantic.v1", "requests"),
    *("rich.console", "rich.table", "uvicorn", "uvloop", "yaml", "zmq"),
)
NUM_DESCRIPTORS = 4
MAX_BYTES = 1 << 17


def main() -> None:
    """Blocks until the other end of FD is closed. In each fork it returns, with `sys.argv` and the rest set."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, and for the commands
    asked = socket.socket(fileno=int(sys.argv[1]))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy starts others when it is imported
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # of another release of Ray, and not needed then
            importlib.import_module(name)
    wrong = [name for name in ("kervan", "ray") if name in sys.modules]
    assert not wrong, f"commands would not import {wrong} themselves"
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose a thread"
    gc.collect()
    gc.freeze()
    children: dict[int, tuple[int, int]] = {}  # pidfd -> pid, where its lines go
    with selectors.DefaultSelector() as selector:
        selector.register(asked, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in children:
                    selector.unregister(key.fd)
                    _report(key.fd, *children.pop(key.fd))
                    continue
                message, descriptors, _, _ = socket.recv_fds(asked, MAX_BYTES, NUM_DESCRIPTORS)
                if not message:
                    return
                if (pid := os.fork()) == 0:
                    selector.close()
                    asked.close()
                    for pidfd, (_, line) in children.items():
                        os.close(pidfd)
                        os.close(line)
                    _command(json.loads(message), descriptors)
                *streams, line = descriptors
                for stream in streams:
                    os.close(stream)
                _tell(line, pid)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid, line
                selector.register(pidfd, selectors.EVENT_READ)


def _report(pidfd: int, pid: int, line: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _tell(line, status)
    os.close(line)
    os.close(pidfd)


def _tell(line: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked has given up
        os.write(line, f"{number}\n".encode())


def _command(asked: dict[str, Any], descriptors: list[int]) -> None:
    """Become `python -m kervan`: ends as that does, with all that Python does at its end."""
    for target, descriptor in enumerate(descriptors[:-1]):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path.insert(0, asked["cwd"])
    sys.argv = ["kervan", *asked["args"]]
    runpy.run_module("kervan", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    main()
