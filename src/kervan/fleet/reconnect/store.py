"""The journals that a gateway keeps: for how long, and what goes when there are too many."""

from collections.abc import Callable, Iterator

from kervan.fleet.reconnect.journal import Journal


class JournalStore:
    """The journals that a gateway holds, its own and copies of others'.

    They are kept for `replay_s` from their end, and `max_bytes` of them at most.
    When there are more bytes, those that ended go first, the oldest before the others, and then the oldest that run.
    `dropped` is called with each that goes.
    """

    def __init__(self, *, replay_s: float, max_bytes: int, now: Callable[[], float]):
        self._replay_s = replay_s
        self._max_bytes = max_bytes
        self._now = now
        self.dropped: Callable[[Journal], None] = lambda journal: None
        self._all: dict[str, Journal] = {}
        self.num_bytes = 0  # at the last look, and what has been added since
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Journal]:
        return iter(list(self._all.values()))

    def get(self, stream_id: str) -> Journal | None:
        """The journal of this stream; None if there is none, or its time is over."""
        journal = self._all.get(stream_id)
        return None if journal is None or self._is_over(journal) else journal

    def add(self, journal: Journal) -> None:
        """Keep it, and drop others for it if they are too many."""
        self._all[journal.stream_id] = journal
        self.num_bytes += journal.num_bytes
        if self.num_bytes > self._max_bytes:
            self.sweep()

    def end(self, journal: Journal) -> None:
        """The response ended or broke off now: keep its journal for `replay_s` more."""
        journal.ended_s = self._now()

    def drop(self, journal: Journal) -> None:
        """Drop the journal; its stream goes on, and nothing more of it is recorded."""
        journal.is_dropped = True
        if self._all.get(journal.stream_id) is journal:
            del self._all[journal.stream_id]
        self.dropped(journal)

    def _is_over(self, journal: Journal) -> bool:
        return journal.ended_s is not None and self._now() - journal.ended_s > self._replay_s

    def sweep(self) -> list[Journal]:
        """Drop journals that are over or exceed the limit; returns those that were dropped."""
        dropped = [journal for journal in self if self._is_over(journal)]
        for journal in dropped:
            self.drop(journal)
        self.num_bytes = sum(journal.num_bytes for journal in self._all.values())
        if self.num_bytes > self._max_bytes:
            ended = sorted((j for j in self if j.ended_s is not None), key=lambda journal: journal.ended_s or 0.0)
            for journal in [*ended, *(j for j in self if j.ended_s is None)]:
                if self.num_bytes <= self._max_bytes:
                    break
                self.drop(journal)
                dropped.append(journal)
                self.num_bytes -= journal.num_bytes
                self.num_dropped += 1
        return dropped
