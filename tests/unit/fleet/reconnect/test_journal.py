"""Where a client is in its answer, and what a gateway keeps for it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.fleet.reconnect.journal import Journal, Journals, Position, Run


def journal(stream_id: str = "gw-a-1", body: bytes = b"{}", refusal: str = "") -> Journal:
    return Journal(stream_id, b"digest", "/v1/completions", [(b"x", b"y")], body, refusal)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("12.1", Position(12, 1)),
        ("0.2", Position(0, 2)),
        ("", None),
        ("12", None),
        ("12.", None),
        ("-1.1", None),
        ("1.1 ", None),
        ("1.1\n", None),
        ("9999999999.1", None),
        ("\u0661.1", None),
    ],
)
def test_positions_are_read(text: str, position: Position | None) -> None:
    assert Position.parse(text) == position


@given(st.tuples(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1)))
def test_a_position_that_was_told_is_read_again(pair: tuple[int, int]) -> None:
    assert Position.parse(str(Position(*pair))) == Position(*pair)


@given(st.lists(st.binary(max_size=300)))
def test_a_journal_gives_the_outputs_that_it_was_given(outputs: list[bytes]) -> None:
    own, copy = journal(), journal()
    for output in outputs:
        sent = len(own.data)
        own.record(output, 2)
        copy.extend(bytes(own.data[sent:]), 2)
    assert list(own.outputs()) == list(copy.outputs()) == outputs
    assert own.num_tokens == copy.num_tokens == 2 * len(outputs)


def events(run: Run, takes: list[int]) -> list[str | None]:
    """What a run tells of a chat whose app takes so many tokens at a time, one event each, and its end."""
    told = [run.next_event()]  # the role
    for number, num_tokens in enumerate(takes, 1):
        run.take(num_tokens, is_finished=number == len(takes))
        told.append(run.next_event())
    told += [run.next_event(), run.next_event()]  # usage, [DONE]
    return [None if position is None else str(position) for position in told]


# Five tokens. Worked by hand: the end counts 1 more, so the last token is event 6.1.
def test_events_are_numbered_by_what_they_tell() -> None:
    assert events(Run(journal()), [2, 2, 1]) == ["0.1", "2.1", "4.1", "6.1", "6.2", "6.3"]


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ("0.1", [None, "1.1", "2.1", "3.1", "4.1", "6.1", "6.2", "6.3"]),
        ("2.1", [None, None, None, "3.1", "4.1", "6.1", "6.2", "6.3"]),
        ("4.1", [None, None, None, None, None, "6.1", "6.2", "6.3"]),
        ("6.1", [None, None, None, None, None, None, "6.2", "6.3"]),
        ("6.2", [None, None, None, None, None, None, None, "6.3"]),
        ("6.3", [None] * 8),
    ],
)
def test_a_client_gets_what_it_has_not(after: str, told: list[str | None]) -> None:
    assert events(Run(journal(), Position.parse(after)), [1, 1, 1, 1, 1]) == told


def test_a_client_has_no_more_than_its_journal_unless_the_answer_is_whole() -> None:
    one = journal()
    one.record(b"t", 1)
    run = Run(one)
    run.take(1, is_finished=False)
    assert one.last_count == 1
    run.take(0, is_finished=True)  # a stop string
    assert (one.is_finished, one.last_count) == (True, 2)


async def test_a_run_waits_until_the_app_has_taken() -> None:
    run = Run(journal())
    waiting = asyncio.create_task(run.wait_for(3))
    for is_enough in (False, False, True):
        await asyncio.sleep(0)
        assert not waiting.done()
        run.take(1, is_finished=False)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done() == is_enough


def test_an_answer_of_several_requests_cannot_be_given_again() -> None:
    run = Run(journal())
    assert run.begin()
    assert not run.begin()
    assert "several requests" in run.journal.refusal


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def kept(journals: Journals) -> list[str]:
    return [journal.stream_id for journal in journals]


def test_journals_are_kept_for_a_time_after_their_end(clock: Clock) -> None:
    journals = Journals(replay_s=30, max_bytes=1000, now=clock)
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
    journals = Journals(replay_s=30, max_bytes=120, now=clock)
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
    journals = Journals(replay_s=30, max_bytes=100, now=clock)
    for number in range(10):
        journals.add(journal(str(number), b"x" * 40))
    assert kept(journals) == ["8", "9"]


def test_an_adopted_copy_is_a_journal_of_its_own() -> None:
    copy = journal()
    copy.is_own = False
    copy.record(b"1", 1)
    own = copy.adopted()
    copy.record(b"of the gateway that still runs", 1)
    assert (own.is_own, own.num_tokens, list(own.outputs())) == (True, 1, [b"1"])
