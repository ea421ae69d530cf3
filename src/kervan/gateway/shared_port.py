"""Several fleets behind one port: a request for another fleet's model is passed on to a gateway of that fleet.

The kernel spreads connections over the gateways of all fleets on the port (SO_REUSEPORT), so each of them must know
what to do with each request. Stands before the shell; a fleet that has its port to itself goes without it.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs

import msgspec

from kervan.fleet.auth import is_proof
from kervan.fleet.directory import GatewayEntry
from kervan.fleet.vllm.stored_responses import owner_id
from kervan.gateway.answers import BODY_METHODS, silence
from kervan.gateway.asgi import CollectedResponse, Receive, Scope, Send, error_body, header, replay, respond
from kervan.gateway.peers import response_id
from kervan.gateway.reconnect import STREAMS_PREFIX
from kervan.gateway.relay import MISDIRECTED, RELAY_HEADER, Relay, RelayFailedError
from kervan.gateway.shell import OPEN_PATHS, RETRY_NOT_READY_S, STATUS_PATH, GatewayShell
from kervan.policy import model_routing
from kervan.policy.model_routing import GatewayCandidate, PortFleet
from kervan.vendor.vllm_names import MODELS_PATH

logger = logging.getLogger(__name__)

MODELS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another fleet on the port. `models`: the names in its settings; its gateways may know more (adapters)."""

    name: str
    models: tuple[str, ...]
    has_keys: bool
    relay_key: bytes
    gateways: tuple[GatewayEntry, ...]

    @property
    def port_fleet(self) -> PortFleet:
        """As routing knows it: with the models that its gateways have loaded since."""
        loaded = (model for gateway in self.gateways for model in gateway.models)
        return PortFleet(self.name, tuple(dict.fromkeys([*self.models, *loaded])), self.has_keys)

    def urls(self, model: str | None, node: str, turn: int) -> list[str]:
        """Base URLs of the gateways that serve `model`, the best first."""
        candidates = [
            GatewayCandidate(g.internal_url, model is None or model in g.models, g.is_ready, g.node == node)
            for g in self.gateways
        ]
        return model_routing.in_order(candidates, turn)


class _Named(msgspec.Struct):
    """All that routing reads of a body; the parser skips the rest."""

    model: str | None = None


class _ModelList(msgspec.Struct):
    data: list[msgspec.Raw] = []
    object: str = "list"


_named_decoder = msgspec.json.Decoder(_Named)
_models_decoder = msgspec.json.Decoder(_ModelList)


