"""`python -m kervan.fleet.vllm FD`: an engine replica's process; FD is this end of the control line."""

import logging
import signal
import socket
import sys

import msgspec

from kervan.fleet.control import ControlEnd, EngineSpec
from kervan.fleet.vllm import head_start


def main() -> None:
    """Serve until the control line or vLLM ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = ControlEnd(socket.socket(fileno=int(sys.argv[1])))
    spec = msgspec.json.decode(control.receive(), type=EngineSpec)
    ahead = head_start.begin(spec.engine_argv)
    from kervan.fleet.vllm import replica  # and vLLM with it: 5 to 20 s

    replica.serve(control, spec, ahead)


if __name__ == "__main__":
    main()
