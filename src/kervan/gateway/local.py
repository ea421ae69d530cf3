"""Calls of vLLM's OpenAI app in the same process: as a client would over HTTP, less HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kervan.errors import ConfigError, EngineError
from kervan.gateway.asgi import JSON, ASGIApp, Message


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A part of a completion, as it comes."""

    text: str
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion. `finish_reason`: stop, length, or what else vLLM says."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


class CompletionRequest:
    """One request: `await` it for the whole `Completion`, or iterate over its `TextChunk`s (`async for`); once.

    Both raise ConfigError for what vLLM refuses, EngineError for what fails. Leaving the loop ends the request.
    """

    def __init__(self, app: Callable[[], Awaitable[ASGIApp]], path: str, fields: Mapping[str, Any]):
        self._app = app
        self._path = path
        self._fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
        self._usage: dict[str, int] = {}

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._whole().__await__()

    async def _whole(self) -> Completion:
        text, finish = [], None
        async for chunk in self:
            text.append(chunk.text)
            finish = chunk.finish_reason or finish
        usage = self._usage
        return Completion("".join(text), finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        app = await self._app()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        body = msgspec.json.encode(self._fields)
        is_sent = False

        async def receive() -> Message:
            nonlocal is_sent
            if not is_sent:
                is_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def call_app() -> None:
            try:
                await app(self._scope(len(body)), receive, messages.put)
            finally:
                messages.put_nowait(None)

        response = asyncio.create_task(call_app())
        try:
            async for event in self._events(messages):
                if "error" in event:
                    raise EngineError(str(event["error"].get("message", event["error"])))
                self._usage = event.get("usage") or self._usage
                for choice in event.get("choices", ()):
                    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    if text or choice.get("finish_reason"):
                        yield TextChunk(text, choice.get("finish_reason"))
            await response
        finally:
            left.set()
            if not response.done():  # vLLM aborts the request when its client is gone
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(response), 1.0)
                response.cancel()
            await asyncio.gather(response, return_exceptions=True)

    def _scope(self, length: int) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"kervan"), (b"content-type", JSON), (b"content-length", b"%d" % length)],
            "client": ("kervan", 0),
            "server": ("kervan", 0),
        }

    @staticmethod
    async def _events(messages: "asyncio.Queue[Message | None]") -> AsyncIterator[dict[str, Any]]:
        """The JSON of the answer's events; a response that is no stream is an error."""
        status, rest = 0, b""
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                status = message["status"]
                continue
            rest += message.get("body", b"")
            if status != 200:
                if message.get("more_body", False):
                    continue
                raise _refusal(status, rest)
            *lines, rest = rest.split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield msgspec.json.decode(data)


def _refusal(status: int, body: bytes) -> Exception:
    try:
        message = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        message = body.decode(errors="replace")[:300]
    return ConfigError(message) if 400 <= status < 500 else EngineError(f"{message} (status {status})")
