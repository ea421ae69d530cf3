"""One gateway: its own HTTP port, the shell, vLLM's OpenAI app, and the fleet client behind it.

Runs on the loop that calls `start`; needs neither Ray nor the main thread. Whoever runs it feeds `update` with
directory snapshots.
"""

import asyncio
import functools
import logging
import os
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import uvicorn
from yarl import URL

from kervan import __version__, metrics
from kervan.config.api_keys import OPEN, KeyTable
from kervan.errors import ConfigError
from kervan.fleet import pinned_tls
from kervan.fleet.admitted import Ticket
from kervan.fleet.auth import Secrets, relay_key
from kervan.fleet.client import FleetClient
from kervan.fleet.directory import DemandCounts, GatewayEntry, Snapshot, as_told
from kervan.fleet.link import members
from kervan.fleet.reconnect.replicated_store import ReplicatedStore
from kervan.fleet.vllm.adapters import Adapters
from kervan.fleet.vllm.logs import kept_handlers
from kervan.fleet.vllm.stored_responses import StoredResponses
from kervan.gateway import explain, openapi, page, ranges
from kervan.gateway.answers import Answers, OwnAnswer
from kervan.gateway.asgi import ASGIApp
from kervan.gateway.connection import Connection
from kervan.gateway.inner_port import InnerPort
from kervan.gateway.key_guard import KeyGuard
from kervan.gateway.keys import KeyRing
from kervan.gateway.leaving import send_clients_away
from kervan.gateway.merged_page import merge_pages
from kervan.gateway.page import key_metrics
from kervan.gateway.peers import Peers, SharedAdapters
from kervan.gateway.quotas import Quotas
from kervan.gateway.reconnect import Streams
from kervan.gateway.relay import RELAY_HEADER
from kervan.gateway.remembered import RequestMemory
from kervan.gateway.request_size import RequestSize
from kervan.gateway.shared_port import SharedPort
from kervan.gateway.shell import REQUESTS_PREFIX, GatewayShell, Shed
from kervan.gateway.tls import LOOK_PERIOD_S, ServerTls, TlsFiles
from kervan.gateway.tracing import Tracing
from kervan.logs import LogFormat
from kervan.metrics import Descriptor
from kervan.policy import admission
from kervan.policy.model_routing import PortFleet

logger = logging.getLogger(__name__)

EXPLAIN_TIMEOUT_S = 2.0
NODE = "node"  # in the place of a gateway's id
LAST_S = 3  # for what is left when `Gateway.stop` has waited; whole seconds, as uvicorn wants them
CLOSING, CLOSING_RETRY_S = "the fleet ends when its streams have ended, and takes no more requests", 30


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """What a gateway needs to start. Where a fleet's setting has the same name, it is that (`kervan.config.fleet`)."""

    gateway_id: str
    node: str
    """Address of the node, as the directory names it."""
    engine_argv: tuple[str, ...]
    """Arguments of vLLM's own server parser."""
    secret: str
    """The fleet's, with which gateways prove to replicas and to each other who they are."""
    host: str
    port: int
    internal_host: str
    """Where other gateways reach this one, at a free port."""
    public_host: str
    """Where clients reach it."""
    max_queued_streams: int
    hold_timeout_s: float
    stop_timeout_s: float
    """How long open requests may take to end when it stops."""
    opens_when_attached: bool
    """Open the port only when vLLM's app answers; otherwise at once, with 503 until then."""
    is_twin: bool
    shared_port: bool
    fleet_name: str
    models: tuple[str, ...]
    """The names in the fleet's settings, which with `fleet_name` tell it from others on the port."""
    replay_s: float
    replay_max_bytes: int
    keys: KeyTable = OPEN
    """The API keys when it starts; later ones come with snapshots of the directory."""
    secret_before: str = ""
    """Which other gateways and replicas may still prove themselves with, as `auth.Secrets` takes it."""
    encrypts: bool = True
    tls: TlsFiles | None = None
    """None: clients speak HTTP."""
    routes_by_prefix: bool = True
    remembered_requests: int = 0
    otlp: str = ""
    log_format: LogFormat = "text"
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of the fleet, for the status page; JSON types only."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that other gateways of this user may share.

    Raises: ConfigError when someone else listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends each write at once (TCP_NODELAY); else a response of two waits 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ConfigError(f"port {port} of {host} cannot be used ({error.strerror}); choose another --port") from error
    sock.setblocking(False)
    return sock


