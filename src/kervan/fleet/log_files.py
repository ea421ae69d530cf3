"""What engines and gateways write, one file each, kept for a while after they are gone."""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_LOGS = 50


def new_log(directory: Path, name: str) -> Path:
    """A new log's path; of the logs that nobody writes to any more, the oldest beyond `MAX_LOGS` go."""
    directory.mkdir(parents=True, exist_ok=True)
    logs = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[: max(0, len(logs) - MAX_LOGS + 1)]:
        if not _is_written(path):
            path.unlink(missing_ok=True)
    return directory / f"{name}.log"


def open_log(path: Path) -> BinaryIO:
    """The log, to append to; who inherits it as its output is known to live until it ends."""
    log = path.open("ab")
    fcntl.flock(log, fcntl.LOCK_SH)
    return log


def _is_written(path: Path) -> bool:
    with suppress(FileNotFoundError), path.open("rb") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
