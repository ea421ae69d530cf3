import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from harness.gateway import View, guard_of

from kervan.gateway.answers import OwnAnswer
from kervan.gateway.asgi import Receive, Scope, Send, respond
from kervan.gateway.shell import GatewayShell, Shed, makes_work

JSON = {"content-type": "application/json"}


class Inner:
    """Stands for vLLM's app: echoes, streams until the client leaves, fails, or answers 404."""

    def __init__(self) -> None:
        self.streaming = asyncio.Event()
        self.disconnected = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/v1/early":
            raise KeyError("before the start")
        if path == "/v1/stream" or path == "/v1/late":
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            if path == "/v1/late":
                raise KeyError("after the start")
            self.streaming.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnected.set()
        elif path == "/v1/missing":
            await respond(send, 404, b'{"error":{"code":404}}')
        else:
            body = (await receive())["body"] if scope["method"] == "POST" else b""
            self.bodies.append(body)
            await respond(send, 200, json.dumps({"method": scope["method"], "length": len(body)}).encode())


class Site:
    def __init__(self, shell: GatewayShell, view: View, inner: Inner, port: int) -> None:
        self.shell, self.view, self.inner, self.port = shell, view, inner, port
        # verify=False: plain HTTP, and reading the certificate store takes 0.1 s per client.
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False, verify=False)

    async def raw(self, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        await writer.drain()
        return reader, writer


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Site]:
    """A real uvicorn on a free port, in this event loop."""
    view, inner = View(), Inner()
    shell = GatewayShell(view, **options)
    shell.attach(inner)
    config = uvicorn.Config(shell, log_level="critical", lifespan="on", http="httptools", ws="none")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup(sockets=[listener])
        site = Site(shell, view, inner, listener.getsockname()[1])
        try:
            async with site.http:
                yield site
        finally:
            # Server.shutdown sleeps 0.1 s.
            for connection in list(server.server_state.connections):
                connection.transport.close()
            for running in server.servers:
                running.close()
                await running.wait_closed()
            await server.lifespan.shutdown()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as running:
        yield running


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert error["code"] == response.status_code
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


async def test_pages(site: Site) -> None:
    assert (await site.http.get("/health")).json() == {"status": "live"}
    assert (await site.http.get("/health/ready")).json() == {"status": "ready"}
    assert (await site.http.get("/kervan/status")).json() == {"model": "tiny", "replicas": []}
    page = await site.http.get("/metrics")
    assert page.text == "up 1\n"
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert site.view.opened == 0


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics", "/kervan/status"])
async def test_pages_answer_head_and_refuse_other_methods(site: Site, path: str) -> None:
    got, head = await site.http.get(path), await site.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]
    refused = await site.http.post(path, content=b"{}")
    assert refused.headers["allow"] == "GET, HEAD"
    assert error_of(refused)["code"] == 405


@pytest.mark.parametrize("path", ["/generate", "/chat"])
async def test_simple_paths_are_post_only(site: Site, path: str) -> None:
    refused = await site.http.get(path)
    assert refused.headers["allow"] == "POST"
    assert error_of(refused)["message"] == f"{path} does not accept GET; use POST"


async def test_not_ready_tells_the_reason(site: Site) -> None:
    site.view.reason = "0 of 2 replicas have produced a token"
    ready = await site.http.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json() == {"status": "not ready", "reason": "0 of 2 replicas have produced a token"}
    assert (await site.http.get("/health")).status_code == 200


