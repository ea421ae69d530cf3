"""What a gateway gives others of its fleet, and nobody else, at its internal port; its own metrics to anyone there."""

import urllib.parse
from collections.abc import Awaitable, Callable

import msgspec

from kervan.errors import ConfigError
from kervan.fleet.auth import Secrets, is_proof, relay_key
from kervan.gateway import ranges
from kervan.gateway.asgi import Receive, Scope, Send, error_body, header, respond
from kervan.gateway.peers import ADAPTERS_PATH, OWNER_PREFIX, Peers, SharedAdapters
from kervan.gateway.quotas import QUOTA_PATH, Quotas
from kervan.gateway.reconnect import INTERNAL_PREFIX, Streams
from kervan.gateway.relay import KEY_HEADER, MISDIRECTED, RELAY_HEADER, is_relayed
from kervan.gateway.shared_port import SharedPort
from kervan.gateway.shell import REQUESTS_PREFIX, GatewayShell

GIVEN_PATHS = (INTERNAL_PREFIX, OWNER_PREFIX, ADAPTERS_PATH, REQUESTS_PREFIX, ranges.PATH, QUOTA_PATH)


class InnerPort:
    """The ASGI app of the internal port. `page` makes the metrics, `explain` tells of a request that was here.

    `shared_port`: takes what gateways of other fleets on the port pass on. `record`: set when there is an engine to
    profile.
    """

    def __init__(
        self,
        secrets: Secrets,
        *,
        shell: GatewayShell,
        streams: Streams,
        peers: Peers,
        adapters: SharedAdapters,
        quotas: Quotas,
        page: Callable[[], str],
        explain: Callable[[str], bytes | None],
        shared_port: SharedPort | None,
    ) -> None:
        self.record: Callable[[ranges.RangesAsk], Awaitable[ranges.GatewayRecord]] | None = None
        self._secrets = secrets
        self._shell = shell
        self._streams = streams
        self._peers = peers
        self._adapters = adapters
        self._quotas = quotas
        self._page = page
        self._explain = explain
        self._shared_port = shared_port
        self._is_recording = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page of this gateway alone, and what other gateways pass on: for a stream, or on a shared port."""
        if scope["type"] == "http":
            scope = self._with_present_key(scope)
            if is_relayed(scope) and scope["path"].startswith(GIVEN_PATHS):
                await self._give(scope, receive, send)
            elif self._shared_port is not None and is_relayed(scope):
                await self._shared_port.respond_relayed(scope, receive, send)
            else:
                await respond(send, 200, self._page().encode(), b"text/plain; version=0.0.4; charset=utf-8")

    def _with_present_key(self, scope: Scope) -> Scope:
        """A request whose proof is of the secret before, as if it were of the present one."""
        given = header(scope, RELAY_HEADER)
        if not any(is_proof(given, relay_key(secret)) for secret in self._secrets.taken[1:]):
            return scope
        others = [pair for pair in scope["headers"] if pair[0] != RELAY_HEADER]
        return {**scope, "headers": [*others, (RELAY_HEADER, relay_key(self._secrets.present))]}

    async def _give(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What this gateway alone has, to one that proves to be of the fleet."""
        app, path = self._shell.inner, scope["path"]
        if not is_proof(header(scope, RELAY_HEADER), relay_key(self._secrets.present)):
            await _nothing(send)
        elif path.startswith(REQUESTS_PREFIX):
            told_of = self._explain(urllib.parse.unquote(path.removeprefix(REQUESTS_PREFIX)))
            await respond(send, 200 if told_of is not None else MISDIRECTED, told_of or b"")
        elif path == QUOTA_PATH:  # also before vLLM's app is there
            if (asked := await self._shell.read_body(scope, receive, send)) is not None:
                try:
                    await respond(send, 200, self._quotas.take(asked))
                except msgspec.DecodeError as error:
                    await respond(send, 400, error_body(400, str(error)))
        elif path == ranges.PATH and self.record is not None:
            await self._record_ranges(self.record, scope, send)
        elif app is None:
            await _nothing(send)
        elif path.startswith(INTERNAL_PREFIX):
            with self._shell.guard.charging(header(scope, KEY_HEADER)):
                await self._streams.get_internal(app, scope, receive, send)
        elif path.startswith(OWNER_PREFIX):
            with self._shell.guard.charging(header(scope, KEY_HEADER)):
                await self._peers.respond_as_owner(app, scope, receive, send)
        elif (told := await self._shell.read_body(scope, receive, send)) is not None:
            try:
                known = self._adapters.take(told)
            except msgspec.DecodeError as error:
                await respond(send, 400, error_body(400, str(error)))
            else:
                await respond(send, 200 if known is not None else MISDIRECTED, known or b"")

    async def _record_ranges(
        self, record: Callable[[ranges.RangesAsk], Awaitable[ranges.GatewayRecord]], scope: Scope, send: Send
    ) -> None:
        try:
            ask = ranges.parse_ask(scope["query_string"])
        except ConfigError as error:
            await respond(send, 400, error_body(400, str(error)))
            return
        if self._is_recording:
            why = "this gateway is being profiled already; ask again when it is not"
            await respond(send, 409, error_body(409, why))
            return
        self._is_recording = True
        try:
            recorded = await record(ask)
        finally:
            self._is_recording = False
        await respond(send, 200, msgspec.json.encode(recorded))


async def _nothing(send: Send) -> None:
    await respond(send, MISDIRECTED, error_body(MISDIRECTED, "the gateway here has nothing to give"))
