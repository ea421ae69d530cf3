"""What an API key lets a request do, at one gateway and at several."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from harness.gateway import View, listening
from harness.live import until

from kervan.config.api_keys import KeyEntry, KeyTable, digest
from kervan.fleet.directory import GatewayEntry
from kervan.fleet.usage import KeyUsage, current_charge
from kervan.gateway.asgi import Receive, Scope, Send, header, respond
from kervan.gateway.key_guard import KeyGuard, duration
from kervan.gateway.keys import KeyRing
from kervan.gateway.quotas import QUOTA_PATH, Quotas
from kervan.gateway.relay import RELAY_HEADER, named_headers
from kervan.gateway.shell import GatewayShell, Shed
from kervan.policy.quota import Limits

PROOF = b"of the fleet"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Place:
    """A gateway without a fleet: vLLM's app is a few lines that use what the body tells them to."""

    def __init__(self, name: str, others: list["Place"], table: KeyTable) -> None:
        self.name, self.places = name, others
        self.clock = Clock()
        self.ring = KeyRing(table, self.clock)
        self.quotas = Quotas(name, lambda: [place.entry() for place in self.places], PROOF)
        self.view = View()
        self.shell = GatewayShell(self.view, KeyGuard(self.ring, self.quotas))
        self.shell.attach(self.app)
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.is_deaf = False
        self.internal_url = self.url = ""
        self.num_asked = 0

    def entry(self) -> GatewayEntry:
        return GatewayEntry(self.name, "n", 1, self.url, self.internal_url, True)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/models":
            cards = [{"id": name, "object": "model"} for name in ("tiny", "sql", "law")]
            await respond(send, 200, json.dumps({"object": "list", "data": cards}).encode())
            return
        body = json.loads((await receive())["body"] or b"{}") if scope["method"] == "POST" else {}
        charge = current_charge.get()
        if charge is not None and scope["path"] != "/tokenize":
            for number in range(body.get("n", 1)):
                stream: Any = SimpleNamespace(
                    request_id=f"{number}_one", model=body.get("adapter", ""), generated=[1] * body.get("uses", 0),
                    prompt_tokens=10, cached_tokens=4, num_replayed=0, charge=None,
                )  # fmt: skip
                charge.opened(stream)
                charge.ended(stream)
        await self.may_end.wait()
        await respond(send, 200, b"{}")

    async def internal(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert (scope["path"], header(scope, RELAY_HEADER)) == (QUOTA_PATH, PROOF)
        self.num_asked += 1
        told = (await receive())["body"]
        await respond(send, 421 if self.is_deaf else 200, b"" if self.is_deaf else self.quotas.take(told))


def key(name: str, **limits: Any) -> KeyEntry:
    return KeyEntry(name=name, digest=digest(f"kv-{name}"), **limits)


@asynccontextmanager
async def places(*entries: KeyEntry, count: int = 1) -> AsyncIterator[list[Place]]:
    found: list[Place] = []
    found += [Place(f"gw-{number}", found, KeyTable(entries, is_open=False)) for number in range(count)]
    async with AsyncExitStack() as stack:
        for place in found:
            place.url = await stack.enter_async_context(listening(place.shell))
            place.internal_url = await stack.enter_async_context(listening(place.internal))
            stack.push_async_callback(place.quotas.close)
        yield found


@asynccontextmanager
async def client_of(place: Place, name: str | None) -> AsyncIterator[httpx.AsyncClient]:
    headers = {} if name is None else {"authorization": f"Bearer kv-{name}"}
    async with httpx.AsyncClient(
        base_url=place.url, headers=headers, timeout=20, trust_env=False, verify=False
    ) as http:
        yield http


async def ask(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 8, **body})


def limits_of(response: httpx.Response) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): value for name, value in response.headers.items() if name.startswith(prefix)}


async def test_a_limit_is_told_with_each_response_and_429_says_when_it_is_over() -> None:
    async with places(key("web", requests_per_minute=2)) as (place,), client_of(place, "web") as http:
        first = await ask(http)
        assert limits_of(first) == {"limit-requests": "2", "remaining-requests": "1", "reset-requests": "30s"}
        assert limits_of(await ask(http))["remaining-requests"] == "0"
        refused = await ask(http)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "30"
        assert refused.headers["retry-after-ms"] == "30000"
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == (429, "rate_limit_exceeded")
        assert error["message"] == "key web has used its 2 requests per minute; try again in 30 s"
        assert limits_of(refused)["remaining-requests"] == "0"
        assert place.view.admitted == 2
        assert (await http.get("/v1/models")).status_code == 200  # nothing to count


async def test_keys_without_limits_have_no_headers() -> None:
    async with places(key("web")) as (place,), client_of(place, "web") as http:
        response = await ask(http)
        assert (response.status_code, limits_of(response)) == (200, {})