async def test_before_attach(site: Site) -> None:
    site.shell.inner = None
    assert (await site.http.get("/health/ready")).json()["reason"] == "vLLM's app is still being built"
    refused = await site.http.post("/v1/completions", json={})
    assert refused.headers["retry-after"] == "5"
    assert "still being built" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/health", None, 200),
        ("/health/ready", None, 200),
        ("/metrics", None, 200),
        ("/metrics/gw-1", None, 200),
        ("/metrics/gw-2", None, 404),
        ("/metrics/", None, 401),
        ("/kervan/status", None, 401),
        ("/kervan/status", "Bearer second", 200),
        ("/v1/models", None, 401),
        ("/v1/models", "Bearer", 401),
        ("/v1/models", "Bearer wrong", 401),
        ("/v1/models", "Bearer firs", 401),
        ("/v1/models", "Basic first", 401),
        ("/v1/models", "Bearer first", 200),
        ("/v1/models", "bearer second", 200),
        ("/docs", None, 200),
        ("/openapi.json", None, 200),
        ("/static/swagger-ui.css", None, 200),
        ("/docs/x", None, 401),
        ("/generate", None, 401),
    ],
)
async def test_keys(path: str, header: str | None, status: int) -> None:
    async with serving(guard=guard_of("first", "second")) as site:
        response = await site.http.get(path, headers={"authorization": header} if header else {})
        assert response.status_code == status
        if status == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["type"] == "authentication_error"


async def test_wrong_key_is_told_although_a_large_body_is_on_its_way() -> None:
    async with serving(guard=guard_of("k")) as site:
        response = await site.http.post("/v1/completions", content=bytes(10_000_000))
        assert error_of(response)["code"] == 401
        assert site.inner.bodies == []


async def test_docs_are_open_to_read_only() -> None:
    async with serving(guard=guard_of("k")) as site:
        assert (await site.http.post("/docs", json={})).status_code == 401


class Middlewares:
    """Stands for vLLM's app: one middleware that names answers, and takes 403 for some."""

    def __init__(self, inner: Any) -> None:
        self._inner = OwnAnswer(inner)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-name", b"n"))
            await send(message)

        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        if scope["path"] == "/kervan/status":
            await respond(send, 403, b"")
        elif scope["path"] == "/health":
            await respond(send, 500, b"")  # as Starlette does for what is raised
            raise KeyError("of the user's")
        else:
            await self._inner(scope, receive, named)


