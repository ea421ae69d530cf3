"""Two fleets behind one port, each gateway a real server: what goes where, and what a broken gateway does to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import uvloop
from harness.gateway import View, guard_of, listening

from kervan.fleet.auth import relay_key
from kervan.fleet.directory import GatewayEntry
from kervan.gateway.answers import OwnAnswer
from kervan.gateway.asgi import Receive, Scope, Send, respond
from kervan.gateway.relay import MAX_UNSENT_BYTES, RELAY_HEADER
from kervan.gateway.shared_port import Neighbour, SharedPort
from kervan.gateway.shell import GatewayShell
from kervan.policy.model_routing import PortFleet

NODE = "10.0.0.1"
MIB = 1 << 20


class Inner:
    """Stands for a fleet's vLLM app: tells what came, or streams as told by the test."""

    def __init__(self, name: str, models: tuple[str, ...]) -> None:
        self.name = name
        self.models = models
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self.next_chunk = asyncio.Event()
        self.has_begun = asyncio.Event()
        self.disconnected = asyncio.Event()
        self.num_sent_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["method"] == "POST":
            self.bodies.append((await receive())["body"])
        kind = scope["path"].rpartition("/")[2]
        if kind == "models":
            cards = [{"id": model, "object": "model", "max_model_len": 7} for model in self.models]
            await respond(send, 200, json.dumps({"object": "list", "data": cards}).encode())
        elif kind == "stream":
            await self.stream(receive, send)
        elif kind == "flood":
            await self.flood(send)
        elif kind == "broken":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            raise KeyError("after the first chunk")
        else:
            await respond(send, 418, json.dumps({"fleet": self.name}).encode(), headers=[(b"x-from", b"here")])

    async def stream(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        self.has_begun.set()
        leave = asyncio.create_task(receive())
        go_on = asyncio.create_task(self.next_chunk.wait())
        await asyncio.wait({leave, go_on}, return_when=asyncio.FIRST_COMPLETED)
        if leave.done():
            assert leave.result()["type"] == "http.disconnect"
            self.disconnected.set()
        else:
            await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": False})
        for task in (leave, go_on):
            task.cancel()

    async def flood(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(48):
            await send({"type": "http.response.body", "body": bytes([i]) * MIB, "more_body": i < 47})
            self.num_sent_bytes += MIB


class Gateway:
    """One gateway of one fleet: public and internal port."""

    def __init__(self, name: str, models: tuple[str, ...], api_keys: tuple[str, ...]) -> None:
        self.name, self.models, self.api_keys = name, models, api_keys
        self.view = View()
        self.inner = Inner(name, models)
        self.shell = GatewayShell(self.view, guard_of(*api_keys))
        self.shell.attach(self.inner)
        self.key = relay_key("secret of " + name)
        self.port = SharedPort(self.shell, lambda: PortFleet(name, models, bool(api_keys)), NODE, self.key)
        self.public_url = self.internal_url = ""
        self.http: httpx.AsyncClient

    def neighbour(self, *internal_urls: str) -> Neighbour:
        """As others see its fleet, with gateways at these addresses."""
        urls = internal_urls or (self.internal_url,)
        entries = tuple(GatewayEntry(f"g{i}", NODE, 1, "", url, True) for i, url in enumerate(urls))
        return Neighbour(self.name, self.models, bool(self.api_keys), self.key, entries)

    @property
    def is_untouched(self) -> bool:
        return (self.view.opened, self.view.admitted, self.inner.scopes) == (0, 0, [])


@asynccontextmanager
async def gateways(*given: Gateway) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for gateway in given:
            gateway.public_url = await stack.enter_async_context(listening(gateway.port))
            gateway.internal_url = await stack.enter_async_context(listening(gateway.port.respond_relayed))
            client = httpx.AsyncClient(base_url=gateway.public_url, timeout=20, trust_env=False, verify=False)
            gateway.http = await stack.enter_async_context(client)
            stack.callback(gateway.port.close)
        for gateway in given:
            gateway.port.update([other.neighbour() for other in given if other is not gateway])
        yield


@pytest.fixture
async def a() -> Gateway:
    return Gateway("a", ("llama", "sql"), ("key-a",))


@pytest.fixture
async def b(a: Gateway) -> AsyncIterator[Gateway]:
    gateway = Gateway("b", ("qwen",), ())
    async with gateways(a, gateway):
        yield gateway


@asynccontextmanager
async def raw_gateway(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that does with each connection what the test says, and then closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length"))
    return head + await reader.readexactly(int(length.split(b":")[1]))


async def test_a_request_goes_to_the_fleet_of_its_model(a: Gateway, b: Gateway) -> None:
    body = b'{ "prompt": "\xc3\xa4",  "model": "qwen" }'
    headers = {"authorization": "Bearer whatever", "x-request-id": "r1", RELAY_HEADER.decode(): b.key.decode()}
    got = await a.http.post("/v1/completions?x=1", content=body, headers=headers)
    assert (got.status_code, got.json(), got.headers["x-from"]) == (418, {"fleet": "b"}, "here")
    assert got.headers.get_list("content-length") == ["14"]
    (scope,) = b.inner.scopes
    seen = dict(scope["headers"])
    assert (scope["path"], scope["query_string"], b.inner.bodies) == ("/v1/completions", b"x=1", [body])
    assert (seen[b"authorization"], seen[b"x-request-id"]) == (b"Bearer whatever", b"r1")
    assert RELAY_HEADER not in seen
    assert a.is_untouched  # neither its keys nor its admission have a say
    assert (b.view.opened, b.view.admitted) == (1, 1)


async def test_a_fleets_own_requests_stay(a: Gateway, b: Gateway) -> None:
    got = await a.http.post("/v1/completions", json={"model": "sql"}, headers={"authorization": "Bearer key-a"})
    assert (got.status_code, got.json()) == (418, {"fleet": "a"})
    assert b.is_untouched


async def test_keys_are_the_affair_of_the_fleet_asked_for(a: Gateway, b: Gateway) -> None:
    assert (await b.http.post("/v1/completions", json={"model": "llama"})).status_code == 401
    good = {"authorization": "Bearer key-a"}
    assert (await b.http.post("/v1/completions", json={"model": "llama"}, headers=good)).status_code == 418
    assert b.is_untouched


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b'{"model": "gpt"}', 404, "`gpt` does not exist"),
        ("/v1/completions", b'{"prompt": "x"}', 400, "2 fleets share this port"),
        ("/v1/completions", b'{"model": null}', 400, "2 fleets share this port"),
        ("/v1/completions", b'{"model": 7}', 400, "2 fleets share this port"),
        ("/v1/completions", b'["model"]', 400, "2 fleets share this port"),
        ("/v1/completions", b'{"model": "qwen"', 400, "2 fleets share this port"),
        ("/v1/completions", b"[" * 200_000, 400, "2 fleets share this port"),
        ("/v1/completions", b"", 400, "2 fleets share this port"),
        ("/generate", b'{"prompt": "x"}', 400, "2 fleets share this port"),
        ("/v1/completions?fleet=c", b'{"model": "qwen"}', 404, "no fleet 'c'"),
    ],
)
async def test_what_names_no_fleet_is_refused(
    a: Gateway, b: Gateway, path: str, body: bytes, status: int, words: str
) -> None:
    for gateway in (a, b):
        got = await gateway.http.post(path, content=body, headers={"content-type": "application/json"})
        error = got.json()["error"]
        assert (got.status_code, error["code"], set(error)) == (status, status, {"message", "type", "param", "code"})
        assert words in error["message"]
        assert "llama" not in error["message"]  # fleet a has keys: its models are not told to everybody
    assert a.is_untouched
    assert b.is_untouched


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(a: Gateway, b: Gateway) -> None:
    assert (await b.http.post("/v1/completions", content=b" " * (9 * MIB))).status_code == 413
    assert b.is_untouched


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_path_can_name_the_fleet(a: Gateway, b: Gateway, method: str) -> None:
    for gateway in (a, b):
        b.view.reason = None
        assert (await gateway.http.request(method, "/health/ready?fleet=b")).status_code == 200
        b.view.reason = "no replica is ready"
        got = await gateway.http.request(method, "/health/ready?fleet=b")
        assert (got.status_code, bool(got.content)) == (503, method == "GET")
        assert (await gateway.http.request(method, "/health/ready?fleet=a")).status_code == 200
    assert (await a.http.post("/tokenize?fleet=b", json={"prompt": "x"})).json() == {"fleet": "b"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_{}_00112233445566778899aabbccddeeff"),
        ("POST", "/v1/responses/resp_{}_00112233445566778899aabbccddeeff/cancel"),
        ("GET", "/v1/streams/{}-00112233445566778899aabbccddeeff"),
    ],
)
async def test_an_id_names_the_fleet_by_its_gateway(a: Gateway, b: Gateway, method: str, path: str) -> None:
    """Of b's gateways a knows one, g0."""
    key = {"authorization": "Bearer key-a"}
    assert (await a.http.request(method, path.format("g0"), headers=key)).json() == {"fleet": "b"}
    assert (await a.http.request(method, path.format("gone"), headers=key)).json() == {"fleet": "a"}
    assert (await a.http.request(method, path.format("g0") + "?fleet=a", headers=key)).json() == {"fleet": "a"}


