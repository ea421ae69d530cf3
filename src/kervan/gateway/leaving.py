"""How a gateway leaves a port that others go on to serve: no client may notice."""

import asyncio
import contextlib
import os
import socket
import time

import uvicorn

# How long clients are told to connect anew before the port is closed; uvicorn writes its default headers once a second.
LEAVE_S = 1.0
# A connection without a request for so long after its last response is idle.
IDLE_S = 2.0
# How long a connection may take to send its first request.
FIRST_REQUEST_S = 10.0


async def send_clients_away(server: uvicorn.Server, listening: socket.socket, *, timeout_s: float) -> None:
    """Stop listening without breaking a connection; returns when all are gone or idle, at the latest after `timeout_s`.

    Answers tell clients to connect anew, elsewhere. One whose answer began before that will ask again on the same
    connection as soon as it ends: it gets one more answer, and is told then.

    The kernel resets what it has connected and nobody has accepted when a socket closes; so a second handle to it is
    accepted from until the last moment (`net.ipv4.tcp_migrate_req=1` closes the gap of microseconds that is left: the
    kernel then hands such connections to the other gateways). What was accepted may still send its first request.
    """
    deadline_s = time.monotonic() + timeout_s
    goodbye = (b"connection", b"close")
    server.server_state.default_headers.append(goodbye)
    server.config.encoded_headers.append(goodbye)  # uvicorn makes the default ones from these, once in a second
    await asyncio.sleep(LEAVE_S)
    last = listening.dup()
    last.setblocking(False)
    for listener in server.servers:
        listener.close()
    await asyncio.sleep(0.01)  # the loop closes its handle in its next rounds
    listening.close()
    accepted = []
    os.sched_yield()  # a fresh time slice, so that nothing else runs between the last accept and the close
    with contextlib.suppress(BlockingIOError):
        while True:
            accepted.append(last.accept()[0])
    last.close()
    config, loop = server.config, asyncio.get_running_loop()

    def protocol() -> asyncio.Protocol:
        http: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=server.server_state, app_state=server.lifespan.state
        )
        return http

    for connection in accepted:
        connection.setblocking(False)
        await loop.connect_accepted_socket(protocol, connection, ssl=config.ssl)
    idle_since_s: dict[tuple[int, int], float] = {}
    while (now_s := time.monotonic()) < deadline_s:
        is_busy = False
        for client in list(server.server_state.connections):
            cycle = getattr(client, "cycle", client)  # a request and its answer; None before the first
            if cycle is not None and not getattr(cycle, "response_complete", False):
                is_busy = True
                continue
            since_s = idle_since_s.setdefault((id(client), id(cycle)), now_s)
            is_busy |= now_s - since_s < (FIRST_REQUEST_S if cycle is None else IDLE_S)
        if not is_busy:
            break
        await asyncio.sleep(0.1)
