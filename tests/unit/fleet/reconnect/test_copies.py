"""Journals and their copies, over real connections."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from harness.journals import SECRET, VERSION, Holder, journal, new_journals
from harness.live import until

from kervan.fleet.auth import NONCE_BYTES
from kervan.fleet.pinned_tls import split, unchecked_context
from kervan.fleet.reconnect import copy_sender as copy_sender_module
from kervan.fleet.reconnect.copy_sender import CopySender
from kervan.fleet.reconnect.journal import Attempt, Journal
from kervan.fleet.reconnect.store import JournalStore
from kervan.policy.replication import Peer


@asynccontextmanager
async def sending(*holders: Holder) -> AsyncIterator[tuple[JournalStore, CopySender]]:
    journals = new_journals()
    async with AsyncExitStack() as stack:
        for holder in holders:
            await holder.start()
            stack.callback(holder.copies.close)
        copy_sender = CopySender(journals, own_id="gw-a", own_node="n1", secret=SECRET, engine_version=VERSION)
        stack.push_async_callback(copy_sender.close)
        copy_sender.set_peers([holder.peer for holder in holders])
        yield journals, copy_sender


async def opened(holder: Holder) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stranger's connection to it."""
    host, _, port = split(holder.peer.address)[0].rpartition(":")
    return await asyncio.open_connection(host, int(port), ssl=unchecked_context())


def record(journals: JournalStore, copy_sender: CopySender, one: Journal, num_tokens: int = 1) -> None:
    if journals.get(one.stream_id) is None:
        journals.add(one)
    for _ in range(num_tokens):
        one.record(b"output", 1)
    copy_sender.change(one)


async def test_a_copy_is_whole_before_the_client_sees_more() -> None:
    holder = Holder("gw-b")
    async with sending(holder) as (journals, copy_sender):
        await until(lambda: copy_sender.is_holding)
        seen = []
        one = journal()
        for number in range(1, 51):
            record(journals, copy_sender, one)

            def show(number: int = number) -> None:
                assert holder.has("gw-a-1") >= number
                seen.append(number)

            copy_sender.deliver(show)
            assert len(seen) < number  # not at once
            if number % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(seen) == 50)
        assert seen == list(range(1, 51))
        copy = holder.journals.get("gw-a-1")
        assert copy is not None
        same = ("key_digest", "path", "headers", "body", "data", "num_tokens")
        assert [getattr(copy, name) for name in same] == [getattr(one, name) for name in same]
        assert not copy.is_own
        assert copy_sender.num_late == 0


async def test_what_changes_nothing_waits_for_nothing() -> None:
    async with sending(Holder("gw-b")) as (_, copy_sender):
        await until(lambda: copy_sender.is_holding)
        seen: list[int] = []
        copy_sender.deliver(lambda: seen.append(1))
        assert seen == [1]


async def test_ends_refusals_and_drops_are_told() -> None:
    holder = Holder("gw-b")
    async with sending(holder) as (journals, copy_sender):
        await until(lambda: copy_sender.is_holding)
        one, two = journal("gw-a-1"), journal("gw-a-2")
        record(journals, copy_sender, one)
        record(journals, copy_sender, two)
        await copy_sender.copied()
        copy = holder.journals.get("gw-a-1")
        assert copy is not None
        assert copy.ended_s is None
        journals.end(one)
        one.refusal, one.is_finished = "it ended with an error", True
        journals.drop(two)
        for changed in (one, two):
            copy_sender.change(changed)
        await copy_sender.copied()
        assert (copy.refusal, copy.is_finished, copy.ended_s is not None) == ("it ended with an error", True, True)
        assert holder.journals.get("gw-a-2") is None
        one.attempt, one.ended_s = Attempt(one), None  # its client is back
        copy_sender.change(one)
        await copy_sender.copied()
        assert copy.ended_s is None


async def test_a_peer_that_comes_late_gets_what_there_is() -> None:
    """More than one frame of it."""
    holder = Holder("gw-b")
    async with sending(holder) as (journals, copy_sender):
        copy_sender.set_peers([])
        for number in range(40):
            record(journals, copy_sender, journal(f"gw-a-{number}", b"x" * 100_000), 20)
        copy_sender.set_peers([holder.peer])
        await until(lambda: copy_sender.is_holding)
        await copy_sender.copied()
        assert [holder.has(f"gw-a-{number}") for number in range(40)] == [20] * 40


