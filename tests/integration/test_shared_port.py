"""Two fleets of twins behind one port, and one behind its own: each model is answered by its fleet, whatever the others do."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from harness.live import ENVIRONMENT, Fleet, Home, eventually, eventually_async
from harness.shared_fleet import Models
from harness.twin_load import NUM_STREAMS, STEP_S, kervan, kill_actor, load

from kervan.config.fleet import FleetConfig
from kervan.ports import free_port
from kervan.twin.settings import settings
from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

KEY = "key of beta"
LONG = 1500
KEYS = {"alpha": "none", "beta": KEY}


def start(home: Home, models: Models, name: str, port: int, *options: str) -> Fleet:
    """A fleet of one twin and one gateway whose model has the fleet's name."""
    arguments = ("max_model_len=2048", f"served_model_name={name}")
    twin = ("--engine", "twin", "--gpu", "H200", "--twin", f"base_s={STEP_S}", "--gateways", "1")
    return home.up(models.demo, name, arguments, *twin, *options, port=port)


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def alpha(home: Home, models: Models, port: int, twins: Fleet) -> Iterator[Fleet]:
    """Beside `twins`, which has a port of its own, and Ray already."""
    yield start(home, models, "alpha", port, "--shared-port")
    assert home.kervan("down", "--name", "alpha").returncode == 0


def start_beta(home: Home, models: Models, port: int) -> Fleet:
    return start(home, models, "beta", port, "--shared-port", "--api-key", KEY)


@pytest.fixture(scope="module")
def beta(home: Home, models: Models, alpha: Fleet) -> Iterator[Fleet]:
    yield start_beta(home, models, alpha.port)
    assert home.kervan("down", "--name", "beta").returncode == 0


def client_of(fleet: Fleet, api_key: str) -> openai.OpenAI:
    """With a connection of its own."""
    return openai.OpenAI(base_url=fleet.url + "/v1", api_key=api_key, max_retries=0, timeout=60)


def expected(models: Models, prompt: list[int], num_tokens: int) -> list[int]:
    limits = settings(FleetConfig(model=str(models.demo), engine="twin", gpu="H200")).limits
    return answer(prompt, num_tokens, limits)


def num_answered(fleet: Fleet) -> float:
    """Requests that the engines of one fleet have answered; told by whichever gateway is asked."""
    page = fleet.get(f"/metrics?fleet={fleet.name}").text
    lines = [line for line in page.splitlines() if line.startswith("vllm:request_success_total{")]
    assert all(f'model_name="{fleet.name}"' in line for line in lines)
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_each_model_is_answered_by_its_fleet_on_every_connection(alpha: Fleet, beta: Fleet, models: Models) -> None:
    before = {fleet.name: num_answered(fleet) for fleet in (alpha, beta)}

    def ask(i: int) -> None:
        name = ("alpha", "beta")[i % 2]
        prompt = [5, 6, 7, 8 + i]
        more = {"ignore_eos": True, "return_token_ids": True}
        with client_of(alpha, KEYS[name]) as client:
            whole = client.completions.create(model=name, prompt=prompt, max_tokens=9, extra_body=more)
            stream = client.completions.create(model=name, prompt=prompt, max_tokens=9, extra_body=more, stream=True)
            chunks = list(stream)
        told: Any = whole.choices[0]
        pieces = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or []]
        assert whole.model == name
        assert {chunk.model for chunk in chunks} == {name}
        assert told.token_ids == pieces == expected(models, prompt, 9)
        assert len(chunks) > 3  # in pieces, not all at the end

    with ThreadPoolExecutor(8) as users:  # each waits for most of its time
        list(users.map(ask, range(32)))  # the kernel spreads them: 1 in 2**31 that one gateway gets all
    for fleet in (alpha, beta):
        eventually(lambda fleet=fleet: num_answered(fleet) == before[fleet.name] + 32, f"32 by {fleet.name}", 10)


def test_keys_are_those_of_the_models_fleet(alpha: Fleet, beta: Fleet) -> None:
    for _ in range(8):
        with client_of(alpha, "wrong") as client:
            assert client.completions.create(model="alpha", prompt="x", max_tokens=1).model == "alpha"
            with pytest.raises(openai.AuthenticationError):
                client.completions.create(model="beta", prompt="x", max_tokens=1)
            assert [model.id for model in client.models.list()] == ["alpha"]
        with client_of(alpha, KEY) as client:
            assert [model.id for model in client.models.list()] == ["alpha", "beta"]


def test_requests_that_name_no_fleet_are_refused_alike_on_every_connection(alpha: Fleet, beta: Fleet) -> None:
    bodies = [{"model": "gamma", "prompt": "x"}, {"prompt": "x"}, {"model": 3, "prompt": "x"}, [1]]
    for body, status in zip(bodies, (404, 400, 400, 400), strict=True):
        answers = set()
        for _ in range(8):
            with alpha.client() as client:
                got = client.post("/v1/completions", json=body)
                answers.add((got.status_code, got.text))
        ((told, text),) = answers
        assert told == status
        assert json.loads(text)["error"]["code"] == status
    for _ in range(8):
        with alpha.client() as client:
            assert client.post("/generate", json={"prompt": "x"}).status_code == 400
            assert (
                client.post("/generate", json={"prompt": "x", "model": "alpha", "max_tokens": 3}).json()["tokens"] == 3
            )
            assert client.post("/generate?fleet=alpha", json={"prompt": "x", "max_tokens": 3}).json()["tokens"] == 3
            head = client.get("/health/ready?fleet=beta")
            assert (head.status_code, len(head.headers.get_list("date"))) == (200, 1)


