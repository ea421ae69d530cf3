"""A fleet of twins: real Ray, real gateways, simulated engines; every token of every stream is checked."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import START_S, Fleet, Home, eventually
from shared_fleet import Models

from kervan.facts.fleet import FleetConfig
from kervan.twin.engine import answer
from kervan.twin.settings import settings

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

NUM_STREAMS = 16
STALL_S = 4.0


@pytest.fixture(scope="module")
def twins(home: Home, models: Models, scratch: Path) -> Iterator[Fleet]:
    """Three twins that take 30 ms a step, so that two cores carry them, and one gateway."""
    config = scratch / "twins.yaml"
    config.write_text(
        json.dumps({"engine": "twin", "gpu": "H200", "twin": {"base_s": 0.03}, "stall_timeout_s": STALL_S})
    )
    name = ("max_model_len=2048", "served_model_name=twin")
    running = home.up(models.demo, "twins", name, "--config", str(config), "--replicas", "3", "--gateways", "1")
    yield running
    assert home.kervan("down", "--name", "twins").returncode == 0


@dataclass
class Load:
    """Streams one after the other on `NUM_STREAMS` clients. `broken` tells what was not as it should be."""

    url: str
    model: Path
    name: str = "twin"
    api_key: str = "none"
    num_whole: int = 0
    broken: list[str] = field(default_factory=list)
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
                num_tokens = rng.randint(20, 200)
                try:
                    tokens, finish = await self.stream(client, prompt, num_tokens)
                except httpx.HTTPError as error:
                    self.broken.append(repr(error))
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
async def load(fleet: Fleet, models: Models, name: str = "twin", api_key: str = "none") -> AsyncIterator[Load]:
    """Streams of the model `name` all the time within the block; whole, every one, at its end."""
    running = Load(fleet.url, models.demo, name, api_key)
    clients = [asyncio.create_task(running.client(seed)) for seed in range(NUM_STREAMS)]
    try:
        yield running
        running.is_over = True
        await asyncio.gather(*clients)
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    assert running.broken == []
    assert running.num_whole >= NUM_STREAMS


async def kervan(fleet: Fleet, *words: str) -> str:
    done = await asyncio.to_thread(fleet.home.kervan, *words, "--name", fleet.name)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fleet_of_twins_is_shown_as_it_is(twins: Fleet) -> None:
    status = twins.status()
    assert (status["engine"], [r["state"] for r in status["replicas"]]) == ("twin", ["ready"] * 3)
    why = twins.home.kervan("status", "--why", "--name", "twins")
    assert why.stdout.splitlines()[-1] == "all is as it should be"
    screen = twins.home.kervan("top", "--once", "--name", "twins").stdout
    assert all(replica["id"] in screen for replica in status["replicas"])
    found = json.loads(twins.home.kervan("top", "--json", "--name", "twins").stdout)
    assert {"tokens_per_s", "ttft_s"} <= set(found["replicas"][0])


@pytest.mark.parametrize(
    "more", [{"logprobs": 1}, {"structured_outputs": {"json": {"type": "object"}}}], ids=lambda more: next(iter(more))
)
def test_what_twins_cannot_answer_is_refused(twins: Fleet, more: dict[str, Any]) -> None:
    with twins.client() as client:
        refused = client.post("/v1/completions", json={"model": "twin", "prompt": "Hello", "max_tokens": 5} | more)
    assert refused.status_code == 400
    assert "the replicas are simulated" in refused.json()["error"]["message"]


async def test_changes_under_load_lose_nothing(twins: Fleet, models: Models) -> None:
    """More and fewer replicas, other step times, other engine arguments (new gateways too), more and fewer gateways."""
    async with load(twins, models) as running:
        await kervan(twins, "scale", "4")
        changed = await kervan(twins, "up", "--twin", "base_s=0.04", "--json")
        assert len(json.loads(changed)["replicas"]) == 4
        await kervan(twins, "scale", "2")
        before = running.num_whole
        await kervan(twins, "up", "--engine-arg", "max_num_seqs=64")
        await kervan(twins, "scale", "3", "--gateways", "2")
        await kervan(twins, "scale", "--gateways", "1")
        assert running.num_whole > before
    assert twins.is_whole(3, 1)


async def test_a_change_that_cannot_start_changes_nothing(twins: Fleet, models: Models) -> None:
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    before = {replica["id"] for replica in twins.status()["replicas"]}
    for words, why in (
        (("up", "--twin", "speed=fast"), "is no number"),
        (("up", "--gpu", "L5"), "no GPU 'L5' is known"),
        (("up", str(models.embedding)), "streams cannot move to another model"),
        (("up", "--engine", "vllm"), "cannot become 'vllm'"),
    ):
        refused = await asyncio.to_thread(twins.home.kervan, *words, "--name", "twins")
        assert refused.returncode == 1
        assert why in refused.stderr
    assert {replica["id"] for replica in twins.status()["replicas"]} == before


async def test_faults_move_streams_and_heal(twins: Fleet, models: Models) -> None:
    """One twin hangs (the watchdog finds it), one crashes, one loses most of its KV pool: no stream shows it."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    async with load(twins, models):
        hung, crashed, pressed = (replica["id"] for replica in twins.status()["replicas"])
        await kervan(twins, "fault", pressed, "kv-pressure", "0.9")
        await kervan(twins, "fault", hung, "hang")
        await kervan(twins, "fault", crashed, "crash", "50")

        def ids() -> set[str]:
            return {replica["id"] for replica in twins.status()["replicas"]}

        await asyncio.to_thread(eventually, lambda: not {hung, crashed} & ids(), "the sick ones are replaced", START_S)
        await asyncio.to_thread(twins.wait_until_whole, 3, 1)
        why = await kervan(twins, "status", "--why")
        assert f"replica {pressed}: told to suffer: kv-pressure 0.9" in why
        await kervan(twins, "fault", pressed, "none")
    assert twins.total("kervan_streams_given_up_total") == 0


