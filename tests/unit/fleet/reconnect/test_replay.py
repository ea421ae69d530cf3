"""Streams whose clients come back, in the fleet client: what the journal has comes first, and a replica goes on."""

import asyncio

from harness.journals import Holder, journal, new_journals
from harness.live import until
from harness.toy_fleet import FATAL, Bench

from kervan.fleet.reconnect.copy_sender import CopySender
from kervan.fleet.reconnect.journal import Attempt, Journal, current_attempt


async def add(
    bench: Bench, request_id: str, attempt: Attempt, max_tokens: int = 6, prompt: list[int] | None = None
) -> None:
    """As for a request that vLLM's app makes while it answers for `attempt`."""
    token = current_attempt.set(attempt)
    await bench.add(request_id, prompt, max_tokens)
    current_attempt.reset(token)


async def begun(bench: Bench, num_tokens: int) -> Journal:
    """The journal of a stream whose client has left after `num_tokens` of 6."""
    one = journal()
    replica = await bench.start("r")
    await add(bench, "before", Attempt(one))
    await bench.placed(replica, "before")
    await bench.steps(replica, num_tokens)
    await bench.client.abort(["before"])
    await until(lambda: not replica.running)
    assert one.num_tokens == num_tokens
    return one


async def test_a_stream_goes_on_after_its_journal(bench: Bench) -> None:
    one = await begun(bench, 3)
    attempt = Attempt(one)
    await add(bench, "again", attempt)
    for count in (1, 2, 3):
        await bench.got("again", count)
        await asyncio.sleep(0.01)
        assert len(bench.tokens["again"]) == count  # each when the app has taken the one before
        assert not bench.replicas["r"].running
        attempt.take(1, is_finished=False)
    await bench.placed(bench.replicas["r"], "again~1")
    await bench.finished("again")
    assert one.num_tokens == 6


async def test_a_stream_that_had_ended_asks_no_replica(bench: Bench) -> None:
    one = await begun(bench, 6)
    num_added = len(bench.replicas["r"].added)
    attempt = Attempt(one)
    await add(bench, "again", attempt)
    for count in range(1, 6):
        await bench.got("again", count)
        attempt.take(1, is_finished=False)
    await bench.ended("again")
    assert bench.tokens["again"] == bench.expected["again"]
    assert len(bench.replicas["r"].added) == num_added


async def test_a_client_that_leaves_again_ends_the_replay(bench: Bench) -> None:
    one = await begun(bench, 3)
    attempt = Attempt(one)
    await add(bench, "again", attempt)
    await bench.got("again", 1)
    await bench.client.abort(["again"])
    attempt.take(1, is_finished=False)
    await asyncio.sleep(0.01)
    assert (len(bench.tokens["again"]), bench.client.num_streams) == (1, 0)
    assert not bench.replicas["r"].running


async def test_a_journal_of_another_version_ends_its_stream_only(bench: Bench) -> None:
    one = await begun(bench, 1)
    one.data.clear()
    one.record(b"\xc1", 1)
    await add(bench, "again", Attempt(one))
    await bench.ended("again")
    assert bench.failed("again")


async def test_a_stream_that_kills_replicas_cannot_be_asked_for_again(bench: Bench) -> None:
    one = journal()
    for name in ("r", "s"):
        replica = await bench.start(name)
        if name == "r":
            await add(bench, "fatal", Attempt(one), prompt=[1, FATAL])
        link = bench.link(replica)
        await until(lambda k=link: any(k.pong_s > s.placed_s for s in k.streams.values()), "it was alive with it")
        await bench.placed(replica, *link.streams)
        await replica.step()
        await bench.lost(replica)
    await bench.ended("fatal")
    assert bench.failed("fatal")
    assert one.refusal.startswith("it ended with an error")


async def test_nothing_is_seen_before_it_is_copied(bench: Bench) -> None:
    holder, journals = Holder("gw-b"), new_journals()
    await holder.start()
    copy_sender = CopySender(journals, own_id="gw-a", own_node="n1", secret="s3cret", engine_version="toy-1")
    copy_sender.set_peers([holder.peer])
    bench.client.copy_sender = copy_sender
    await until(lambda: copy_sender.is_holding)
    one = journal()
    journals.add(one)
    replica = await bench.start("r")
    await add(bench, "a", Attempt(one))
    await bench.placed(replica, "a")
    for count in range(1, 6):
        await replica.step()
        await bench.got("a", count)
        assert holder.has(one.stream_id) == count
    await bench.finished("a")
    await copy_sender.close()
    holder.copies.close()
