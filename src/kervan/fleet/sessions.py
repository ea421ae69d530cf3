"""The gateways that are connected to one replica: handshake, lease, load. The replica's end of `kervan.fleet.wire`."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from kervan.fleet import auth, curve, wire
from kervan.fleet.step_clock import StepClock

logger = logging.getLogger(__name__)


class RefusalError(Exception):
    """Why a replica cannot serve a gateway that knows the secret."""


@dataclass(slots=True)
class Session:
    """One gateway's connection."""

    identity: bytes
    gateway_id: str
    last_seen_s: float
    hello: wire.Hello
    outstanding_tokens: int = 0
    num_suspects: int = 0
    num_outputs: int = 0
    is_over: bool = False
    why_over: str = ""
    news: bytes = b""  # what other gateways have told of prefixes, and this one has not heard


class Sessions:
    """Sessions by index (their place in `all`) and by identity.

    `begin` is called with a new session's index and returns where its outputs come from, and what the engine is, or
    raises RefusalError. `end` is called with the index of a session that is over: it aborts the session's requests and
    returns how many there were. `engine_version` None: gateways of any version are welcome.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        secrets: auth.Secrets,
        engine_version: str | None,
        begin: Callable[[int], tuple[str, wire.EngineFacts]],
        end: Callable[[int], int],
    ):
        self.all: list[Session] = []
        self._replica_id = replica_id
        self._secrets = secrets
        self._engine_version = engine_version
        self._begin = begin
        self._end = end
        self._live: dict[bytes, int] = {}

    def allowed_keys(self) -> list[bytes]:
        """The public keys of those who may connect."""
        return [curve.of_gateways(secret).public for secret in self._secrets.taken]

    @property
    def live(self) -> list[Session]:
        """The sessions that are not over."""
        return [self.all[index] for index in self._live.values()]

    def seen(self, identity: bytes) -> int | None:
        """The index of a session that gave a sign of life; None if it never said HELLO, or its lease has ended."""
        index = self._live.get(identity)
        if index is not None:
            self.all[index].last_seen_s = time.monotonic()
        return index

    def greet(self, identity: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """The answer to HELLO: WELCOME or REFUSED, with its payload."""
        try:
            hello = msgspec.msgpack.decode(payload, type=wire.Hello)
        except msgspec.MsgspecError as error:
            return wire.REFUSED, f"unreadable HELLO ({error})".encode()
        version = self._engine_version or hello.engine_version
        refusal = wire.refusal(
            hello, session=identity, replica_id=self._replica_id, engine_version=version, secrets=self._secrets.taken
        )
        if refusal is None and any(session.identity == identity for session in self.all):
            refusal = "this session has been here before; a gateway draws a new identity for each link"
        if refusal is not None:
            logger.warning("refused gateway %s: %s", hello.gateway_id, refusal, extra={"gateway": hello.gateway_id})
            return wire.REFUSED, refusal.encode()
        for session in self.live:
            if session.gateway_id == hello.gateway_id:
                self._close(session, "its gateway came again")
        self._live[identity] = len(self.all)
        self.all.append(Session(identity, hello.gateway_id, time.monotonic(), hello))
        try:
            output_address, facts = self._begin(len(self.all) - 1)
        except RefusalError as error:
            self.all.pop()
            del self._live[identity]
            return wire.REFUSED, str(error).encode()
        welcome = wire.Welcome(self._replica_id, version, output_address, time.monotonic(), facts)
        return wire.WELCOME, msgspec.msgpack.encode(welcome)

    def refuse(self, identity: bytes) -> list[bytes]:
        """What to send to one that says something other than HELLO and has no session, or no more.

        Its requests are gone here, and its link looks alive to it: its loop may have stood still while ZMQ's thread
        answered for it. Told so, it opens a new one.
        """
        why = next((session.why_over for session in self.all if session.identity == identity), "no HELLO came from it")
        return [identity, wire.REFUSED, f"the replica has no such session: {why}".encode()]

    def ping(self, index: int, payload: bytes) -> None:
        """Take what the gateway of a session has outstanding here. Raises: msgspec.MsgspecError."""
        ping = msgspec.msgpack.decode(payload, type=wire.Ping)
        session = self.all[index]
        session.outstanding_tokens, session.num_suspects = ping.outstanding_tokens, ping.num_suspects
        if ping.prefixes:
            for other in self.live:
                if other is not session:
                    other.news = (other.news + ping.prefixes)[-wire.MAX_NEWS_BYTES :]

    @property
    def num_suspects(self) -> int:
        """Streams of all gateways that are tried here (`wire.Ping`)."""
        return sum(session.num_suspects for session in self.live)

    def pong(
        self,
        session: Session,
        load: tuple[int, int, float],
        *,
        is_draining: bool,
        has_work: bool,
        clock: StepClock,
    ) -> bytes:
        """PONG's payload. `load`: running, waiting, KV cache use (0 to 1)."""
        live = self.live
        others = sum(other.outstanding_tokens for other in live if other is not session)
        pong = wire.Pong(
            *load,
            others,
            is_draining,
            session.num_outputs,
            len(live),
            stalled_s=round(clock.stalled_s(has_work=has_work), 3),
            step_tokens=clock.step_tokens,
            expected_step_s=round(clock.expected_s(), 3),
            prefixes=session.news,
        )
        session.news = b""
        return msgspec.msgpack.encode(pong)

    def end_expired(self) -> None:
        """End the sessions whose gateway was silent for the length of a lease."""
        oldest_s = time.monotonic() - wire.LEASE_S
        for session in self.live:
            if session.last_seen_s < oldest_s:
                self._close(session, f"no heartbeat for {wire.LEASE_S:.0f} s")

    def _close(self, session: Session, why: str) -> None:
        session.is_over, session.why_over = True, why
        num_aborted = self._end(self._live.pop(session.identity))
        logger.warning("gateway %s: %s; %d requests aborted", session.gateway_id, why, num_aborted)
