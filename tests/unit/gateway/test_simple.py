import asyncio
import json
from typing import Any

import pytest

from kervan.gateway import simple
from kervan.gateway.answers import Answers
from kervan.gateway.asgi import ASGIApp, Receive, Scope, Send

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class App:
    """Stands for vLLM's app: keeps the request, sends a prepared answer in given pieces."""

    def __init__(self, status: int, *pieces: bytes, content_type: bytes = b"application/json") -> None:
        self.status, self.pieces, self.content_type = status, pieces, content_type
        self.scope: Scope = {}
        self.request: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.request = scope, json.loads((await receive())["body"])
        headers = [(b"content-type", self.content_type), (b"x-request-id", b"7")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Answer:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.is_whole = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.pieces.append(message.get("body", b""))
            self.is_whole = not message.get("more_body", False)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


async def connected() -> Any:
    await asyncio.Event().wait()


async def call(app: ASGIApp, path: str, body: Any, receive: Receive = connected) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [(b"content-type", b"text/x"), (b"content-length", b"%d" % len(raw)), (b"x-mine", b"1")]
    scope: Scope = {"type": "http", "method": "POST", "path": path, "query_string": b"q=1", "headers": headers}
    got = Answer()
    function = {"/generate": simple.generate, "/chat": simple.chat}[path]
    await function(app, scope, receive, got.send, model="tiny", body=raw, answers=Answers())
    return got


def completion(text: str) -> bytes:
    return json.dumps({"id": "x", "choices": [{"text": text, "finish_reason": "stop"}], "usage": USAGE}).encode()


async def test_generate() -> None:
    app = App(200, completion("Hello"))
    got = await call(app, "/generate", {"prompt": "Hi", "temperature": 0, "top_p": 0.5, "stop": ["a", "b"]})
    assert app.request == {
        "model": "tiny", "prompt": "Hi", "max_tokens": 16, "temperature": 0, "top_p": 0.5, "stop": ["a", "b"],
    }  # fmt: skip
    assert json.loads(got.body) == {"text": "Hello", "tokens": 2}
    assert int(got.headers[b"content-length"]) == len(got.body)
    assert got.headers[b"x-request-id"] == b"7"
    assert app.scope["path"] == "/v1/completions"
    sent = dict(app.scope["headers"])
    assert sent[b"content-type"] == b"application/json"
    assert sent[b"x-mine"] == b"1"


async def test_options_that_are_not_given_stay_vllms() -> None:
    app = App(200, completion("Hello"))
    await call(app, "/generate", {"prompt": "Hi"})
    assert app.request == {"model": "tiny", "prompt": "Hi", "max_tokens": 16}
    app = App(200, b'{"choices":[{"message":{"content":"x"}}]}')
    await call(app, "/chat", {"messages": [{"role": "user", "content": "Hi"}]})
    assert app.request == {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(("content", "text"), [("Hello", "Hello"), (None, "")])
async def test_chat(content: str | None, text: str) -> None:
    app = App(200, json.dumps({"choices": [{"message": {"content": content}}], "usage": USAGE}).encode())
    messages = [{"role": "user", "content": "Hi \u00fc \U0001f600"}]
    got = await call(app, "/chat", {"messages": messages, "max_tokens": 5, "temperature": 1})
    assert app.request == {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 1}
    assert app.scope["path"] == "/v1/chat/completions"
    assert json.loads(got.body) == {"content": text, "usage": USAGE}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {}, "missing required field `prompt`"),
        ("/generate", {"prompt": 5}, "Expected `str`, got `int` - at `$.prompt`"),
        ("/generate", {"prompt": "x", "best_of": 2}, "unknown field `best_of`"),
        ("/generate", {"prompt": "x", "max_tokens": 0}, "max_tokens is 0; it must be from 1 to 1048576"),
        ("/generate", {"prompt": "x", "max_tokens": -1}, "max_tokens is -1; it must be from 1 to 1048576"),
        ("/generate", {"prompt": "x", "max_tokens": 2**40}, "it must be from 1 to 1048576"),
        ("/generate", {"prompt": "x", "max_tokens": 10**400}, f"max_tokens is 1{'0' * 39}; it must"),
        ("/generate", b'{"prompt":"x","max_tokens":1' + b"0" * 5000 + b"}", "out of range"),
        ("/generate", {"prompt": "x", "max_tokens": True}, "$.max_tokens"),
        ("/generate", {"prompt": "x", "temperature": -0.1}, "temperature is -0.1; it must be from 0 to 2.0"),
        ("/generate", {"prompt": "x", "temperature": 2.1}, "temperature is 2.1; it must be from 0 to 2.0"),
        ("/generate", {"prompt": "x", "temperature": float("nan")}, "malformed"),
        ("/generate", {"prompt": "x", "top_p": 0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ("/generate", {"prompt": "x", "top_p": 1.1}, "top_p is 1.1; it must be above 0 and at most 1"),
        ("/generate", {"prompt": "x", "stop": [1]}, "$.stop"),
        ("/generate", b"", "truncated"),
        ("/generate", b"[]", "Expected `object`, got `array`"),
        ("/generate", b'{"prompt": "\xff"}', "can't decode byte"),
        ("/generate", b'{"prompt":' * 100_000, "$"),
        ("/generate", b'{"x":' + b"[" * 100_000, "$"),
        ("/chat", {"messages": []}, "messages is empty"),
        ("/chat", {"messages": "x"}, "Expected `array`, got `str` - at `$.messages`"),
        ("/chat", {"messages": [{}], "max_tokens": -5}, "max_tokens is -5"),
        ("/chat", {"messages": [{}], "stream": "yes"}, "$.stream"),
        ("/chat", b'{"messages":' + b"[" * 100_000, "the body is not accepted"),
    ],
)
async def test_bad_bodies_are_400(path: str, body: Any, message: str) -> None:
    app = App(200)
    got = await call(app, path, body)
    error = json.loads(got.body)["error"]
    assert (got.status, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert message in error["message"] or message == "$"
    assert app.request == {}


@pytest.mark.parametrize("body", [{"messages": [{}]}, {"messages": [{}], "stream": True}])
async def test_errors_of_vllm_pass_unchanged(body: dict[str, Any]) -> None:
    got = await call(App(404, b'{"error":', b'{"code":404}}'), "/chat", body)
    assert (got.status, got.body, got.is_whole) == (404, b'{"error":{"code":404}}', True)
    got = await call(App(503, b"{}"), "/generate", {"prompt": "x"})
    assert (got.status, got.body) == (503, b"{}")


def chunk(text: str | None = None, finish: str | None = None) -> bytes:
    delta = {"role": "assistant"} if text is None else {"content": text}
    return (
        b"data: %s\n\n" % json.dumps({"choices": [{"delta": delta, "finish_reason": finish}], "usage": None}).encode()
    )


STREAM = b"".join(
    [
        chunk(),
        chunk(""),
        chunk("Hel"),
        b": keep-alive\n\n",
        chunk("lo\n\nd\u00fc"),
        chunk("", "stop"),
        b'data: {"choices":[],"usage":%s}\n\n' % json.dumps(USAGE).encode(),
        b"data: [DONE]\n\n",
    ]
)


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
async def test_chat_stream_however_it_is_split(size: int) -> None:
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    app = App(200, *pieces, content_type=b"text/event-stream; charset=utf-8")
    got = await call(app, "/chat", {"messages": [{}], "stream": True})
    assert app.request["stream"] is True
    assert app.request["stream_options"] == {"include_usage": True}
    assert got.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    *events, nothing = got.body.split(b"\n\n")
    assert nothing == b""
    assert events[1] == b": keep-alive"
    assert events[-1] == b"data: [DONE]"
    assert [json.loads(event[6:]) for event in (events[0], events[2], events[3])] == [
        {"content": "Hel"},
        {"content": "lo\n\nd\u00fc"},
        {"content": "", "usage": USAGE, "finish_reason": "stop"},
    ]
    assert len(events) == 5
    assert got.is_whole


async def test_chat_stream_passes_an_error_on() -> None:
    failure = b'data: {"error":{"message":"gone","code":500}}\n\n'
    got = await call(App(200, chunk("a"), failure, b"data: [DONE]\n\n"), "/chat", {"messages": [{}], "stream": True})
    assert got.body == b'data: {"content":"a"}\n\n' + failure + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "x"}),
        ("/chat", {"messages": [{}]}),
        ("/chat", {"messages": [{}], "stream": True}),
    ],
)
async def test_disconnect_reaches_inner(path: str, body: dict[str, Any]) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    got = await call(app, path, body, gone)
    assert seen == ["http.request", "http.disconnect"]
    assert got.status == 0


async def test_app_without_a_response_is_our_error() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    with pytest.raises(RuntimeError, match="ended without a response"):
        await call(app, "/generate", {"prompt": "x"})


async def test_shell_routes_here() -> None:
    from harness.gateway import View

    from kervan.gateway.shell import GatewayShell

    shell = GatewayShell(View())
    shell.attach(App(200, completion("Hello")))
    got = Answer()

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"prompt":"x"}'}

    await shell({"type": "http", "method": "POST", "path": "/generate", "headers": []}, receive, got.send)
    assert json.loads(got.body) == {"text": "Hello", "tokens": 2}