CALLER = """
import asyncio, json, sys
from kervan.serve import cluster
cluster.connect(cluster.find_local_ray().address)
import ray

@ray.remote(num_cpus=0)
class Caller:
    async def call(self, prompt, model):
        import kervan
        fleet = kervan.get_fleet("twins")
        whole = await fleet.generate(prompt, model="twin", max_tokens=30, ignore_eos=True)
        pieces = [p async for p in fleet.generate(prompt, model="twin", max_tokens=30, ignore_eos=True)]
        chat = await fleet.chat([{"role": "user", "content": "Hi"}], model="twin", max_tokens=5)
        try:
            await fleet.generate(prompt, model="twin", max_tokens=0)
            refused = ""
        except kervan.errors.ConfigError as error:
            refused = str(error)
        async for _ in fleet.generate(prompt, model="twin", max_tokens=2000, ignore_eos=True):
            break
        await fleet.close()
        return whole.text, whole.completion_tokens, "".join(p.text for p in pieces), chat.completion_tokens, refused

print(json.dumps(ray.get(Caller.remote().call.remote(json.loads(sys.argv[1]), "twin"))))
"""


def test_other_code_on_the_cluster_calls_it_without_http(twins: Fleet, models: Models) -> None:
    prompt = [5, 6, 7, 8]
    done = subprocess.run(
        [sys.executable, "-c", CALLER, json.dumps(prompt)],
        env=twins.home.environment, cwd=twins.home.scratch, capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, num_tokens, streamed, chatted, refused = json.loads(done.stdout.splitlines()[-1])
    with twins.client() as client:
        body = {"model": "twin", "prompt": prompt, "max_tokens": 30, "ignore_eos": True}
        over_http = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert (text, streamed, num_tokens, chatted) == (over_http, over_http, 30, 5)
    assert "max_tokens" in refused
    eventually(twins.is_idle, "the stream that was left is aborted", 30)


KILLER = """
import sys
from kervan.serve import cluster
cluster.connect(cluster.find_local_ray().address)
import ray

name, namespace = sys.argv[1:]
actor = ray.get_actor(name, namespace=namespace)
ray.kill(actor, no_restart=False)
"""


def kill_actor(fleet: Fleet, name: str, namespace: str) -> None:
    """An actor that Ray restarts dies."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, name, namespace],
        env=fleet.home.environment, cwd=fleet.home.scratch, capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


async def test_the_directory_dies(twins: Fleet, models: Models) -> None:
    """It carries no tokens; Ray restarts it, and it knows the latest settings again."""
    await kervan(twins, "scale", "2")
    async with load(twins, models):
        await asyncio.to_thread(kill_actor, twins, "directory-twins", "kervan")
        await asyncio.to_thread(twins.wait_until_whole, 2, 1)
        assert twins.status()["target_replicas"] == 2
    await kervan(twins, "scale", "3")


def test_faults_of_unknown_replicas_are_refused(twins: Fleet) -> None:
    refused = twins.home.kervan("fault", "nobody", "hang", "--name", "twins")
    assert (refused.returncode, "has no replica 'nobody'; it has" in refused.stderr) == (1, True)
    assert twins.home.kervan("fault", "nobody", "slow", "--name", "twins").returncode == 2
