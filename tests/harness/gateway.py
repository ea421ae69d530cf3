"""A gateway's surroundings: the fleet that it sees, and a server for its app."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import uvicorn

from kervan.config.api_keys import table_of
from kervan.gateway.key_guard import KeyGuard
from kervan.gateway.keys import KeyRing
from kervan.gateway.quotas import Quotas
from kervan.gateway.request_size import RequestSize
from kervan.gateway.shell import Shed


def guard_of(*keys: str) -> KeyGuard:
    """What lets these keys in, without limits; without any, everybody."""
    return KeyGuard(KeyRing(table_of(keys, None)), Quotas("gw", tuple, b""))


class View:
    """A fleet in memory."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.shed: Shed | None = None
        self.admitted = 0
        self.sizes: list[RequestSize] = []
        self.sessions: list[str] = []
        self.open = 0
        self.opened = 0
        self.is_open = asyncio.Event()
        self.is_idle = asyncio.Event()

    def readiness(self) -> str | None:
        return self.reason

    def admit(self, size: RequestSize, session: str = "") -> Shed | AbstractContextManager[None]:
        self.admitted += 1
        self.sizes.append(size)
        self.sessions.append(session)
        return self.shed or nullcontext()

    def model_name(self) -> str:
        return "tiny"

    async def metrics(self, gateway: str | None = None) -> bytes | None:
        return b"up 1\n" if gateway in (None, "gw-1") else None

    async def status(self) -> dict[str, object]:
        return {"model": "tiny", "replicas": []}

    async def explain(self, request_id: str) -> bytes | None:
        return b'{"gateway":"gw-1"}' if request_id == "known" else None

    def stream_opened(self) -> None:
        self.open += 1
        self.opened += 1
        self.is_open.set()

    def stream_closed(self) -> None:
        self.open -= 1
        self.is_idle.set()


@asynccontextmanager
async def listening(app: Any, **options: Any) -> AsyncIterator[str]:
    """A real uvicorn on a free port, in this event loop."""
    options = {"http": "httptools", "ws": "none", **options}
    config = uvicorn.Config(app, log_level="critical", lifespan="off", interface="asgi3", **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup(sockets=[listener])
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for connection in list(server.server_state.connections):
                connection.transport.close()
            for running in server.servers:
                running.close()
                await running.wait_closed()