async def test_a_client_that_leaves_frees_the_replica_of_the_other_fleet(alpha: Fleet, beta: Fleet) -> None:
    (gateway_of_alpha,) = alpha.gateway_pids()
    headers = {"authorization": f"Bearer {KEY}"}

    async def tokens_made() -> float:
        page = (await asyncio.to_thread(alpha.get, "/metrics?fleet=beta")).text
        lines = [line for line in page.splitlines() if line.startswith("vllm:generation_tokens_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = await tokens_made()
    num_relayed = 0
    while num_relayed < 4:
        async with httpx.AsyncClient(base_url=alpha.url, timeout=60, verify=False, headers=headers) as client:
            if (await client.get("/kervan/status")).json()["gateway"] != gateway_of_alpha:
                continue
            num_relayed += 1
            body = {"model": "beta", "prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                parts = response.aiter_bytes()  # kept: its end would end the stream
                assert (await anext(parts)).startswith(b"data: ")
                status = (
                    await asyncio.to_thread(httpx.get, beta.url + "/kervan/status?fleet=beta", headers=headers)
                ).json()
                assert status["streams"] >= 1

    def is_free() -> bool:
        status = httpx.get(beta.url + "/kervan/status?fleet=beta", headers=headers, timeout=30).json()
        return bool(status["streams"] == 0)

    await asyncio.to_thread(eventually, is_free, "no stream is open at beta", 20)
    assert 0 < await tokens_made() - before < 4 * LONG


async def test_a_fleet_goes_and_comes_and_the_others_do_not_notice(
    alpha: Fleet, beta: Fleet, twins: Fleet, home: Home, models: Models
) -> None:
    """Every stream of the others whole, through whichever gateway: beta's own too, while it leaves and when it comes."""
    async with load(alpha, models, "alpha"), load(twins, models):
        await asyncio.sleep(2.0)
        await kervan(beta, "down")
        gone = (
            await asyncio.to_thread(alpha.client().post, "/v1/completions", json={"model": "beta", "prompt": "x"})
        ).json()
        # Its last gateway is gone; the others hear within a second or two that the fleet is.
        assert gone["error"]["code"] in (404, 503)
        await asyncio.to_thread(eventually, lambda: asks_for_beta(alpha) == 404, "beta is forgotten", 60)
        listed = (await asyncio.to_thread(alpha.get, "/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["alpha"]
        await asyncio.to_thread(start_beta, home, models, alpha.port)
        assert {await asyncio.to_thread(asks_for_beta, alpha) for _ in range(8)} == {200}
        listed = (await asyncio.to_thread(twins.get, "/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["twin"]


def asks_for_beta(fleet: Fleet) -> int:
    headers = {"authorization": f"Bearer {KEY}"}
    with fleet.client(headers=headers) as client:
        return client.post("/v1/completions", json={"model": "beta", "prompt": "x", "max_tokens": 2}).status_code


async def test_a_fleet_changes_under_load_and_nobody_notices(alpha: Fleet, beta: Fleet, models: Models) -> None:
    """New gateways and replicas of alpha; its streams through beta's gateway, and beta's through alpha's, go on."""
    (before,) = alpha.gateway_pids()
    async with load(alpha, models, "alpha") as of_alpha, load(alpha, models, "beta", KEY) as of_beta:
        await kervan(alpha, "up", "--env", "RAY_CHANGED=1")  # by this name it needs no other warm process
        assert min(of_alpha.num_whole, of_beta.num_whole) > NUM_STREAMS
    (after,) = alpha.gateway_pids()
    assert after != before


async def test_a_directory_dies_and_no_request_for_its_fleet_is_refused(
    alpha: Fleet, beta: Fleet, models: Models
) -> None:
    """A new directory knows no gateway before the first beats; the other fleets' gateways go on asking those they know."""
    async with load(alpha, models, "beta", KEY) as of_beta:
        for _ in range(3):
            await asyncio.to_thread(kill_actor, beta, "directory-beta", "kervan")
            num_whole = of_beta.num_whole
            await eventually_async(
                lambda before=num_whole: of_beta.num_whole > before + NUM_STREAMS, "more streams", 60
            )


def refusal(home: Home, models: Models, *options: str) -> str:
    twin = ("--engine", "twin", "--gpu", "H200", "--name", "gamma", "--detach", *ENVIRONMENT)
    done = home.kervan("up", str(models.demo), *twin, *options)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def test_who_may_not_share(home: Home, models: Models, alpha: Fleet, beta: Fleet, twins: Fleet) -> None:
    there, elsewhere = ("--port", str(alpha.port)), ("--port", str(twins.port))
    named = ("--engine-arg", "served_model_name=gamma", "--shared-port")
    assert "is taken by fleet 'alpha'; add --shared-port" in refusal(home, models, *there)
    assert "kervan up --name twins --shared-port" in refusal(home, models, *elsewhere, *named)
    twice = refusal(home, models, *there, "--engine-arg", "served_model_name=alpha", "--shared-port")
    assert "fleet 'alpha' answers for model 'alpha'" in twice
    assert "served_model_name=NAME" in twice
    assert "give --host 127.0.0.1" in refusal(home, models, *there, *named, "--host", "0.0.0.0")
    assert "--ingress direct" in refusal(home, models, *there, *named, "--ingress", "serve")
    left = home.kervan("up", "--name", "alpha", "--own-port")
    assert (left.returncode, "is taken by fleet 'beta'; add --shared-port" in left.stderr) == (2, True), left.stderr
