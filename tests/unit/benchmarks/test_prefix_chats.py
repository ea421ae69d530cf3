"""The figures of chats, by hand, and chats with a server that tells what it found."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import prefix_chats
import pytest
from prefix_chats import ChatShape, Turn

from kervan.bench.reconcile import Counters


def test_figures_of_a_round() -> None:
    """Of 3 turns, two come after the first: 1,024 tokens could have come from the cache, 512 did."""
    turns = [Turn(0, 512, 0, 0, 0.5), Turn(1, 1088, 512, 512, 0.1), Turn(1, 1088, 512, 0, 0.3)]
    found = prefix_chats.chat_figures(turns, Counters(prefix_hits=5), Counters(prefix_hits=517, prefix_queries=2688))
    assert (found["prompt_tokens"], found["possible_tokens"], found["cached_tokens"]) == (2688, 1024, 512)
    assert (found["of_possible"], found["counted_hits"], found["counted_queries"]) == (0.5, 512, 2688)
    assert (found["first_ttft_p50_s"], found["later_ttft_p50_s"]) == (0.5, 0.2)


def test_a_table_of_rounds() -> None:
    rounds: list[dict[str, float | None]] = [
        {"possible_tokens": 1000, "of_possible": 0.6, "later_ttft_p50_s": 0.4, "first_ttft_p50_s": None},
        {"possible_tokens": 1000, "of_possible": 0.8, "later_ttft_p50_s": 0.2, "first_ttft_p50_s": None},
    ]
    row = {"routing": "least-load", "figures": prefix_chats.summary(rounds)}
    last = prefix_chats.table([row]).splitlines()[-1]
    assert last == "| least-load | 1,000 | 70.0% [60.0%, 80.0%] | - | 300 ms [200 ms, 400 ms] | - |"


@pytest.fixture
def serve() -> Callable[[int], httpx.AsyncBaseTransport]:
    """A server that answers with the number of the request, and finds whole blocks of what it had before."""

    def made(num_lost: int) -> httpx.AsyncBaseTransport:
        seen: list[list[int]] = []

        async def answer(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            prompt, count = body["prompt"], body["max_tokens"] - num_lost
            tokens = [len(seen)] * count
            known = max(sum(a == b for a, b in zip(one, prompt, strict=False)) for one in [[], *seen])
            seen.append(prompt + tokens)

            async def events() -> AsyncIterator[bytes]:
                for token in tokens:
                    yield b"data: %s\n\n" % json.dumps({"choices": [{"index": 0, "token_ids": [token]}]}).encode()
                usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": known // 16 * 16}}
                yield b"data: %s\n\ndata: [DONE]\n\n" % json.dumps({"choices": [], "usage": usage}).encode()

            return httpx.Response(200, content=events())

        return httpx.MockTransport(answer)

    return made


def test_a_chat_says_again_all_that_was_said(serve: Callable[[int], httpx.AsyncBaseTransport]) -> None:
    async def run(num_lost: int) -> list[Turn]:
        async with httpx.AsyncClient(base_url="http://server", transport=serve(num_lost)) as client:
            return await prefix_chats.chat(client, "m", ChatShape(1, 3, 40, 10, 0.0), "seed")

    turns = asyncio.run(run(0))
    assert [(t.prompt_tokens, t.possible_tokens, t.cached_tokens) for t in turns] == [
        (40, 0, 0), (90, 48, 48), (140, 96, 96),
    ]  # fmt: skip
    assert all(t.ttft_s > 0 for t in turns)
    with pytest.raises(ValueError, match="an answer has 9 tokens, 10 were asked for"):
        asyncio.run(run(1))
