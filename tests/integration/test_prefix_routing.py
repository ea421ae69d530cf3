"""Chats on a fleet of twins with two gateways: each request is a connection of its own, so it meets any of them."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from harness.live import START_S, Fleet, Home, eventually_async
from harness.shared_fleet import Models
from harness.twin_load import kervan

from kervan.policy import routing
from kervan.policy.session_ring import SessionRing

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

BLOCK = 16
ISL, OSL = 96, 20  # of a turn; the model takes 2,048
FOUND = 0.95  # of what the caches could give
# What a gateway sends it tells half a second later at most, and the others hear that half a second later at most.
NEWS_S = 1.2
MOST_TURNS = 5


@contextmanager
def fleet_of_twins(
    home: Home, models: Models, name: str, *arguments: str, replicas: int, gateways: int
) -> Iterator[Fleet]:
    """Twins with routing as it is by default, on the Ray of the shared fleet."""
    config = home.scratch / f"{name}.yaml"
    config.write_text(json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": 0.02}}))
    arguments = (
        "max_model_len=2048", "served_model_name=twin", "enable_prompt_tokens_details=true", "enable_lora=true",
        f'lora_modules=["adapter={models.adapter}"]', *arguments,
    )  # fmt: skip
    numbers = ("--replicas", str(replicas), "--gateways", str(gateways))
    yield home.up(models.demo, name, arguments, "--config", str(config), *numbers)
    assert home.kervan("down", "--name", name).returncode == 0


@pytest.fixture(scope="module")
def twins(home: Home, models: Models, twins: Fleet) -> Iterator[Fleet]:
    """Three twins and two gateways."""
    with fleet_of_twins(home, models, "prefix", replicas=3, gateways=2) as running:
        yield running


def ids(rng: random.Random, count: int) -> list[int]:
    return [20 + rng.randrange(200) for _ in range(count)]


async def ask(
    fleet: Fleet, prompt: list[int], osl: int = OSL, *, session: str = "", **more: Any
) -> tuple[list[int], int]:
    """(the answer, prompt tokens from the cache), over a new connection."""
    body = {"model": "twin", "prompt": prompt, "max_tokens": osl, "ignore_eos": True, "return_token_ids": True} | more
    headers = {"x-session-id": session} if session else {}
    async with httpx.AsyncClient(base_url=fleet.url, timeout=START_S, headers=headers) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    details = answer["usage"]["prompt_tokens_details"] or {}
    return answer["choices"][0]["token_ids"], details.get("cached_tokens") or 0


@dataclass
class Chat:
    """`possible`, `found`: prompt tokens that the caches could give, and gave, since they were last read."""

    rng: random.Random
    said: list[int] = field(default_factory=list)
    possible: int = 0
    found: int = 0

    async def turn(self, fleet: Fleet, osl: int = OSL) -> None:
        prompt = self.said + ids(self.rng, ISL)
        self.possible += max(0, len(self.said) - 1) // BLOCK * BLOCK
        answer, cached = await ask(fleet, prompt, osl)
        self.found += cached
        self.said = prompt + answer


def share(chats: list[Chat]) -> float:
    """Found of the possible since the last call."""
    found, possible = sum(chat.found for chat in chats), sum(chat.possible for chat in chats)
    for chat in chats:
        chat.found = chat.possible = 0
    return found / possible


async def find_all(fleet: Fleet, chats: list[Chat]) -> None:
    """Turn after turn, until what gateways tell each other, twice a second, is told and the caches give what they can."""
    shares: list[float] = []

    while not shares or shares[-1] < FOUND:
        assert len(shares) < MOST_TURNS, f"found of the possible, by turn: {shares}"
        await asyncio.gather(*(chat.turn(fleet) for chat in chats))
        shares.append(share(chats))
        await asyncio.sleep(NEWS_S)


async def begun(fleet: Fleet, seed: int, count: int = 9) -> list[Chat]:
    """Chats that have found their caches."""
    await asyncio.to_thread(fleet.wait_until_whole, 3, 2)
    chats = [Chat(random.Random(f"{seed} {n}")) for n in range(count)]
    await asyncio.gather(*(chat.turn(fleet) for chat in chats))
    for chat in chats:
        chat.possible = chat.found = 0
    await find_all(fleet, chats)
    return chats


def served(fleet: Fleet) -> dict[str, float]:
    """First tokens that each replica gave."""
    counts: dict[str, float] = {}
    for labels, value in fleet.metrics()["kervan_time_to_first_token_seconds_count"]:
        counts[labels["replica"]] = counts.get(labels["replica"], 0) + value
    return counts


async def test_chats_find_their_cache_whichever_gateway_they_meet(twins: Fleet) -> None:
    before = served(twins)
    chats = await begun(twins, 1)
    after = served(twins)
    assert all(after[name] > before.get(name, 0) for name in after), "all replicas have chats"
    names = ("predicted", "possible", "hit")
    predicted, possible, hit = (twins.total(f"kervan_prefix_{name}_tokens_total") for name in names)
    assert 0 < predicted <= possible
    assert hit >= FOUND * predicted
    assert len(chats[0].said) >= 2 * (ISL + OSL)


async def test_a_prompt_that_all_begin_with_fills_no_replica_beyond_its_bound(twins: Fleet) -> None:
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    rng = random.Random(2)
    system = ids(rng, 1024)
    asks = [asyncio.create_task(ask(twins, system + ids(rng, 40), 150)) for _ in range(60)]
    most: list[tuple[float, float]] = []
    while not all(one.done() for one in asks):
        page = await asyncio.to_thread(twins.metrics)  # in this thread it would hold up the streams
        running = [
            value + waiting
            for (_, value), (_, waiting) in zip(
                *(page[f"kervan_replica_{name}"] for name in ("running", "waiting")), strict=True
            )
        ]
        if sum(running) > 30:
            most.append((max(running), routing.stream_bounds(sum(running) / len(running))[1]))
        await asyncio.sleep(0.1)
    answers = await asyncio.gather(*asks)
    assert most
    # A gateway takes the other one to send as many as it does itself, and hears half a second later of what it sent.
    assert all(loaded <= 1.25 * bound for loaded, bound in most), most
    assert sum(cached for _, cached in answers) >= 0.9 * 57 * 1024  # each replica computes it once


async def test_tenants_and_adapters_share_no_prefix(twins: Fleet) -> None:
    prompt = ids(random.Random(3), 400)
    tenants: list[dict[str, Any]] = [{"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"model": "adapter"}]
    for tenant in tenants:
        assert (await ask(twins, prompt, 4, **tenant))[1] == 0

    await asyncio.sleep(NEWS_S)
    found = [(await ask(twins, prompt, 4, **tenant))[1] for tenant in tenants]
    assert found == [384] * len(tenants)


async def test_sessions_go_to_one_replica_where_prompts_are_too_short_to_tell(twins: Fleet) -> None:
    """Of prompts that begin alike in fewer than 64 tokens nothing is known; without sessions, the first replica of
    an idle fleet would get them all."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    before, rng = served(twins), random.Random(4)
    ring, expected = SessionRing(before), dict.fromkeys(before, 0)
    for n in range(9):
        for _ in range(2):
            await ask(twins, ids(rng, 30), 2, session=f"session {n}")
            expected[str(ring.home(f"session {n}"))] += 1
    assert {name: count - before[name] for name, count in served(twins).items()} == expected
    assert min(expected.values()) > 0


