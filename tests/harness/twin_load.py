"""Load on a fleet of twins, every token of which is checked, and what else their tests do to them."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from harness.live import START_S, Fleet
from harness.shared_fleet import Models
from kervan.config.fleet import FleetConfig
from kervan.twin.settings import settings
from kervan.twin.token_engine import answer

NUM_STREAMS = 16
# Seconds of a twin's step. Steps cost the test and the gateway CPU, not the twin: at 100 ms, 16 streams take a sixth of a
# core, and more of them would show no more.
STEP_S = 0.1


@dataclass
class Load:
    """Streams one after the other on some clients. `broken` tells what was not as it should be.

    `cut`: connections that were lost, with `may_be_cut`; else they are broken too.
    """

    url: str
    model: Path
    name: str = "twin"
    api_key: str = "none"
    num_whole: int = 0
    broken: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    may_be_cut: bool = False
    is_over: bool = False

    def __post_init__(self) -> None:
        self.limits = settings(FleetConfig(model=str(self.model), engine="twin", gpu="H200")).limits

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        headers = {"authorization": f"Bearer {self.api_key}"}
        async with httpx.AsyncClient(base_url=self.url, timeout=START_S, verify=False, headers=headers) as client:
            while not self.is_over:
                prompt = [
                    rng.randint(self.limits.first_token, self.limits.last_token) for _ in range(rng.randint(4, 60))
                ]
                num_tokens = rng.randint(10, 60)  # 1 to 6 s
                try:
                    tokens, finish = await self.stream(client, prompt, num_tokens)
                except httpx.HTTPError as error:
                    (self.cut if self.may_be_cut else self.broken).append(repr(error))
                    continue
                if tokens == answer(prompt, num_tokens, self.limits) and finish == "length":
                    self.num_whole += 1
                else:
                    self.broken.append(f"{len(tokens)} of {num_tokens} tokens, {finish}")

    async def stream(
        self, client: httpx.AsyncClient, prompt: list[int], num_tokens: int
    ) -> tuple[list[int], str | None]:
        body = {"model": self.name, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True,
                "return_token_ids": True}  # fmt: skip
        tokens: list[int] = []
        finish = None
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return [], f"{response.status_code}: {(await response.aread())!r}"
            rest = b""
            async for part in response.aiter_bytes():  # `aiter_lines` would also cut at U+2028, which twins say
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            return tokens, str(event["error"])
                        for choice in event["choices"]:
                            tokens += choice.get("token_ids") or []
                            finish = choice["finish_reason"] or finish
        return tokens, finish


@asynccontextmanager
async def load(
    fleet: Fleet,
    models: Models,
    name: str = "twin",
    api_key: str = "none",
    *,
    may_be_cut: bool = False,
    num_streams: int = NUM_STREAMS,
) -> AsyncIterator[Load]:
    """Streams of the model `name` all the time within the block; whole, every one, at its end."""
    running = Load(fleet.url, models.demo, name, api_key, may_be_cut=may_be_cut)
    clients = [asyncio.create_task(running.client(seed)) for seed in range(num_streams)]
    try:
        yield running
        running.is_over = True
        await asyncio.gather(*clients)
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    assert running.broken == []
    assert running.num_whole >= num_streams


@asynccontextmanager
async def knocks(fleet: Fleet) -> AsyncIterator[None]:
    """A new connection five times a second within the block; each is answered."""

    async def knock() -> None:
        while True:
            async with httpx.AsyncClient(base_url=fleet.url, timeout=START_S, verify=False) as client:
                assert (await client.get("/health/ready")).status_code == 200
            await asyncio.sleep(0.2)

    knocking = asyncio.create_task(knock())
    try:
        yield
        assert not knocking.done(), knocking.exception()
    finally:
        knocking.cancel()
        await asyncio.gather(knocking, return_exceptions=True)


def streams_of(fleet: Fleet) -> dict[str, int]:
    """Open streams by replica, as a gateway tells."""
    return dict(httpx.get(f"{fleet.url}/kervan/status").json()["replicas"])


async def kervan(fleet: Fleet, *words: str) -> str:
    done = await asyncio.to_thread(fleet.home.kervan, *words, "--name", fleet.name)
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLER = """
import sys
from kervan.serve import cluster
address, name, namespace = sys.argv[1:]
cluster.connect(address)
import ray

actor = ray.get_actor(name, namespace=namespace)
ray.kill(actor, no_restart=False)
"""


def kill_actor(fleet: Fleet, name: str, namespace: str) -> None:
    """An actor that Ray restarts dies."""
    address = json.loads((fleet.home.path / "fleets" / f"{fleet.name}.json").read_bytes())["address"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, address, name, namespace],
        env=fleet.home.environment, cwd=fleet.home.scratch, capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