async def test_a_lost_peer_is_replaced_and_the_next_one_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_sender_module, "RETRY_S", 0.01)
    first, second = Holder("gw-b"), Holder("gw-c")
    async with sending(first, second) as (journals, copy_sender):
        await until(lambda: copy_sender.is_holding)
        record(journals, copy_sender, journal(), 5)
        await copy_sender.copied()
        kept, other = (first, second) if first.has("gw-a-1") == 5 else (second, first)
        seen: list[int] = []
        record(journals, copy_sender, next(iter(journals)), 5)
        copy_sender.deliver(lambda: seen.append(1))
        kept.copies.close()
        await until(lambda: seen == [1], "outputs do not wait for a peer that is gone")
        await until(lambda: other.has("gw-a-1") == 10)
        await until(lambda: copy_sender.is_holding)
        left = kept.journals.get("gw-a-1")
        assert left is not None
        assert left.ended_s is not None  # its time runs from when the connection broke


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


@asynccontextmanager
async def silent_peer(received: bytearray | None = None) -> AsyncIterator[tuple[Peer, Callable[[int], None]]]:
    """Welcomes, and says that it holds something when it is told to."""
    writers: list[asyncio.StreamWriter] = []

    def say(number: int) -> None:
        writers[-1].write(framed(msgspec.msgpack.encode(number)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(framed(b"nonce"))
        say(0)
        while received is not None and (data := await reader.read(65536)):
            received.extend(data)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Peer("gw-b", "n2", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"), say
        for writer in writers:
            writer.close()


async def test_a_slow_peer_is_waited_for_a_little_only_until_it_is_fast_again() -> None:
    async with sending() as (journals, copy_sender), silent_peer() as (peer, say):
        copy_sender.set_peers([peer])
        await until(lambda: copy_sender.is_holding)
        seen: list[int] = []
        record(journals, copy_sender, journal())
        copy_sender.deliver(lambda: seen.append(1))
        assert seen == []
        await until(lambda: seen == [1])
        assert (copy_sender.is_holding, copy_sender.num_late) == (False, 1)
        record(journals, copy_sender, next(iter(journals)))
        copy_sender.deliver(lambda: seen.append(2))
        assert seen == [1, 2]
        say(1)  # then it is sent what has come since, and is waited for again
        await until(lambda: copy_sender.is_holding)
        record(journals, copy_sender, next(iter(journals)))
        copy_sender.deliver(lambda: seen.append(3))
        assert seen == [1, 2]
        say(3)
        await until(lambda: seen == [1, 2, 3])
        say(3)


async def test_a_silent_peer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_sender_module, "LOST_S", 0.1)
    holder = Holder("gw-c")
    async with sending(holder) as (journals, copy_sender), silent_peer() as (peer, _):
        copy_sender.set_peers([peer])
        await until(lambda: copy_sender.peer == peer and copy_sender.is_holding)
        record(journals, copy_sender, journal())
        copy_sender.set_peers([peer, holder.peer])
        copy_sender.flush()
        await until(lambda: holder.has("gw-a-1") == 1)


@pytest.mark.parametrize("other", [{"secret": "another"}, {"version": "toy-2"}], ids=lambda other: next(iter(other)))
async def test_strangers_are_refused(other: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    holder = Holder("gw-b", **other)
    async with sending(holder) as (journals, copy_sender):
        seen: list[int] = []
        record(journals, copy_sender, journal())
        copy_sender.deliver(lambda: seen.append(1))
        assert seen == [1]  # nobody waits for it
        await until(lambda: "refused" in caplog.text)
        assert len(holder.journals) == 0


async def test_the_secret_does_not_travel_and_what_does_opens_no_second_connection() -> None:
    sent, holder = bytearray(), Holder("gw-c")
    async with sending() as (journals, copy_sender), silent_peer(sent) as (peer, _):
        copy_sender.set_peers([peer])
        await until(lambda: copy_sender.is_holding)
        record(journals, copy_sender, journal(body=b"the last"))
        copy_sender.flush()
        await until(lambda: b"the last" in sent)
    assert SECRET.encode() not in sent
    async with sending(holder):
        reader, writer = await opened(holder)
        writer.write(sent)
        async with asyncio.timeout(10):
            assert len(await reader.read()) == 4 + NONCE_BYTES  # hung up on, without a welcome
        writer.close()
        assert len(holder.journals) == 0


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\1x", b"\0\0\0\2\x92\x01", b"\xff\xff\xff\xff"])
async def test_what_is_no_gateway_is_hung_up_on(said: bytes) -> None:
    holder = Holder("gw-b")
    async with sending(holder):
        reader, writer = await opened(holder)
        writer.write(said)
        async with asyncio.timeout(10):
            await reader.readexactly(4 + NONCE_BYTES)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(1)
        writer.close()


async def test_the_last_words_of_a_leaving_gateway_are_copied() -> None:
    holder = Holder("gw-b")
    async with sending(holder) as (journals, copy_sender):
        await until(lambda: copy_sender.is_holding)
        record(journals, copy_sender, journal(), 7)
        await copy_sender.close()
        assert holder.has("gw-a-1") == 7