async def test_streams_that_move_take_their_prefix_along(twins: Fleet) -> None:
    chats = await begun(twins, 5)
    leaving = twins.status()["replicas"][0]["id"]
    turns = [asyncio.create_task(chat.turn(twins, 500)) for chat in chats]  # 10 s
    await asyncio.sleep(1)
    moved = twins.total("kervan_streams_moved_total")
    await kervan(twins, "drain", leaving, "--deadline", "30s")
    await asyncio.gather(*turns)
    assert twins.total("kervan_streams_moved_total") > moved
    share(chats)
    await find_all(twins, chats)


async def test_a_gateway_that_comes_is_told_of_what_the_others_know(twins: Fleet) -> None:
    chats = await begun(twins, 6)
    gateway, pid = next(iter(twins.gateway_pids().items()))
    os.kill(pid, signal.SIGKILL)

    await eventually_async(lambda: gateway not in twins.gateway_pids(), "its actor has left", START_S)
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    await find_all(twins, chats)


async def test_a_replica_that_was_lost_is_expected_to_have_nothing(twins: Fleet) -> None:
    chats = await begun(twins, 7)
    os.kill(twins.pids()[0], signal.SIGKILL)
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    await find_all(twins, chats)
    names = ("predicted", "hit")
    predicted, hit = (twins.total(f"kervan_prefix_{name}_tokens_total") for name in names)
    assert hit >= FOUND * predicted


def test_with_prefix_caching_off_routing_by_prefix_is_off(home: Home, models: Models, twins: Fleet) -> None:
    """On a small fleet of its own: to change the other one would start all of it anew, and once more to change it back."""
    chats = [Chat(random.Random(f"off {n}")) for n in range(4)]

    async def talk(fleet: Fleet) -> None:
        for _ in range(3):
            await asyncio.gather(*(chat.turn(fleet) for chat in chats))

    with fleet_of_twins(home, models, "off", "enable_prefix_caching=false", replicas=2, gateways=1) as fleet:
        asyncio.run(talk(fleet))
        assert share(chats) == 0
        assert fleet.total("kervan_prefix_possible_tokens_total") == 0