class Gateway:
    """Implements the shell's `GatewayView` over a fleet client: `start` it, then `stop` it, on one event loop."""

    def __init__(self, config: GatewayConfig):
        self.config = config
        self.fleet: FleetClient
        self.frontend: Any = None
        self.failure: Exception | None = None
        self.num_open = 0
        self._admissions = dict.fromkeys(("admitted", "queue_full", "too_large", "closing"), 0)
        self._snapshot = Snapshot(0, [], [], [])
        self._heard_s: float | None = None
        self._attached = asyncio.Event()
        self._servers: list[uvicorn.Server] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._attaching: asyncio.Task[None]
        self._public: tuple[uvicorn.Server, socket.socket] | None = None
        self._tls: ServerTls | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._internal: tuple[uvicorn.Server, socket.socket]
        self._internal_port = 0
        self._certificate = pinned_tls.draw() if config.encrypts else None
        self._copies_port = 0
        self._most_slots = 0  # of one replica, so far
        self.answers = Answers()
        self._secrets = Secrets(config.secret, config.secret_before)
        key = relay_key(config.secret)
        self.streams = Streams(config.gateway_id, self._gateways, key, self.answers)
        self.peers = Peers(config.gateway_id, self._gateways, key, self.answers)
        self.adapters = SharedAdapters(config.gateway_id, self._gateways, key)
        self.tracing: Tracing | None = None
        if config.otlp:
            self.tracing = Tracing(config.otlp, fleet=config.fleet_name, gateway_id=config.gateway_id)
        self.requests: RequestMemory | None = None
        if config.remembered_requests or self.tracing is not None or config.log_format == "json":
            self.requests = self.streams.requests = RequestMemory(config.remembered_requests, self.tracing)
        self.keys = KeyRing(config.keys)
        self.quotas = Quotas(config.gateway_id, self._gateways, key)
        guard = KeyGuard(self.keys, self.quotas)
        self.shell = GatewayShell(
            self, guard, streams=self.streams, answers=self.answers, peers=self.peers, requests=self.requests
        )
        self.shared_port: SharedPort | None = None
        if config.shared_port:
            self.shared_port = SharedPort(self.shell, self._port_fleet, config.node, key)
        self._inner = InnerPort(
            self._secrets, shell=self.shell, streams=self.streams, peers=self.peers, adapters=self.adapters,
            quotas=self.quotas, page=self._local_page, explain=self._explain_own, shared_port=self.shared_port,
        )  # fmt: skip

    # ---- lifecycle

    async def start(self, *, serve_http: bool = True) -> None:
        """Open the port, or with `serve_http` False let another server call `shell`; vLLM's app follows.

        Raises: ConfigError when the port is taken, or there is no certificate that can be used.
        """
        if self.config.tls is not None:
            self._tls = await asyncio.to_thread(ServerTls, self.config.tls)
            self._renewing = asyncio.create_task(self._renew_forever(self._tls))
        with kept_handlers():
            from kervan.fleet.vllm.frontend import VllmCodec, bare_app  # vLLM takes seconds to import

        self.fleet = FleetClient(
            VllmCodec(),
            secret=self.config.secret,
            encrypts=self.config.encrypts,
            hold_timeout_s=self.config.hold_timeout_s,
            gateway_id=self.config.gateway_id,
            routes_by_prefix=self.config.routes_by_prefix,
        )
        try:
            # Before the port is open: no answer goes without the headers that the fleet's arguments ask for.
            self.answers.pass_through(await asyncio.to_thread(bare_app, self.config.engine_argv, OwnAnswer))
        except Exception as error:  # noqa: BLE001 - vLLM's app comes to it too, and then it is told
            logger.warning("answers go without vLLM's middlewares until its app is there: %s", error)
        internal = listen(self.config.internal_host, 0)
        self._internal_port = internal.getsockname()[1]
        self._internal = self._serve(self._inner, internal, self._inner_tls), internal
        if self.config.replay_s > 0:
            await self._keep_streams()
        if serve_http and not self.config.opens_when_attached:
            self._open()
        self._attaching = asyncio.create_task(self._attach(opens=serve_http and self.config.opens_when_attached))

    async def _keep_streams(self) -> None:
        self.streams.store = store = ReplicatedStore(
            gateway_id=self.config.gateway_id,
            node=self.config.node,
            secrets=self._secrets,
            engine_version=self.fleet.codec.engine_version,
            replay_s=self.config.replay_s,
            max_bytes=self.config.replay_max_bytes,
        )
        self.fleet.copy_sender = store.copy_sender
        copies = listen(self.config.internal_host, 0)
        self._copies_port = copies.getsockname()[1]
        await store.listen(copies, self._inner_tls)

    def _open(self) -> None:
        listening = listen(self.config.host, self.config.port)
        tls = self._tls.context if self._tls is not None else None
        self._public = self._serve(self.shared_port or self.shell, listening, tls), listening

    @staticmethod
    async def _renew_forever(tls: ServerTls) -> None:
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            await asyncio.to_thread(tls.renew)

    def _serve(self, app: ASGIApp, sock: socket.socket, tls: ssl.SSLContext | None = None) -> uvicorn.Server:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="auto",
            lifespan="off",
            interface="asgi3",  # uvicorn takes a bound method for ASGI 2
            access_log=False,
            log_config=None,  # uvicorn's own would close the handlers of all others
            log_level="warning",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=LAST_S,
            ssl_context_factory=None if tls is None else lambda *_: tls,
        )
        server = uvicorn.Server(config)
        self._servers.append(server)
        self._tasks.append(asyncio.create_task(server.serve(sockets=[sock])))
        return server

    async def _attach(self, *, opens: bool) -> None:
        from kervan.fleet.vllm.frontend import OpenAIFrontend

        try:
            self.frontend = await OpenAIFrontend.start(
                self.fleet,
                self.config.engine_argv,
                is_twin=self.config.is_twin,
                is_followed=self.config.replay_s > 0,
                answering=OwnAnswer,
            )
            self.answers.pass_through(self.frontend.app)
            self.peers.stored = StoredResponses(self.frontend.app, self.config.gateway_id)
            await self.adapters.begin(Adapters(self.frontend.app, self.config.gateway_id, self.adapters.tell))
            self._inner.record = functools.partial(
                ranges.record, fleet=self.fleet, engine=self.frontend.engine, memory=self.requests,
                gateway_id=self.config.gateway_id,
            )  # fmt: skip
            app = openapi.describing(
                self.frontend.app, fleet_name=self.config.fleet_name, has_keys=not self.keys.is_open
            )
            self.shell.attach(app)
            if opens:
                self._open()
        except Exception as error:
            self.failure = error
            raise
        self._attached.set()

    async def wait_attached(self) -> None:
        """Return once vLLM's app answers; raises what stopped it."""
        await asyncio.shield(self._attaching)

    async def stop(self) -> None:
        """Stop accepting, let open requests end (at most `stop_timeout_s`), then leave.

        Streams that are cut then go on at the gateway that has their copies, when their clients ask it.
        """
        # Other gateways are clients too.
        is_relayed_to = self.shared_port is not None or self.streams.store is not None or self.peers.keeps_responses
        doors = [door for door in (self._public, self._internal if is_relayed_to else None) if door is not None]
        await asyncio.gather(*(send_clients_away(*door, timeout_s=self.config.stop_timeout_s) for door in doors))
        for server in self._servers:
            server.should_exit = True
        self._servers.clear()
        self._attaching.cancel()
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await asyncio.gather(*self._tasks, self._attaching, return_exceptions=True)
        if self.shared_port is not None:
            self.shared_port.close()
        if self.frontend is not None:
            await self.frontend.close()
        self.streams.close()
        self.peers.close()
        await self.adapters.close()
        await self.quotas.close()
        if self.streams.store is not None:
            await self.streams.store.close()
        await self.fleet.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    def _gateways(self) -> Sequence[GatewayEntry]:
        return self._snapshot.gateways

    def update(self, snapshot: Snapshot) -> None:
        """Follow the directory."""
        self._snapshot = snapshot
        self._heard_s = time.monotonic()
        self.adapters.update()
        if snapshot.keys is not None:
            self.keys.update(snapshot.keys)
        self.quotas.update()
        self.fleet.num_gateways = max(1, len(snapshot.gateways))
        self.fleet.set_slo(snapshot.slo)
        self.fleet.set_members(members(snapshot))
        if self.streams.store is not None:
            self.streams.store.update(snapshot)

    def entry(self) -> GatewayEntry:
        """This gateway as the directory should list it."""
        reason = self.readiness()
        return GatewayEntry(
            id=self.config.gateway_id,
            node=self.config.node,
            pid=os.getpid(),
            url=f"{'https' if self.config.tls else 'http'}://{_bracket(self.config.public_host)}:{self.config.port}",
            internal_url=self._inner_address(self._internal_port, "https://" if self._certificate else "http://"),
            is_ready=reason is None,
            reason=reason or "",
            streams=self.fleet.num_streams,
            held=self.fleet.num_held,
            moved=self.fleet.counts.moved,
            traffic=self.fleet.traffic(),
            demand=self._demand(),
            usage=self.keys.usage(self._own_model()),
            models=self.frontend.model_names if self.frontend is not None else (),
            neighbours=self.shared_port.neighbours if self.shared_port is not None else (),
            copies_address=self._inner_address(self._copies_port) if self._copies_port else "",
        )

    @property
    def _inner_tls(self) -> ssl.SSLContext | None:
        return None if self._certificate is None else self._certificate.context

    def _inner_address(self, port: int, scheme: str = "") -> str:
        """Of one of its sockets for other gateways, as `pinned_tls` has it."""
        digest = f"#{self._certificate.digest}" if self._certificate is not None else ""
        return f"{scheme}{_bracket(self.config.internal_host)}:{port}{digest}"

    def _own_model(self) -> str:
        """What the fleet serves, beside adapters."""
        return self.model_name() if self.frontend is not None else next(iter(self.config.models), "")

    def _demand(self) -> DemandCounts:
        """What clients ask of it. Where there may be no replica, a gateway that is new asks for one itself."""
        demand = self.fleet.take_demand()
        if self._attached.is_set() or not self._snapshot.may_sleep:
            return demand
        return msgspec.structs.replace(demand, held=max(1, demand.held))

    def _port_fleet(self) -> PortFleet:
        loaded = self.frontend.model_names if self.frontend is not None else ()
        models = tuple(dict.fromkeys([*self.config.models, *loaded]))
        return PortFleet(self.config.fleet_name, models, not self.keys.is_open)

    # ---- what the shell asks

    def readiness(self) -> str | None:
        """None when a replica can answer, else the reason; as all below, what `GatewayView` says."""
        if self._snapshot.is_closing:
            return CLOSING
        if any(not link.is_draining for link in self.fleet.links):
            return None if self._attached.is_set() else "the gateway is starting"
        if self._snapshot.may_sleep and self._attached.is_set():
            return None  # it holds requests until there is one
        if self.fleet.refusals:
            return next(iter(self.fleet.refusals.values()))
        states = [
            f"{r.id} {'not connected to this gateway' if r.state == 'ready' else r.state}"
            + (f" ({r.reason})" if r.reason else "")
            for r in self._snapshot.replicas
        ]
        return "no replica is ready: " + ("; ".join(states) or "none has started yet")

    def admit(self, size: RequestSize, session: str = "") -> Shed | Ticket:
        """Room for a request; else why there is none, and when to try again (`policy/admission.py`)."""
        if self._snapshot.is_closing:
            self._admissions["closing"] += 1
            return Shed(CLOSING_RETRY_S, CLOSING)
        decision = admission.decide(self._admission_state(), size.num_streams)
        if decision.admitted:
            self._admissions["admitted"] += 1
            return self.fleet.take_room(size.num_streams, is_bulk=decision.is_bulk, session=session)
        if decision.retry_after_s is not None:  # else none ever has room for it
            self.fleet.demand.shed(size.num_streams)
            self.fleet.counts.ended["refused"] += size.num_streams
        self._admissions["too_large" if decision.retry_after_s is None else "queue_full"] += 1
        return Shed(decision.retry_after_s, decision.reason)

    def _admission_state(self) -> admission.AdmissionState:
        slots = [link.facts.max_num_seqs for link in self.fleet.links]
        self._most_slots = max(self._most_slots, *slots, 0)
        num_coming = sum(replica.state != "draining" for replica in self._snapshot.replicas)
        return admission.AdmissionState(
            outstanding_streams=self.fleet.num_outstanding,
            bulk_streams=self.fleet.num_bulk,
            capacity_streams=self.fleet.capacity_streams,
            full_capacity_streams=num_coming * self._most_slots,
            max_queued_streams=self.config.max_queued_streams,
            num_gateways=self.fleet.num_gateways,
            completed_per_s=self.fleet.completed_per_s,
        )

    def model_name(self) -> str:
        """The first served model name; only once vLLM's app is attached."""
        return str(self.frontend.model_name)

    def stream_opened(self) -> None:
        """Count one HTTP request more in flight."""
        self.num_open += 1

    def stream_closed(self) -> None:
        """Count one HTTP request fewer in flight."""
        self.num_open -= 1

    async def status(self) -> dict[str, object]:
        """What the fleet is, this gateway's streams, and how many each replica has of them, as JSON types.

        With what the directory said last, and how many seconds ago: `kervan status` shows it when that is away.
        """
        status = openapi.StatusPage(
            gateway=self.config.gateway_id,
            fleet=self.config.fleet_name,
            about={
                "models": [*self.config.models],
                "simulated": self.config.is_twin,
                "kervan": __version__,
                **self.config.about,
            },
            streams=self.fleet.num_streams,
            held=self.fleet.num_held,
            moved=self.fleet.counts.moved,
            given_up=self.fleet.counts.given_up,
            replicas={link.replica_id: len(link.streams) for link in self.fleet.links},
            directory=as_told(self._snapshot),
            directory_heard_s=None if self._heard_s is None else round(time.monotonic() - self._heard_s, 1),
        )
        told: dict[str, object] = msgspec.to_builtins(status)
        return told

    async def explain(self, request_id: str) -> bytes | None:
        """Where the time of a request went, as JSON: from this gateway's memory, or another's."""
        if (told := self._explain_own(request_id)) is not None:
            return told
        others = [g.internal_url for g in self._snapshot.gateways if g.id != self.config.gateway_id]
        path = REQUESTS_PREFIX + urllib.parse.quote(request_id, safe="")
        timeout = aiohttp.ClientTimeout(total=EXPLAIN_TIMEOUT_S)
        headers = {RELAY_HEADER.decode(): relay_key(self.config.secret).decode()}

        async def ask(session: aiohttp.ClientSession, url: str) -> bytes | None:
            try:
                place, pin = page.pinned(url)
                async with session.get(URL(place + path, encoded=True), ssl=pin) as response:
                    return await response.read() if response.status == 200 else None
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.info("the gateway at %s was not asked for a request: %r", pinned_tls.split(url)[0], error)
                return None

        async with aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=headers) as session:
            found = await asyncio.gather(*(ask(session, url) for url in others))
        return next((told for told in found if told is not None), None)

    def _explain_own(self, request_id: str) -> bytes | None:
        record = self.requests.find(request_id) if self.requests is not None else None
        if record is None or self.requests is None:
            return None
        found = [record, *self.requests.later(record)]
        now_s = time.monotonic()
        told, *later = (explain.explained(each, gateway=self.config.gateway_id, now_s=now_s) for each in found)
        told.later = later
        return msgspec.json.encode(told)

    async def metrics(self, gateway: str | None = None) -> bytes | None:
        """All gateways' pages and the fleet's gauges as one page; a gateway that does not answer is left out.

        With `gateway`: the page of that one alone, None if there is none or it does not answer. "node" in its place:
        one page of the gateways of this node, so that each counts once where all nodes are scraped.
        """
        if gateway == self.config.gateway_id:
            return self._local_page().encode()
        if gateway is not None and gateway != NODE:
            (found,) = await page.fetch(
                peer.internal_url for peer in self._snapshot.gateways if peer.id == gateway
            ) or [None]
            return None if found is None else found.encode()
        peers = [g for g in self._snapshot.gateways if g.id != self.config.gateway_id]
        if gateway == NODE:
            peers = [peer for peer in peers if peer.node == self.config.node]
        pages = await page.fetch(peer.internal_url for peer in peers)
        texts = {self.config.gateway_id: self._local_page()}
        texts |= {peer.id: text for peer, text in zip(peers, pages, strict=True) if text is not None}
        return merge_pages(texts).encode()

    def _local_page(self) -> str:
        fleet, counts = self.fleet, self.fleet.counts
        age_s = 0.0 if self._heard_s is None else time.monotonic() - self._heard_s
        own: dict[Descriptor, page.Values] = {
            metrics.STREAMS_OPEN: fleet.num_streams,
            metrics.STREAMS_STARTED: counts.started,
            metrics.STREAMS_ENDED: {(outcome,): count for outcome, count in counts.ended.items()},
            metrics.STREAMS_BROKEN: {(reason,): count for reason, count in counts.broken.items()},
            metrics.STREAMS_QUEUED: {(cause,): count for cause, count in fleet.queued().items()},
            metrics.STREAMS_BOUND: admission.bound(self._admission_state()),
            metrics.STREAMS_FETCHED: self.streams.num_fetched,
            metrics.REQUESTS_OPEN: self.num_open,
            metrics.ADMISSION: {(decision,): count for decision, count in self._admissions.items()},
            metrics.STREAMS_MOVED: {(reason,): count for reason, count in counts.moves.items()},
            metrics.MOVE_PAUSE: counts.move_pause_s,
            metrics.MOVE_TOKENS: counts.moved_tokens,
            metrics.DRAIN: counts.drain_s,
            metrics.LINKS: len(fleet.links),
            metrics.LINKS_BROKEN: counts.broken_links,
            metrics.REPLICAS_LOST: counts.lost_replicas,
            metrics.REPLICAS_RETURNED: counts.returned_replicas,
            metrics.DIRECTORY_AGE: age_s,
            **self._of_replicas(),
            **key_metrics(self.keys),
            **({} if self.streams.store is None else self.streams.store.metrics()),
        }
        has_vllm = self.frontend is not None
        return page.write(
            own,
            fleet_name=self.config.fleet_name,
            model_name=self.model_name() if has_vllm else "",
            snapshot=self._snapshot,
            age_s=age_s,
            has_vllm=has_vllm,
        )

    def _of_replicas(self) -> dict[Descriptor, page.Values]:
        """What this gateway has seen of each replica that is listed."""
        pools, now_s = {replica.id: replica.pool for replica in self._snapshot.replicas}, time.monotonic()
        tallies = {(name, pools[name]): tally for name, tally in self.fleet.tallies.items() if name in pools}
        return {
            metrics.TTFT: {labels: tally.ttft for labels, tally in tallies.items()},
            metrics.TPOT: {labels: tally.tpot for labels, tally in tallies.items()},
            metrics.GENERATED_TOKENS: {labels: self.fleet.generated_tokens(labels[0]) for labels in tallies},
            metrics.PREFILLED_TOKENS: {labels: tally.prefilled_tokens for labels, tally in tallies.items()},
            metrics.STALLED: {
                (link.replica_id, pools[link.replica_id]): link.stalled_s(now_s)
                for link in self.fleet.links
                if link.replica_id in pools
            },
            metrics.PREFIX_PREDICTED: {labels: tally.predicted_cached_tokens for labels, tally in tallies.items()},
            metrics.PREFIX_POSSIBLE: {labels: tally.possible_cached_tokens for labels, tally in tallies.items()},
            metrics.PREFIX_HIT: {labels: tally.cached_tokens for labels, tally in tallies.items()},
        }


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
