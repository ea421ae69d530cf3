"""Clients that come back, over HTTP: two gateways, each with real ports, over an app that counts as vLLM's does."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from harness.gateway import View, guard_of, listening
from harness.live import until

from kervan.fleet.auth import Secrets, relay_key
from kervan.fleet.directory import GatewayEntry, Snapshot
from kervan.fleet.reconnect.journal import current_attempt
from kervan.fleet.reconnect.replicated_store import ReplicatedStore
from kervan.gateway.asgi import Receive, Scope, Send, respond
from kervan.gateway.reconnect import Streams, refusal
from kervan.gateway.server import listen
from kervan.gateway.shell import GatewayShell

NUM_TOKENS = 8
BODY = {"model": "tiny", "prompt": "Hello", "stream": True}
WHOLE = [*(f"t{n}" for n in range(NUM_TOKENS)), "[DONE]"]


class App:
    """Stands for vLLM's: token n is tn, the first `ready` of them at once, then as the test allows."""

    def __init__(self) -> None:
        self.ready = 4
        self.more = asyncio.Event()
        self.num_generated = 0
        self.request_ids: list[str] = []

    def allow(self, num_tokens: int) -> None:
        self.ready = num_tokens
        self.more.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        self.request_ids += [value.decode() for name, value in scope["headers"] if name == b"x-request-id"]
        if body["prompt"] == "bad":
            await respond(send, 400, b'{"error":{}}')
            return
        if not body.get("stream"):
            await respond(send, 200, b'{"choices":[]}')
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        leaving = asyncio.create_task(receive())
        attempt = current_attempt.get()
        known = [] if attempt is None else list(attempt.journal.outputs())
        for n in range(NUM_TOKENS):
            if n >= len(known):
                while n >= self.ready and not leaving.done():
                    self.more.clear()
                    waiting = asyncio.create_task(self.more.wait())
                    await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                if leaving.done():
                    return
                self.num_generated += 1
                if attempt is not None:
                    attempt.journal.record(b"t%d" % n, 1)
            if attempt is not None:
                attempt.take(1, is_finished=n == NUM_TOKENS - 1)
            await send({"type": "http.response.body", "body": b"data: t%d\n\n" % n, "more_body": True})
        leaving.cancel()
        await send({"type": "http.response.body", "body": b": all\n\ndata: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Site:
    """A gateway of the fleet. Its app tells the copy_sender what is new, as the fleet client does."""

    def __init__(self, name: str, sites: list["Site"], *, keeps: bool, api_keys: tuple[str, ...]):
        self.name = name
        self.sites = sites
        self.app = App()
        self.streams = Streams(name, lambda: [site.entry for site in sites], relay_key("s3cret"))
        self.shell = GatewayShell(View(), guard_of(*api_keys), streams=self.streams)
        self.shell.attach(self.app)
        self.keeps = keeps
        self.url = ""
        self.entry: GatewayEntry
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        self.url = await self._stack.enter_async_context(listening(self.shell))
        internal = await self._stack.enter_async_context(listening(self._internal))
        address = ""
        if self.keeps:
            self.streams.store = ReplicatedStore(
                gateway_id=self.name,
                node=self.name,
                secrets=Secrets("s3cret"),
                engine_version="1",
                replay_s=60,
                max_bytes=1 << 20,
            )
            sock = listen("127.0.0.1", 0)
            address = f"127.0.0.1:{sock.getsockname()[1]}"
            await self.streams.store.listen(sock)
        self.entry = GatewayEntry(self.name, self.name, 1, self.url, internal, True, copies_address=address)

    @property
    def store(self) -> ReplicatedStore:
        assert self.streams.store is not None
        return self.streams.store

    async def _internal(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.streams.get_internal(self.app, scope, receive, send)

    async def copy(self) -> None:
        """What the app has recorded is at the other gateway."""
        for journal in self.store.journals:
            if journal.is_own:
                self.store.copy_sender.change(journal)
        await self.store.copy_sender.copied()

    async def leave(self) -> None:
        """As a gateway whose time to drain is over: connections are cut, and it goes."""
        await self._stack.aclose()
        await until(lambda: all(journal.attempt is None for journal in self.store.journals))
        await self.store.close()
        self.streams.close()
        self.sites.remove(self)

    async def stop(self) -> None:
        await self._stack.aclose()
        self.streams.close()
        if self.streams.store is not None:
            await self.streams.store.close()


@pytest.fixture
async def sites() -> AsyncIterator[list[Site]]:
    found: list[Site] = []
    found += [Site(name, found, keeps=True, api_keys=("k1", "k2")) for name in ("gw-a", "gw-b")]
    for site in found:
        await site.start()
    snapshot = Snapshot(1, [], [site.entry for site in found], [])
    for site in found:
        site.store.update(snapshot)
    everyone = list(found)
    for site in found:
        await until(lambda site=site: site.store.copy_sender.is_holding)
    yield found
    for site in everyone:
        await site.stop()


@dataclass
class Client:
    key: str = "k1"
    stream_id: str = ""
    last: str = ""
    told: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    async def ask(self, site: Site, *, until_event: int | None = None, **more: Any) -> int:
        return await self._read(site, "POST", "/v1/completions", until_event, json=BODY | more)

    async def again(self, site: Site, *, until_event: int | None = None) -> int:
        headers = {"Last-Event-ID": self.last} if self.last else {}
        return await self._read(site, "GET", f"/v1/streams/{self.stream_id}", until_event, headers=headers)

    async def _read(self, site: Site, method: str, path: str, until_event: int | None, **more: Any) -> int:
        headers = {"Authorization": f"Bearer {self.key}", **more.pop("headers", {})}
        async with (
            httpx.AsyncClient(base_url=site.url, timeout=20, trust_env=False, verify=False) as http,
            http.stream(method, path, headers=headers, **more) as response,
        ):
            if response.status_code != 200:
                self.told.append((await response.aread()).decode())
                return response.status_code
            self.stream_id = response.headers["x-kervan-stream-id"]
            async for line in response.aiter_lines():
                if line.startswith("id: "):
                    self.last = line.removeprefix("id: ")
                    self.ids.append(self.last)
                elif line.startswith("data: "):
                    self.told.append(line.removeprefix("data: "))
                elif len(self.told) == until_event:
                    return 200
        return 200


async def test_without_it_an_answer_has_an_id_and_is_else_as_it_was() -> None:
    site = Site("gw-a", [], keeps=False, api_keys=())
    await site.start()
    site.app.allow(NUM_TOKENS)
    client = Client()
    assert await client.ask(site) == 200
    assert (client.told, client.ids) == (WHOLE, [])
    assert client.stream_id.startswith("gw-a-")
    assert await client.again(site) == 404
    assert "replay_s above 0" in client.told[-1]
    await site.stop()


async def test_a_client_comes_back_to_its_gateway(sites: list[Site]) -> None:
    a, _ = sites
    client = Client()
    await client.ask(a, until_event=3)
    assert client.ids == ["1.1", "2.1", "3.1"]
    a.app.allow(NUM_TOKENS)
    assert await client.again(a) == 200
    assert client.told == WHOLE
    assert client.ids == [*(f"{n}.1" for n in range(1, 8)), "9.1", "9.2"]
    assert a.app.num_generated == NUM_TOKENS  # nothing twice
    assert len(set(a.app.request_ids)) == 1  # so vLLM names the answer as before


async def test_openais_client_takes_events_with_ids(sites: list[Site]) -> None:
    """As it takes those without; a comment between them too."""
    from openai._streaming import SSEDecoder  # here: it takes long to import, and each worker would

    sites[0].app.allow(NUM_TOKENS)
    headers = {"Authorization": "Bearer k1"}
    async with httpx.AsyncClient(base_url=sites[0].url, headers=headers, trust_env=False, verify=False) as http:
        told = (await http.post("/v1/completions", json=BODY)).content
    assert b"id: 7.1\ndata: t6\n\n" in told
    assert b": all\nid: 9.2\ndata: [DONE]\n\n" in told
    assert [event.data for event in SSEDecoder().iter_bytes(iter([told]))] == WHOLE


async def test_without_a_last_event_id_all_comes_again(sites: list[Site]) -> None:
    a, _ = sites
    a.app.allow(NUM_TOKENS)
    client = Client()
    await client.ask(a)
    client.last = ""
    await client.again(a)
    assert client.told == WHOLE * 2


async def test_any_gateway_will_do(sites: list[Site]) -> None:
    a, b = sites
    client = Client()
    await client.ask(a, until_event=2)
    a.app.allow(NUM_TOKENS)
    assert await client.again(b) == 200
    assert (client.told, b.app.num_generated) == (WHOLE, 0)


@pytest.mark.parametrize("is_listed", [True, False])
async def test_a_stream_goes_on_when_its_gateway_is_gone(sites: list[Site], *, is_listed: bool) -> None:
    """Killed, and still in the directory; or at the end of its time to drain."""
    a, b = sites
    client = Client()
    asking = asyncio.create_task(client.ask(a))
    await until(lambda: client.told == WHOLE[:4])
    await a.copy()
    await a.leave()
    if is_listed:
        sites.append(a)
    with pytest.raises(httpx.TransportError):
        await asking
    b.app.allow(NUM_TOKENS)
    assert await client.again(b) == 200
    assert (client.told, b.app.num_generated) == (WHOLE, NUM_TOKENS - 4)
    # It is gateway b's stream now, and stays its own if it is asked for again.
    client.last = "8.1"
    assert await client.again(b) == 200


async def test_one_client_takes_a_stream_over_from_its_broken_connection(sites: list[Site]) -> None:
    a, b = sites
    client = Client()
    asking = asyncio.create_task(client.ask(a))
    await until(lambda: client.told == WHOLE[:4])
    back = Client(stream_id=client.stream_id, last=client.last)
    coming = asyncio.create_task(back.again(b))
    with pytest.raises(httpx.TransportError):
        await asking
    a.app.allow(NUM_TOKENS)
    assert await coming == 200
    assert back.told == WHOLE[4:]


async def test_of_two_that_ask_a_copys_gateway_at_once_one_is_answered(sites: list[Site]) -> None:
    a, b = sites
    client = Client()
    await client.ask(a, until_event=4)
    await a.copy()
    await a.leave()
    both = [Client(stream_id=client.stream_id, last=client.last) for _ in range(2)]
    asking = [asyncio.create_task(one.again(b)) for one in both]
    await until(lambda: any(task.done() for task in asking))
    b.app.allow(NUM_TOKENS)
    ends = await asyncio.gather(*asking, return_exceptions=True)
    assert sorted(one.told for one in both) == [[], WHOLE[4:]]
    assert sum(isinstance(end, httpx.TransportError) for end in ends) == 1
    assert b.app.num_generated == NUM_TOKENS - 4


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"stream_id": "gw-a-0"}, 404, "no stream 'gw-a-0' is kept"),
        ({"stream_id": "x\u00fc"}, 404, "no stream"),
        ({"key": "k2"}, 404, "is kept"),
        ({"key": "k3"}, 401, "no valid API key"),
        ({"last": "soon"}, 400, "'soon' is not an event id"),
        ({"last": "5.1"}, 410, "it has 4 tokens here, and Last-Event-ID says 5.1"),
        ({"last": "6.1"}, 410, "it has 4 tokens here, and Last-Event-ID says 6.1"),
    ],
)
async def test_what_is_refused(sites: list[Site], at: int, change: dict[str, str], status: int, why: str) -> None:
    client = Client()
    await client.ask(sites[0], until_event=4)
    for name, value in change.items():
        setattr(client, name, value)
    assert await client.again(sites[at]) == status
    assert why in client.told[-1]
    assert json.loads(client.told[-1])["error"]["code"] == status


