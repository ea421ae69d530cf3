"""Streams of replicas that are lost or stand still: they go on elsewhere, or are rejected when they take those down."""

import asyncio
import time

import pytest
from harness.live import until
from harness.toy_fleet import FATAL, Bench, Request, ToyReplica

from kervan.fleet import stalls
from kervan.fleet.admitted import StreamFailure
from kervan.policy import quarantine

pytestmark = pytest.mark.usefixtures("quick")


# ---- they go on elsewhere


async def test_a_killed_replicas_stream_goes_on_elsewhere_without_a_seam(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=[7, 8, 9], max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    assert b.added == [Request("s~1", [7, 8, 9, *bench.expected["s"][:3]], 5)]
    await bench.finished("s")
    counts = bench.client.counts
    assert counts.moves == {"lost": 1, "stalled": 0, "drained": 0}
    assert counts.move_pause_s.buckets()[-1] == ("+Inf", 1)
    assert (counts.broken_links, counts.lost_replicas, counts.returned_replicas) == (1, 1, 0)


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


async def test_what_cannot_be_moved_is_failed(bench: Bench) -> None:
    a, _ = await bench.start("a"), await bench.start("b")
    await bench.add("audio", is_resumable=True)
    await bench.placed(a, "audio")
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.ended("audio")
    assert bench.failed("audio")


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
    assert bench.client.counts.moves == {"lost": 0, "stalled": 1, "drained": 0}
    assert bench.client.counts.broken_links == 0


async def test_a_replica_that_stood_still_gets_one_stream_until_it_has_made_a_step(bench: Bench) -> None:
    """Without streams it looks idle, and each of the new ones would wait there for as long as the first."""
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=80)
    await bench.placed(a, "s")
    a.stalled_s = 100.0
    await bench.placed(b, "s~1")
    a.stalled_s = 0.0
    await until(lambda: not bench.link(a).load.is_stalled)
    await bench.add("t", max_tokens=8)
    await bench.placed(a, "t")
    for request in ("u", "v"):  # though `b` has much more to do
        await bench.add(request, max_tokens=8)
    await bench.placed(b, "s~1", "u", "v")
    await bench.steps(a, 1)
    await until(lambda: not bench.link(a).load.is_on_trial)
    await bench.add("w", max_tokens=8)
    await bench.placed(a, "t", "w")
    await bench.finished("s", "t", "u", "v", "w")


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


@pytest.mark.parametrize("has_other", [True, False])
async def test_what_two_replicas_stood_still_over_in_a_step_gets_no_third(bench: Bench, has_other: bool) -> None:
    """It has moved to the second when the first stood still, or came there when the first had been ended."""
    a = await bench.start("a")
    b = await bench.start("b") if has_other else None
    ticket = bench.client.take_room(1, is_bulk=False)
    with ticket:
        await bench.add("long")
    await bench.placed(a, "long")
    a.stalled_s, a.step_tokens = 100.0, 512
    if b is None:
        await until(lambda: bench.link(a).is_long_in_step)
        await bench.kill(a)
        b = await bench.start("b")
    await bench.placed(b, "long~1")
    await until(lambda: b.last_ping is not None and b.last_ping.num_suspects == 1)
    b.stalled_s, b.step_tokens = 100.0, 512
    c = await bench.start("c")
    await until(lambda: bench.link(b).is_long_in_step)
    await bench.kill(b)
    await bench.ended("long")
    assert bench.failed("long")
    assert c.added == []
    assert ticket.failure == StreamFailure(
        "the request was given up: 2 replicas made no step for too long after they got it, and were ended; send a "
        "shorter prompt, or raise the fleet's stall_timeout_s",
        is_transient=False,
    )


# ---- they are suspected


async def test_a_replica_that_stood_still_before_is_lost_through_no_stream_that_came_later(bench: Bench) -> None:
    """Its streams have left, so it looks idle and gets new ones; then the watchdog ends it."""
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("x", max_tokens=40)
    await bench.placed(a, "x")
    await bench.add("y", max_tokens=40)
    await bench.placed(b, "y")
    await bench.steps(a, 1)
    await bench.steps(b, 1)
    b.stalled_s = 100.0
    await bench.placed(a, "x", "y~1")
    b.stalled_s = 0.0
    await until(lambda: not bench.link(b).load.is_stalled)
    await bench.add("s")
    await bench.placed(b, "s")
    link = bench.link(b)
    await until(lambda: link.pong_s > link.streams["s"].placed_s, "it was alive with it")
    await bench.kill(b)
    await until(lambda: "s~1" in a.running)
    assert bench.link(a).load.num_suspects == 0
    await bench.finished("x", "y", "s")
    assert bench.client.counts.given_up == 0