async def test_own_answers_pass_the_middlewares_of_vllms_app(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(guard=guard_of("k")) as site:
        site.shell.answers.pass_through(Middlewares(site.inner))
        for method, path, status in [("GET", "/metrics", 200), ("HEAD", "/metrics", 200), ("GET", "/v1/models", 401)]:
            response = await site.http.request(method, path)
            assert (response.status_code, response.headers["x-name"]) == (status, "n")
        large = await site.http.post("/v1/x", content=bytes(10_000_000), headers={"authorization": "Bearer k"})
        assert (large.status_code, large.headers["x-name"], large.headers["connection"]) == (413, "n", "close")
        assert error_of(large)["type"] == "RequestTooLargeError"
        assert (await site.http.get("/kervan/status", headers={"authorization": "Bearer k"})).status_code == 403
        assert (await site.http.get("/health")).status_code == 500
    assert [record.getMessage() for record in caplog.records] == [
        "a middleware failed on the gateway's answer to /health"
    ]


async def test_preflight_needs_no_key() -> None:
    async with serving(guard=guard_of("k")) as site:
        assert (await site.http.options("/v1/completions")).json()["method"] == "OPTIONS"


async def test_body_reaches_inner_whole(site: Site) -> None:
    body = b"{" + bytes(3_000_000)
    assert (await site.http.post("/v1/completions", content=body)).json()["length"] == len(body)
    assert site.inner.bodies == [body]
    assert (site.view.open, site.view.opened) == (0, 1)


async def chunked() -> AsyncIterator[bytes]:
    for _ in range(100):
        yield bytes(100_000)


@pytest.mark.parametrize(
    ("content", "found"), [(lambda: bytes(10_000_000), "10000000 bytes"), (chunked, "over 8388608 bytes")]
)
async def test_body_of_10_mb_is_413(site: Site, content: Callable[[], Any], found: str) -> None:
    response = await site.http.post("/v1/completions", content=content())
    assert error_of(response)["message"].startswith(f"the body is {found}")
    assert error_of(response)["message"].endswith("this gateway accepts at most 8388608 bytes (8 MiB)")
    assert response.headers["connection"] == "close"
    assert site.inner.bodies == []
    await site.view.is_idle.wait()


async def test_body_limit_is_inclusive() -> None:
    async with serving(max_body_bytes=10) as site:
        assert (await site.http.post("/v1/x", content=b"{" * 10)).status_code == 200
        assert (await site.http.post("/v1/x", content=b"{" * 11)).status_code == 413


async def test_slow_body_is_408_and_closes() -> None:
    async with serving(body_timeout_s=0.2) as site:
        reader, writer = await site.raw("POST /v1/completions HTTP/1.1\nhost: x\ncontent-length: 100", b'{"a')
        answered = await reader.read()  # to the end: the gateway closes
        writer.close()
        assert answered.startswith(b"HTTP/1.1 408")
        assert b"3 bytes of the body came in 0.2 s" in answered
        assert site.inner.bodies == []
        await site.view.is_idle.wait()


async def test_deadline_is_each_bodys_own() -> None:
    async with serving(body_timeout_s=0.3) as site:
        slow = [await site.raw("POST /v1/x HTTP/1.1\nhost: x\ncontent-length: 9") for _ in range(3)]
        for _ in range(3):
            assert (await site.http.post("/v1/x", json={})).status_code == 200
        for reader, writer in slow:
            assert (await reader.read()).startswith(b"HTTP/1.1 408")
            writer.close()
        reader, writer = await site.raw("POST /v1/x HTTP/1.1\nhost: x\ncontent-length: 9")  # the timer is armed again
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()
        assert len(site.inner.bodies) == 3


async def test_cancelling_a_body_read_is_not_a_timeout() -> None:
    shell = GatewayShell(View())
    reading = asyncio.Event()

    async def receive() -> dict[str, Any]:
        reading.set()
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}
    task = asyncio.ensure_future(shell(scope, receive, send))
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_client_that_leaves_in_its_body_is_no_error(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    _, writer = await site.raw("POST /v1/completions HTTP/1.1\nhost: x\ncontent-length: 100", b"{")
    await site.view.is_open.wait()
    writer.close()
    await site.view.is_idle.wait()
    assert site.view.open == 0
    assert site.inner.bodies == []
    assert caplog.records == []


async def test_disconnect_reaches_inner(site: Site) -> None:
    async with site.http.stream("POST", "/v1/stream", json={}) as response:
        async for line in response.aiter_lines():
            assert line == "data: 1"
            break
        await site.inner.streaming.wait()
        assert site.view.open == 1
    await asyncio.wait_for(site.inner.disconnected.wait(), 10)
    await site.view.is_idle.wait()
    assert site.view.open == 0


async def test_errors_of_inner_pass(site: Site) -> None:
    response = await site.http.post("/v1/missing", json={})
    assert (response.status_code, response.content) == (404, b'{"error":{"code":404}}')


async def test_admission(site: Site) -> None:
    site.view.shed = Shed(7, "512 requests wait, and the queue holds 512")
    refused = await site.http.post("/v1/completions", json={})
    assert refused.headers["retry-after"] == "7"
    assert error_of(refused)["message"] == "512 requests wait, and the queue holds 512; try again in 7 s"
    assert site.inner.bodies == []
    for path in ("/tokenize", "/v1/responses/resp_1/cancel"):
        assert (await site.http.post(path, json={})).status_code == 200
    assert (await site.http.get("/v1/models")).status_code == 200
    assert site.view.admitted == 1


async def test_a_request_that_can_never_fit_is_told_the_arithmetic(site: Site) -> None:
    site.view.shed = Shed(None, "one request may open at most 96 in this fleet: (64 running + 32 queued) / 1 gateway")
    refused = await site.http.post("/v1/completions", json={"prompt": ["a"] * 100, "n": 100})
    assert refused.status_code == 400
    assert "retry-after" not in refused.headers
    assert error_of(refused) == {
        "message": "100 prompts x n=100 = 10,000 streams, but one request may open at most 96 in this fleet: (64 running"
        " + 32 queued) / 1 gateway; split the request, or raise the fleet's max_queued_streams",
        "type": "BadRequestError",
        "param": "prompt",
        "code": 400,
    }
    assert site.inner.bodies == []


@pytest.mark.parametrize(
    ("path", "works"),
    [
        ("/v1/chat/completions", True),
        ("/v1/embeddings", True),
        ("/v2/rerank", True),
        ("/inference/v1/generate", True),
        ("/score", True),
        ("/invocations", True),
        ("/tokenize", False),
        ("/v1/models", False),
        ("/v1/load_lora_adapter", False),
        ("/v1/messages/count_tokens", False),
        ("/inference/v1/abort_requests", False),
        ("/", False),
    ],
)
def test_makes_work(path: str, works: bool) -> None:
    assert makes_work(path) is works


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1]", "the body is a JSON list"),
        (b'  "x"', "the body is a JSON str"),
        (b"null", "the body is a JSON NoneType"),
        (b"\xff\xfeoops", "the body is not valid JSON"),
        (b"nonsense", "the body is not valid JSON"),
        (b'{"structured_outputs": []}', "structured_outputs is a JSON list; send an object"),
        (b"[" * 100_000, "the body is not valid JSON: maximum recursion depth"),
        (b"[" * 100_000 + b"]" * 100_000, "the body is not valid JSON: maximum recursion depth"),
    ],
)
async def test_json_that_is_no_object_is_400(site: Site, body: bytes, message: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize", "/invocations"):
        response = await site.http.post(path, content=body, headers=JSON)
        assert error_of(response)["message"].startswith(message)
    assert site.inner.bodies == []


async def test_sagemaker_path_survives_a_nested_object(site: Site) -> None:
    body = b'{"a":' * 100_000
    response = await site.http.post("/invocations", content=body, headers=JSON)
    assert error_of(response)["code"] == 400


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", JSON),
        (b"  {}", JSON),
        (b'{"structured_outputs": {"json": {}}}', JSON),
        (b'{"structured_outputs": null}', JSON),
        (b"\xef\xbb\xbf{}", JSON),
        ('{"a":1}'.encode("utf-16"), JSON),
        (b'{"broken', JSON),  # vLLM answers 400 itself
        (b"[1]", {"content-type": "multipart/form-data; boundary=x"}),
    ],
)
async def test_other_bodies_are_left_to_vllm(site: Site, body: bytes, headers: dict[str, str]) -> None:
    await site.http.post("/v1/chat/completions", content=body, headers=headers)
    assert site.inner.bodies == [body]


