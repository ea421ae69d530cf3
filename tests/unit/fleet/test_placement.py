"""Where the fleet client places streams, and when it holds them."""

import dataclasses
import math

import pytest
from harness.live import until
from harness.toy_fleet import Bench, ToyReplica, make_bench

from kervan.fleet import wire
from kervan.fleet.link import Member
from kervan.policy.output_length import MIN_ANSWERS
from kervan.policy.session_ring import SessionRing

pytestmark = pytest.mark.usefixtures("quick")


def replace_risky(member: Member) -> Member:
    return dataclasses.replace(member, risky_for_s=math.inf)


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
        assert bench.client.counts.broken["expired"] == 1
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


# ---- by prefix: a toy replica's blocks have 16 tokens, so that a span has 64


def chat(seed: int, num_tokens: int) -> list[int]:
    return [1 + (seed * 7919 + i * i) % 500 for i in range(num_tokens)]


async def whole(bench: Bench, request_id: str, prompt: list[int], max_tokens: int = 2) -> list[int]:
    """Prompt and answer of a stream that nothing else runs beside."""
    await bench.add(request_id, prompt=prompt, max_tokens=max_tokens)
    await bench.finished(request_id)
    return [*prompt, *bench.tokens[request_id]]


def ran(replica: ToyReplica) -> list[str]:
    return [request.request_id for request in replica.added]