async def test_a_stream_that_cannot_be_given_again_says_why_wherever_it_is_asked_for(sites: list[Site]) -> None:
    a, b = sites
    a.app.allow(NUM_TOKENS)
    client = Client()
    assert await client.ask(a, n=2) == 200
    assert (client.told, client.ids) == (WHOLE, [])
    for _ in range(2):
        assert await client.again(b) == 410
        assert "several choices" in client.told[-1]
        if a in sites:
            await a.leave()


async def test_an_answer_that_vllm_refuses_leaves_nothing(sites: list[Site]) -> None:
    a, b = sites
    client = Client()
    assert await client.ask(a, prompt="bad") == 400
    await a.store.copy_sender.copied()
    assert [len(site.store.journals) for site in sites] == [0, 0]
    assert await client.ask(b, stream=False) == 200
    assert client.stream_id.startswith("gw-b-")
    assert len(b.store.journals) == 0


async def test_what_a_full_gateway_forgets_is_forgotten_by_the_other_too(sites: list[Site]) -> None:
    a, b = sites
    a.app.allow(NUM_TOKENS)
    first = Client()
    await first.ask(a)
    await a.copy()
    assert len(b.store.journals) == 1
    large = Client()
    await large.ask(a, user="x" * (1 << 20))  # as much as there may be in all
    assert await first.again(a) == 404
    await a.copy()
    assert len(b.store.journals) == 0


