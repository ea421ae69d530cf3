"""What it costs to pass a request on between fleets that share a port: CPU time of the gateway in between. CPU only.

    python benchmarks/shared_port.py --streams 64 --record DIR

A source streams chunks of the size of a chat chunk, each stream one every `--pause` seconds; the client reads them from
the source itself (`direct`), and through a gateway's `SharedPort` (`relayed`). Both servers are uvicorn on uvloop.
"""

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from kervan.bench import records

CHUNK = b'data: {"id":"chatcmpl-8f14e45fceea167a5a36dedd4bea2543","object":"chat.completion.chunk","created":1795392000,"model":"qwen","choices":[{"index":0,"delta":{"content":" caravan"},"logprobs":null,"finish_reason":null}]}\n\n'  # noqa: E501
BODY = b'{"model":"qwen"}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
KEY = b"key"


# ---- the two servers, each in a process of its own


def source(num_chunks: int, pause_s: float) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if b"short" in scope["query_string"]:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(num_chunks):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(pause_s)
        await send({"type": "http.response.body", "body": b""})

    return app


def relay(source_url: str) -> Any:
    from kervan.fleet.directory import GatewayEntry
    from kervan.gateway.shared_port import Neighbour, SharedPort
    from kervan.gateway.shell import GatewayShell
    from kervan.policy.model_routing import PortFleet

    shell = GatewayShell(None)  # type: ignore[arg-type] # no request is for this fleet
    port = SharedPort(shell, lambda: PortFleet("own", ("llama",)), "here", KEY)
    port.update([Neighbour("other", ("qwen",), False, KEY, (GatewayEntry("g", "here", 1, "", source_url, True),))])
    return port


def serve(app: Any) -> None:
    import uvicorn

    from kervan.gateway.server import listen

    listening = listen("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(
        app, http="httptools", loop="uvloop", lifespan="off", interface="asgi3", access_log=False, log_level="warning"
    )
    uvicorn.Server(config).run(sockets=[listening])


class Server:
    def __init__(self, *words: str) -> None:
        command = [sys.executable, __file__, "--serve", *words]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._meter = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        times = self._meter.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


# ---- the client


async def take(port: int, num_chunks: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD % len(BODY) + BODY)
    missing = num_chunks
    while missing:
        part = await reader.read(1 << 16)
        assert part, f"the stream broke off with {missing} of {num_chunks} chunks missing"
        missing -= part.count(b"data: ")
    writer.close()


async def ask(port: int, num_requests: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(num_requests):
        writer.write((HEAD % len(BODY)).replace(b" HTTP", b"?short HTTP", 1) + BODY)
        await reader.readuntil(b"\r\n\r\nok")
    writer.close()


async def streams(port: int, num_streams: int, num_chunks: int) -> None:
    await asyncio.gather(*(take(port, num_chunks) for _ in range(num_streams)))


def measure(servers: dict[str, Server], load: Any, count: int) -> dict[str, float]:
    """CPU microseconds of each server per piece of the load, which is `count` pieces."""
    before = {name: server.cpu_s() for name, server in servers.items()}
    asyncio.run(load)
    return {name: round(1e6 * (server.cpu_s() - before[name]) / count, 1) for name, server in servers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="64")
    parser.add_argument("--chunks", type=int, default=400, help="of each stream")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between the chunks of a stream")
    parser.add_argument("--requests", type=int, default=2000, help="short ones, one after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(relay(args.serve) if args.serve.startswith("http") else source(args.chunks, args.pause))
        return
    own = Server("source", "--chunks", str(args.chunks), "--pause", str(args.pause))
    between = Server(f"http://127.0.0.1:{own.port}")
    servers = {"source": own, "relay": between}
    levels: list[tuple[str, int, Any, int]] = [
        (f"{n} streams", n * args.chunks, streams, n) for n in map(int, args.streams.split(","))
    ]
    runs = []
    try:
        for what, count, _, n in levels:
            for way, port in (("direct", own.port), ("relayed", between.port)):
                found = [measure(servers, streams(port, n, args.chunks), count) for _ in range(args.rounds)]
                runs.append(told(f"{what}, {way}", "chunk", found))
        for way, port in (("direct", own.port), ("relayed", between.port)):
            found = [measure(servers, ask(port, args.requests), args.requests) for _ in range(args.rounds)]
            runs.append(told(f"short requests, {way}", "request", found))
    finally:
        between.stop()
        own.stop()
    if args.record is not None:
        command = shlex.join(["python", "benchmarks/shared_port.py", *sys.argv[1:]])
        made = {**records.record("shared-port", {"runs": runs}), "command": command}
        print(records.write(args.record, made))


def told(what: str, piece: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """Median and range over the rounds, printed too."""
    run: dict[str, Any] = {"what": what}
    for name in found[0]:
        values = [round_[name] for round_ in found]
        run[f"{name}_cpu_us_per_{piece}"] = {
            "median": statistics.median(values), "min": min(values), "max": max(values),
        }  # fmt: skip
    print(json.dumps(run), flush=True)
    return run


if __name__ == "__main__":
    main()
