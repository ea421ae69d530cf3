"""Notices of this node's end, for a command that runs on it without a fleet."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kervan.notices.events import Notice
    from kervan.notices.settings import NoticeSettings


@contextmanager
def watching_notices(on_end: Callable[["Notice"], object]) -> Iterator[None]:
    """Inside, `on_end` is called once, in a thread, when a cloud says that this node will go.

    KERVAN_NOTICES_WATCH and the like say what is watched; without a cloud, nothing happens. Signals are for the command
    itself to handle. Needs aiohttp (the extra `serve`); where it is missing, signals alone end the command.

    Raises: ConfigError for such a variable that is wrong.
    """
    from kervan.notices.settings import from_environment

    settings = from_environment(os.environ)
    settings = replace(settings, watch=tuple(name for name in settings.watch if name != "signal"))
    stop = threading.Event()  # set by the command's thread; the watching loop is in another
    thread = threading.Thread(target=_watch, args=(settings, on_end, stop), name="kervan-notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def _watch(settings: "NoticeSettings", on_end: Callable[["Notice"], object], stop: threading.Event) -> None:
    with suppress(ImportError):
        asyncio.run(_watching(settings, on_end, stop))


async def _watching(settings: "NoticeSettings", on_end: Callable[["Notice"], object], stop: threading.Event) -> None:
    from kervan.notices.node import watching

    told = False

    async def on_notice(notice: "Notice") -> None:
        nonlocal told
        if notice.is_certain and not told:
            told = True
            on_end(notice)

    async with watching(settings, on_notice, node=socket.gethostname()):
        await asyncio.to_thread(stop.wait)
