"""Which event loop the client runs on."""

import asyncio
from collections.abc import Callable


def factory() -> tuple[Callable[[], asyncio.AbstractEventLoop] | None, str]:
    """uvloop's, which costs less for each read, where it is installed; and its name."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None, "asyncio"
    return uvloop.new_event_loop, "uvloop"