async def test_own_answers_pass_the_middlewares_of_vllms_app(a: Gateway, b: Gateway) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-name", b"n"))
            await send(message)

        await OwnAnswer(b.inner)(scope, receive, named)

    b.shell.answers.pass_through(app)
    a.port.update([])
    for request, status in (
        (b.http.get("/v1/models"), 200),
        (b.http.post("/v1/completions", json={"model": "none"}), 404),
        (b.http.post("/v1/completions", json={}), 400),
        (b.http.get("/health?fleet=none"), 404),
    ):
        response = await request
        assert (response.status_code, response.headers["x-name"]) == (status, "n")


async def test_the_list_of_models_is_that_of_all_fleets_that_take_the_key(a: Gateway, b: Gateway) -> None:
    for gateway in (a, b):
        with_key = await gateway.http.get("/v1/models", headers={"authorization": "Bearer key-a"})
        assert [card["id"] for card in with_key.json()["data"]] == ["llama", "sql", "qwen"]
        assert with_key.json()["data"][0]["max_model_len"] == 7
        assert [card["id"] for card in (await gateway.http.get("/v1/models")).json()["data"]] == ["qwen"]
    a.port.update([b.neighbour("http://127.0.0.1:9")])
    assert (await a.http.get("/v1/models")).status_code == 401
    with_key = await a.http.get("/v1/models", headers={"authorization": "Bearer key-a"})
    assert [card["id"] for card in with_key.json()["data"]] == ["llama", "sql"]


