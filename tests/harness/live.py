"""A running fleet as its users see it: the `kervan` command, HTTP, process ids. And streams that tell how they went."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from harness import commands, warm_owner
from kervan.ports import free_port
from kervan.serve.environment import WARM_OWNER

# Starts take a minute on two idle cores; several minutes mean that the machine is shared, not that it hangs.
START_S = 600.0
REQUEST_S = 60.0
UNTIL_S = 300.0
HEARD_S = 3.0  # a gateway asks the directory once a second
SMALL = ("dtype=float32", "enforce_eager=true")
# Of all fleets, as those that differ are forked from another warm process. Left alone, vLLM binds every engine of a small
# machine to core 0, and the tests run up to three.
ENVIRONMENT = (
    *("--env", "VLLM_CPU_KVCACHE_SPACE=1", "--env", "TORCH_COMPILE_DISABLE=1"),
    *("--env", "VLLM_CPU_OMP_THREADS_BIND=nobind", "--env", "OMP_NUM_THREADS=1"),
)


def eventually(check: Callable[[], Any], what: str, timeout_s: float, every_s: float = 0.3) -> Any:
    """The first true value of `check`, asked again until the deadline; AssertionError then."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"after {timeout_s:.0f} s still not: {what}"
        time.sleep(every_s)


def none_is_left(alive: Callable[[], Collection[str]], before: Collection[str], timeout_s: float = 20) -> None:
    """Waits until all processes that were not there `before` are gone. Both are told as "pid: command"; a process may
    change its title.
    """
    pids = {told.partition(":")[0] for told in before}
    deadline_s = time.monotonic() + timeout_s
    while left := [told for told in alive() if told.partition(":")[0] not in pids]:
        assert time.monotonic() < deadline_s, f"left after {timeout_s:.0f} s: {left}"
        time.sleep(0.3)


async def eventually_async(check: Callable[[], Any], what: str, timeout_s: float, every_s: float = 0.1) -> Any:
    """As `eventually`, while the loop goes on."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = await asyncio.to_thread(check)
        if value:
            return value
        assert time.monotonic() < deadline_s, f"after {timeout_s:.0f} s still not: {what}"
        await asyncio.sleep(every_s)


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Until what this loop does has made it true; for conditions that take no time to look at."""
    deadline_s = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < deadline_s, what or "the condition never came true"
        await asyncio.sleep(0.002)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


@dataclass(frozen=True)
class Home:
    """One place where `kervan` remembers fleets; all commands run in it, with all files under `scratch`."""

    scratch: Path
    name: str = "home"
    keeps_warm: bool = True  # False: the warm process ends with the Ray cluster, as a user's does

    @property
    def path(self) -> Path:
        return self.scratch / self.name

    @property
    def environment(self) -> dict[str, str]:
        # What pytest says of the test would make every engine's environment another one, and so each its warm process.
        left_out = ("RAY_", "KERVAN_API_KEY", "PYTEST_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        warm = {WARM_OWNER: str(warm_owner.pid())} if self.keeps_warm else {}
        return {**kept, **warm, "KERVAN_HOME": str(self.path), "TMPDIR": str(self.scratch)}

    def command(self, *args: str) -> dict[str, Any]:
        """Keywords for subprocess that run `kervan args`."""
        return {
            "args": [sys.executable, "-m", "kervan", *args],
            "env": self.environment,
            "cwd": self.scratch,
            "text": True,
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            # A test run in the background of a script ignores SIGINT, and so would its children.
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        }

    def kervan(self, *args: str, timeout_s: float = START_S) -> "subprocess.CompletedProcess[str]":
        """`kervan args`, ended."""
        return commands.run(list(args), self.environment, self.scratch, timeout_s)

    def ray_directories(self) -> list[Path]:
        return sorted(self.scratch.glob("kervan-ray-*"))

    def fleets(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "fleets").glob("*.json"))

    def up(self, model: Path, name: str, engine_args: Sequence[str], *options: str, port: int | None = None) -> "Fleet":
        """A fleet that is ready."""
        port = free_port() if port is None else port
        words = [word for arg in engine_args for word in ("--engine-arg", arg)]
        done = self.kervan(
            *("up", str(model), "--name", name, "--detach", "--json", "--port", str(port), *words, *options),
            *ENVIRONMENT,
        )
        assert done.returncode == 0, f"kervan up failed:\n{done.stderr}{done.stdout}"
        return Fleet(self, name, json.loads(done.stdout)["url"], port)


