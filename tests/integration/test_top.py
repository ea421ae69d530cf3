"""`kervan top` in a real terminal on a real fleet, and what the fleet's logs say of requests that move under it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from harness.live import START_S, Fleet, eventually
from harness.screen import Screen, on_screen
from harness.shared_fleet import Models
from harness.twin_load import Load, kill_actor, load

from kervan.serve.directory.client import ACTOR_PREFIX, NAMESPACE
from kervan.twin.token_engine import answer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def screen(twins: Fleet) -> Iterator[Screen]:
    words = [sys.executable, "-m", "kervan", "top", "--name", twins.name]
    env = {**twins.home.environment, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
    with on_screen(words, env, columns=80, lines=24, cwd=twins.home.scratch) as shown:
        shown.until("3/3 replicas", timeout_s=START_S)
        yield shown
        child = psutil.Process(shown.process.pid).children()
        if shown.process.poll() is None:
            shown.press("q")
            assert shown.process.wait(20) == 0
        assert shown.modes() == shown.modes_before
        eventually(lambda: not any(process.is_running() for process in child), "what asks Ray has ended", 20)


async def test_a_fleet_is_followed_through_load_a_kill_and_a_directory_that_is_away(
    twins: Fleet, models: Models, screen: Screen
) -> None:
    def seen(what: str) -> Any:
        return asyncio.to_thread(screen.until, what, START_S)

    async with load(twins, models):
        await seen(r"streams 1\d")
        await seen(r"tok/s [1-9]")
        victim = twins.seen()["replicas"][0]
        os.kill(victim["pid"], signal.SIGKILL)
        await seen(rf"moved \d+ streams?: \d+ off {victim['id']}")
        screen.press("4")
        await seen(rf"replica {victim['id']} is gone")
        screen.press("3")
        await seen("the number of replicas is fixed")
        screen.press("5")
        await seen("port 9400|NVIDIA")
        screen.press("2")
        await seen(r"gw-\w+ +ready +\d+")
        screen.press("d")
        await seen(r"address +http://")
        screen.press("1")
        for columns, lines in ((40, 10), (200, 60), (80, 24)):
            screen.resize(columns, lines)
            await seen(r"on-demand-\w+ +ready")
            assert len(screen.lines) == lines
        await asyncio.to_thread(kill_actor, twins, ACTOR_PREFIX + twins.name, NAMESPACE)
        await asyncio.to_thread(twins.wait_until_whole, 3, 1)
        another = twins.seen()["replicas"][-1]
        os.kill(another["pid"], signal.SIGKILL)
        screen.press("4")
        await seen(rf"replica {another['id']} is gone")  # as the directory says that Ray has started since
        screen.press("p")
        await seen("PAUSED")
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)


def log_lines(path: str) -> list[dict[str, Any]]:
    """Of a log whose lines are JSON objects, except those that others print."""
    found = []
    for line in Path(path).read_text(errors="replace").splitlines():
        if line.startswith('{"time": "'):
            found.append(json.loads(line))
    return found


async def test_a_moved_request_is_found_in_the_logs_of_gateway_and_replica_by_its_ids(
    twins: Fleet, models: Models
) -> None:
    checks = Load(twins.url, models.demo)
    headers = {"x-request-id": "night-7", "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    async with httpx.AsyncClient(base_url=twins.url, timeout=START_S, headers=headers) as client:
        stream = asyncio.create_task(checks.stream(client, [7, 8, 9], 60))  # 6 s
        told: dict[str, Any] = {}

        def placed_on() -> Any:
            nonlocal told
            answered = httpx.get(f"{twins.url}/kervan/requests/night-7")
            told = answered.json() if answered.status_code == 200 else {}
            decode = [p for s in told.get("streams", []) for p in s["parts"] if p["part"] == "decode"]
            return decode and decode[-1]["replica"]

        replica = await asyncio.to_thread(eventually, placed_on, "it is answered", START_S)
        status = await asyncio.to_thread(twins.status)
        (pid,) = (r["pid"] for r in status["replicas"] if r["id"] == replica)
        os.kill(pid, signal.SIGKILL)
        assert await stream == (answer([7, 8, 9], 60, checks.limits), "length")
    (gateway,) = status["gateways"]
    (line,) = (
        e
        for e in log_lines(gateway["log"])
        if "goes on at replica" in e["message"] and e.get("request_id") == "night-7"
    )
    assert (line["trace_id"], line["gateway"], line["fleet"]) == (TRACE_ID, gateway["id"], twins.name)
    (target,) = (r for r in status["replicas"] if r["id"] == line["replica"])
    (there,) = (
        e
        for e in log_lines(target["log"])
        if "goes on here after" in e["message"] and e["stream"] == line["stream"] + "~1"
    )
    assert (there["request_id"], there["replica"]) == (
        "night-7",
        target["id"],
    )  # vLLM sends traces on with `otlp` alone
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