async def test_a_chunk_comes_before_the_next_one_is_made(a: Gateway, b: Gateway) -> None:
    async with a.http.stream("POST", "/v1/stream", json={"model": "qwen"}) as got:
        chunks = got.aiter_raw()
        assert got.headers["content-type"] == "text/event-stream"
        assert await anext(chunks) == b"data: 1\n\n"
        assert not b.inner.next_chunk.is_set()
        b.inner.next_chunk.set()
        assert [chunk async for chunk in chunks] == [b"data: 2\n\n"]


async def test_a_client_that_leaves_ends_the_request(a: Gateway, b: Gateway) -> None:
    async with a.http.stream("POST", "/v1/stream", json={"model": "qwen"}) as got:
        assert await anext(got.aiter_raw()) == b"data: 1\n\n"
    await asyncio.wait_for(b.inner.disconnected.wait(), 10)


async def test_a_client_that_leaves_before_the_answer_ends_the_request(a: Gateway, b: Gateway) -> None:
    left = asyncio.Event()
    num_requests = 0

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_requests
        num_requests += 1
        await read_request(reader)
        asked.set()
        assert await reader.read() == b""
        left.set()

    asked = asyncio.Event()
    async with raw_gateway(say_nothing) as silent:
        a.port.update([b.neighbour(silent, b.internal_url)])
        asking = asyncio.create_task(a.http.post("/v1/completions", json={"model": "qwen"}))
        await asked.wait()
        asking.cancel()
        await asyncio.wait_for(left.wait(), 10)
    assert num_requests == 1
    assert b.is_untouched  # not asked elsewhere for nobody


async def test_a_gateway_that_is_gone_is_passed_over(a: Gateway, b: Gateway) -> None:
    async def close_on_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async with raw_gateway(close_on_request) as dying:
        a.port.update([b.neighbour("http://127.0.0.1:9", dying, b.internal_url)])
        for _ in range(4):  # whichever is first
            got = await a.http.post("/v1/completions", json={"model": "qwen"})
            assert (got.status_code, got.json()) == (418, {"fleet": "b"})
        a.port.update([b.neighbour("http://127.0.0.1:9", dying)])
        none = await a.http.post("/v1/completions", json={"model": "qwen"})
        assert (none.status_code, none.headers["retry-after"]) == (503, "5")
        assert "no gateway of fleet 'b' answers now" in none.json()["error"]["message"]
    assert a.is_untouched


async def test_an_idle_connection_that_ends_loses_no_request(a: Gateway, b: Gateway) -> None:
    """The other side closes it just as the next request is on its way; there is no other gateway."""
    num_connections = 0

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await read_request(reader)

    async with raw_gateway(answer_once) as one:
        a.port.update([b.neighbour(one)])
        for _ in range(3):
            assert (await a.http.post("/v1/completions", json={"model": "qwen"})).text == "ok"
        assert num_connections == 3
        a.port.close()


