"""`python -m kervan.fleet.vllm FD`: an engine replica's process; FD is this end of the control line."""

import logging
import signal
import socket
import sys
from typing import NoReturn

import msgspec
import psutil

from kervan import logs
from kervan.fleet.control import ControlEnd, EngineSpec
from kervan.fleet.vllm import head_start


def run(control_fd: int, asked_s: float, *, is_forked: bool = False) -> NoReturn:
    """Be the engine that the other end of the control line asks for.

    `asked_s`: `time.time()` when it was wanted; `is_forked`: this process had vLLM imported before.
    """
    logs.configure(level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = ControlEnd(socket.socket(fileno=control_fd))
    spec = msgspec.json.decode(control.receive(), type=EngineSpec)
    logs.configure(level=logging.INFO, force=True, replica=spec.replica_id)
    ahead = head_start.begin(spec.engine_argv)
    from kervan.fleet.vllm import replica  # and vLLM with it: 5 to 20 s, where this process is not forked

    replica.serve(control, spec, ahead, asked_s=asked_s, is_forked=is_forked)


if __name__ == "__main__":
    run(int(sys.argv[1]), psutil.Process().create_time())
