"""Requests that no client should send, on the sockets of gateways with vLLM's app over a twin.

Of each: an answer within `ANSWER_S`, never 5xx but the documented 503, never a traceback of an exception that nobody
expected. Of all together: nothing is left of them, and a plain request is answered as before.
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
from typing import Any

import httpx
import psutil
import pytest
from harness import sweeps
from harness.gateway_trio import KEY, GatewayTrio
from harness.live import until
from harness.odd_bodies import OddBodies

pytestmark = pytest.mark.timeout(600)

ANSWER_S = 60.0
AT_ONCE = 6
NUM_SAMPLED, NUM_EXHAUSTIVE = 600, 4_000
WARM_UP = 200
MAX_GROWN_BYTES = 96 << 20
MIB = 1 << 20
PLAIN = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
WITH_KEY = {"authorization": f"Bearer {KEY}"}
# Of a server, not of vLLM's words for a refusal.
UNEXPECTED = re.compile(r"Exception in ASGI|failed before its answer|Task exception|never retrieved|Fatal|Unhandled")
# 501: what the model cannot do.
UNDOCUMENTED = re.compile(r'"code": ?5(?!01)\d\d')


class Door:
    """The public port of a gateway, and what must be as it was before."""

    def __init__(self, trio: GatewayTrio) -> None:
        self.trio = trio
        host, port = trio.urls[0].removeprefix("http://").split(":")
        self.address = host, int(port)
        self.process = psutil.Process(trio.pid)
        self.plain = self.answer()
        self.before = trio.ask("left")
        self.num_files = self.process.num_fds()
        self.log_bytes = trio.log_path.stat().st_size

    def answer(self) -> Any:
        """To a plain request."""
        response = httpx.post(f"{self.trio.urls[0]}/v1/completions", json=PLAIN, headers=WITH_KEY, timeout=ANSWER_S)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    async def settled(self) -> None:
        """Nothing is left of what was sent."""
        with contextlib.suppress(AssertionError):  # the next line says more
            await until(lambda: self.left() == {})
        assert self.left() == {}
        assert self.answer() == self.plain
        with self.trio.log_path.open(errors="replace") as log:
            log.seek(self.log_bytes)
            told = log.read()
        assert UNEXPECTED.search(told) is None, told[-3000:]

    def left(self) -> dict[str, int]:
        now = {**self.trio.ask("left"), "files": self.process.num_fds()}
        allowed = {**self.before, "files": self.num_files + 2}  # of pools
        return {name: count for name, count in now.items() if count > allowed[name]}


@pytest.fixture(scope="module")
def door(trio: GatewayTrio) -> Door:
    return Door(trio)


@pytest.fixture(scope="module")
def bodies(trio: GatewayTrio) -> OddBodies:
    return OddBodies(httpx.get(f"{trio.urls[0]}/openapi.json", timeout=ANSWER_S).json())


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Status, head in lower case, and body of one answer.

    Raises: IncompleteReadError when the gateway closes before it is whole.
    """
    head = b""
    while not head or head.startswith(b"http/1.1 100"):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head[9:12])
    if (length := re.search(rb"\r\ncontent-length: (\d+)", head)) is not None:
        return status, head, await reader.readexactly(int(length[1]))
    body = b""
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    return status, head, body


def fault(status: int, head: bytes, body: bytes) -> str | None:
    """What is wrong with an answer."""
    text = body.decode(errors="replace")
    if status == 503 and b"\r\nretry-after: " in head:
        return None
    if status >= 500 and status != 501:
        return f"{status} {text[:500]}"
    if b"text/event-stream" in head and UNDOCUMENTED.search(text):
        return f"in a stream: {text[-500:]}"
    if status >= 400:
        error = json.loads(text)
        if not (error.get("detail") or error["error"]["message"]):
            return f"{status} without a message: {text[:500]}"
    return None


# ---- bodies


async def send_all(door: Door, bodies: OddBodies, seed: int, numbers: range) -> list[str]:
    """What was wrong with the answers, each with how to repeat it."""
    found: list[str] = []
    rest = iter(numbers)

    async def client() -> None:
        connection = None
        for number in rest:
            case = bodies.case(seed, number)
            reader, writer = connection or await asyncio.open_connection(*door.address)
            connection = None
            try:
                async with asyncio.timeout(ANSWER_S):
                    writer.write(case.as_bytes(KEY))
                    status, head, body = await read_answer(reader)
                wrong = fault(status, head, body)
                if b"\r\nconnection: close" not in head:
                    connection = reader, writer
            except (OSError, EOFError, TimeoutError, ValueError, KeyError) as error:
                wrong = f"{type(error).__name__}: {error}"
            if connection is None:
                writer.close()
            if wrong is not None:
                found.append(f"KERVAN_SAMPLE_SEED={seed}, case {number}: {case!r}"[:2000] + f"\n  {wrong}")
        if connection is not None:
            connection[1].close()

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return found