@dataclass(frozen=True)
class Fleet:
    """A fleet that was started from `home`."""

    home: Home
    name: str
    url: str
    port: int

    def status(self) -> dict[str, Any]:
        """`kervan status --json`."""
        done = self.home.kervan("status", "--name", self.name, "--json", timeout_s=120)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def seen(self) -> dict[str, Any]:
        """What a gateway heard of the directory, at most `HEARD_S` ago: without the second of CPU that a command takes.

        `replicas` and `gateways` as `status` has them, as far as clients may know them. Where no gateway tells,
        because it wants a key, or has not heard of late, the command is asked.
        """
        answer = self.get(f"/kervan/status?fleet={self.name}")
        told = answer.json() if answer.status_code == 200 else {}
        if told.get("fleet") != self.name or told["directory_heard_s"] is None or told["directory_heard_s"] > HEARD_S:
            return self.status()
        found: dict[str, Any] = told["directory"]
        for gateway in found["gateways"]:
            gateway["ready"] = gateway["is_ready"]
        return found

    def pids(self) -> list[int]:
        """Of the replicas that are ready."""
        return [replica["pid"] for replica in self.seen()["replicas"] if replica["state"] == "ready"]

    def gateway_pids(self) -> dict[str, int]:
        return {gateway["id"]: gateway["pid"] for gateway in self.seen()["gateways"]}

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": REQUEST_S, **options})

    def get(self, path: str) -> httpx.Response:
        """GET over a connection of its own; asked again where a gateway died with the connection."""
        for _ in range(20):
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(self.url + path, timeout=REQUEST_S)
            time.sleep(0.1)
        return httpx.get(self.url + path, timeout=REQUEST_S)

    def metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """The metrics page: samples by name."""
        page = self.get("/metrics").text
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return samples

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over all its samples with these labels."""
        return sum(value for found, value in self.metrics().get(name, ()) if labels.items() <= found.items())

    def is_whole(self, replicas: int = 2, gateways: int = 2, *, asks_directory: bool = False) -> bool:
        """Whether so many replicas and gateways are ready, and every gateway is linked to every replica.

        `asks_directory`: it says so itself, after a gateway does.
        """
        pages = self.metrics()
        links = [value for _, value in pages.get("kervan_links", ())]
        states = {labels["state"]: value for labels, value in pages.get("kervan_replicas", ())}
        if links != [replicas] * gateways or states.get("ready") != replicas or sum(states.values()) != replicas:
            return False
        if not is_as_wanted(self.seen(), replicas, gateways):
            return False
        return not asks_directory or is_as_wanted(self.status(), replicas, gateways)

    def wait_until_whole(self, replicas: int = 2, gateways: int = 2, *, asks_directory: bool = False) -> None:
        what = f"{replicas} replicas and {gateways} gateways ready"
        eventually(lambda: self.is_whole(replicas, gateways, asks_directory=asks_directory), what, START_S)

    def is_idle(self) -> bool:
        """Whether no replica works, waits, or holds KV cache for anyone."""
        return (
            self.total("kervan_streams_open")
            == self.total("kervan_replica_running")
            == 0
            == self.total("kervan_replica_waiting")
        )


def is_as_wanted(status: dict[str, Any], replicas: int, gateways: int) -> bool:
    """Whether so many of each are there, all of them ready and with a process."""
    here = [*status["replicas"], *status["gateways"]]
    return (
        len(status["replicas"]) == replicas
        and len(status["gateways"]) == gateways
        and all(is_alive(part["pid"]) for part in here)
        and all(gateway["ready"] for gateway in status["gateways"])
        and all(replica["state"] == "ready" for replica in status["replicas"])
    )


@dataclass
class Take:
    """One stream as its client saw it."""

    text: str = ""
    num_pieces: int = 0
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    is_done: bool = False
    error: str = ""
    began: asyncio.Event = field(default_factory=asyncio.Event)
    at_s: list[float] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.is_done and not self.error and self.finish_reason is not None


async def events(response: httpx.Response) -> AsyncIterator[Any]:
    """The JSON of server-sent events; None for [DONE]."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            yield None if data == "[DONE]" else json.loads(data)


async def take_chat(client: httpx.AsyncClient, take: Take, body: dict[str, Any], max_chars: float = math.inf) -> Take:
    """Stream one chat answer into `take`; every failure ends in `take.error`. Who has `max_chars` of it leaves."""
    body = {"stream": True, "stream_options": {"include_usage": True}, **body}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                take.error = f"{response.status_code}: {(await response.aread())!r}"
                return take
            async for event in events(response):
                if event is None:
                    take.is_done = True
                elif "error" in event:
                    take.error = str(event["error"])
                else:
                    take.usage = event.get("usage") or take.usage
                    for choice in event["choices"]:
                        if piece := choice["delta"].get("content"):
                            take.text += piece
                            take.num_pieces += 1
                            take.at_s.append(time.monotonic())
                            take.began.set()
                        take.finish_reason = choice["finish_reason"] or take.finish_reason
                if len(take.text) >= max_chars:
                    return take
    except httpx.HTTPError as error:
        take.error = repr(error)
    finally:
        take.began.set()
    return take


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process gets no CPU inside the block; killed on the way out, because a stopped one cannot end itself."""
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            process.kill()
