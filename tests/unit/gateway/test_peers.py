"""Gateways of one fleet that need each other, over real ports; what vLLM's app does is in tests/contract."""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from harness.gateway import View, listening

from kervan.fleet.directory import GatewayEntry
from kervan.fleet.vllm.adapters import DRAWN_IDS, NAMED_IDS, AdapterChange, named_id
from kervan.fleet.vllm.stored_responses import new_id, owner_id
from kervan.gateway.answers import Answers
from kervan.gateway.asgi import Receive, Scope, Send, respond
from kervan.gateway.peers import ADAPTERS_PATH, OWNER_PREFIX, Peers, SharedAdapters, response_id
from kervan.gateway.shell import GatewayShell

KEY = b"key"


class Stored:
    """Stands for the responses of vLLM's app."""

    is_kept = True

    def __init__(self) -> None:
        self.names: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.names


class Known:
    """Stands for the adapters of vLLM's app."""

    can_change = True

    def __init__(self) -> None:
        self.by_name: dict[str, AdapterChange] = {}

    @property
    def changes(self) -> list[AdapterChange]:
        return list(self.by_name.values())

    def merge(self, changes: Iterable[AdapterChange]) -> bool:
        news = {c.name: c for c in changes if c.name not in self.by_name or self.by_name[c.name].order < c.order}
        self.by_name |= news
        return bool(news)


class Gateway:
    def __init__(self, name: str, entries: dict[str, GatewayEntry]) -> None:
        self.name, self.entries = name, entries
        self.requests: list[tuple[str, str, bytes]] = []
        answers = Answers()
        self.peers = Peers(name, lambda: list(entries.values()), KEY, answers)
        self.peers.stored = self.stored = Stored()  # type: ignore[assignment]
        self.adapters = SharedAdapters(name, lambda: list(entries.values()), KEY)
        self.known = Known()
        self.shell = GatewayShell(View(), peers=self.peers, answers=answers)
        self.shell.attach(self.app)
        self.http: httpx.AsyncClient

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's."""
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        self.requests.append((scope["method"], scope["path"], body))
        await respond(send, 200, json.dumps({"by": self.name}).encode())

    async def internal(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == ADAPTERS_PATH:
            known = self.adapters.take((await receive())["body"])
            await respond(send, 200 if known is not None else 421, known or b"")
        else:
            assert scope["path"].startswith(OWNER_PREFIX)
            await self.peers.respond_as_owner(self.app, scope, receive, send)


@pytest.fixture
async def gateways() -> AsyncIterator[dict[str, Gateway]]:
    entries: dict[str, GatewayEntry] = {}
    made = {name: Gateway(name, entries) for name in ("gw-a", "gw-b", "gw-c")}
    async with AsyncExitStack() as stack:
        for name, gateway in made.items():
            internal = await stack.enter_async_context(listening(gateway.internal))
            entries[name] = GatewayEntry(name, "n", 1, "", internal, True)
            url = await stack.enter_async_context(listening(gateway.shell))
            client = httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, verify=False)
            gateway.http = await stack.enter_async_context(client)
        yield made
        for gateway in made.values():
            gateway.peers.close()
            await gateway.adapters.close()


def test_an_id_names_its_gateway() -> None:
    name = new_id("gw-1a_2")
    assert name.startswith("resp_")
    assert owner_id(name) == "gw-1a_2"
    for chosen in ("resp_1", "", "resp_gw-a_12", f"{name}0", "resp__" + "0" * 32):
        assert owner_id(chosen) is None


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/v1/responses/resp_1", b"", "resp_1"),
        ("POST", "/v1/responses/resp_1/cancel", b"", "resp_1"),
        ("POST", "/v1/responses", b'{"previous_response_id": "resp_1", "input": [1]}', "resp_1"),
        ("POST", "/v1/responses", b'{"previous_response_id": null}', None),
        ("POST", "/v1/responses", b"[", None),
        ("POST", "/v1/responses", b'{"previous_response_id": 7}', None),
        ("POST", "/v1/responses/render", b"", None),
        ("GET", "/v1/responses/resp_1/cancel", b"", None),
        ("GET", "/v1/responses", b"", None),
        ("GET", "/v1/models", b"", None),
    ],
)
def test_what_a_request_is_about(method: str, path: str, body: bytes, expected: str | None) -> None:
    assert response_id(method, path, body) == expected


