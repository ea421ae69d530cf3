"""`python -m harness.forked FD PLACE PID`: a fork server whose children import nothing and do as they are told.

The first line on a child's control line is Python to run there; its result goes back as a line.
"""

import importlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kervan.fleet import fork_server

prepared: list[str] = []


def prepare(program: str, hints: Sequence[str]) -> Callable[[], None] | None:
    if not program and "SLOW" in os.environ:
        Path(os.environ["SLOW"]).write_text(str(os.getpid()))
        time.sleep(600)
    prepared.extend(hints)
    if "thread" in hints:
        threading.Thread(target=threading.Event().wait, daemon=True, name="idle").start()
    return (lambda: prepared.append("later")) if "later" in hints else None


def run(program: str, control_fd: int, asked_s: float) -> None:
    with socket.socket(fileno=control_fd) as control, control.makefile("rw") as lines:
        names: dict[str, Any] = {
            "program": program,
            "prepared": prepared,
            "asked_s": asked_s,
            "os": os,
            "importlib": importlib,
        }
        for line in lines:
            lines.write(f"{eval(line, names)}\n")
            lines.flush()


if __name__ == "__main__":
    fork_server.main(prepare, run, linger_s=float(os.environ.get("LINGER_S", "60")))
