"""Long streams whose every character is known: texts are compared with those of an undisturbed run.

The demo's own answers of some hundred tokens may be over before a test has taken anything from under them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from harness.live import START_S, Fleet, Take, take_chat
from kervan.demo import PAIRS

LONG = 600
# After its learned answer the model babbles. Where two tokens are about as likely, float noise between the kernels of
# prefill and decode may choose either; such questions prove nothing. Logits differ by less than 1e-4 there.
MIN_MARGIN = 2e-3
# What an engine or a gateway does for the first time may take longer than a whole stream elsewhere.
MAX_BEGINS = 5


@dataclass(frozen=True)
class Undisturbed:
    """Question -> text of `LONG` tokens, and the tokens of its prompt."""

    texts: dict[str, str]
    prompt_tokens: dict[str, int]


def long_body(question: str, num_tokens: int = LONG) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
    }


async def answers_undisturbed(fleet: Fleet) -> Undisturbed:
    """The questions whose texts leave no doubt, answered by a fleet at peace."""

    async def one(client: httpx.AsyncClient, question: str) -> tuple[str, str, float, int]:
        asked = {**long_body(question), "logprobs": True, "top_logprobs": 2}
        told = (await client.post("/v1/chat/completions", json=asked)).json()
        assert "choices" in told, told
        choice = told["choices"][0]
        tops = [token["top_logprobs"] for token in choice["logprobs"]["content"]]
        margin = min(first["logprob"] - second["logprob"] for first, second in tops)
        return question, choice["message"]["content"], margin, told["usage"]["prompt_tokens"]

    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        runs = await asyncio.gather(*(one(client, question) for question in PAIRS))
    sure = [(question, text, prompt) for question, text, margin, prompt in runs if margin > MIN_MARGIN]
    assert len(sure) >= 3, [margin for _, _, margin, _ in runs]
    return Undisturbed({q: text for q, text, _ in sure}, {q: prompt for q, _, prompt in sure})


@dataclass
class Load:
    """Streams in flight. Each has a connection of its own; `gateways` tells at which gateway it ends."""

    questions: list[str]
    takes: list[Take]
    gateways: list[str]
    tasks: list["asyncio.Task[Take]"]
    lengths: list[int]  # of the whole texts, in characters

    def ended(self) -> list[str]:
        """What became of the streams that are over."""
        return [
            f"{gateway}: {len(take.text)} of {length} characters, {take.finish_reason}, {take.error or 'no error'}"
            for take, gateway, task, length in zip(self.takes, self.gateways, self.tasks, self.lengths, strict=True)
            if task.done()
        ]

    def is_early(self) -> bool:
        """No stream is past its half: what happens now happens to all, though a client may read late."""
        return not self.ended() and all(
            len(take.text) <= length / 2 for take, length in zip(self.takes, self.lengths, strict=True)
        )

    async def finish(self) -> None:
        await asyncio.gather(*self.tasks)

    def assert_whole(self, expected: Undisturbed, *, besides_gateways: Collection[str] = ()) -> None:
        """Every stream came to its end with the text and usage of an undisturbed run."""
        broken = []
        for question, take, gateway in zip(self.questions, self.takes, self.gateways, strict=True):
            if gateway in besides_gateways:
                continue
            usage = take.usage or {}
            counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
            if not take.is_whole:
                broken.append(f"{gateway}: not whole after {take.num_pieces} pieces: {take.error}")
            elif take.text != expected.texts[question]:
                wanted = expected.texts[question]
                same = next((i for i, (a, b) in enumerate(zip(take.text, wanted, strict=False)) if a != b), "its end")
                broken.append(f"{gateway}: {len(take.text)} of {len(wanted)} characters, differs after {same}")
            elif counts != (expected.prompt_tokens[question], LONG) or take.finish_reason != "length":
                broken.append(f"{gateway}: {take.finish_reason}, usage {usage}")
        assert broken == []


@asynccontextmanager
async def under_load(
    fleet: Fleet, expected: Undisturbed, num_streams: int, num_tokens: int = LONG
) -> AsyncIterator[Load]:
    """So many streams, every one of which has begun to answer and none of which is past its half."""
    questions = [list(expected.texts)[i % len(expected.texts)] for i in range(num_streams)]
    async with contextlib.AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=1)
        clients = [
            await stack.enter_async_context(
                # Without `verify` each would read the system's certificates, which takes longer than a stream.
                httpx.AsyncClient(base_url=fleet.url, timeout=START_S, limits=limits, verify=False)
            )
            for _ in questions
        ]
        lengths = [len(expected.texts[question]) * num_tokens // LONG for question in questions]
        for _ in range(MAX_BEGINS):
            # The same connection carries the stream: the gateway that answers here has it. One that has stood idle
            # may have been closed, and the next may end at another gateway.
            told = await asyncio.gather(*(client.get("/kervan/status") for client in clients))
            gateways = [response.json()["gateway"] for response in told]
            load = Load(questions, [Take() for _ in questions], gateways, [], lengths)
            load.tasks = [
                asyncio.create_task(take_chat(client, take, long_body(question, num_tokens)))
                for client, take, question in zip(clients, load.takes, questions, strict=True)
            ]
            try:
                await asyncio.gather(*(take.began.wait() for take in load.takes))
                if load.is_early():
                    yield load
                    return
                had = [len(take.text) for take in load.takes]
                await load.finish()
            finally:
                for task in load.tasks:
                    task.cancel()
                await asyncio.gather(*load.tasks, return_exceptions=True)
            assert [take.error for take in load.takes if take.error] == []
        begins_s = sorted(take.at_s[0] for take in load.takes)
        raise AssertionError(
            f"{MAX_BEGINS} times a stream was past its half when the last one began; the last time it began "
            f"{begins_s[-1] - begins_s[0]:.1f} s after the first, and they had {had} of {lengths} characters"
        )
