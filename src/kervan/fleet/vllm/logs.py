"""What vLLM must not do to the logs of the process it is in."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Handlers of this process outlive what is done inside.

    vLLM calls `logging.config.dictConfig`, some releases when they are imported; that closes every handler there is,
    whoever made it. Ray Serve's own one has lost its file then: asked by a restarted Serve controller for the path, the
    replica raises, and Serve stops it.
    """
    handlers = logging._handlerList  # type: ignore[attr-defined]  # those that dictConfig closes
    kept = handlers[:]
    handlers.clear()
    try:
        yield
    finally:
        handlers[:0] = kept
