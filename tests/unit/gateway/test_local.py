"""Calls of an OpenAI app in the same process, against small ASGI apps."""

import asyncio
import json
from typing import Any

import pytest

from kervan.errors import ConfigError, EngineError
from kervan.gateway.local import Completion, CompletionRequest, TextChunk

SEEN: list[dict[str, Any]] = []


def events(*values: Any) -> bytes:
    return b"".join(
        b"data: %s\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode()) for value in values
    )


WHOLE = events(
    {"choices": [{"text": "He", "finish_reason": None}]},
    {"choices": [{"text": "llo \u2028", "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    b"[DONE]",
)


def app(body: bytes, status: int = 200, *, cut: int = 10**9, waits: bool = False) -> Any:
    """An app that answers so, in parts of `cut` bytes; with `waits` it does not end before the client has left."""

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        SEEN.append({"scope": scope, "body": json.loads((await receive())["body"])})
        await send({"type": "http.response.start", "status": status, "headers": []})
        for begin in range(0, len(body), cut):
            await send({"type": "http.response.body", "body": body[begin : begin + cut], "more_body": True})
        if waits:
            SEEN.append(await receive())
        await send({"type": "http.response.body", "body": b""})

    async def ready() -> Any:
        return answering

    return ready


@pytest.mark.parametrize("cut", [1, 7, 10**9])
async def test_a_whole_answer(cut: int) -> None:
    answer = await CompletionRequest(app(WHOLE, cut=cut), "/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert answer == Completion("Hello \u2028", "length", 3, 2)
    asked = SEEN[-1]
    assert (asked["scope"]["path"], asked["body"]["prompt"], asked["body"]["stream"]) == ("/v1/completions", "x", True)


async def test_chunks_as_they_come() -> None:
    chat = events({"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "Hi"}}]},
                  {"choices": [{"delta": {}, "finish_reason": "stop"}]}, b"[DONE]")  # fmt: skip
    chunks = [chunk async for chunk in CompletionRequest(app(b": keep-alive\n\n" + chat), "/v1/chat/completions", {})]
    assert chunks == [TextChunk("Hi"), TextChunk("", "stop")]


@pytest.mark.parametrize(
    ("status", "error"), [(400, ConfigError), (404, ConfigError), (500, EngineError), (503, EngineError)]
)
async def test_refusals(status: int, error: type[Exception]) -> None:
    body = json.dumps({"error": {"message": "max_tokens=0; use 1 or more"}}).encode()
    with pytest.raises(error, match="max_tokens=0; use 1 or more"):
        await CompletionRequest(app(body, status, cut=5), "/v1/completions", {})
    with pytest.raises(error, match="not JSON"):
        await CompletionRequest(app(b"not JSON", status), "/v1/completions", {})


async def test_an_error_within_the_stream() -> None:
    with pytest.raises(EngineError, match="broke"):
        await CompletionRequest(
            app(events({"choices": [{"text": "a"}]}, {"error": {"message": "broke"}})), "/v1/completions", {}
        )


async def test_an_app_that_fails_is_an_error() -> None:
    async def failing(*_: Any) -> None:
        raise EngineError("no")

    async def ready() -> Any:
        return failing

    with pytest.raises(EngineError, match="no"):
        await CompletionRequest(ready, "/v1/completions", {})


async def test_leaving_the_loop_tells_the_app() -> None:
    call = CompletionRequest(app(WHOLE, waits=True), "/v1/completions", {})
    async for chunk in call:
        assert chunk.text == "He"
        break
    await asyncio.sleep(0.1)
    # The generator is closed by the garbage collector's hook, at the latest when the loop ends.
    chunks = aiter(CompletionRequest(app(WHOLE, waits=True), "/v1/completions", {}))
    assert (await anext(chunks)).text == "He"
    await chunks.aclose()  # type: ignore[attr-defined]
    assert {"type": "http.disconnect"} in SEEN
