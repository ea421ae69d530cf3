"""Ports for servers that are started on this machine, and are told theirs by number."""

import secrets
import socket
from pathlib import Path

FIRST = 20_000  # Ray's workers listen below
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port that is free on 127.0.0.1, from 20,000 up to where the kernel's ports for connections begin.

    What the kernel itself would choose may become some connection's own end before the server has it, or between two
    of its lives; Linux's default range begins at 32,768. Where no port is left below the range, it is one of the range.

    Raises: OSError if none is free.
    """
    ports = range(FIRST, int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else FIRST)
    for _ in range(min(len(ports), 100)):
        port = secrets.choice(ports)
        if _is_free(port):
            return port
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False
