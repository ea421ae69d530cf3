"""`kervan top` on a fleet of twins under load: its picture for the docs, and what it costs.

    python benchmarks/top.py [--svg docs/images/top.svg] [--record FILE] [--url URL --name NAME]

Starts a fleet (or uses one that is there), loads it, kills a twin, and runs `kervan top` in a pty, whose screen pyte
keeps and rich draws. CPU is that of `kervan top` and of its child that asks Ray, over a minute of looks each second.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness.screen import Screen, on_screen
from twin_fleet import NAME, TwinFleet

from kervan.bench import records
from kervan.ports import free_port

STREAMS, COLUMNS, LINES = 24, 112, 26
MODEL = Path(__file__).parent / "models/llama3-8b"
ENV = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


async def _client(client: httpx.AsyncClient, model: str, seed: int) -> None:
    rng = random.Random(seed)
    while True:
        body = {"model": model, "prompt": [rng.randint(5, 900) for _ in range(rng.randint(20, 600))],
                "max_tokens": rng.randint(50, 400), "ignore_eos": True, "stream": True}  # fmt: skip
        with contextlib.suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    pass
        await asyncio.sleep(rng.expovariate(1.0))


@contextlib.contextmanager
def loaded(url: str) -> Iterator[None]:
    """Streams that come and go within the block."""

    async def run(is_over: threading.Event) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            tasks = [asyncio.create_task(_client(client, model, seed)) for seed in range(STREAMS)]
            await asyncio.to_thread(is_over.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    is_over = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run(is_over)))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def picture(screen: Screen, columns: int) -> str:
    """The screen as SVG."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    for row in screen.cells():
        line = Text(no_wrap=True)
        for cell in row:
            style = " ".join(
                [*(["bold"] if cell.bold else []), *(["reverse"] if cell.reverse else []),
                 *(["underline"] if cell.underscore else []), *([_colour(cell.fg)] if cell.fg != "default" else [])]
            )  # fmt: skip
            line.append(cell.data, style)
        line.rstrip()
        console.print(line)
    return console.export_svg(title="kervan top")


def _colour(name: str) -> str:
    """pyte calls yellow brown, as terminals once showed it."""
    return {"brown": "yellow", "brightbrown": "bright_yellow"}.get(name, name.replace("bright", "bright_"))


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds so far of `kervan top` and of its child."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    children = [child.cpu_times() for child in process.children()]
    return {"top": times.user + times.system, "feed": sum(child.user + child.system for child in children)}


def follow(url: str, svg: Path | None, seconds: float, name: str) -> dict[str, Any]:
    """Run `kervan top` under load: take its picture, then meter it at several sizes."""
    words = [sys.executable, "-m", "kervan", "top", "--name", name]
    found: dict[str, Any] = {}
    with loaded(url), on_screen(words, ENV, columns=COLUMNS, lines=LINES) as screen:
        screen.until("1 replicas")
        screen.press("j")
        time.sleep(20)  # some past for the graphs
        replicas = httpx.get(f"{url}/kervan/status").json()["directory"]["replicas"]
        psutil.Process(replicas[0]["pid"]).kill()
        screen.until("moved", timeout_s=60)
        time.sleep(12)
        if svg is not None:
            svg.parent.mkdir(parents=True, exist_ok=True)
            svg.write_text(picture(screen, COLUMNS))
        for columns, lines in ((80, 24), (200, 60)):
            screen.resize(columns, lines)
            time.sleep(2)
            before, sent, begin_s = cpu_s(screen.process.pid), len(screen.output), time.monotonic()
            time.sleep(seconds)
            after, took_s = cpu_s(screen.process.pid), time.monotonic() - begin_s
            found[f"{columns}x{lines}"] = {
                "cpu_percent": {part: round(100 * (after[part] - before[part]) / took_s, 2) for part in after},
                "bytes_per_s": round((len(screen.output) - sent) / took_s),
            }
        process = psutil.Process(screen.process.pid)
        found["rss_mib"] = {
            "top": round(process.memory_info().rss / 2**20),
            "feed": round(sum(child.memory_info().rss for child in process.children()) / 2**20),
        }
        screen.press("q")
        screen.process.wait(20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--url", help="of a fleet that is there")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--model", type=Path, default=MODEL, help="of the fleet that is started")
    given = parser.parse_args()
    if given.url:
        found = follow(given.url, given.svg, given.seconds, given.name)
    else:
        with TwinFleet(given.model, 4, 2, step_s=0.03, port=free_port(), logs=None) as fleet:
            found = follow(fleet.url, given.svg, given.seconds, NAME)
    print(json.dumps(found, indent=2))
    if given.record:
        command = {"command": "python benchmarks/top.py"}
        print(records.write(given.record, records.record("top", {"seconds": given.seconds, **found}) | command))


if __name__ == "__main__":
    main()
