"""What a watcher asks of a source of notices, and the form for sources that are told instead of asking."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kervan.notices.events import Notice


class NoticeSource(Protocol):
    """One place that notices come from."""

    @property
    def name(self) -> str:
        """Names the source in notices, states and logs: one of `SourceName`."""
        ...

    @property
    def period_s(self) -> float:
        """The least number of seconds from the start of one poll to the start of the next."""
        ...

    @property
    def polls_to_withdraw(self) -> int:
        """After so many polls in a row without it, a notice is no longer pending.

        More than 1 where a server may forget it for a moment.
        """
        ...

    async def poll(self) -> Sequence[Notice]:
        """All notices that are pending, now or when that changes. A call that is cancelled leaves nothing behind.

        Raises: SourceError when that cannot be known.
        """
        ...

    async def acknowledge(self, notice: Notice) -> bool:
        """Tell the cloud that the node is empty and may go; False where that means nothing.

        Raises: SourceError when the cloud did not take it.
        """
        ...


class PushSource:
    """The notices of a source that is told of them (a signal, a command). Use it on one event loop only."""

    period_s = 0.0
    polls_to_withdraw = 1

    def __init__(self, node: str, *, wall: Callable[[], float] = time.time):
        self.node = node
        self.wall = wall
        self._pending: dict[str, Notice] = {}
        self._changed = asyncio.Event()

    def put(self, notice: Notice) -> None:
        """Make a notice pending, in the place of one with the same `event_id`."""
        self._pending[notice.event_id] = notice
        self._changed.set()

    def drop(self, event_id: str) -> bool:
        """Withdraw a notice; False when it was not pending."""
        if self._pending.pop(event_id, None) is None:
            return False
        self._changed.set()
        return True

    async def poll(self) -> Sequence[Notice]:
        await self._changed.wait()
        self._changed.clear()
        return list(self._pending.values())

    async def acknowledge(self, notice: Notice) -> bool:
        return False
