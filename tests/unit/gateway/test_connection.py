"""Requests as bytes on a socket: what is refused before a body, and what an upgrade that is not made costs (nothing)."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from harness.gateway import listening

from kervan.gateway.connection import MAX_HEAD_BYTES, MAX_HEADERS, Connection

ENOUGH_S = 10.0
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQC\r\n"
WEBSOCKET = (
    b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class App:
    """Answers with the method, the body's size and the number of headers; /wait does so when it is told."""

    def __init__(self) -> None:
        self.waiting, self.go = asyncio.Event(), asyncio.Event()
        self.kinds: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.kinds.append(scope["type"])
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        body = b""
        if scope["method"] == "POST":
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    break
        if scope["path"] == "/wait":
            self.waiting.set()
            await self.go.wait()
        names = {name for name, _ in scope["headers"]}
        told = json.dumps([scope["method"], len(body), b"upgrade" in names]).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(told))]})
        await send({"type": "http.response.body", "body": told})


class Impatient(Connection):
    head_timeout_s = 0.05


class Patient(Connection):
    head_timeout_s = 1.0  # enough for a client on a busy machine


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def port(app: App, request: pytest.FixtureRequest) -> AsyncIterator[int]:
    protocol = getattr(request, "param", Connection)
    async with listening(app, http=protocol, ws="auto", timeout_keep_alive=60) as url:
        yield int(url.rpartition(":")[2])


async def exchange(port: int, *parts: bytes, eof: bool = False) -> tuple[list[int], bytes]:
    """The statuses of all answers until the gateway closes, and the last answer's body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
        if eof:
            writer.write_eof()
        got = await asyncio.wait_for(reader.read(-1), ENOUGH_S)
    finally:
        writer.close()
    return statuses_in(got), got.rpartition(b"\r\n")[2]


def statuses_in(got: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", got)]


def get(path: bytes = b"/", headers: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n"


def post(headers: bytes = b"", body: bytes = b"hello") -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body) + headers + b"\r\n" + body


CLOSE = b"Connection: close\r\n"


def message_of(body: bytes, status: int) -> str:
    error = json.loads(body)["error"]
    assert error["code"] == status
    return str(error["message"])


@pytest.mark.parametrize(
    "request_bytes",
    [
        get(headers=b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n"),
        get(headers=b"X-A: " + b"a" * (1 << 20)),
        get(path=b"/" + b"a" * MAX_HEAD_BYTES),
        get(headers=b"".join(b"x-%d: 1\r\n" % i for i in range(MAX_HEADERS))),
        b"GET / HTTP/1.1\r\n" + b"x: 1\r\n" * 20_000,
    ],
    ids=["header", "endless header", "target", "many headers", "endless headers"],
)
async def test_large_heads_are_refused(port: int, request_bytes: bytes) -> None:
    statuses, body = await exchange(port, request_bytes)
    assert statuses == [431]
    assert "accepts at most" in message_of(body, 431)


async def test_a_head_within_the_bounds_is_taken(port: int) -> None:
    many = b"".join(b"x-%d: %s\r\n" % (i, b"a" * 200) for i in range(MAX_HEADERS - 2))
    assert (await exchange(port, get(headers=many + CLOSE)))[0] == [200]


@pytest.mark.parametrize("port", [Impatient], indirect=True)
@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([b"GET / HT"], [408]),
        ([get()[:-2]], [408]),
        ([post(), b"POST / HTTP/1.1\r\n"], [200, 408]),
        # What is left of a body that nobody waits for, and line ends: no request that could be answered.
        ([get(headers=b"Content-Length: 9\r\n"), b"a"], [200]),
        ([post(), b"\r\n"], [200]),
    ],
)
async def test_a_head_that_does_not_end_is_given_up(port: int, parts: list[bytes], statuses: list[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    for part in parts:
        writer.write(part)
        if part is not parts[-1]:  # its answer, so that the next part comes in a read of its own
            got += await asyncio.wait_for(reader.readuntil(b"]"), ENOUGH_S)
    got += await asyncio.wait_for(reader.read(-1), ENOUGH_S)
    writer.close()
    assert statuses_in(got) == statuses


@pytest.mark.parametrize("port", [Patient], indirect=True)
async def test_an_answer_outlives_the_wait_for_the_next_head(app: App, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(get(b"/wait") + b"GET / HT")
    await asyncio.wait_for(app.waiting.wait(), ENOUGH_S)
    await asyncio.sleep(1.2 * Patient.head_timeout_s)
    app.go.set()
    assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"]"), ENOUGH_S)
    writer.write(b"TP/1.1\r\n" + CLOSE + b"\r\n")
    assert b"200 OK" in await asyncio.wait_for(reader.read(-1), ENOUGH_S)
    writer.close()


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET, b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n"])
async def test_a_post_keeps_its_body_though_it_offers_an_upgrade(app: App, port: int, upgrade: bytes) -> None:
    statuses, body = await exchange(
        port, post(upgrade) + post(upgrade + b"X: y\r\n", b""), post(upgrade + CLOSE, b"a" * 300_000)
    )
    assert statuses == [200, 200, 200]
    assert json.loads(body) == ["POST", 300_000, False]
    assert app.kinds == ["http"] * 3


async def test_a_chunked_post_keeps_its_body_too(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + H2C + CLOSE + b"\r\n"
    assert await exchange(port, head + b"5\r\nhello\r\n", b"2\r\nab\r\n0\r\n\r\n") == ([200], b'["POST", 7, false]')


async def test_a_websocket_is_asked_for_with_get(app: App, port: int) -> None:
    assert (await exchange(port, get(headers=WEBSOCKET)))[0] == [403]  # closed before the handshake
    assert app.kinds == ["websocket"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        get(headers=WEBSOCKET + b"X: 1\r\n" * 130 + CLOSE),
        get(headers=WEBSOCKET + b"X: " + b"1" * 9000 + b"\r\n" + CLOSE),
        get(headers=WEBSOCKET + b"Content-Length: 0\r\n" + CLOSE),
        get(headers=WEBSOCKET).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
async def test_a_websocket_that_the_library_does_not_parse_is_answered(port: int, request_bytes: bytes) -> None:
    assert (await exchange(port, request_bytes))[0] == [200]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        get(b"http://x"),
        get(headers=b"X: a\0b\r\n"),
        post(b"Content-Length: 3\r\n"),
        post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_told_why(port: int, request_bytes: bytes) -> None:
    statuses, body = await exchange(port, request_bytes)
    assert statuses == [400]
    assert "not valid HTTP/1.1" in message_of(body, 400)


async def test_garbage_after_a_request_does_not_cost_its_answer(app: App, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(get(b"/wait") + b"\0\0garbage\r\n\r\n")
    await asyncio.wait_for(app.waiting.wait(), ENOUGH_S)
    app.go.set()
    got = await asyncio.wait_for(reader.read(-1), ENOUGH_S)
    writer.close()
    assert got.startswith(b"HTTP/1.1 200")
    assert got.endswith(b'["GET", 0, false]')


async def test_a_connection_without_a_request_is_closed(app: App) -> None:
    async with listening(app, http=Connection, timeout_keep_alive=0) as url:
        assert await exchange(int(url.rpartition(":")[2])) == ([], b"")


@pytest.mark.parametrize("target", [b"x:443", b"/x"])
async def test_a_gateway_is_no_proxy(port: int, target: bytes) -> None:
    statuses, body = await exchange(port, b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert statuses == [405]
    assert "does not accept CONNECT" in message_of(body, 405)