async def test_streams_are_only_read(sites: list[Site]) -> None:
    async with httpx.AsyncClient(base_url=sites[0].url, headers={"Authorization": "Bearer k1"}, verify=False) as http:
        assert (await http.post("/v1/streams/x", json={})).status_code == 405
        assert (await http.delete("/v1/streams/x")).status_code == 405


async def test_a_copy_that_is_too_short_is_not_used(sites: list[Site]) -> None:
    """As after a time in which the other gateway was too slow: nothing that would not fit is told."""
    a, b = sites
    client = Client()
    asking = asyncio.create_task(client.ask(a))
    await until(lambda: client.told == WHOLE[:4])
    await a.copy()
    (copy,) = b.store.journals
    copy.data.clear()
    copy.num_tokens = 1
    await a.leave()
    with pytest.raises(httpx.TransportError):
        await asking
    assert await client.again(b) == 410


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"stream": true, "prompt": "x"}', ""),
        (b'{"stream": true, "prompt": ["x"]}', ""),
        (b'{"stream": true, "prompt": [ 1, 2]}', ""),
        (b'{"stream": true, "prompt": [[1, 2]]}', ""),
        (b'{"stream": true, "messages": [], "n": 1, "stream_interval": null}', ""),
        (b'{"stream": true, "prompt": ["x", "y"]}', "several prompts"),
        (b'{"stream": true, "prompt": [[1], [2]]}', "several prompts"),
        (b'{"stream": true, "prompt_embeds": ["x"]}', "several prompts"),
        (b'{"stream": true, "n": 2}', "several choices"),
        (b'{"stream": true, "best_of": 3}', "several choices"),
        (b'{"stream": true, "use_beam_search": true}', "several choices"),
        (b'{"stream": true, "stream_interval": 4}', "stream_interval"),
        (b'{"stream": false, "n": 2}', None),
        (b'{"prompt": "x"}', None),
        (b'{"stream": true, "n": "two"}', None),
        (b"no json", None),
    ],
)
def test_what_can_be_given_again(body: bytes, why: str | None) -> None:
    found = refusal(body)
    assert (found is None) == (why is None)
    assert why is None or why in (found or "")
    assert why != "" or found == ""
