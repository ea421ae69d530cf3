"""Metadata servers for tests: real HTTP on a free port, answering as the clouds document."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Asked:
    """A request as it came; header names in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class DropError(Exception):
    """Raised by a cloud that closes the connection without an answer."""


Handler = Callable[[Asked], Awaitable[Answer]]


class Server:
    """One address that can go away and come back."""

    def __init__(self, handler: Handler):
        self.handler = handler
        self.asked: list[Asked] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._was_asked = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def was_asked(self, times: int) -> None:
        """Wait until so many requests have come, at most 10 s."""
        async with asyncio.timeout(10):
            while len(self.asked) < times:
                self._was_asked.clear()
                await self._was_asked.wait()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *rest = head.strip().split("\r\n")
            method, target, _ = line.split(" ")
            headers = {name.lower(): value for name, value in (row.split(": ", 1) for row in rest)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            parts = urlsplit(target)
            asked = Asked(method, parts.path, dict(parse_qsl(parts.query)), headers, body)
            self.asked.append(asked)
            self._was_asked.set()
            answer = await self.handler(asked)
            raw = answer.body.encode() if isinstance(answer.body, str) else answer.body
            lines = [f"HTTP/1.1 {answer.status} X", f"Content-Length: {len(raw)}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in answer.headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
            await writer.drain()
        except (DropError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


@contextlib.asynccontextmanager
async def serving(cloud: Any) -> AsyncIterator[Server]:
    """A server in front of a cloud's `answer`."""
    server = Server(cloud.answer)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.contextmanager
def serving_beside(cloud: Any) -> Iterator[Server]:
    """As `serving`, in a thread: for what outlives the loop of a test."""
    loop, server = asyncio.new_event_loop(), Server(cloud.answer)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def forever() -> None:
    await asyncio.Event().wait()


class Aws:
    """IMDSv2 of one instance. `items`: path below /latest/meta-data/ -> text; all others are 404."""

    def __init__(self, *, ttl_s: str = "21600", **items: str) -> None:
        self.items: dict[str, str] = {"instance-id": "i-0123456789abcdef0", **items}
        self.ttl_s = ttl_s
        self.tokens: list[str] = []
        self.is_valid = True
        self.status = 0  # of all items, when not 0

    async def answer(self, asked: Asked) -> Answer:
        if asked.path == "/latest/api/token":
            if asked.method != "PUT":
                return Answer(405)
            if not 1 <= int(asked.headers["x-aws-ec2-metadata-token-ttl-seconds"]) <= 21600:
                return Answer(400)
            self.tokens.append(f"token-{len(self.tokens)}==")
            self.is_valid = True
            return Answer(200, self.tokens[-1], {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": self.ttl_s})
        if not self.tokens or asked.headers.get("x-aws-ec2-metadata-token") != self.tokens[-1] or not self.is_valid:
            return Answer(401)
        if self.status:
            return Answer(self.status)
        text = self.items.get(asked.path.removeprefix("/latest/meta-data/"))
        return Answer(404, "<html>404</html>") if text is None else Answer(200, text)


class Gcp:
    """Google's metadata server: values with ETags, and answers that wait for a change."""

    def __init__(self, **values: str) -> None:
        self.values = {
            "instance/name": "node-1",
            "instance/preempted": "FALSE",
            "instance/maintenance-event": "NONE",
            **values,
        }
        self.has_etag = True
        self.waits = True
        self.status = 0
        self._changed = asyncio.Event()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value
        self._changed.set()
        self._changed = asyncio.Event()

    def etag(self, key: str) -> str:
        return f"{hash(self.values[key]) & 0xFFFFFFFF:08x}"

    async def answer(self, asked: Asked) -> Answer:
        if asked.headers.get("metadata-flavor") != "Google":
            return Answer(403, "Missing Metadata-Flavor:Google header.")
        key = asked.path.removeprefix("/computeMetadata/v1/")
        flavor = {"Metadata-Flavor": "Google"}
        if key not in self.values:
            return Answer(404, "", flavor)
        if self.status:
            return Answer(self.status, "", flavor)
        is_known = asked.query.get("last_etag") in (None, self.etag(key))
        if asked.query.get("wait_for_change") == "true" and self.waits and is_known:
            before = self.values[key]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(float(asked.query.get("timeout_sec", "60"))):
                    while self.values[key] == before:
                        await self._changed.wait()
        headers = {**flavor, "ETag": self.etag(key)} if self.has_etag else flavor
        return Answer(200, self.values[key], headers)


class Azure:
    """The metadata service of one VM, with scheduled events."""

    def __init__(self, name: str = "vm_0", **compute: str) -> None:
        self.compute = {
            "name": name,
            "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
            "location": "westeurope",
            "zone": "",
            "priority": "",
            **compute,
        }
        self.events: list[Any] = []
        self.incarnation = 1
        self.first_answer_s = 0.0
        self.raw: str | None = None
        self.approved: list[str] = []

    async def answer(self, asked: Asked) -> Answer:
        if asked.headers.get("metadata") != "true" or "api-version" not in asked.query:
            return Answer(400, '{"error": "Bad request"}')
        if asked.path == "/metadata/instance/compute":
            return Answer(200, json.dumps(self.compute))
        if asked.path != "/metadata/scheduledevents":
            return Answer(404)
        if asked.method == "POST":
            try:
                self.approved += [request["EventId"] for request in json.loads(asked.body)["StartRequests"]]
            except (ValueError, KeyError, TypeError):
                return Answer(400)
            return Answer(200)
        delay_s, self.first_answer_s = self.first_answer_s, 0.0
        await asyncio.sleep(delay_s)
        document = {"DocumentIncarnation": self.incarnation, "Events": self.events}
        return Answer(200, json.dumps(document) if self.raw is None else self.raw)


def scheduled_event(event_id: str = "602d9444", kind: str = "Preempt", **fields: Any) -> dict[str, Any]:
    """A scheduled event as api-version 2020-07-01 has it."""
    return {
        "EventId": event_id,
        "EventStatus": "Scheduled",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": ["vm_0"],
        "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT",
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
        **fields,
    }
