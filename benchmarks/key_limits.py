"""What API keys and their limits cost a gateway: CPU for each request, and the wait for the gateway that counts.

    python benchmarks/key_limits.py [--record FILE]

A request goes through the shell to an app that answers at once. The settings take turns; CPU is that of this process,
in which both gateways are where one asks the other over HTTP. Nothing is done for a token.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import uvloop
from remembering import ROUNDS, cpu_us
from twins import _OpenView

from kervan.bench import records
from kervan.config.api_keys import KeyEntry, KeyTable, digest
from kervan.fleet.directory import GatewayEntry
from kervan.gateway.key_guard import KeyGuard
from kervan.gateway.keys import KeyRing
from kervan.gateway.quotas import Quotas
from kervan.gateway.server import listen
from kervan.gateway.shell import GatewayShell

REPEATS = 5
KEY = "kv-0"
LIMITS = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "streams": 10**6}


def table(num_keys: int, **limits: Any) -> KeyTable:
    entries = [KeyEntry(name=f"key{number}", digest=digest(f"kv-{number}"), **limits) for number in range(num_keys)]
    return KeyTable(tuple(entries), is_open=False)


def shell(keys: KeyTable, quotas: Quotas | None = None) -> GatewayShell:
    async def inner(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    made = GatewayShell(_OpenView(), KeyGuard(KeyRing(keys), quotas or Quotas("gw-1", list, b"key")))
    made.attach(inner)
    return made


@contextlib.asynccontextmanager
async def counted_elsewhere(name: str) -> Any:
    """Quotas of a gateway for which another one, behind HTTP, counts the key."""
    import uvicorn

    other = next(
        id for id in (f"gw-{number}" for number in range(2, 99)) if Quotas(id, list, b"")._counting(name) is None
    )

    async def internal(_: Any, receive: Any, send: Any) -> None:
        body = counting.take((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    sock = listen("127.0.0.1", 0)
    entries: list[GatewayEntry] = []
    counting = Quotas(other, lambda: entries, b"key")
    asking_id = next(
        id
        for id in (f"asking-{number}" for number in range(99))
        if Quotas(id, lambda: [GatewayEntry(other, "n", 1, "", "", True)], b"")._counting(name) is not None
    )
    entries += [GatewayEntry(other, "n", 1, "", f"http://127.0.0.1:{sock.getsockname()[1]}", True)]
    config = uvicorn.Config(internal, lifespan="off", log_level="error", access_log=False, interface="asgi3")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    asking = Quotas(asking_id, lambda: entries, b"key")
    try:
        yield asking
    finally:
        await asking.close()
        server.should_exit = True
        await serving


async def measure() -> dict[str, Any]:
    """By setting; wall-clock is that of requests one after the other."""
    headers = [(b"authorization", b"Bearer " + KEY.encode())]
    async with counted_elsewhere("key0") as asking:
        settings = {
            "open": shell(KeyTable()),
            "1 key": shell(table(1)),
            "1000 keys": shell(table(1000)),
            "limits, counted here": shell(table(1, **LIMITS)),
            "limits, counted at another gateway": shell(table(1, **LIMITS), asking),
        }
        cpu: dict[str, list[float]] = {name: [] for name in settings}
        wall: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(REPEATS):
            for name, app in settings.items():
                begin_s = time.perf_counter()
                cpu[name].append(await cpu_us(app, headers))
                wall[name].append((time.perf_counter() - begin_s) / ROUNDS * 1e6)
    return {"requests": ROUNDS, "repeats": REPEATS} | {
        name: {
            "cpu_us": round(statistics.median(cpu[name]), 1),
            "cpu_us_range": [round(min(cpu[name]), 1), round(max(cpu[name]), 1)],
            "wall_us": round(statistics.median(wall[name]), 1),
        }
        for name in settings
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    found = uvloop.run(measure())  # as a gateway's process
    print(json.dumps(found, indent=2))
    if arguments.record is not None:
        record = records.record("key limits", found) | {"command": "python benchmarks/key_limits.py"}
        print(records.write(arguments.record, record))


if __name__ == "__main__":
    main()