async def test_tokens_are_reserved_and_settled() -> None:
    async with places(key("web", tokens_per_minute=1000)) as (place,), client_of(place, "web") as http:
        response = await ask(http, max_tokens=500, uses=90)
        reserved = 1000 - int(limits_of(response)["remaining-tokens"])
        assert 500 < reserved < 530  # a quarter of the body's bytes for the prompt
        assert int(limits_of(await ask(http, max_tokens=1, uses=1))["remaining-tokens"]) > 1000 - 100 - 40
        never = await ask(http, max_tokens=400, n=3)
        assert never.status_code == 400
        assert "may generate 1,200 tokens, and key web has 1,000 per minute" in never.json()["error"]["message"]
        await ask(http, max_tokens=1, uses=2000)  # more than it said
        later = await ask(http)
        assert later.status_code == 429
        assert 60 < int(later.headers["retry-after"]) < 130


async def test_streams_at_once_are_limited_and_free_when_they_end() -> None:
    async with places(key("web", streams=2)) as (place,), client_of(place, "web") as http:
        assert (await ask(http, n=3)).status_code == 400
        place.may_end.clear()
        running = [asyncio.create_task(ask(http)) for _ in range(2)]
        await until(lambda: place.ring.accounts()[0].num_streams == 2)
        refused = await ask(http)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        place.may_end.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        assert (await ask(http)).status_code == 200


async def test_a_client_that_leaves_frees_its_streams() -> None:
    async with places(key("web", streams=1)) as (place,), client_of(place, "web") as http:
        place.may_end.clear()
        running = asyncio.create_task(ask(http))
        await until(lambda: place.ring.accounts()[0].num_streams == 1)
        running.cancel()
        place.may_end.set()
        await until(lambda: place.ring.accounts()[0].num_streams == 0)
        assert (await ask(http)).status_code == 200


async def test_what_the_fleet_has_no_room_for_is_not_on_the_keys_account() -> None:
    async with places(key("web", requests_per_minute=5)) as (place,), client_of(place, "web") as http:
        place.view.shed = Shed(3, "full")
        assert (await ask(http)).status_code == 503
        place.view.shed = None
        assert limits_of(await ask(http))["remaining-requests"] == "4"
        assert place.ring.usage("tiny")["web"]["tiny"].requests == 1


async def test_a_key_for_some_models_sees_and_has_these_alone() -> None:
    async with places(key("web", models=("sql",))) as (place,), client_of(place, "web") as http:
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["sql"]
        assert (await ask(http, model="sql")).status_code == 200
        for body in ({"model": "law"}, {"model": "gpt"}, {}):  # without one it is the fleet's own
            refused = await ask(http, **body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert (await http.post("/tokenize", json={"model": "law"})).status_code == 404
        form = {"model": (None, "law"), "file": ("a.wav", b"0")}
        assert (await http.post("/v1/audio/transcriptions", files=form)).status_code == 404
        two = {"model": (None, "sql"), "file": ("a.wav", b'name="model"\r\n\r\nlaw\r\n')}
        assert (await http.post("/v1/audio/transcriptions", files=two)).status_code == 404
        for odd in (b'{"model": "law", "top_p": NaN}', '{"model": "law"}'.encode("utf-16")):
            assert (await http.post("/v1/completions", content=odd)).status_code == 404
        assert (await http.post("/v1/load_lora_adapter", json={"model": "sql"})).status_code == 403
        assert (await http.get("/v1/models/law")).status_code == 404
        assert place.ring.accounts()[0].rejected["model"] == 9


async def test_keys_come_go_and_expire_while_the_gateway_runs() -> None:
    async with places(key("web", expires_s=2000)) as (place,), client_of(place, "web") as http:
        assert (await ask(http)).status_code == 200
        place.clock.now_s = 2000.0
        assert "API key web has expired" in (await ask(http)).json()["error"]["message"]
        async with client_of(place, "new") as other:
            assert (await ask(other)).status_code == 401
            place.ring.update(KeyTable((key("new"),), is_open=False))
            assert (await ask(other, uses=5)).status_code == 200
        assert (await ask(http)).json()["error"]["message"].startswith("no valid API key")
        assert [account.name for account in place.ring.accounts()] == ["new", "(unknown)"]
        assert set(place.ring.usage("tiny")) == {"web", "new", "(unknown)"}  # what was used stays used
        place.ring.update(KeyTable((), is_open=False))
        assert (await ask(http)).status_code == 401
        place.ring.update(KeyTable())
        assert (await ask(http)).status_code == 200


async def test_usage_is_by_key_and_model_and_choices_share_their_prompt() -> None:
    async with places(key("web")) as (place,), client_of(place, "web") as http, client_of(place, None) as stranger:
        await ask(http, n=3, uses=7)
        await ask(http, uses=2, adapter="sql")
        await ask(stranger)
        own = KeyUsage(requests=1, prompt_tokens=10, cached_tokens=4, generated_tokens=21)
        adapter = KeyUsage(requests=1, prompt_tokens=10, cached_tokens=4, generated_tokens=2)
        assert place.ring.usage("tiny") == {
            "web": {"sql": adapter, "tiny": own}, "(unknown)": {"tiny": KeyUsage(rejected=1)},
        }  # fmt: skip


async def test_websockets_need_a_key_that_is_for_all_models() -> None:
    async with places(key("web", models=("sql",)), key("all")) as (place,):
        for name, code in (("none", 1008), ("web", 1008), ("all", None)):
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            headers = [(b"authorization", f"Bearer kv-{name}".encode())]
            scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, "method": "GET"}
            await place.shell(scope, send, send)  # type: ignore[arg-type]
            assert sent[0].get("code") == code


