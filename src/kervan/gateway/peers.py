"""What one gateway has and all must give: stored responses, and adapters that were loaded at run time.

A request about a stored response goes to the gateway that keeps it; its id names it. One that aborts requests goes to
all gateways, as each knows its own only. Of adapters each gateway tells all others before the client has its answer,
and a gateway that starts asks the others. All of it goes from internal port to internal port. What else of vLLM's state
outlives a request is in docs/architecture.md.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from urllib.parse import quote, unquote

import aiohttp
import msgspec

from kervan.fleet.directory import GatewayEntry
from kervan.fleet.pinned_tls import split
from kervan.fleet.vllm.adapters import AdapterChange, Adapters
from kervan.fleet.vllm.stored_responses import StoredResponses, owner_id
from kervan.gateway.answers import Answers, silence
from kervan.gateway.asgi import ASGIApp, CollectedResponse, Receive, Scope, Send, error_body, header, respond
from kervan.gateway.page import pinned
from kervan.gateway.relay import KEY_HEADER, MISDIRECTED, RELAY_HEADER, Relay, RelayFailedError, named_headers
from kervan.vendor import vllm_names
from kervan.vendor.vllm_names import RESPONSES_PATH

logger = logging.getLogger(__name__)

OWNER_PREFIX = "/kervan/owner"  # before the path of a request that goes to the gateway which keeps its response
ADAPTERS_PATH = "/kervan/adapters"
RESPONSE_HEADER = b"x-kervan-response"  # the id that such a request is about, quoted as in a URL
EXCHANGE_TIMEOUT_S = 2.0
RETRY_OWNER_S = 10  # the directory has heard by then that a gateway is gone
_ONE_RESPONSE = re.compile(re.escape(RESPONSES_PATH) + r"/([^/]+)(/cancel)?")


class _Continued(msgspec.Struct):
    previous_response_id: str | None = None


_continued_decoder = msgspec.json.Decoder(_Continued)
_changes_decoder = msgspec.json.Decoder(list[AdapterChange])


def response_id(method: str, path: str, body: bytes) -> str | None:
    """The stored response that a request is about, None without one."""
    if method == "POST" and path == RESPONSES_PATH:
        try:
            return _continued_decoder.decode(body).previous_response_id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # vLLM says what is wrong with it
    found = _ONE_RESPONSE.fullmatch(path)
    if found is None or (method, found[2]) not in (("GET", None), ("POST", "/cancel")):
        return None
    return found[1]


class Peers:
    """Passes requests on to other gateways that must have them.

    `gateways`: those that the directory lists. `key`: `auth.relay_key` of the fleet. `stored`: set when vLLM's app is
    there.
    """

    def __init__(
        self, gateway_id: str, gateways: Callable[[], Sequence[GatewayEntry]], key: bytes, answers: Answers
    ) -> None:
        self.stored: StoredResponses | None = None
        self._gateway_id = gateway_id
        self._gateways = gateways
        self._key = key
        self._answers = answers
        self._relay = Relay()

    @property
    def keeps_responses(self) -> bool:
        """Whether other gateways may pass requests on to this one."""
        return self.stored is not None and self.stored.is_kept

    def close(self) -> None:
        """Close the connections to other gateways that are not in use."""
        self._relay.close()

    async def respond(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Whether the request has had its answer: from another gateway, or that the one which it needs is gone.

        `receive` must have nothing more to give than the client's leave.
        """
        if scope["method"] == "POST" and scope["path"] in vllm_names.GATEWAYS_OWN_PATHS:
            await self._repeat(scope, body)
            return False
        if self.stored is None or not self.stored.is_kept:
            return False
        wanted = response_id(scope["method"], scope["path"], body)
        if wanted is None or self.stored.has(wanted):
            return False
        owner = owner_id(wanted)
        if owner == self._gateway_id:
            return False  # vLLM says that it is unknown
        others = [gateway for gateway in self._gateways() if gateway.id != self._gateway_id]
        asked = [gateway for gateway in others if owner in (None, gateway.id)]
        forwarded = _to_owner(scope, (RESPONSE_HEADER, quote(wanted, safe="").encode()))
        try:
            urls = [gateway.internal_url for gateway in asked]
            await self._relay.forward(urls, self._key, forwarded, body, receive, send)
        except RelayFailedError:
            if owner is None:
                return False  # as above
            if asked:
                reason = f"gateway {owner}, which keeps the response, does not answer now"
                await self._answers.unavailable(scope, send, reason, RETRY_OWNER_S)
            else:
                message = (
                    f"response {wanted} was kept by gateway {owner}, which has ended, and is lost with it; "
                    "send the conversation as input"
                )
                await self._answers.error(scope, send, 410, message)
        return True

    async def _repeat(self, scope: Scope, body: bytes) -> None:
        """Let all other gateways do the same; one that does not answer in time is left out."""

        async def repeat_at(url: str) -> None:
            try:
                async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                    await self._relay.forward(
                        [url], self._key, _to_owner(scope), body, silence, CollectedResponse().send
                    )
            except (RelayFailedError, TimeoutError) as error:
                logger.warning("gateway at %s did not take %s: %r", split(url)[0], scope["path"], error)

        others = [gateway.internal_url for gateway in self._gateways() if gateway.id != self._gateway_id]
        await asyncio.gather(*map(repeat_at, others))

    async def respond_as_owner(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to another gateway, which has checked the request: if the response is here, else with 421."""
        path, raw_path = scope["path"].removeprefix(OWNER_PREFIX), scope["raw_path"].removeprefix(OWNER_PREFIX.encode())
        wanted = unquote(header(scope, RESPONSE_HEADER).decode("latin-1"))
        is_here = owner_id(wanted) == self._gateway_id or (self.stored is not None and self.stored.has(wanted))
        if not is_here and path not in vllm_names.GATEWAYS_OWN_PATHS:
            await respond(send, MISDIRECTED, error_body(MISDIRECTED, "the response is not here"))
            return
        headers = [pair for pair in scope["headers"] if pair[0] not in (RELAY_HEADER, RESPONSE_HEADER, KEY_HEADER)]
        await app({**scope, "path": path, "raw_path": raw_path, "headers": headers}, receive, send)


def _to_owner(scope: Scope, *headers: tuple[bytes, bytes]) -> Scope:
    """A request as another gateway's `respond_as_owner` takes it."""
    return {
        **scope,
        "path": OWNER_PREFIX + scope["path"],
        "raw_path": OWNER_PREFIX.encode() + scope["raw_path"],
        "headers": [*(pair for pair in named_headers(scope) if pair[0] != RESPONSE_HEADER), *headers],
    }


class SharedAdapters:
    """Keeps the adapters of all gateways of a fleet the same; arguments as of `Peers`.

    `adapters`: set when vLLM's app is there.
    """

    def __init__(self, gateway_id: str, gateways: Callable[[], Sequence[GatewayEntry]], key: bytes) -> None:
        self.adapters: Adapters | None = None
        self._gateway_id = gateway_id
        self._gateways = gateways
        self._headers = {RELAY_HEADER.decode(): key.decode()}
        self._revision = 0  # of what is known here
        self._agreed: set[str] = set()  # gateways that know as much
        self._meeting: asyncio.Task[None] | None = None

    async def begin(self, adapters: Adapters) -> None:
        """Learn what other gateways know, before clients come here."""
        self.adapters = adapters
        await self._exchange(adapters, self._missing(adapters))

    def update(self) -> None:
        """Follow the directory: a gateway that is new, or did not answer, is told."""
        if self.adapters is None or (self._meeting is not None and not self._meeting.done()):
            return
        if missing := self._missing(self.adapters):
            self._meeting = asyncio.create_task(self._exchange(self.adapters, missing))

    async def tell(self) -> None:
        """Tell all others of a change; those that do not answer are told later."""
        self._renew()
        if self.adapters is not None:
            await self._exchange(self.adapters, self._missing(self.adapters))

    async def close(self) -> None:
        """Tell nobody any more."""
        if self._meeting is not None:
            self._meeting.cancel()
            await asyncio.gather(self._meeting, return_exceptions=True)

    def take(self, told: bytes) -> bytes | None:
        """What this gateway knows, for another one that has told what it knows; None before vLLM's app is there.

        Raises: msgspec.DecodeError.
        """
        if self.adapters is None:
            return None
        if self.adapters.merge(_changes_decoder.decode(told)):
            self._renew()
        return msgspec.json.encode(self.adapters.changes)

    def _renew(self) -> None:
        self._revision += 1
        self._agreed.clear()

    def _missing(self, adapters: Adapters) -> list[GatewayEntry]:
        if not adapters.can_change:
            return []
        others = [gateway for gateway in self._gateways() if gateway.id != self._gateway_id]
        self._agreed &= {gateway.id for gateway in others}
        return [gateway for gateway in others if gateway.id not in self._agreed]

    async def _exchange(self, adapters: Adapters, others: Sequence[GatewayEntry]) -> None:
        if not others:
            return
        timeout = aiohttp.ClientTimeout(total=EXCHANGE_TIMEOUT_S)
        known = msgspec.json.encode(adapters.changes)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=self._headers) as session:
            await asyncio.gather(*(self._exchange_one(session, gateway, known) for gateway in others))

    async def _exchange_one(self, session: aiohttp.ClientSession, gateway: GatewayEntry, known: bytes) -> None:
        revision = self._revision
        try:
            url, pin = pinned(gateway.internal_url)
            async with session.post(url + ADAPTERS_PATH, data=known, ssl=pin) as response:
                if not response.ok:
                    return
                self.take(await response.read())
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            logger.info("gateway %s was not told of adapters: %r", gateway.id, error)
            return
        if revision == self._revision:
            self._agreed.add(gateway.id)