async def test_connections_are_kept(a: Gateway, b: Gateway) -> None:
    for _ in range(3):
        assert (await a.http.post("/v1/completions", json={"model": "qwen"})).status_code == 418
    assert len({scope["client"] for scope in b.inner.scopes}) == 1


@pytest.mark.parametrize("way", ["the app fails", "the connection ends", "no HTTP"])
async def test_an_answer_that_breaks_off_breaks_the_clients_connection(a: Gateway, b: Gateway, way: str) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        rest = b"" if way == "the connection ends" else b"no chunk\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n" + rest)
        await writer.drain()

    async with raw_gateway(break_off) as breaking:
        if way != "the app fails":
            a.port.update([b.neighbour(breaking)])
        got = b""
        with pytest.raises(httpx.RemoteProtocolError):
            async with a.http.stream("POST", "/v1/broken", json={"model": "qwen"}) as response:
                async for chunk in response.aiter_raw():
                    got += chunk
        assert got == b"data: 1\n\n"


async def test_only_a_gateway_that_knows_the_key_gets_past_the_internal_port(a: Gateway, b: Gateway) -> None:
    async with httpx.AsyncClient(base_url=b.internal_url, trust_env=False, verify=False) as stranger:
        for key in ("", "wrong", a.key.decode()):
            got = await stranger.post("/v1/completions", json={"model": "qwen"}, headers={RELAY_HEADER.decode(): key})
            assert got.status_code == 421
    assert b.is_untouched
    # An address that another fleet's gateway has got meanwhile: not an answer, but no gateway of fleet b.
    a.port.update([b.neighbour(a.internal_url)])
    assert (await a.http.post("/v1/completions", json={"model": "qwen"})).status_code == 503
    a.port.update([b.neighbour(a.internal_url, b.internal_url)])
    for _ in range(2):
        assert (await a.http.post("/v1/completions", json={"model": "qwen"})).json() == {"fleet": "b"}


async def test_what_was_passed_on_is_not_passed_on_again(a: Gateway, b: Gateway) -> None:
    """Even when the two disagree on whose model it is: the second one answers."""
    b.port.update([Neighbour("a", ("qwen", "llama"), True, a.key, a.neighbour().gateways)])
    assert (await a.http.post("/v1/completions", json={"model": "qwen"})).json() == {"fleet": "b"}
    assert a.is_untouched


async def test_an_adapter_is_asked_for_where_it_was_loaded(a: Gateway, b: Gateway) -> None:
    there = GatewayEntry("g1", NODE, 1, "", b.internal_url, True, models=("qwen", "late"))
    elsewhere = GatewayEntry("g0", NODE, 1, "", "http://127.0.0.1:9", True, models=("qwen",))
    a.port.update([Neighbour("b", ("qwen",), False, b.key, (elsewhere, there))])
    for _ in range(2):
        assert (await a.http.post("/v1/completions", json={"model": "late"})).json() == {"fleet": "b"}


async def test_a_fleet_without_neighbours_is_its_shell(a: Gateway, b: Gateway) -> None:
    seen: list[Any] = []

    async def shell(*call: Any) -> None:
        seen.append(call)

    alone = SharedPort(shell, lambda: PortFleet("a", ("llama",)), NODE, b"")  # type: ignore[arg-type]
    call = ({"type": "http", "method": "POST"}, object(), object())
    await alone(*call)  # type: ignore[arg-type]
    assert seen == [call]  # the very same `receive`: the body was not read here


async def test_websockets_need_a_port_of_their_own(a: Gateway, b: Gateway) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await a.port({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)  # type: ignore[arg-type]
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


def test_a_client_that_does_not_read_stops_the_other_gateway() -> None:
    """Held back by the connections, not in this gateway's memory; and nothing of it is lost."""

    async def run() -> tuple[int, bytes]:
        a, b = Gateway("a", ("llama",), ()), Gateway("b", ("qwen",), ())
        async with gateways(a, b), a.http.stream("POST", "/v1/flood", json={"model": "qwen"}) as got:
            sent = -1
            while sent != b.inner.num_sent_bytes:  # until no more goes out
                sent = b.inner.num_sent_bytes
                await asyncio.sleep(0.3)
            return sent, await got.aread()

    sent, body = uvloop.run(run())
    assert 0 < sent < 40 * MIB
    assert MAX_UNSENT_BYTES < MIB
    assert body == b"".join(bytes([i]) * MIB for i in range(48))