async def sent_odd_bodies(door: Door, bodies: OddBodies, count: int) -> None:
    # Each run takes others.
    seed = sweeps.SEED if "KERVAN_SAMPLE_SEED" in os.environ else secrets.randbelow(10**9)
    print(f"KERVAN_SAMPLE_SEED={seed} sends the same bodies again")
    found = await send_all(door, bodies, seed, range(WARM_UP))
    warm_bytes = door.process.memory_info().rss
    found += await send_all(door, bodies, seed, range(WARM_UP, count))
    assert found == [], "\n".join([f"{len(found)} of {count} bodies", *found[:10]])
    await door.settled()
    grown_bytes = door.process.memory_info().rss - warm_bytes
    assert grown_bytes < MAX_GROWN_BYTES, f"{grown_bytes / MIB:.0f} MiB more after {count} bodies, seed {seed}"


async def test_some_bodies_that_no_client_should_send(door: Door, bodies: OddBodies) -> None:
    await sent_odd_bodies(door, bodies, NUM_SAMPLED)


@pytest.mark.exhaustive
async def test_many_bodies_that_no_client_should_send(door: Door, bodies: OddBodies) -> None:
    await sent_odd_bodies(door, bodies, NUM_EXHAUSTIVE)


# ---- bytes

BODY = json.dumps(PLAIN).encode()
SHORT = json.dumps({**PLAIN, "stream": True}).encode()
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQC\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
TARGET = b"/v1/completions"
KEY_LINE = b"authorization: Bearer %s\r\n" % KEY.encode()


def post(headers: bytes = b"", body: bytes = BODY, *, target: bytes = TARGET, version: bytes = b"1.1") -> bytes:
    length = (
        b""
        if b"transfer-encoding" in headers or b"content-length" in headers
        else b"content-length: %d\r\n" % len(body)
    )
    head = b"POST %s HTTP/%s\r\nhost: x\r\n%scontent-type: application/json\r\n" % (target, version, KEY_LINE)
    return head + length + headers + b"\r\n" + body


def get(
    target: bytes = b"/v1/models", headers: bytes = b"", *, version: bytes = b"1.1", method: bytes = b"GET"
) -> bytes:
    return b"%s %s HTTP/%s\r\nhost: x\r\n%s%s\r\n" % (method, target, version, KEY_LINE, headers)


