"""Two servers share a port and one leaves: no client may notice."""

import asyncio
import contextlib
import socket
from typing import Any

import pytest
import uvicorn
import uvloop

from kervan.gateway.leaving import send_clients_away
from kervan.gateway.server import listen

NUM_CLIENTS = 24
SLOW_S = 1.5  # longer than clients have to leave
BODY_BYTES = 300
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % BODY_BYTES


async def app(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while len(body) < BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    if body.startswith(b"s"):
        await asyncio.sleep(SLOW_S)
    await send({"type": "http.response.body", "body": b"ok"})


def serve(sock: socket.socket) -> tuple[uvicorn.Server, "asyncio.Task[None]"]:
    config = uvicorn.Config(app, http="httptools", lifespan="off", interface="asgi3", log_level="warning")
    server = uvicorn.Server(config)
    return server, asyncio.create_task(server.serve(sockets=[sock]))


async def ask_for_ever(port: int, *, keeps: bool, failed: list[str], count: list[int]) -> None:
    """Requests one after the other, on one connection for as long as the server keeps it, or each on a new one."""
    reader = writer = None
    while True:
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD if keeps else HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
            await asyncio.sleep(0)  # the body comes in a segment of its own, as from many clients
            is_slow = count[0] % 100 == 30
            writer.write((b"s" if is_slow else b"b") * BODY_BYTES)
            assert reader is not None
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(2)
        except asyncio.CancelledError:
            if writer is not None:
                writer.close()
            raise
        except (OSError, asyncio.IncompleteReadError) as error:
            failed.append(repr(error))
            writer = None
            continue
        assert body == b"ok"
        count[0] += 1
        if not keeps or b"connection: close" in head.lower():
            assert writer is not None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            writer = None


async def leave_and_return(keeps: bool) -> tuple[list[str], list[int]]:
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    serving = [(*serve(sock), sock) for sock in (first, listen("127.0.0.1", port))]
    failed: list[str] = []
    counts = []
    clients = []
    for _ in range(NUM_CLIENTS):
        counts.append([0])
        clients.append(asyncio.create_task(ask_for_ever(port, keeps=keeps, failed=failed, count=counts[-1])))
    for _ in range(3):
        await asyncio.sleep(0.2)
        server, task, sock = serving.pop(0)
        await send_clients_away(server, sock, timeout_s=30.0)
        server.should_exit = True
        await task
        again = listen("127.0.0.1", port)
        serving.append((*serve(again), again))
    await asyncio.sleep(0.2)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    for server, task, _ in serving:
        server.should_exit = True
        await task
    return failed, [count[0] for count in counts]


@pytest.mark.parametrize("keeps", [True, False], ids=["kept connections", "new connections"])
def test_no_request_fails_while_gateways_come_and_go(keeps: bool) -> None:
    failed, counts = uvloop.run(leave_and_return(keeps))
    assert failed == []
    assert min(counts) > 10