class SharedPort:
    """ASGI app: `shell` for this fleet's requests, a gateway of their fleet for the others.

    `own` tells this fleet's name and models as they are now; `node` is this gateway's; `key` is what other gateways
    must know (`auth.relay_key`).
    """

    def __init__(self, shell: GatewayShell, own: Callable[[], PortFleet], node: str, key: bytes) -> None:
        self._shell = shell
        self._own = own
        self._node = node
        self._key = key
        self._relay = Relay()
        self._neighbours: dict[str, Neighbour] = {}
        self._turns = itertools.count()

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Names of the other fleets that are known here."""
        return tuple(self._neighbours)

    def update(self, neighbours: Sequence[Neighbour]) -> None:
        """Replace the list of the other fleets on the port."""
        self._neighbours = {neighbour.name: neighbour for neighbour in neighbours}

    def close(self) -> None:
        """Close the connections to other fleets' gateways that are not in use."""
        self._relay.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._neighbours or scope["type"] == "lifespan":
            await self._shell(scope, receive, send)
        elif scope["type"] == "websocket":
            # Its model comes in a later message. 1008: policy.
            reason = "several fleets share this port; websockets need a port of the fleet's own"
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await self._http(scope, receive, send)

    async def respond_relayed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that another gateway has passed on: straight to the shell, so that it is passed on only once."""
        if is_proof(header(scope, RELAY_HEADER), self._key):
            kept = [pair for pair in scope["headers"] if pair[0] != RELAY_HEADER]
            await self._shell({**scope, "headers": kept}, receive, send)
        else:
            await respond(send, MISDIRECTED, error_body(MISDIRECTED, "the gateway here is not of the fleet asked for"))

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        fleet = parse_qs(scope["query_string"].decode("latin-1")).get("fleet", [None])[-1]
        if path == MODELS_PATH and method == "GET" and fleet is None:
            await self._models(scope, receive, send)
            return
        body, model = b"", None
        has_body = method in BODY_METHODS
        if has_body:
            read = await self._shell.read_body(scope, receive, send)
            if read is None:
                return
            body, model = read, _model(read)
        keeper = _keeper_id(method, path)
        if fleet is None and keeper:
            fleet = next((n.name for n in self._neighbours.values() if keeper in (g.id for g in n.gateways)), None)
        own = self._own()
        fleets = [own, *(neighbour.port_fleet for neighbour in self._neighbours.values())]
        needs_model = has_body and path not in OPEN_PATHS and path != STATUS_PATH and keeper is None
        route = model_routing.decide(fleets, own=own.name, model=model, fleet=fleet, needs_model=needs_model)
        if route.fleet is None:
            await self._shell.answers.error(scope, send, route.status, route.reason, route.param)
        elif route.fleet == own.name:
            await self._shell(scope, replay(body, receive) if has_body else receive, send)
        else:
            await self._forward(self._neighbours[route.fleet], model, scope, body, receive, send)

    async def _forward(
        self, neighbour: Neighbour, model: str | None, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        urls = neighbour.urls(model, self._node, next(self._turns))
        try:
            await self._relay.forward(urls, neighbour.relay_key, scope, body, receive, send)
        except RelayFailedError as error:
            logger.warning("no gateway of fleet %s took %s: %s", neighbour.name, scope["path"], error)
            what = "answers" if urls else "is there"
            reason = f"no gateway of fleet {neighbour.name!r} {what} now"
            await self._shell.answers.unavailable(scope, send, reason, RETRY_NOT_READY_S)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The models of all fleets whose key, if they have any, the client has given."""

        async def fetch_models(neighbour: Neighbour) -> CollectedResponse:
            response = CollectedResponse()
            try:
                async with asyncio.timeout(MODELS_TIMEOUT_S):
                    urls = neighbour.urls(None, self._node, next(self._turns))
                    await self._relay.forward(urls, neighbour.relay_key, scope, b"", silence, response.send)
            except (RelayFailedError, TimeoutError) as error:
                logger.warning("fleet %s did not report its models: %r", neighbour.name, error)
                return CollectedResponse()
            return response

        own = CollectedResponse()
        neighbours = list(self._neighbours.values())
        others, _ = await asyncio.gather(
            asyncio.gather(*map(fetch_models, neighbours)), self._shell(scope, receive, own.send)
        )
        responses = {self._own().name: own, **dict(zip((n.name for n in neighbours), others, strict=True))}
        good = [response for _, response in sorted(responses.items()) if response.status == 200]
        lists = [_models_decoder.decode(response.body) for response in good]
        if lists:
            cards = [card for models in lists for card in models.data]
            await self._shell.answers.respond(scope, send, 200, msgspec.json.encode(_ModelList(cards)))
        else:
            await own.forward(send)


def _keeper_id(method: str, path: str) -> str | None:
    """The gateway that keeps the stream or response of a path; "" when its id does not say, None for other paths."""
    if path.startswith(STREAMS_PREFIX):
        return path.removeprefix(STREAMS_PREFIX).rpartition("-")[0]
    kept = response_id(method, path, b"")
    return None if kept is None else owner_id(kept) or ""


def _model(body: bytes) -> str | None:
    """The text `model` of a JSON object; None without one. The shell and vLLM say what is wrong with other bodies."""
    try:
        return _named_decoder.decode(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