def chunked(*chunks: bytes, headers: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end
    return post(b"transfer-encoding: chunked\r\n" + headers, body)


# What is sent, and the statuses that answer it one after another; () where the connection is closed without a word.
BYTES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "pipelined": (post() + get() + post(body=SHORT) + get(b"/health"), (200, 200, 200, 200)),
    "chunked": (chunked(BODY[:10], BODY[10:]), (200,)),
    "chunk of one byte each": (chunked(*(bytes([byte]) for byte in BODY)), (200,)),
    "trailers": (chunked(BODY, headers=b"trailer: x-a\r\n", end=b"0\r\nx-a: 1\r\n\r\n"), (200,)),
    "chunk extension": (chunked(end=b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), (200,)),
    "no chunk": (chunked(end=b"zz\r\n"), (400,)),
    "negative chunk": (chunked(end=b"-1\r\n" + BODY), (400,)),
    "chunk beyond 64 bits": (chunked(end=b"f" * 20 + b"\r\n" + BODY), (400,)),
    "length and chunks": (post(b"transfer-encoding: chunked\r\ncontent-length: 4\r\n", b"0\r\n\r\n" + get()), (400,)),
    "two lengths": (post(b"content-length: 3\r\ncontent-length: 4\r\n"), (400,)),
    "negative length": (post(b"content-length: -1\r\n"), (400,)),
    "length with a sign": (post(b"content-length: +5\r\n"), (400,)),
    "length beyond 64 bits": (post(b"content-length: " + b"9" * 30 + b"\r\n"), (400,)),
    "length of a terabyte": (post(b"content-length: 999999999999\r\n"), (413,)),
    "another coding": (post(b"transfer-encoding: gzip\r\n"), (400,)),
    "header of 64 KiB": (get(headers=b"x: " + b"a" * 65536 + b"\r\n"), (431,)),
    "header of 4 MiB": (get(headers=b"x: " + b"a" * (4 << 20) + b"\r\n"), (431,)),
    "10,000 headers": (get(headers=b"".join(b"x-%d: 1\r\n" % i for i in range(10_000))), (431,)),
    "target of 1 MiB": (get(b"/" + b"a" * MIB), (431,)),
    "target of 60 KB": (get(b"/v1/" + b"a" * 60_000), (404,)),
    "bytes in a header": (get(headers=b"x: \xff\xfe\r\nx-request-id: \xff\r\norigin: \xff\r\n"), (200,)),
    "bytes in a name": (get(headers=b"x\xff: a\r\n"), (400,)),
    "bytes in a key": (get().replace(KEY.encode(), b"\xff"), (401,)),
    "bytes in a content type": (post().replace(b"application/json", b"\xff\xfe/json"), (400,)),
    "NUL in a header": (get(headers=b"x: a\0b\r\n"), (400,)),
    "folded header": (get(headers=b"x: a\r\n b\r\n"), (400,)),
    "space before a colon": (get(headers=b"x : a\r\n"), (400,)),
    "line feeds alone": (get().replace(b"\r\n", b"\n"), (400,)),
    "carriage return alone": (get(headers=b"x: a\rb\r\n"), (400,)),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (200,)),
    "HTTP/1.0": (get(version=b"1.0"), (200,)),
    "HTTP/1.0, streamed": (post(body=SHORT, version=b"1.0"), (200,)),
    "HTTP/9.9": (get(version=b"9.9"), (400,)),
    "HTTP/2 at once": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", (400,)),
    "HTTP/2 by upgrade": (post(H2C) + get(headers=H2C), (200, 200)),
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"a" * 200, (400,)),
    "WebSocket by POST": (post(WEBSOCKET), (200,)),
    "WebSocket with many headers": (get(headers=WEBSOCKET + b"x: 1\r\n" * 200), (200,)),
    "WebSocket where there is none": (get(b"/v1/models", WEBSOCKET), (403,)),
    "CONNECT": (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n", (405,)),
    "no method": (get(method=b"BREW"), (400,)),
    "TRACE": (get(method=b"TRACE"), (405,)),
    "absolute target": (get(b"http://other.example:99/v1/models"), (200,)),
    "target of an authority": (get(b"x:443"), (400,)),
    "asterisk": (get(b"*", method=b"OPTIONS"), (404,)),
    "no target": (get(b""), (400,)),
    "no slash": (get(b"v1/models"), (400,)),
    "percent signs": (
        get(b"/v1/%6dodels") + get(b"/v1/%zz%") + get(b"/v1/%00") + get(b"/v1/responses/%ff"),
        (200, 404, 404, 404),
    ),
    "line ends in a path": (get(b"/metrics/%0d%0aX:y") + get(b"/v1/responses/%0d%0ax"), (404, 404)),
    "dots": (get(b"/../../etc/passwd") + get(b"/v1/../metrics"), (404, 404)),
    "bytes in a target": (get(b"/v1/\xff"), (400,)),
    "query of 30 KB": (get(b"/v1/models?" + b"a=%ff&" * 5_000), (200,)),
    "Expect": (post(b"expect: 100-continue\r\n"), (200,)),
    "Expect of something else": (post(b"expect: 200-maybe\r\n"), (200,)),
    "GET with a body": (get(headers=b"content-length: 5\r\n") + b"hello" + get(), (200, 200)),
    "line ends first": (b"\r\n" * 1000 + get(), (200,)),
    "garbage": (bytes(range(256)) * 40, (400,)),
    "garbage after a request": (post() + b"\0\0\r\n\r\n", (200,)),
    "nothing": (b"", ()),
    "half a request line": (b"GET /v1/mod", ()),
    "half a head": (post()[:60], ()),
    "half a body": (post()[:-5], ()),
    "half a chunk": (chunked(BODY)[:-20], ()),
}


async def statuses(door: Door, sent: bytes, count: int) -> tuple[int, ...]:
    """Of `count` answers; a half-closed connection afterwards must end."""
    reader, writer = await asyncio.open_connection(*door.address)
    try:
        async with asyncio.timeout(ANSWER_S):
            writer.write(sent)
            got = []
            for _ in range(count):
                status, head, body = await read_answer(reader)
                assert fault(status, head, body if status != 403 else b'{"detail": "no body"}') is None
                got.append(status)
            writer.write_eof()
            assert await reader.read() == b""
            return tuple(got)
    finally:
        writer.close()


@pytest.mark.parametrize("name", BYTES)
async def test_bytes_that_no_client_should_send(door: Door, name: str) -> None:
    sent, expected = BYTES[name]
    assert await statuses(door, sent, len(expected)) == expected


async def test_clients_that_leave_at_any_byte_leave_nothing(door: Door) -> None:
    """Cut off within a head, a body or a stream, by an end of what is sent and by a reset."""
    whole = post(H2C, json.dumps({**PLAIN, "stream": True, "max_tokens": 200}).encode())
    for place in sweeps.positions(len(whole) + 1, "cut", most=40):
        for resets in (False, True):
            _, writer = await asyncio.open_connection(*door.address)
            writer.write(whole[:place])
            if resets:
                writer.transport.abort()
            else:
                writer.write_eof()
                writer.close()
    await door.settled()


async def test_nothing_is_left_of_bytes(door: Door) -> None:
    for sent, expected in BYTES.values():
        await statuses(door, sent, len(expected))
    await door.settled()