async def test_a_suspect_that_comes_while_a_replica_stands_still_is_not_blamed_when_that_is_seen_again(
    bench: Bench,
) -> None:
    """It waits there, as it is tried alone, so the replica is found to stand still once more, now with the suspect."""
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("x", max_tokens=200)
    await bench.placed(a, "x")
    await bench.add("y", max_tokens=200)
    await bench.placed(b, "y")
    await bench.steps(a, 1)
    await bench.steps(b, 1)
    b.stalled_s = 100.0
    await bench.placed(a, "x", "y~1")
    c = await bench.start("c")
    await bench.add("s")
    await bench.placed(c, "s")
    await until(lambda: bench.link(c).pong_s > bench.link(c).streams["s"].placed_s, "it was alive with it")
    b.stalled_s = 0.0
    await until(lambda: not bench.link(b).load.is_stalled)
    await bench.kill(c)
    await bench.placed(b, "s~1")
    b.stalled_s = 100.0
    await until(lambda: bench.link(b).load.is_stalled, "it is found to stand still again")
    await bench.kill(b)
    await until(lambda: "s~2" in a.running)
    await bench.finished("x", "y", "s")
    assert bench.client.counts.given_up == 0


async def test_a_suspect_that_comes_to_a_replica_which_hangs_already_is_not_blamed_and_does_not_wait(
    bench: Bench,
) -> None:
    """Two faults at once: one replica dies with it, and the other stopped a second before, which nobody knows yet."""
    hung = await bench.start("hung")
    await bench.add("y", max_tokens=40)
    await bench.placed(hung, "y")
    await bench.steps(hung, 2)
    link = bench.link(hung)
    await until(lambda: link.is_late(time.monotonic()), "y waits for its next token")
    dying = await bench.start("dying")
    await bench.add("s")
    await bench.placed(dying, "s")
    await until(lambda: bench.link(dying).pong_s > bench.link(dying).streams["s"].placed_s, "it was alive with it")
    await bench.kill(dying)
    await bench.placed(hung, "y", "s~1")
    await until(lambda: link.pong_s > link.streams["s~1"].placed_s, "it answers")
    free = await bench.start("free")
    hung.stalled_s, hung.step_tokens = 100.0, 3
    await bench.placed(free, "y~1", "s~2")
    await bench.kill(hung)
    await bench.finished("y", "s")
    assert bench.client.counts.given_up == 0


