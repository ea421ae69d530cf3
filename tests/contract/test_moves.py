"""Moves as a client sees them: vLLM's OpenAI server over a replica whose streams move after every one of their tokens.

Nothing here is on Ray. What moves is exact in itself (`test_resume.py`); here is what stays in the gateway, above it.
"""

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.moving_fleet import MovingFleet, deltas
from harness.shared_fleet import Models
from harness.sweeps import positions
from harness.warm_place import WarmPlace

from kervan.demo import PAIRS, REASONED, TOOL_TURN, WEATHER_TOOL

# Each test sweeps the places of its moves: some in `make test`, all in `make exhaustive`.
pytestmark = [pytest.mark.sweep(99), pytest.mark.timeout(600)]

QUESTION, ANSWER = list(PAIRS.items())[2]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_count = itertools.count()


@pytest.fixture(scope="module")
def moving(models: Models, scratch: Path, warm_place: WarmPlace) -> Iterator[MovingFleet]:
    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "served_model_name": "tiny",
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
    }
    moving = MovingFleet(models.demo, arguments, scratch, warm_place)
    yield moving
    moving.close()


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any], when: str) -> dict[str, Any]:
    chunks = []
    request = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, **body}
    headers = {"X-Request-Id": f"{when}-{next(_count)}-"}
    async with client.stream("POST", path, json=request, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
    return deltas(chunks)


async def compare(moving: MovingFleet, path: str, body: dict[str, Any], *, num_cuts: int = 24) -> dict[str, Any]:
    """The answer, if it is the same without a move, with one after some of its first tokens, and with one after all."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=moving.url, timeout=120, limits=limits) as client:
        whole = await streamed(client, path, body, "stay")
        num_choices = sum(isinstance(key, int) for key in whole)
        num_tokens = whole["usage"]["completion_tokens"] // num_choices
        cuts = positions(min(num_cuts, num_tokens) - 1, str(body))
        whens = ["move-always", *(f"move{1 + cut}" for cut in cuts)]
        moving.num_moves()
        for some in itertools.batched(whens, 16) if hasattr(itertools, "batched") else [whens]:
            answers = await asyncio.gather(*(streamed(client, path, body, when) for when in some))
            for when, answer in zip(some, answers, strict=True):
                assert answer == whole, when
        # A stop string ends a stream a few tokens late, or before its last move.
        assert moving.num_moves() >= num_choices * (len(whens) - 1 + num_tokens - 1) - 8
    return whole


def chat(text: str, *, thinks: bool = False, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"messages": [message], "temperature": 0, "chat_template_kwargs": {"enable_thinking": thinks}, **more}


async def test_text_and_usage(moving: MovingFleet) -> None:
    whole = await compare(moving, CHAT, chat(QUESTION))
    assert whole[0]["text"] == ANSWER
    assert whole[0]["finish"] == ("stop", None)


async def test_stop_strings_that_span_a_move(moving: MovingFleet) -> None:
    start = ANSWER.index("pause")
    stop = ANSWER[start - 6 : start + 9]
    whole = await compare(moving, CHAT, chat(QUESTION, stop=[stop]))
    assert whole[0]["text"] == ANSWER[: start - 6]
    assert whole[0]["finish"] == ("stop", stop)


async def test_characters_of_several_tokens(moving: MovingFleet) -> None:
    text = "na\u00efve \u6f22\u5b57 \U0001f42a\U0001f3dc!"
    whole = await compare(moving, CHAT, chat(QUESTION, structured_outputs={"choice": [text]}))
    assert whole[0]["text"] == text
    assert whole["usage"]["completion_tokens"] > len(text)


async def test_tool_calls(moving: MovingFleet) -> None:
    whole = await compare(moving, CHAT, chat(TOOL_TURN[0]["content"], tools=[WEATHER_TOOL]))
    ((name, arguments),) = whole[0]["calls"].values()
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Ankara"})
    assert whole[0]["finish"][0] == "tool_calls"


async def test_reasoning(moving: MovingFleet) -> None:
    question, answer = REASONED
    whole = await compare(moving, CHAT, chat(question, thinks=True), num_cuts=40)
    thoughts, _, told = answer.removeprefix("<think>").partition("</think>")
    assert (whole[0]["reasoning"].strip(), whole[0]["text"].strip()) == (thoughts.strip(), told.strip())


async def test_reasoning_before_a_grammar(moving: MovingFleet) -> None:
    wanted = {"structured_outputs": {"regex": "[0-9]{2} camels"}}
    whole = await compare(moving, CHAT, chat(REASONED[0], thinks=True, **wanted), num_cuts=40)
    assert whole[0]["text"].strip().endswith(" camels")
    assert whole[0]["reasoning"]


async def test_logprobs(moving: MovingFleet) -> None:
    whole = await compare(moving, CHAT, chat(QUESTION, max_tokens=20, logprobs=True, top_logprobs=2))
    assert len(whole[0]["logprobs"]) == 20
    plain = {"prompt": "A caravan is", "temperature": 0, "max_tokens": 12, "logprobs": 1}
    assert len((await compare(moving, COMPLETIONS, plain))[0]["logprobs"]) == 12


async def test_echo(moving: MovingFleet) -> None:
    plain = {"prompt": "A caravan is", "temperature": 0, "max_tokens": 12, "echo": True}
    assert (await compare(moving, COMPLETIONS, plain))[0]["text"].startswith("A caravan is")


async def test_echo_with_logprobs_tells_the_prompt_once(moving: MovingFleet) -> None:
    plain = {"prompt": "A caravan is", "temperature": 0, "max_tokens": 8, "echo": True, "logprobs": 1}
    whole = await compare(moving, COMPLETIONS, plain)
    assert "".join(token for token, _ in whole[0]["logprobs"]).count("A caravan is") == 1


async def test_several_choices_of_one_seed(moving: MovingFleet) -> None:
    """Each choice is a stream of its own, with a seed of its own, and moves by itself."""
    sampling = {"n": 3, "temperature": 2.0, "seed": 4, "max_tokens": 20}
    whole = await compare(moving, CHAT, chat(QUESTION, **sampling))
    assert len({whole[index]["text"] for index in range(3)}) > 1


async def test_penalties_min_tokens_and_the_end(moving: MovingFleet) -> None:
    sampling = {"frequency_penalty": 1.5, "presence_penalty": 1.0, "min_tokens": 30, "max_tokens": 40}
    whole = await compare(moving, CHAT, chat(REASONED[0], **sampling), num_cuts=40)
    assert whole["usage"]["completion_tokens"] >= 30


async def test_an_answer_in_one_piece(moving: MovingFleet) -> None:
    async with httpx.AsyncClient(base_url=moving.url, timeout=60) as client:
        request = {"model": "tiny", **chat(QUESTION)}
        answer = await client.post(CHAT, json=request, headers={"X-Request-Id": "move-always"})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


async def test_no_client_says_what_a_stream_has_generated(moving: MovingFleet) -> None:
    async with httpx.AsyncClient(base_url=moving.url, timeout=60) as client:
        request = {"model": "tiny", **chat(QUESTION), "vllm_xargs": {"kervan_generated": [5, 6, 7]}}
        answer = await client.post(CHAT, json=request)
    assert answer.status_code == 400
    assert "kervan's own word" in answer.text


# ---- clients that leave and come back: the stream goes through the app once more


async def comes_back(client: httpx.AsyncClient, path: str, body: dict[str, Any], after: int) -> dict[str, Any]:
    """What a client is told that leaves after so many events, and comes back."""
    chunks: list[dict[str, Any]] = []
    last, stream_id = "", ""
    request = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, **body}
    for visit in range(2):
        if visit == 0:
            answering = client.stream("POST", path, json=request)
        else:
            answering = client.stream("GET", f"/v1/streams/{stream_id}", headers={"Last-Event-ID": last})
        async with answering as answer:
            assert answer.status_code == 200, await answer.aread()
            stream_id = answer.headers["x-kervan-stream-id"]
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    last = line.removeprefix("id: ")
                elif line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                elif visit == 0 and not line and len(chunks) == after:
                    break
    assert len({chunk["id"] for chunk in chunks}) == 1
    return deltas(chunks)


PLAIN = {"prompt": "A caravan is", "temperature": 0, "max_tokens": 12}


@pytest.mark.sweep(4)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(QUESTION)),
        (CHAT, chat(QUESTION, stop=[ANSWER[ANSWER.index("pause") - 6 : ANSWER.index("pause") + 9]])),
        (CHAT, chat(QUESTION, structured_outputs={"choice": ["na\u00efve \u6f22\u5b57 \U0001f42a\U0001f3dc!"]})),
        (CHAT, chat(TOOL_TURN[0]["content"], tools=[WEATHER_TOOL])),
        (CHAT, chat(REASONED[0], thinks=True)),
        (CHAT, chat(QUESTION, seed=4, max_tokens=20) | {"temperature": 2.0}),
        (CHAT, chat(QUESTION, max_tokens=20, logprobs=True, top_logprobs=2)),
        (COMPLETIONS, PLAIN | {"logprobs": 1, "echo": True}),
        (COMPLETIONS, PLAIN | {"return_token_ids": True}),
    ],
    ids=["text", "stop string", "characters", "tool call", "reasoning", "seed", "logprobs", "echo", "token ids"],
)
async def test_a_client_that_comes_back_is_told_the_rest(moving: MovingFleet, path: str, body: dict[str, Any]) -> None:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=moving.url, timeout=120, limits=limits) as client:
        whole = await streamed(client, path, body, "stay")
        afters = [1 + position for position in positions(16, str(body))]
        answers = await asyncio.gather(*(comes_back(client, path, body, after) for after in afters))
    for after, answer in zip(afters, answers, strict=True):
        assert answer == whole, after


async def test_an_unseeded_answer_does_not_change_where_it_was_told(moving: MovingFleet) -> None:
    """A client that comes back twice to the same place is told the same: what was generated stays."""
    body = {"model": "tiny", "stream": True, **chat(QUESTION, max_tokens=20)} | {"temperature": 2.0}
    async with httpx.AsyncClient(base_url=moving.url, timeout=120) as client:
        async with client.stream("POST", CHAT, json=body) as answer:
            stream_id = answer.headers["x-kervan-stream-id"]
            first = (await answer.aread()).decode()
        again = (await client.get(f"/v1/streams/{stream_id}")).text

    def told(text: str) -> dict[str, Any]:
        return deltas([json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")])

    assert told(first) == told(again)
