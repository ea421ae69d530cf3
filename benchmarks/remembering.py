"""What a gateway pays to remember its requests and to trace them: CPU for each request, bytes for each that is kept.

    python benchmarks/remembering.py [--record FILE]

A request goes through the shell to an app that opens a stream and notes what `FleetClient` does for one that ends as it
should; there is no engine. The settings take turns; CPU is that of all threads of this process, so that sending spans
counts, and the receiver is another process. Nothing is done for a token.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twins import _OpenView

from kervan.bench import records
from kervan.fleet.timeline import MAX_STEPS, MAX_STREAMS, RequestRecord, current_request
from kervan.gateway.reconnect import Streams
from kervan.gateway.remembered import RequestMemory
from kervan.gateway.shell import GatewayShell
from kervan.gateway.tracing import Tracing

ROUNDS, REPEATS = 1000, 9
RECEIVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def receiving() -> Iterator[str]:
    """A process that takes spans and forgets them; its URL."""
    with subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1/traces"
        finally:
            process.kill()


def note_stream(record: RequestRecord | None, number: int) -> None:
    """As `FleetClient` does for a stream that is placed, answered and ends."""
    if record is None:
        return
    timeline = record.open(f"chatcmpl-{number:032x}-0badcafe", 512, time.monotonic())
    if timeline is not None:
        timeline.note("placed", "on-demand-4e6983", "fewest outstanding tokens", 512)
        timeline.note("first token", "on-demand-4e6983", cached_tokens=0, queue_s=0.001)
        timeline.note("ended", "on-demand-4e6983", "stop", 128)


def shell(requests: RequestMemory | None) -> GatewayShell:
    async def inner(_: Any, receive: Any, send: Any) -> None:
        await receive()
        note_stream(current_request.get(), 7)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    made = GatewayShell(_OpenView(), streams=Streams("gw-1", list, b"key"), requests=requests)
    made.attach(inner)
    return made


async def cpu_us(app: GatewayShell, headers: list[tuple[bytes, bytes]]) -> float:
    """Of one request."""
    body = json.dumps({"model": "model", "prompt": list(range(512)), "max_tokens": 128, "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions",
        "headers": [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: Any) -> None:
        pass

    begin_s = time.process_time()
    for number in range(ROUNDS):
        await app(scope, receive, send)
        if number % 50 == 0:
            await asyncio.sleep(0)
    return (time.process_time() - begin_s) / ROUNDS * 1e6


def kept_bytes(num_streams: int, num_steps: int, count: int = 1000) -> float:
    """Of one request that is remembered, by what Python has allocated."""
    memory = RequestMemory(count)
    scope = {"path": "/v1/chat/completions", "headers": [(b"x-request-id", b"0" * 32)]}
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        with memory.begin(scope, time.monotonic()):
            record = current_request.get()
            assert record is not None
            record.stream_id = f"gw-abcdef-{number:032x}"
            if num_steps == 3:
                note_stream(record, number)
                continue
            for stream in range(num_streams):
                timeline = record.open(f"{stream}_chatcmpl-{number:032x}-0badcafe", 512, time.monotonic())
                for step in range(num_steps if timeline is not None else 0):
                    assert timeline is not None
                    timeline.note("placed", f"on-demand-{step:06x}", "fewest outstanding tokens", 512)
    found = (tracemalloc.get_traced_memory()[0] - before) / count
    tracemalloc.stop()
    return found


async def measure() -> dict[str, Any]:
    sampled = [(b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")]
    unsampled = [(b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")]
    with receiving() as url:
        tracing = Tracing(url, fleet="f", gateway_id="gw-1")
        settings: dict[str, tuple[GatewayShell, list[tuple[bytes, bytes]]]] = {
            "off": (shell(None), sampled),
            "remembered": (shell(RequestMemory(1000)), sampled),
            "traced, not sampled": (shell(RequestMemory(1000, tracing)), unsampled),
            "traced": (shell(RequestMemory(1000, tracing)), sampled),
        }
        found: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(REPEATS):
            for name, (app, headers) in settings.items():
                found[name].append(await cpu_us(app, headers))
        tracing.close()
    rows = {
        name: {"cpu_us_per_request": statistics.median(each), "min": min(each), "max": max(each)}
        for name, each in found.items()
    }
    return {
        "requests": ROUNDS,
        "repeats": REPEATS,
        "cpu": rows,
        "bytes_per_request": kept_bytes(1, 3),
        "most_bytes_per_request": kept_bytes(MAX_STREAMS, MAX_STEPS, 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # spans that are too many are dropped
    found = asyncio.run(measure())
    for name, row in found["cpu"].items():
        print(f"{name:20} {row['cpu_us_per_request']:6.1f} us ({row['min']:.1f} to {row['max']:.1f})")
    print(f"bytes: {found['bytes_per_request']:.0f} a request, at most {found['most_bytes_per_request']:.0f}")
    if args.record:
        print(
            records.write(
                args.record, records.record("remembering", found) | {"command": "python benchmarks/remembering.py"}
            )
        )


if __name__ == "__main__":
    main()
