"""Where a client is in its answer, and what its journal has of it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.fleet.reconnect.journal import Attempt, Journal, Position


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


def events(attempt: Attempt, takes: list[int]) -> list[str | None]:
    """What an attempt tells of a chat whose app takes so many tokens at a time, one event each, and its end."""
    told = [attempt.next_event()]  # the role
    for number, num_tokens in enumerate(takes, 1):
        attempt.take(num_tokens, is_finished=number == len(takes))
        told.append(attempt.next_event())
    told += [attempt.next_event(), attempt.next_event()]  # usage, [DONE]
    return [None if position is None else str(position) for position in told]


# Five tokens. Worked by hand: the end counts 1 more, so the last token is event 6.1.
def test_events_are_numbered_by_what_they_tell() -> None:
    assert events(Attempt(journal()), [2, 2, 1]) == ["0.1", "2.1", "4.1", "6.1", "6.2", "6.3"]


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
    assert events(Attempt(journal(), Position.parse(after)), [1, 1, 1, 1, 1]) == told


def test_a_client_has_no_more_than_its_journal_unless_the_answer_is_whole() -> None:
    one = journal()
    one.record(b"t", 1)
    attempt = Attempt(one)
    attempt.take(1, is_finished=False)
    assert one.last_count == 1
    attempt.take(0, is_finished=True)  # a stop string
    assert (one.is_finished, one.last_count) == (True, 2)


async def test_an_attempt_waits_until_the_app_has_taken() -> None:
    attempt = Attempt(journal())
    waiting = asyncio.create_task(attempt.wait_for(3))
    for is_enough in (False, False, True):
        await asyncio.sleep(0)
        assert not waiting.done()
        attempt.take(1, is_finished=False)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done() == is_enough


def test_an_answer_of_several_requests_cannot_be_given_again() -> None:
    attempt = Attempt(journal())
    assert attempt.begin()
    assert not attempt.begin()
    assert "several requests" in attempt.journal.refusal


def test_an_adopted_copy_is_a_journal_of_its_own() -> None:
    copy = journal()
    copy.is_own = False
    copy.record(b"1", 1)
    own = copy.adopted()
    copy.record(b"of the gateway that still runs", 1)
    assert (own.is_own, own.num_tokens, list(own.outputs())) == (True, 1, [b"1"])
