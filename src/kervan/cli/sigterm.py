"""SIGTERM to a command that has something to end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupting() -> Iterator[None]:
    """Within the block SIGTERM is as Ctrl-C: a KeyboardInterrupt, so that what was started is ended."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