async def test_a_request_goes_to_the_gateway_that_keeps_its_response(gateways: dict[str, Gateway]) -> None:
    a, b, c = gateways.values()
    named, chosen = new_id("gw-b"), "resp_my own/id\r\nx: y"
    b.stored.names = {named}
    c.stored.names = {chosen}
    for gateway in gateways.values():
        body: dict[str, Any] = {"previous_response_id": named}
        for request in (
            gateway.http.get(f"/v1/responses/{named}?stream=true", headers={"x-kervan-response": "other"}),
            gateway.http.post(f"/v1/responses/{named}/cancel"),
            gateway.http.post("/v1/responses", json=body),
        ):
            assert (await request).json()["by"] == "gw-b"
        assert (await gateway.http.post("/v1/responses", json={"previous_response_id": chosen})).json()["by"] == "gw-c"
        unknown = await gateway.http.post("/v1/responses", json={"previous_response_id": "resp_1"})
        assert unknown.json()["by"] == gateway.name  # vLLM says that there is none
        assert gateway.requests[-1][2] == b'{"previous_response_id":"resp_1"}'
    assert a.requests[0][:2] == ("POST", "/v1/responses")
    assert {request[:2] for request in b.requests} >= {("GET", f"/v1/responses/{named}")}


async def test_a_response_whose_gateway_is_gone(gateways: dict[str, Gateway]) -> None:
    a, b, _ = gateways.values()
    name = new_id("gw-b")
    entry = a.entries["gw-b"]
    a.entries["gw-b"] = GatewayEntry("gw-b", "n", 1, "", "http://127.0.0.1:1", True)  # killed, and still listed
    told = await a.http.get(f"/v1/responses/{name}")
    assert (told.status_code, told.headers["retry-after"]) == (503, "10")
    del a.entries["gw-b"]
    for request in (
        a.http.get(f"/v1/responses/{name}"),
        a.http.post(f"/v1/responses/{name}/cancel"),
        a.http.post("/v1/responses", json={"previous_response_id": name}),
    ):
        told = await request
        assert told.status_code == 410
        assert "was kept by gateway gw-b, which has ended" in told.json()["error"]["message"]
    assert entry.id == "gw-b"
    assert a.requests == b.requests == []


async def test_what_each_gateway_has_to_do_is_done_by_all(gateways: dict[str, Gateway]) -> None:
    a, b, c = gateways.values()
    del c.entries["gw-c"]
    body = b'{"request_ids":["cmpl-1"]}'
    assert (await a.http.post("/abort_requests", content=body)).json()["by"] == "gw-a"
    expected = [("POST", "/abort_requests", body)]
    assert (a.requests, b.requests, c.requests) == (expected, expected, [])


async def test_scaling_vllms_own_engines_is_refused(gateways: dict[str, Gateway]) -> None:
    refused = await gateways["gw-a"].http.post("/scale_elastic_ep", json={"new_data_parallel_size": 2})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "/scale_elastic_ep is not for fleets; use kervan scale"


def change(name: str, at_s: float, gateway: str = "gw-a", *, is_loaded: bool = True) -> AdapterChange:
    return AdapterChange(name, at_s, gateway, [name, 7, "/path"] if is_loaded else None)


async def test_adapters_reach_all_gateways_whoever_comes_and_goes(gateways: dict[str, Gateway]) -> None:
    a, b, c = gateways.values()
    await a.adapters.begin(a.known)  # type: ignore[arg-type]
    await b.adapters.begin(b.known)  # type: ignore[arg-type]
    a.known.merge([change("x", 1.0)])
    await a.adapters.tell()
    assert b.known.by_name == a.known.by_name
    await c.adapters.begin(c.known)  # type: ignore[arg-type]
    assert c.known.by_name == a.known.by_name
    # One is not listed for a while, and an unload and a load pass by.
    entry = a.entries.pop("gw-c")
    b.known.merge([change("x", 2.0, "gw-b", is_loaded=False), change("y", 2.0)])
    await b.adapters.tell()
    assert c.known.by_name["x"].request is not None
    a.entries["gw-c"] = entry
    del a.entries["gw-b"]  # it is killed before it can tell
    a.adapters.update()
    assert a.adapters._meeting is not None
    await a.adapters._meeting
    assert c.known.by_name == a.known.by_name == b.known.by_name
    assert c.known.by_name["x"].request is None
    a.adapters.update()  # nobody has anything to tell
    assert a.adapters._meeting.done()


def test_the_later_change_counts_and_numbers_do_not_meet() -> None:
    assert change("x", 2.0).order > change("x", 1.0, "gw-b").order
    assert change("x", 1.0, "gw-b").order > change("x", 1.0).order
    assert named_id("x") == named_id("x") != named_id("y")
    assert named_id("x") in NAMED_IDS
    assert DRAWN_IDS[-1] < NAMED_IDS[0]
    assert NAMED_IDS[-1] < 1 << 31
