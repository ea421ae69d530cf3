"""Streams of the fleet client that go on elsewhere: off replicas that are lost, stand still or drain."""

import asyncio
import dataclasses

import pytest
from harness.live import until
from harness.toy_fleet import SECRET, Bench, Request, ToyCodec

from kervan.errors import EngineError
from kervan.fleet import stalls, traffic, wire
from kervan.fleet.client import FleetClient

pytestmark = pytest.mark.usefixtures("quick")


# ---- loss of a replica


async def test_a_killed_replicas_stream_goes_on_elsewhere_without_a_seam(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=[7, 8, 9], max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    assert b.added == [Request("s~1", [7, 8, 9, *bench.expected["s"][:3]], 5)]
    await bench.finished("s")
    assert bench.client.counts.moved == 1
    assert bench.client.counts.lost_replicas == 1


async def test_a_replicas_streams_are_counted_beyond_its_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway tells its counts once a second: the last ones of a replica that is gone must not be lost."""
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.finished("s")
    await bench.add("t", max_tokens=8)
    await bench.placed(a, "t")
    await bench.kill(a)
    await bench.placed(b, "t~1")
    await bench.finished("t")
    counts = {name: (told.num_served, told.num_moved) for name, told in bench.client.traffic().items()}
    assert counts == {"a": (1, 1), "b": (1, 0)}
    monkeypatch.setattr(traffic, "KEEP_TALLY_S", 0.0)
    assert set(bench.client.traffic()) == {"b"}


async def test_only_moved_streams_are_restored(bench: Bench) -> None:
    a, _ = await bench.start("a"), await bench.start("b")
    await bench.add("moved", max_tokens=4)
    await bench.add("stays", max_tokens=4)
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.finished("moved", "stays")
    restored = {o.request_id for message in bench.messages for o in message.outputs if o.is_restored}
    assert restored == {"moved"}


async def test_an_engine_that_says_it_is_dead_is_left_at_once(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await a.say_dead()
    await bench.placed(b, "s~1")
    a.kill()
    await bench.lost(a)
    await bench.finished("s")


@pytest.mark.parametrize("fault", ["connection", "middle", "tail"])
async def test_lost_outputs_are_noticed_and_their_streams_move(
    bench: Bench, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ROUTER drops what it cannot route without a word, for example while a connection breaks and comes back."""
    monkeypatch.setattr(wire, "OUTPUT_TIMEOUT_S", 0.2)
    a = await bench.start("a")
    await bench.add("r1", max_tokens=12)
    await bench.placed(a, "r1")
    await bench.steps(a, 3)
    link = bench.link(a)
    if fault == "connection":
        await a.break_output_connection()
    else:
        a.num_to_lose = 1
        await a.step()
        if fault == "middle":
            await a.step()
    await until(lambda: bench.client.links and bench.link(a) is not link, "the link is made again")
    await bench.finished("r1")
    assert bench.client.counts.moved == 1


async def test_a_stream_survives_one_replica_after_another(bench: Bench) -> None:
    await bench.add("s", max_tokens=10)
    for i in range(5):
        replica = await bench.start(f"r{i}")
        await until(lambda replica=replica: replica.running)
        await bench.steps(replica, 2)
        if i < 4:
            await bench.kill(replica)
    await bench.finished("s")
    assert bench.client.counts.moved == 4


async def test_late_outputs_of_an_earlier_placement_on_the_same_replica_are_ignored(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=12)
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    a.obeys_aborts = False  # a keeps stepping what it was told to forget
    await a.drain()
    await bench.placed(b, "s~1")
    await bench.steps(b, 2)
    await a.drain(False)
    await until(lambda: not bench.link(a).pong.is_draining)
    await bench.kill(b)
    await bench.placed(a, "s", "s~2")
    await bench.finished("s")
    assert bench.client.counts.late_outputs >= 1
    assert bench.client.counts.moved == 2


async def test_what_cannot_be_moved_is_failed(bench: Bench) -> None:
    a, _ = await bench.start("a"), await bench.start("b")
    await bench.add("audio", is_resumable=True)
    await bench.placed(a, "audio")
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.ended("audio")
    assert bench.failed("audio")


async def test_a_further_part_of_an_input_goes_where_the_first_went(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("audio", prompt=[1] * 50, is_resumable=True)
    await bench.placed(a, "audio")
    await bench.client.add(Request("audio", [2] * 50, 3, is_resumable=True))
    await until(lambda: len(a.added) == 2)
    assert b.added == []
    assert bench.client.num_streams == 1
    await bench.client.abort(["audio"])
    await bench.placed(a)


async def test_a_replica_that_returns_at_its_address_is_linked_again(bench: Bench) -> None:
    a = await bench.start("a")
    first = bench.link(a)
    await a.say_dead()
    await until(lambda: bench.client.links and bench.link(a) is not first)
    await bench.add("s")
    await bench.finished("s")


async def test_a_member_that_is_no_longer_listed_keeps_its_streams(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    bench.client.set_members([])  # the directory restarted empty
    await bench.add("t")
    await bench.finished("s", "t")


async def test_a_client_that_closes_moves_nothing() -> None:
    bench = Bench(FleetClient(ToyCodec(), secret=SECRET))
    try:
        a, b = await bench.start("a"), await bench.start("b")
        a.is_silent_to_calls = b.is_silent_to_calls = True
        await bench.add("s")
        await bench.add("t")
        await bench.placed(a, "s")
        await bench.placed(b, "t")
        call = asyncio.create_task(bench.client.call("sleep", ()))
        await until(lambda: a.calls and b.calls)
        await bench.client.close()
        with pytest.raises(EngineError, match="ended before a replica answered sleep"):
            await call
        assert bench.client.links == []
        assert (bench.client.counts.moved, bench.client.counts.lost_replicas, bench.endings) == (0, 0, {})
    finally:
        await bench.close()


# ---- standing still


async def test_streams_move_off_a_replica_that_stands_still_and_it_may_go_on(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    a.stalled_s = 100.0
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await bench.add("t")  # though `a` has less to do
    await bench.placed(b, "s~1", "t")
    a.stalled_s = 0.0
    await until(lambda: not bench.link(a).load.is_stalled)
    await bench.add("u")
    await bench.placed(a, "u")
    await bench.finished("s", "t", "u")
    assert (bench.client.counts.moved, bench.client.counts.lost_replicas) == (1, 0)


async def test_nothing_moves_when_all_stand_still(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.add("t", max_tokens=8)
    await bench.placed(a, "s")
    await bench.placed(b, "t")
    await bench.steps(a, 1)
    await bench.steps(b, 1)
    a.stalled_s = b.stalled_s = 100.0
    await until(lambda: all(link.load.is_stalled for link in bench.client.links))
    await bench.add("u")  # and what comes is not refused
    await until(lambda: "u" in a.running or "u" in b.running)
    assert bench.client.counts.moved == 0
    a.stalled_s = b.stalled_s = 0.0
    await bench.finished("s", "t", "u")


async def test_what_a_replica_may_stand_still_over_is_tried_once_elsewhere(bench: Bench) -> None:
    a, b, c = [await bench.start(name) for name in "abc"]
    await bench.add("s")
    await bench.placed(a, "s")
    a.stalled_s = 100.0
    await bench.placed(b, "s~1")
    a.stalled_s, b.stalled_s = 0.0, 200.0
    await until(lambda: bench.link(b).load.is_stalled)
    await asyncio.sleep(10 * stalls.PERIOD_S)
    assert (set(b.running), c.running) == ({"s~1"}, {})
    await bench.kill(b)
    await until(lambda: len(a.running) + len(c.running) == 1)
    await bench.finished("s")


# ---- draining


async def test_a_draining_replicas_streams_move_and_are_aborted_there(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await a.drain()
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    assert bench.link(a).load.own_tokens == 0
    await bench.add("t")
    await bench.placed(b, "s~1", "t")
    await bench.finished("s", "t")
    assert bench.client.counts.lost_replicas == 0


async def test_the_directory_may_know_of_a_drain_before_the_replica(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    bench.client.set_members([dataclasses.replace(a.member, is_draining=True), b.member])
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await a.drain(is_draining=False)  # an older answer of the replica changes nothing
    await bench.add("t")
    await bench.placed(b, "s~1", "t")
    await bench.finished("s", "t")


async def test_if_only_a_draining_replica_is_left_its_streams_stay_and_new_ones_wait(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 1)
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    await bench.add("new")
    assert bench.client.num_held == 1
    await bench.finished("s")
    assert a.aborted == []
    b = await bench.start("b")
    await bench.placed(b, "new")
    await bench.finished("new")


async def test_streams_move_off_a_draining_replica_when_a_replacement_links(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await bench.finished("s")


async def test_a_stream_that_cannot_move_stays_on_its_draining_replica(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("audio", is_resumable=True)
    await bench.add("s")
    await bench.placed(a, "audio")
    await bench.placed(b, "s")
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    await bench.finished("s", "audio")
    assert a.aborted == []
