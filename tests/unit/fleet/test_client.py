"""The fleet client against toy replicas: answers, aborts, what is counted, and any order of events."""

import asyncio
import random
import time

import pytest
from harness.live import until
from harness.toy_fleet import SECRET, Bench, Request, ToyCodec, ToyReplica, make_bench

from kervan.errors import EngineError
from kervan.fleet import traffic
from kervan.fleet.client import FleetClient

pytestmark = pytest.mark.usefixtures("quick")


async def test_a_stream_is_placed_answered_and_forgotten(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[5, 6], max_tokens=4)
    await bench.placed(a, "s")
    assert bench.client.num_streams == 1
    assert bench.link(a).load.own_tokens == 6  # 2 prompt + 4 output
    await bench.finished("s")
    assert a.added == [Request("s", [5, 6, *bench.expected["s"]], 0)]
    assert a.aborted == []


async def test_outstanding_tokens_fall_with_the_prompt_and_with_each_token(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[1] * 100, max_tokens=10)
    await bench.placed(a, "s")
    seen = [bench.link(a).load.own_tokens]
    for _ in range(3):
        await bench.steps(a, 1)
        seen.append(bench.link(a).load.own_tokens)
    assert seen == [110, 9, 8, 7]
    await bench.finished("s")


async def test_at_its_first_token_a_moved_stream_was_prefilled_with_what_it_had_generated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[int] = []
    monkeypatch.setattr(bench.client._prefill, "observe", lambda tokens, ttft_s: prefilled.append(tokens))
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=[1] * 100, max_tokens=10)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    seen = [bench.link(b).load.own_tokens]
    for _ in range(2):
        await bench.steps(b, 1)
        seen.append(bench.link(b).load.own_tokens)
    assert prefilled == [100, 103]
    assert seen == [110, 6, 5]  # 103 queued and 7 to come
    await bench.finished("s")


async def test_capacity_is_the_sum_over_replicas_that_take_work(bench: Bench) -> None:
    assert bench.client.capacity_streams == 0
    await bench.start("a")
    b = await bench.start("b")
    assert bench.client.capacity_streams == 16
    await b.drain()
    await until(lambda: bench.client.capacity_streams == 8)


async def test_room_is_taken_before_streams_open_and_given_back(bench: Bench) -> None:
    a = await bench.start("a")
    ticket = bench.client.take_room(3, is_bulk=False)
    assert (bench.client.num_outstanding, bench.client.num_streams) == (3, 0)
    with ticket:
        await bench.add("s")
        await bench.add("t")
        assert (bench.client.num_outstanding, bench.client.num_streams) == (3, 2)
    assert bench.client.num_outstanding == 2  # the third never came
    await bench.placed(a, "s", "t")
    await bench.finished("s", "t")
    assert bench.client.num_outstanding == 0


async def test_bulk_requests_take_turns_and_others_pass(bench: Bench) -> None:
    a = await bench.start("a")  # 8 slots, of which bulk requests may have 6
    with bench.client.take_room(9, is_bulk=True):
        for i in range(9):
            await bench.add(f"b{i}", max_tokens=1 + i)
    with bench.client.take_room(2, is_bulk=True):
        for i in range(2):
            await bench.add(f"c{i}")
    with bench.client.take_room(1, is_bulk=False):
        await bench.add("s")
    await bench.placed(a, *(f"b{i}" for i in range(6)), "s")
    assert (bench.client.num_outstanding, bench.client.num_bulk) == (12, 11)
    await bench.steps(a, 1)  # ends b0
    await until(lambda: "b6" in a.running)
    await bench.steps(a, 1)  # ends b1
    await until(lambda: "c0" in a.running)
    assert {"b7", "b8", "c1"}.isdisjoint(a.running)
    await bench.client.abort(["b7", "c1", "b2"])
    await until(lambda: "b8" in a.running)
    bench.endings |= {"b7": ["abort"], "c1": ["abort"], "b2": ["abort"]}
    await bench.finished("s", "c0", *(f"b{i}" for i in (3, 4, 5, 6, 8)))
    assert (bench.client.num_outstanding, bench.client.num_bulk) == (0, 0)


async def test_bulk_streams_outlive_their_replica_and_get_the_slots_of_the_next(bench: Bench) -> None:
    a = await bench.start("a")
    with bench.client.take_room(9, is_bulk=True):
        for i in range(9):
            await bench.add(f"b{i}")
    await bench.placed(a, *(f"b{i}" for i in range(6)))
    b = await bench.start("b")  # 16 slots: 12 for bulk requests
    await bench.placed(b, "b6", "b7", "b8")
    await bench.kill(a)
    await until(lambda: len(b.running) >= 3)
    await bench.finished(*(f"b{i}" for i in range(9)))