async def test_gateways_give_out_a_limit_once_all_together() -> None:
    async with places(key("web", requests_per_minute=4, streams=3), count=3) as found, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(place, "web")) for place in found]
        responses = [await ask(clients[number % 3]) for number in range(9)]
        assert [response.status_code for response in responses] == [200] * 4 + [429] * 5
        assert [limits_of(response)["remaining-requests"] for response in responses[:3]] == ["3", "2", "1"]
        assert sorted(place.num_asked > 0 for place in found) == [False, False, True]  # one counts, the others ask it


async def test_streams_of_all_gateways_are_free_for_all_of_them_when_they_end() -> None:
    async with places(key("web", streams=2), count=2) as found, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(place, "web")) for place in found]
        for place in found:
            place.may_end.clear()
        running = [asyncio.create_task(ask(http)) for http in clients]
        await until(lambda: all(place.ring.accounts()[0].num_streams == 1 for place in found))
        meter = next(place.quotas._meters["web"] for place in found if "web" in place.quotas._meters)
        await until(lambda: meter.num_streams == 2)
        assert [(await ask(http)).status_code for http in clients] == [429, 429]
        for place in found:
            place.may_end.set()
        await asyncio.gather(*running)
        await until(lambda: not any(place.quotas._telling for place in found))
        assert [(await ask(http)).status_code for http in clients] == [200, 200]


async def test_while_who_counts_does_not_answer_the_others_give_out_their_shares() -> None:
    async with places(key("web", requests_per_minute=4), count=2) as found:
        counting = next(place for place in found if place.quotas._counting("web") is None)
        (other,) = [place for place in found if place is not counting]
        counting.is_deaf = True
        async with client_of(other, "web") as http:
            assert [(await ask(http)).status_code for _ in range(3)] == [200] * 2 + [429]
            counting.is_deaf = False
            assert limits_of(await ask(http))["remaining-requests"] == "3"


async def test_who_counts_next_knows_what_was_taken() -> None:
    async with places(key("web", requests_per_minute=4, streams=4), count=2) as found:
        counting = next(place for place in found if place.quotas._counting("web") is None)
        (other,) = [place for place in found if place is not counting]
        async with client_of(other, "web") as http:
            for _ in range(2):
                await ask(http)
            other.may_end.clear()
            running = asyncio.create_task(ask(http))
            await until(lambda: other.view.admitted == 3)  # it has the answer of the one that counts
            found.remove(counting)
            other.quotas.update()
            assert other.quotas._meters["web"].num_streams == 1
            other.may_end.set()
            assert (await running).status_code == 200
            assert [(await ask(http)).status_code for _ in range(3)] == [200, 429, 429]
            counting.url = counting.internal_url  # it is stopped by the block all the same


async def test_what_another_gateway_holds_for_a_request_is_charged_where_its_streams_are() -> None:
    async with places(key("web", tokens_per_minute=100)) as (place,), client_of(place, "web") as http:
        for name in (b"web", b"(anybody)", b"nobody"):
            with place.shell.guard.charging(name):
                charge = current_charge.get()
                if charge is not None:
                    stream: Any = SimpleNamespace(
                        request_id="a", model="", generated=[1] * 30, prompt_tokens=10, cached_tokens=0, num_replayed=0
                    )
                    charge.opened(stream)
                    charge.ended(stream)
        assert current_charge.get() is None
        assert place.ring.usage("tiny")["web"]["tiny"] == KeyUsage(prompt_tokens=10, generated_tokens=30)
        before = int(limits_of(await ask(http, max_tokens=1))["remaining-tokens"])
        assert 30 < before < 60  # of 100, 40 were owed, and the request has reserved some


async def test_a_client_cannot_say_whose_its_request_is() -> None:
    scope = {"headers": [(b"x-kervan-key", b"root"), (b"a", b"b")]}
    assert named_headers(scope) == [(b"a", b"b")]
    assert named_headers({**scope, "kervan.key": "web"}) == [(b"a", b"b"), (b"x-kervan-key", b"web")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.1234, "123ms"), (7.66, "7.66s"), (60, "1m0s"), (360, "6m0s"), (90.5, "1m30.5s")],
)
def test_durations_are_written_as_openais_clients_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_key_without_limits_is_not_counted_for_others() -> None:
    ring = KeyRing(KeyTable((key("web"),), is_open=False))
    assert ring.accounts()[0].limits == Limits()
