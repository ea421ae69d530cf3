"""Links to toy replicas: refused, lost, made again."""

import asyncio

import pytest
from harness.live import until
from harness.toy_fleet import SECRET, Bench, ToyReplica

from kervan.fleet import link as link_module
from kervan.fleet import wire

pytestmark = pytest.mark.usefixtures("quick")


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


async def test_a_refusal_is_forgotten_when_the_replica_accepts(bench: Bench) -> None:
    a = await bench.start("a", is_awaited=False, secret="another")
    await until(lambda: "a" in bench.client.refusals)
    a.secret = SECRET
    await until(lambda: bench.client.links)
    assert bench.client.refusals == {}


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


async def test_an_address_where_nobody_answers_harms_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 0.05)
    gone = ToyReplica("gone")
    gone.kill()
    bench.client.set_members([gone.member])
    await bench.add("s")
    a = await bench.start("a")
    await bench.placed(a, "s")
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
    counts = bench.client.counts
    assert counts.moved == 1
    assert (counts.broken_links, counts.lost_replicas, counts.returned_replicas) == (1, 0, 1)  # no replica was lost


async def test_a_replica_that_returns_at_its_address_is_linked_again(bench: Bench) -> None:
    a = await bench.start("a")
    first = bench.link(a)
    await a.say_dead()
    await until(lambda: bench.client.links and bench.link(a) is not first)
    await bench.add("s")
    await bench.finished("s")


async def test_a_link_whose_session_the_replica_has_ended_is_made_again(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", max_tokens=20)
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("is_sleeping", ()))
    await until(lambda: a.calls)
    before = bench.link(a)
    a.is_silent_to_calls = False
    a.end_sessions()  # the gateway's loop stood still for the length of a lease, and its connections lived
    await until(lambda: bench.client.links and bench.link(a) is not before)
    assert await call == ["a did is_sleeping"]
    await bench.finished("s")


async def test_a_member_that_is_no_longer_listed_keeps_its_streams(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    bench.client.set_members([])  # the directory restarted empty
    await bench.add("t")
    await bench.finished("s", "t")