async def test_the_completion_rate_is_known(bench: Bench) -> None:
    await bench.start("a")
    assert bench.client.completed_per_s == 0
    for i in range(10):
        await bench.add(f"s{i}", max_tokens=1)
    await bench.finished(*(f"s{i}" for i in range(10)))
    assert 0.5 < bench.client.completed_per_s <= 1.0  # ten streams, averaged over about 10 s


async def test_timestamps_are_shifted_to_this_hosts_clock(bench: Bench) -> None:
    begin_s = time.monotonic()
    await bench.start("a", clock_ahead_s=5000.0)
    await bench.add("s", max_tokens=1)
    await bench.finished("s")
    stamps = [message.timestamp for message in bench.messages]
    assert stamps
    assert all(begin_s - 1 <= stamp <= time.monotonic() + 1 for stamp in stamps)


async def test_an_abort_frees_the_replica(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[1] * 64, max_tokens=500)
    await bench.add("t")
    await bench.placed(a, "s", "t")
    await bench.steps(a, 2)
    await bench.client.abort(["s", "never seen"])
    assert bench.link(a).load.own_tokens == 4  # t's: 6 tokens, 2 given
    await until(lambda: a.aborted == ["s"])
    await bench.finished("t")
    assert "s" not in bench.endings
    assert bench.client.links[0].load.own_tokens == 0


async def test_a_moved_stream_is_aborted_by_the_id_its_replica_knows(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    await bench.client.abort(["s"])
    await until(lambda: b.aborted == ["s~1"])
    assert b.running == {}


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


async def test_a_client_that_closes_moves_nothing() -> None:
    bench = Bench(FleetClient(ToyCodec(), secret=SECRET, encrypts=False))
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


@pytest.mark.parametrize("seed", range(25))
async def test_every_stream_ends_once_and_whole_whatever_happens(seed: int) -> None:
    """Adds, kills, starts, drains and aborts in random order over replicas that step by themselves.

    A stream whose replica is killed twice before it gave a token is taken for a fatal one, so a kill waits until the last
    one was noticed and no stream is a suspect; everything else may happen at any moment.
    """
    rng = random.Random(seed)
    async with make_bench() as bench:
        names = (f"r{i}" for i in range(1000))
        aborted: set[str] = set()
        num_added = 0

        async def start() -> None:
            replica = await bench.start(next(names), is_awaited=rng.random() < 0.5)
            replica.run()

        def alive() -> list[ToyReplica]:
            return [replica for replica in bench.replicas.values() if replica.is_alive]

        def may_kill() -> bool:
            noticed = all(bench.replicas[link.replica_id].is_alive for link in bench.client.links)
            return noticed and not any(stream.is_suspect for stream in bench.client._placements.streams.values())

        for _ in range(60):
            event = rng.choices(["add", "kill", "start", "drain", "abort", "breathe"], [10, 2, 3, 2, 1, 6])[0]
            if event == "add":
                for _ in range(rng.randint(1, 4)):
                    prompt = [rng.randrange(600) for _ in range(rng.randint(1, 20))]
                    await bench.add(f"s{num_added}", prompt, max_tokens=rng.randint(1, 40))
                    num_added += 1
            elif event == "kill" and alive():
                victim = rng.choice(alive())
                if all(replica.is_draining for replica in alive() if replica is not victim):
                    await start()  # suspects wait for one that takes work
                await until(may_kill)
                victim.kill()
                bench.follow()
            elif event == "start" and len(alive()) < 4:
                await start()
            elif event == "drain" and alive():
                replica = rng.choice(alive())
                await replica.drain(not replica.is_draining)
            elif event == "abort" and num_added:
                name = f"s{rng.randrange(num_added)}"
                await bench.client.abort([name])
                if name not in bench.endings:
                    aborted.add(name)
            for _ in range(rng.randint(0, 20)):
                await asyncio.sleep(0)

        for replica in alive():
            await replica.drain(False)
        await start()
        whole = {f"s{i}" for i in range(num_added)} - aborted
        await bench.ended(*whole)
        for name in whole:
            assert (name, bench.endings[name]) == (name, ["length"])
            assert (name, bench.tokens[name]) == (name, bench.expected[name])
        for name in aborted:  # an abort may meet its stream's last tokens on their way; what came is right
            tokens = bench.tokens.get(name, [])
            assert tokens == bench.expected[name][: len(tokens)]
        assert bench.client.counts.broken == dict.fromkeys(bench.client.counts.broken, 0)