async def test_a_chat_comes_back_to_the_replica_that_has_what_it_said_before(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("long", prompt=chat(1, 10), max_tokens=500)
    await bench.placed(a, "long")  # so that b has less to do
    said = await whole(bench, "turn1", chat(2, 100))
    b.other_tokens = 600
    await until(lambda: bench.link(b).load.outstanding_tokens == 600)
    assert ran(b) == ["turn1"]
    await whole(bench, "other", chat(3, 100))
    await bench.add("turn2", prompt=[*said, *chat(4, 50)])
    await bench.placed(b, "turn2")
    assert ran(a) == ["long", "other"]
    assert bench.link(b).load.own_tokens == 102 + 50 + 6 - 64, "what the cache has is not to be done"
    assert bench.link(b).load.queued_tokens == 102 + 50 - 64
    await bench.finished("turn2", "long")
    assert (bench.link(b).load.queued_tokens, bench.link(a).load.queued_tokens) == (0, 0)
    tally = bench.link(b).tally
    assert (tally.predicted_cached_tokens, tally.possible_cached_tokens, tally.cached_tokens) == (64, 64, 0)


async def test_answers_are_part_of_the_prefix_but_for_their_last_token(bench: Bench) -> None:
    a = await bench.start("a")
    said = await whole(bench, "turn1", chat(2, 100), max_tokens=29)
    assert len(said) == 129
    await whole(bench, "turn2", [*said, *chat(3, 20)])
    assert bench.link(a).tally.predicted_cached_tokens == 128
    await whole(bench, "turn1b", chat(5, 100), max_tokens=28)  # its last token would have ended the span
    await whole(bench, "turn2b", [*chat(5, 100), *bench.tokens["turn1b"], *chat(6, 20)])
    assert bench.link(a).tally.predicted_cached_tokens == 128 + 64


async def test_equal_prompts_that_come_at_once_are_computed_once(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    for name in ("s", "t", "u"):
        await bench.add(name, prompt=chat(1, 1000))
    await bench.placed(a, "s", "t", "u")
    assert bench.link(a).load.queued_tokens == 1000 + 2 * 40  # 15 spans of 64 are there, or will be
    assert not b.added
    await bench.finished("s", "t", "u")


async def test_a_move_takes_the_prefix_along_and_a_lost_replica_begins_empty(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=chat(1, 120), max_tokens=50)
    await bench.placed(a, "s")
    await bench.steps(a, 10)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    assert bench.link(b).load.queued_tokens == 130
    a = await bench.start("a")
    said = [*chat(1, 120), *bench.tokens["s"][:10]]
    await bench.add("t", prompt=[*said, 7], max_tokens=20)  # b has 128 of its 131 tokens
    await bench.placed(b, "s~1", "t")
    assert bench.link(b).load.queued_tokens == 130 + 3
    assert not a.added
    await bench.finished("s", "t")


async def test_what_names_its_session_goes_to_the_sessions_replica_where_nothing_else_is_known(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    ring = SessionRing(["a", "b"])
    session = next(name for name in map(str, range(99)) if ring.home(name) == "b")
    for n in range(3):
        with bench.client.take_room(1, is_bulk=False, session=session):
            await whole(bench, f"s{n}", chat(n, 30))
        await whole(bench, f"t{n}", chat(n, 30))  # without a session: the first of two idle ones
    assert (ran(b), ran(a)) == (["s0", "s1", "s2"], ["t0", "t1", "t2"])


async def test_emptied_caches_are_known_to_be_empty(bench: Bench) -> None:
    a = await bench.start("a")
    await whole(bench, "s", chat(1, 100))
    await bench.client.call("reset_prefix_cache", ())
    await whole(bench, "t", chat(1, 100))
    assert bench.link(a).tally.predicted_cached_tokens == 0
    await whole(bench, "u", chat(1, 100))
    assert bench.link(a).tally.predicted_cached_tokens == 64


async def test_what_the_engine_had_of_a_prompt_corrects_what_is_expected(bench: Bench) -> None:
    a = await bench.start("a")
    a.cached_tokens = 32
    for n in range(3):
        await whole(bench, f"s{n}", chat(1, 100))
    tally = bench.link(a).tally
    assert (tally.predicted_cached_tokens, tally.cached_tokens) == (128, 96)
    assert bench.link(a).load.prefix_trust == pytest.approx(1 - 0.5 * (1 - (15 / 16) ** 2))


@pytest.mark.parametrize("why", ["least-load", "no cache", "block size unknown"])
async def test_without_a_cache_or_a_wish_for_it_prefixes_do_not_count(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_bench(routes_by_prefix=why != "least-load") as bench:
        block_size = 0 if why == "block size unknown" else 16
        a, b = await bench.start("a", block_size=block_size), await bench.start("b", block_size=block_size)
        if why == "no cache":
            bench.client.prefixes.is_on = False
        for name in ("s", "t"):
            await bench.add(name, prompt=chat(1, 1000))
        await bench.placed(a, "s")
        await bench.placed(b, "t")
        await bench.finished("s", "t")


async def test_replicas_of_another_block_size_are_no_part_of_it(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b", block_size=32)
    await whole(bench, "s", chat(1, 200))
    a.kill()
    await bench.lost(a)
    await whole(bench, "t", chat(1, 200))
    assert bench.link(b).tally.possible_cached_tokens == 0
    await bench.start("c", block_size=32)  # the first one of a new table, as a has left
    for name in ("u", "v"):
        await bench.add(name, prompt=chat(3, 200))
    await bench.finished("u", "v")
    assert sum(bench.link(replica).tally.predicted_cached_tokens for replica in (b, bench.replicas["c"])) in (0, 192)


async def test_ids_that_no_vocabulary_has_are_placed_by_load(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[1 << 40] * 100)
    await bench.placed(a, "s")
    await bench.finished("s")


async def with_two_gateways(bench: Bench, replica: ToyReplica) -> None:
    replica.num_gateways = 2
    await until(lambda: bench.link(replica).load.num_gateways == 2)


async def test_gateways_find_the_prefix_of_a_chat_whose_turns_meet_both_of_them() -> None:
    async with make_bench() as one, make_bench() as two:
        b = await one.start("b")
        await whole(one, "alone", chat(1, 200))
        await until(lambda: b.last_ping is not None)
        assert not b.prefixes_heard, "there is nobody to tell"
        await with_two_gateways(one, b)
        said = await whole(one, "turn1", chat(2, 200))
        await until(
            lambda: len(b.prefixes_heard) >= 6 * 8, "what it knew before, for the one that has come, and 3 spans more"
        )
        a2, b2 = await two.start("a"), await two.start("b")
        b2.prefixes_to_tell = bytes(b.prefixes_heard)
        await until(lambda: bool(two.link(b2).pong.prefixes))
        await two.add("turn2", prompt=[*said, *chat(3, 100)])
        await two.placed(b2, "turn2")
        assert two.link(b2).load.queued_tokens == 302 - 192
        await two.finished("turn2")
        await two.add("other", prompt=[*chat(1, 200), 7])  # since before the second gateway came
        await two.placed(b2, "other")
        await two.finished("other")
        assert not a2.added


async def test_what_is_told_of_prefixes_is_bounded_and_told_once(bench: Bench) -> None:
    a = await bench.start("a")
    await with_two_gateways(bench, a)
    for n in range(4):
        await bench.add(f"s{n}", prompt=chat(n, 64 * 800), max_tokens=1)
        assert len(bench.link(a).news) <= wire.MAX_NEWS_BYTES  # 800 spans more each time
    await bench.finished(*(f"s{n}" for n in range(4)))

    async def next_pong() -> None:
        before_s = bench.link(a).pong_s
        await until(lambda: bench.link(a).pong_s > before_s and not bench.link(a).news)

    async def heard(*, request_id: str) -> int:
        await whole(bench, request_id, chat(9, 640), max_tokens=1)
        await next_pong()
        await next_pong()  # to a PING that was sent after the one before it had come
        return len(a.prefixes_heard)

    assert await heard(request_id="once") == await heard(request_id="again")


async def test_what_is_told_may_be_cut_off(bench: Bench) -> None:
    a = await bench.start("a")
    a.prefixes_to_tell = b"\x01" * 13
    await until(lambda: bool(bench.link(a).pong.prefixes))
    await whole(bench, "s", chat(1, 100))