async def test_a_stream_that_kills_two_replicas_is_given_up_and_its_neighbours_finish(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    for i in range(4):
        await bench.add(f"old{i}", max_tokens=9)
    await until(lambda: len(a.running) == len(b.running) == 2)
    await bench.steps(a, 2)
    await bench.steps(b, 2)
    await bench.add("fatal", prompt=[1, FATAL])
    await until(lambda: "fatal" in a.running or "fatal" in b.running)
    first, second = (a, b) if "fatal" in a.running else (b, a)
    await first.step()
    await bench.lost(first)
    await until(lambda: "fatal~1" in second.running)
    link = bench.link(second)
    await until(lambda: link.pong_s > link.streams["fatal~1"].placed_s, "the second one was alive with it")
    await second.step()
    await bench.lost(second)
    await bench.ended("fatal")
    assert bench.failed("fatal")
    c = await bench.start("c")
    c.run()
    await bench.finished(*(f"old{i}" for i in range(4)))
    assert bench.client.counts.given_up == 1
    assert bench.client.counts.broken_links == 2


@pytest.mark.parametrize("position", range(4))
async def test_suspects_are_tried_one_by_one_and_only_the_fatal_one_is_rejected(bench: Bench, position: int) -> None:
    """Four streams wait on a replica when it dies at its first step; any of them may be the fatal one."""
    names = [f"s{i}" for i in range(4)]
    a = await bench.start("a")
    for i, name in enumerate(names):
        await bench.add(name, prompt=[1, FATAL] if i == position else [1, i + 2])
    await bench.placed(a, *names)
    await a.step()
    await bench.lost(a)
    await until(lambda: bench.client.num_held == 4)

    b, c = await bench.start("b"), await bench.start("c")
    await until(lambda: len(b.running) == len(c.running) == 1)
    assert bench.client.num_held == 2
    spares = iter("defg")
    while not all(name in bench.endings for name in names):
        for replica in [r for r in bench.replicas.values() if r.is_alive]:
            link = bench.link(replica)
            suspects = [stream for stream in link.streams.values() if stream.is_suspect]
            assert len(suspects) <= 1
            for stream in suspects:  # a death that follows too fast for a sign of life counts for less
                await until(lambda s=stream, k=link: k.pong_s > s.placed_s or not s.is_suspect)  # type: ignore[misc]
            await replica.step()
            if not replica.is_alive:
                await bench.lost(replica)
                await bench.start(next(spares))
        await asyncio.sleep(0)
    for i, name in enumerate(names):
        if i == position:
            assert bench.failed(name)
        else:
            assert (bench.tokens[name], bench.endings[name]) == (bench.expected[name], ["length"])
    assert bench.client.counts.broken_links == 2


async def test_a_token_clears_of_earlier_losses_only(bench: Bench) -> None:
    """Both gave a token on the first replica and none on the second: suspects, which a third tries one by one."""
    a = await bench.start("a")
    await bench.add("s")
    await bench.add("t")
    await bench.placed(a, "s", "t")
    await bench.steps(a, 1)
    await bench.kill(a)
    b = await bench.start("b")
    await bench.placed(b, "s~1", "t~1")
    await bench.kill(b)
    c = await bench.start("c")
    await bench.placed(c, "s~2")
    await bench.steps(c, 1)
    await bench.placed(c, "s~2", "t~2")
    await bench.finished("s", "t")


async def silence(bench: Bench, replica: ToyReplica) -> None:
    """The link to a replica that lives, and was heard of since its last stream came, breaks; then it is back."""
    link = bench.link(replica)
    await until(lambda: any(link.pong_s > s.placed_s for s in link.streams.values()))
    await replica.break_output_connection()
    await until(lambda: any(k.replica_id == replica.replica_id and k is not link for k in bench.client.links))


async def test_no_stream_is_rejected_for_replicas_that_come_back(bench: Bench) -> None:
    """As when the whole machine stands still for seconds, twice: nobody died, so no request is a killer."""
    a = await bench.start("a")
    await bench.add("s")
    await bench.add("t")
    await bench.placed(a, "s", "t")
    for _ in range(3):
        await silence(bench, a)
    await bench.finished("s", "t")
    assert bench.client.counts.given_up == 0


async def test_a_rejection_waits_for_the_return_of_a_replica(bench: Bench) -> None:
    """One replica falls silent, the next dies; the first one's return clears the stream of both."""
    a = await bench.start("a")
    await bench.add("s")
    link = bench.link(a)
    await until(lambda: any(link.pong_s > s.placed_s for s in link.streams.values()))
    bench.client.set_members([])
    await a.break_output_connection()
    await until(lambda: not bench.client.links)
    b = bench.replicas["b"] = ToyReplica("b")
    bench.client.set_members([b.member])
    await bench.placed(b, "s~1")
    link = bench.link(b)
    await until(lambda: any(link.pong_s > s.placed_s for s in link.streams.values()))
    b.kill()
    await until(lambda: not bench.client.links and bench.client.num_held == 1)
    bench.follow()
    await bench.placed(a, "s~2")
    await bench.finished("s")
    assert bench.client.counts.given_up == 0


async def test_a_stream_can_be_aborted_while_its_rejection_is_pending(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "RETURN_WAIT_S", 3600.0)
    await bench.add("s")
    for name in "ab":
        replica = await bench.start(name)
        link = bench.link(replica)
        await until(lambda k=link: any(k.pong_s > s.placed_s for s in k.streams.values()))  # type: ignore[misc]
        await bench.kill(replica)
    await until(lambda: bench.client.num_held == 1)
    await bench.client.abort(["s"])
    assert bench.client.num_held == 0


async def test_a_stream_that_silences_its_replica_again_and_again_is_given_up(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    for _ in range(quarantine.MAX_UNPROVEN_LOSSES):
        await silence(bench, a)
    link = bench.link(a)
    await until(lambda: bench.failed("s") or link.streams)
    if not bench.failed("s"):
        await a.break_output_connection()
    await bench.ended("s")
    assert bench.failed("s")


async def test_a_suspect_does_not_keep_others_away(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("suspect", max_tokens=50)
    await bench.placed(a, "suspect")
    await bench.kill(a)
    await bench.placed(b, "suspect~1")
    await bench.add("s")
    await bench.placed(b, "suspect~1", "s")
    await bench.finished("s", "suspect")


async def test_an_aborted_suspect_makes_room_for_the_next(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.add("t")
    await bench.placed(a, "s", "t")
    await bench.kill(a)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await bench.client.abort(["s"])
    await bench.placed(b, "t~1")
    await bench.finished("t")
