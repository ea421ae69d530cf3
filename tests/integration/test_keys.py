"""A fleet of twins behind API keys: limits that two gateways keep together, keys that come and go, usage, and no secrets."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from harness.live import START_S, Fleet, Home, eventually, eventually_async
from harness.shared_fleet import Models
from harness.twin_load import STEP_S, Load

from kervan.config import key_file
from kervan.config.api_keys import KeyEntry, digest
from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

CHOSEN = "chosen by its user: 7"  # in the settings, by --api-key


class Locked:
    """The fleet, its file of keys, and all keys that were ever used."""

    def __init__(self, home: Home, path: Path) -> None:
        self.home, self.path = home, path
        self.keys: dict[str, str] = {"key-1": CHOSEN}
        self.fleet: Fleet

    def run(self, *words: str) -> str:
        done = self.home.kervan("keys", *words, "--file", str(self.path))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def add(self, name: str, *limits: str) -> str:
        self.keys[name] = key = self.run("add", name, *limits).strip()
        return key

    def client(self, name: str, **more: Any) -> httpx.Client:
        """With a connection of its own for each request, so that the kernel picks a gateway anew."""
        headers = {"authorization": f"Bearer {self.keys[name]}", "connection": "close"}
        return self.fleet.client(headers=headers, **more)

    def usage(self, *words: str) -> list[dict[str, Any]]:
        done = self.home.kervan("usage", "--name", self.fleet.name, "--json", *words)
        assert done.returncode == 0, done.stderr
        told: list[dict[str, Any]] = next(
            value for value in json.loads(done.stdout).values() if isinstance(value, list)
        )
        return told

    def usage_of(self, name: str) -> dict[str, Any]:
        return next(row for row in self.usage() if row["name"] == name)


@pytest.fixture(scope="module")
def locked(home: Home, models: Models, twins: Fleet) -> Iterator[Locked]:
    """Beside `twins`, which has Ray already: two twins and two gateways."""
    locked = Locked(home, home.scratch / "locked-keys.yaml")
    locked.add("web")
    config = home.scratch / "locked.yaml"
    settings = {
        "engine": "twin", "gpu": "H200", "twin": {"base_s": STEP_S}, "replay_s": 60, "replicas": 2, "gateways": 2,
        "api_keys": [CHOSEN], "api_keys_file": str(locked.path),
    }  # fmt: skip
    config.write_text(json.dumps(settings))
    arguments = ("max_model_len=2048", 'served_model_name=["twin","alias"]')
    locked.fleet = home.up(models.demo, "locked", arguments, "--config", str(config))
    config.unlink()  # it has a key, as the user wrote it
    yield locked
    assert home.kervan("down", "--name", "locked").returncode == 0


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    body = {"model": "twin", "prompt": [3, 4, 5], "max_tokens": 4, "ignore_eos": True, **more}
    return client.post("/v1/completions", json=body)


def test_openais_client_reads_a_keys_limits(locked: Locked) -> None:
    key = locked.add("small", "--requests-per-minute", "3", "--models", "twin")
    eventually(lambda: httpx.get(f"{locked.fleet.url}/v1/models", headers={"authorization": f"Bearer {key}"}).is_success,
               "the gateway knows the key", 20)  # fmt: skip
    with openai.OpenAI(base_url=f"{locked.fleet.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == ["twin"]
        with pytest.raises(openai.NotFoundError, match="your key may not use it"):
            client.completions.create(model="alias", prompt="x")
        for left in ("2", "1", "0"):
            raw = client.completions.with_raw_response.create(model="twin", prompt="x", max_tokens=2)
            assert raw.headers["x-ratelimit-limit-requests"] == "3"
            assert raw.headers["x-ratelimit-remaining-requests"] == left
            assert raw.parse().usage.completion_tokens == 2
        with pytest.raises(openai.RateLimitError, match="key small has used its 3 requests per minute") as refused:
            client.completions.create(model="twin", prompt="x")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 20
    with (
        openai.OpenAI(base_url=f"{locked.fleet.url}/v1", api_key="kv-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_two_gateways_give_out_a_limit_once_and_changes_reach_both(locked: Locked) -> None:
    locked.add("few", "--requests-per-minute", "20")
    with locked.client("few") as client:

        def is_known_everywhere(status: int) -> bool:
            return all(client.get("/v1/models").status_code == status for _ in range(12))

        eventually(lambda: is_known_everywhere(200), "both gateways know it", 20)
        begin_s = time.monotonic()
        statuses = [ask(client, max_tokens=1).status_code for _ in range(45)]
        more = (time.monotonic() - begin_s) / 3  # that came meanwhile, one in 60 / 20 s
        assert 20 <= statuses.count(200) <= 21 + more
        locked.run("limit", "few", "--requests-per-minute", "1000")
        eventually(lambda: ask(client).status_code == 200, "the new limit holds", 20)
        locked.run("revoke", "few")
        eventually(lambda: is_known_everywhere(401), "neither gateway knows it", 20)
    assert ask_as(locked, "key-1") == 200
    assert ask_as(locked, "web") == 200


def ask_as(locked: Locked, name: str) -> int:
    with locked.client(name) as client:
        return ask(client).status_code


async def test_a_stream_counts_once_wherever_it_goes_and_ends_although_its_key_is_revoked(
    locked: Locked, models: Models
) -> None:
    key = locked.add("one", "--streams", "1")
    fleet, load = locked.fleet, Load(locked.fleet.url, models.demo, api_key=key)
    headers = {"authorization": f"Bearer {key}"}
    await eventually_async(lambda: is_in(locked, "one"), "the gateways know the key", 20)
    async with httpx.AsyncClient(base_url=fleet.url, headers=headers, timeout=60) as client:
        stream = asyncio.create_task(load.stream(client, [7], 150))  # 15 s
        await eventually_async(lambda: fleet.total("kervan_key_streams", key="one") == 1, "its stream is open", 20)
        assert [await asyncio.to_thread(ask_as, locked, "one") for _ in range(4)] == [429] * 4

        def busy() -> list[str]:
            running = fleet.metrics()["kervan_replica_running"]
            return [labels["replica"] for labels, streams in running if streams]

        await eventually_async(busy, "a replica has it", 20)
        moved = fleet.total("kervan_streams_moved_total")
        drain = asyncio.to_thread(fleet.home.kervan, "drain", busy()[0], "--name", fleet.name)
        drained = asyncio.create_task(drain)
        await eventually_async(lambda: fleet.total("kervan_streams_moved_total") > moved, "it moves", START_S)
        assert await asyncio.to_thread(ask_as, locked, "one") == 429  # it has moved, and is one still
        await asyncio.to_thread(locked.run, "revoke", "one")
        assert await stream == (answer([7], 150, load.limits), "length")
        done = await drained
        assert done.returncode == 0, done.stderr
    row = {"requests": 1, "prompt_tokens": 1, "cached_tokens": 0, "generated_tokens": 150, "rejected": 5, "streams": 0}
    await eventually_async(lambda: locked.usage_of("one") == {"name": "one", **row}, f"usage is {row}", 20)


def is_in(locked: Locked, name: str) -> bool:
    with locked.client(name) as client:
        return all(client.get("/v1/models").status_code == 200 for _ in range(12))


def test_usage_adds_up_over_gateways_and_says_what_clients_were_told(locked: Locked) -> None:
    locked.add("counted")
    with locked.client("counted") as client:
        eventually(lambda: all(client.get("/v1/models").is_success for _ in range(12)), "it is known", 20)
        told = [ask(client, n=2).json()["usage"] for _ in range(10)]
    prompt, generated = (sum(usage[f"{what}_tokens"] for usage in told) for what in ("prompt", "completion"))
    row = {
        "name": "counted", "requests": 10, "prompt_tokens": prompt, "generated_tokens": generated, "rejected": 0,
        "streams": 0,
    }  # fmt: skip

    def is_counted() -> bool:
        used = locked.usage_of("counted")
        return {**used, "cached_tokens": 0} == {**row, "cached_tokens": 0}

    eventually(is_counted, f"{row}", 20)
    by_model = locked.usage("--by", "model")
    assert [used["name"] for used in by_model] == ["twin"]
    assert by_model[0]["generated_tokens"] == sum(used["generated_tokens"] for used in locked.usage())
    fleet = locked.fleet
    assert fleet.total("kervan_key_generated_tokens_total", key="counted") == generated
    assert fleet.total("kervan_key_requests_total", key="counted") == 10


def test_what_is_wrong_with_the_file_is_told_and_the_keys_stay(locked: Locked) -> None:
    good = locked.path.read_text()
    locked.path.write_text("keys: nothing")
    try:

        def why() -> str:
            return locked.home.kervan("status", "--name", "locked", "--why").stdout

        eventually(lambda: "holds no list `keys`" in why(), "status says why", 30)
        assert ask_as(locked, "web") == 200
    finally:
        key_file.write(locked.path, [])
        locked.path.write_text(good)
    eventually(lambda: "API keys:" not in why(), "it is well again", 30)


def test_keys_are_in_no_log_process_list_page_or_file(locked: Locked) -> None:
    fleet = locked.fleet
    with locked.client("web") as client:
        response = ask(client)
        explained = fleet.home.kervan(
            "explain", response.json()["id"], "--url", fleet.url, "--api-key", locked.keys["web"]
        )
        assert explained.returncode == 0, explained.stderr
        pages = [client.get(path).text for path in ("/metrics", "/kervan/status", "/openapi.json", "/v1/models")]
    pages += [explained.stdout, json.dumps(fleet.status()), json.dumps(locked.usage()), locked.run("list", "--json")]
    for process in psutil.process_iter(["cmdline"]):
        pages.append(" ".join(process.info["cmdline"] or ()))
    secrets = list(locked.keys.values())
    assert response.is_success and ask_as(locked, "key-1") == 200  # so these two are keys
    assert not [place for place, page in enumerate(pages) if any(secret in page for secret in secrets)]
    files = [path for path in fleet.home.scratch.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    found = [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]
    assert found == []
    assert digest(locked.keys["web"]) in locked.path.read_text()
    assert KeyEntry in {type(entry) for entry in key_file.read(locked.path)}
