"""What a gateway keeps of its journals, and for how long."""

import pytest
from harness.journals import journal

from kervan.fleet.reconnect.store import JournalStore


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def kept(journals: JournalStore) -> list[str]:
    return [journal.stream_id for journal in journals]


def test_journals_are_kept_for_a_time_after_their_end(clock: Clock) -> None:
    journals = JournalStore(replay_s=30, max_bytes=1000, now=clock)
    running, ended = journal("running"), journal("ended")
    for one in (running, ended):
        journals.add(one)
    journals.end(ended)
    clock.now_s += 30
    assert journals.sweep() == []
    assert journals.get("ended") is ended
    clock.now_s += 0.1
    assert journals.get("ended") is None  # though nobody has swept yet
    assert journals.sweep() == [ended]
    assert kept(journals) == ["running"]


# Bodies of 40 bytes, 100 at most: two stay. Ended ones go before running ones, the first to end first.
@pytest.mark.parametrize(
    ("ended", "stay"),
    [
        (("b", "a"), ["a", "c"]),
        (("c",), ["a", "b"]),
        ((), ["b", "c"]),
    ],
)
def test_too_much_is_dropped(clock: Clock, ended: tuple[str, ...], stay: list[str]) -> None:
    journals = JournalStore(replay_s=30, max_bytes=120, now=clock)
    all_ = {name: journal(name, b"x" * 40) for name in "abc"}
    for one in all_.values():
        journals.add(one)
    for name in ended:
        clock.now_s += 1
        journals.end(all_[name])
    assert journals.sweep() == []
    all_["c"].record(b"y" * 26, 1)  # 30 with its length
    (dropped,) = journals.sweep()
    assert kept(journals) == stay
    assert dropped.is_dropped
    before = len(dropped.data)
    dropped.record(b"more", 1)  # its stream goes on, and costs nothing
    assert len(dropped.data) == before
    assert journals.num_dropped == 1


def test_a_full_gateway_makes_room_at_once(clock: Clock) -> None:
    journals = JournalStore(replay_s=30, max_bytes=100, now=clock)
    for number in range(10):
        journals.add(journal(str(number), b"x" * 40))
    assert kept(journals) == ["8", "9"]
