"""The fleet client against toy replicas: placement, held streams, refusals, aborts, calls, and any order of events."""

import asyncio
import dataclasses
import math
import random
import time

import pytest
from harness.live import until
from harness.toy_fleet import SECRET, Bench, Request, ToyReplica, make_bench

from kervan.errors import EngineError
from kervan.fleet import link as link_module
from kervan.fleet import wire
from kervan.fleet.link import Member
from kervan.fleet.prefill_speed import PrefillSpeed
from kervan.policy.output_length import MIN_ANSWERS

pytestmark = pytest.mark.usefixtures("quick")


# ---- placement


def replace_risky(member: Member) -> Member:
    return dataclasses.replace(member, risky_for_s=math.inf)


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
    monkeypatch.setattr(PrefillSpeed, "observe", lambda _, tokens, ttft_s: prefilled.append(tokens))
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


async def test_streams_go_where_the_fewest_tokens_are_outstanding(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    # tokens (a, b):     (0, 0)        (100, 0)      (100, 40)      (100, 80)      (100, 120)
    for i, (length, output) in enumerate([(90, 10), (30, 10), (30, 10), (30, 10), (10, 5)]):
        await bench.add(f"s{i}", prompt=[1] * length, max_tokens=output)
    await bench.placed(a, "s0", "s4")
    await bench.placed(b, "s1", "s2", "s3")
    await bench.finished(*(f"s{i}" for i in range(5)))


async def test_other_gateways_load_counts(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    a.other_tokens = 500
    await until(lambda: bench.link(a).pong.other_tokens == 500)
    await bench.add("s")
    await bench.placed(b, "s")
    await until(lambda: b.last_ping == wire.Ping(9), "the replica learns what is outstanding: 3 prompt + 6 output")
    await bench.finished("s")


async def test_long_answers_pass_a_risky_replica_over_for_as_long_as_it_is_one(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    bench.client.set_members([replace_risky(a.member), b.member])
    before_s = bench.link(a).pong_s
    await until(lambda: bench.link(a).pong_s > before_s + 0.05, "signs of life do not end it")
    await bench.add("short", max_tokens=1023)
    await bench.placed(a, "short")
    await bench.add("short2", prompt=[1] * 200, max_tokens=1023)
    await bench.placed(b, "short2")  # a: 1026, b: 1223
    await bench.add("long", max_tokens=1024)
    await bench.placed(b, "short2", "long")
    bench.client.set_members([dataclasses.replace(a.member, risky_for_s=0.01), b.member])
    await until(lambda: not bench.link(a).load.is_risky)
    await bench.add("long2", max_tokens=1024)
    await bench.placed(a, "short", "long2")
    await bench.finished("short", "short2", "long", "long2")


async def test_answers_that_may_be_long_and_never_are_go_anywhere(bench: Bench) -> None:
    a = await bench.start("a")
    for i in range(MIN_ANSWERS):
        await bench.add(f"s{i}", max_tokens=4)
    await bench.finished(*(f"s{i}" for i in range(MIN_ANSWERS)))
    await bench.start("b")
    bench.client.set_members([replace_risky(a.member), bench.replicas["b"].member])
    await bench.add("s", max_tokens=2000)  # as many as there may be; those before it had 4
    await bench.placed(a, "s")
    await bench.finished("s")


async def test_capacity_is_the_sum_over_replicas_that_take_work(bench: Bench) -> None:
    assert bench.client.capacity_streams == 0
    await bench.start("a")
    b = await bench.start("b")
    assert bench.client.capacity_streams == 16
    await b.drain()
    await until(lambda: bench.client.capacity_streams == 8)


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


# ---- held streams


async def test_without_a_replica_a_stream_is_held_and_placed_when_one_links(bench: Bench) -> None:
    for name in ("s", "t"):
        await bench.add(name)
    assert bench.client.num_held == 2
    a = await bench.start("a")
    await bench.placed(a, "s", "t")
    assert bench.client.num_held == 0
    await bench.finished("s", "t")


async def test_a_lost_fleet_holds_its_streams_for_the_next_replica(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await bench.kill(a)
    await until(lambda: bench.client.num_held == 1)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await bench.finished("s")


async def test_a_stream_held_too_long_is_failed() -> None:
    async with make_bench(hold_timeout_s=0.0) as bench:
        await bench.add("s")
        await bench.ended("s")
        assert bench.failed("s")
        assert bench.client.counts.expired == 1
        assert bench.client.num_held == 0


async def test_a_held_stream_can_be_aborted(bench: Bench) -> None:
    await bench.add("s")
    await bench.client.abort(["s"])
    assert (bench.client.num_held, bench.client.num_streams) == (0, 0)
    a = await bench.start("a")
    await bench.add("t")
    await bench.placed(a, "t")
    await bench.finished("t")
    assert [request.request_id for request in a.added] == ["t"]


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param(
            {"engine_version": "toy-2"}, ["gateway runs vLLM toy-1, replica vLLM toy-2", "install"], id="version"
        ),
        pytest.param({"secret": "another"}, ["another fleet"], id="secret"),
    ],
)
async def test_a_refused_gateway_knows_why_and_uses_the_others(
    bench: Bench, settings: dict[str, str], words: list[str]
) -> None:
    await bench.start("a", is_awaited=False, **settings)
    await until(lambda: "a" in bench.client.refusals)
    assert all(word in bench.client.refusals["a"] for word in words)
    assert bench.client.links == []
    b = await bench.start("b")
    await bench.add("s")
    await bench.placed(b, "s")
    await bench.finished("s")


async def test_the_secret_is_in_nothing_that_a_gateway_sends(bench: Bench) -> None:
    a = await bench.start("a")
    b = await bench.start("b", is_awaited=False, secret="another")
    await until(lambda: "b" in bench.client.refusals)
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.client.call("is_sleeping", ())
    await bench.finished("s")
    await until(lambda: a.last_ping)
    for replica in (a, b):
        assert wire.HELLO in replica.received
        assert SECRET.encode() not in replica.received


async def test_a_refusal_is_forgotten_when_the_replica_accepts(bench: Bench) -> None:
    a = await bench.start("a", is_awaited=False, secret="another")
    await until(lambda: "a" in bench.client.refusals)
    a.secret = SECRET
    await until(lambda: bench.client.links)
    assert bench.client.refusals == {}


async def test_an_address_where_nobody_answers_harms_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 0.05)
    gone = ToyReplica("gone")
    gone.kill()
    bench.client.set_members([gone.member])
    await bench.add("s")
    a = await bench.start("a")
    await bench.placed(a, "s")
    await bench.finished("s")


# ---- aborts


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


# ---- utility calls


async def test_a_call_gathers_the_answers_of_all_replicas(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    assert sorted(await bench.client.call("add_lora", (7, "x"))) == ["a did add_lora", "b did add_lora"]
    assert a.calls == b.calls == [("add_lora", (7, "x"))]


async def test_a_call_waits_for_the_first_replica(bench: Bench) -> None:
    call = asyncio.create_task(bench.client.call("get_supported_tasks", ()))
    await bench.start("a")
    assert await call == ["a did get_supported_tasks"]


async def test_a_call_after_the_fleet_was_lost_waits_for_the_next_replica(bench: Bench) -> None:
    await bench.kill(await bench.start("a"))
    call = asyncio.create_task(bench.client.call("is_sleeping", ()))
    await bench.start("b")
    assert await call == ["b did is_sleeping"]


async def test_a_failed_call_names_the_replica(bench: Bench) -> None:
    await bench.start("a")
    b = await bench.start("b")
    b.call_failure = "no such adapter"
    with pytest.raises(EngineError, match="replica b: no such adapter"):
        await bench.client.call("add_lora", (7,))
    await until(lambda: not any(link.calls for link in bench.client.links), "the other replica has answered")


async def test_a_replica_that_dies_meanwhile_needs_not_answer_a_call(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.start("b")
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("sleep", ()))
    await until(lambda: a.calls)
    await bench.kill(a)
    assert await call == ["b did sleep"]


async def test_a_call_whose_replicas_all_die_is_made_to_the_next(bench: Bench) -> None:
    """As when a gateway starts while the only replica is replaced."""
    a = await bench.start("a")
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("get_supported_tasks", ()))
    await until(lambda: a.calls)
    await bench.kill(a)
    await bench.start("b")
    assert await call == ["b did get_supported_tasks"]


# ---- any order of events


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
        assert bench.client.counts.given_up == bench.client.counts.expired == 0
