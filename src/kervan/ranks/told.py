"""Whether this rank was told to end: by SIGTERM, which work that looks here may answer by saving what it has.

It is heard from the first moment of a rank, before its work begins. Work that does not look goes on; a rank ends with
the command that has started it in any case.
"""

import signal
import threading
from typing import Any

_TOLD = threading.Event()


def listen() -> None:
    """From now on. Called once, in a rank's main thread."""
    signal.signal(signal.SIGTERM, _hear)


def _hear(*_: Any) -> None:
    _TOLD.set()


def is_told() -> bool:
    """Whether it was."""
    return _TOLD.is_set()
