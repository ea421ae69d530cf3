"""One watcher per node: it asks all sources, and tells each notice once.

No source can end it or hide another's notice: trouble is logged when it changes, and the source is asked again later.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kervan.notices.events import Identity, Notice, soonest
from kervan.notices.metadata import SourceError
from kervan.notices.source import NoticeSource

logger = logging.getLogger(__name__)

NoticeCallback = Callable[[Notice], Awaitable[None]]

FIRST_BACKOFF_S = 1.0
# Of a notice of 30 s no more than a third may be lost because the server was away when it came.
MAX_BACKOFF_S = 10.0
TELL_ATTEMPTS = 5


@dataclass(slots=True)
class SourceHealth:
    """What became of a source's polls. `problem` is empty while they succeed."""

    polls: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    problem: str = ""


class Watcher:
    """Polls `sources` and calls `on_notice` for each new notice, and again when its deadline comes nearer.

    `on_withdrawn` is called when a notice is no longer pending: the cloud changed its mind, or it is over. Both should
    return soon (start a task for what takes long): calls are made one after the other. One that raises is called again,
    TELL_ATTEMPTS times in all.
    """

    def __init__(
        self,
        sources: Sequence[NoticeSource],
        on_notice: NoticeCallback,
        *,
        on_withdrawn: NoticeCallback | None = None,
        first_backoff_s: float = FIRST_BACKOFF_S,
        max_backoff_s: float = MAX_BACKOFF_S,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.health = {source.name: SourceHealth() for source in sources}
        self._sources = {source.name: source for source in sources}
        self._on_notice = on_notice
        self._on_withdrawn = on_withdrawn
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._monotonic = monotonic
        self._pending: dict[Identity, tuple[str, Notice]] = {}
        self._absences: dict[Identity, int] = {}
        self._undelivered: asyncio.Queue[tuple[NoticeCallback, Notice]] = asyncio.Queue()

    @property
    def pending(self) -> list[Notice]:
        """The notices that hold now, with their nearest deadlines."""
        return [notice for _, notice in self._pending.values()]

    @property
    def soonest(self) -> Notice | None:
        """The pending notice that ends the node first; None while none does."""
        return soonest(self.pending)

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._deliver())
            for source in self._sources.values():
                tasks.create_task(self._watch(source))

    async def acknowledge(self, notice: Notice) -> bool:
        """Tell the cloud that this node is empty; False where that means nothing, or failed (it is logged)."""
        pending = self._pending.get(notice.identity)
        if pending is None:
            return False
        try:
            return await self._sources[pending[0]].acknowledge(notice)
        except SourceError as error:
            logger.warning("notices: the acknowledgement of %s %s failed: %s", notice.kind, notice.event_id, error)
            return False

    async def _watch(self, source: NoticeSource) -> None:
        health = self.health[source.name]
        while True:
            began_s = self._monotonic()
            wait_s = source.period_s
            try:
                polled = await source.poll()
            except SourceError as error:
                wait_s = max(wait_s, self._failed(source.name, health, str(error)))
            except Exception as error:  # supervised: a fault in one source must not end the others
                if not health.problem:
                    logger.exception("notices: fault in source %s", source.name)
                wait_s = max(wait_s, self._failed(source.name, health, f"{type(error).__name__}: {error}"))
            else:
                if health.problem:
                    logger.info("notices: %s answers again", source.name)
                health.failures_in_a_row, health.problem = 0, ""
                self._take(source, polled)
            health.polls += 1
            # Also without a period others must get their turn: a source may answer without ever waiting.
            await asyncio.sleep(max(0.0, began_s + wait_s - self._monotonic()))

    def _failed(self, name: str, health: SourceHealth, problem: str) -> float:
        """Count a failure; how long to leave the source alone."""
        if problem != health.problem:
            logger.warning("notices: %s cannot be read: %s", name, problem)
        health.problem = problem
        health.failures += 1
        health.failures_in_a_row += 1
        exponent = min(health.failures_in_a_row - 1, 16)
        return min(self._max_backoff_s, self._first_backoff_s * 2.0**exponent)

    def _take(self, source: NoticeSource, polled: Sequence[Notice]) -> None:
        """Compare what a source says with what it said before."""
        for notice in polled:
            pending = self._pending.get(notice.identity)
            self._absences.pop(notice.identity, None)
            if pending is None or notice.is_sooner_than(pending[1]):
                self._pending[notice.identity] = (source.name, notice)
                self._undelivered.put_nowait((self._on_notice, notice))
        present = {notice.identity for notice in polled}
        for identity, (name, notice) in list(self._pending.items()):
            if name != source.name or identity in present:
                continue
            absences = self._absences.get(identity, 0) + 1
            self._absences[identity] = absences
            if absences >= source.polls_to_withdraw:
                del self._pending[identity], self._absences[identity]
                if self._on_withdrawn is not None:
                    self._undelivered.put_nowait((self._on_withdrawn, notice))

    async def _deliver(self) -> None:
        while True:
            callback, notice = await self._undelivered.get()
            for attempt in range(1, TELL_ATTEMPTS + 1):
                try:
                    await callback(notice)
                except Exception:  # supervised: a notice is worth more than one failed call
                    logger.exception(
                        "notices: telling of %s %s failed (%d of %d)",
                        notice.kind,
                        notice.event_id,
                        attempt,
                        TELL_ATTEMPTS,
                    )
                    await asyncio.sleep(min(self._max_backoff_s, self._first_backoff_s * 2 ** (attempt - 1)))
                else:
                    break