async def test_exception_before_the_start_is_500(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "kervan"):
        response = await site.http.post("/v1/early", json={})
    assert error_of(response)["type"] == "InternalServerError"
    assert "before the start" not in response.text
    assert [record.getMessage() for record in caplog.records] == ["POST /v1/early failed before its answer began"]
    assert site.view.open == 0


async def test_exception_after_the_start_cuts_the_stream(site: Site) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await site.http.post("/v1/late", json={})
    assert site.view.open == 0


async def test_exception_after_the_start_is_raised_again() -> None:
    shell = GatewayShell(View())
    shell.attach(Inner())
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        if sent and message["type"] == "http.response.start":
            raise RuntimeError("started already")
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/late", "headers": []}
    with pytest.raises(KeyError, match="after the start"):
        await shell(scope, receive, send)


async def test_inner_gets_the_servers_send() -> None:
    shell = GatewayShell(View())
    got: list[Send] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    shell.attach(inner)
    await shell({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
    assert got == [send]


@pytest.mark.parametrize(
    ("key", "shed", "code"), [("wrong", None, 1008), ("k", Shed(1, "full"), 1013), ("k", None, None)]
)
async def test_websocket(key: str, shed: Shed | None, code: int | None) -> None:
    view = View()
    view.shed = shed
    shell = GatewayShell(view, guard_of("k"))
    sent: list[Any] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", "open": view.open})

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    shell.attach(inner)
    headers = [(b"authorization", b"Bearer " + key.encode())]
    await shell({"type": "websocket", "path": "/v1/realtime", "headers": headers}, receive, send)
    assert [message.get("code") for message in sent] == [code]
    assert view.open == 0
