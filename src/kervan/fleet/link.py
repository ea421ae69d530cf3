"""One gateway's connection to one replica: the handshake, and what is known of the replica since."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from kervan.errors import EngineError
from kervan.facts.markets import SPOT
from kervan.fleet import auth, curve, wire
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.histogram import TPOT_BOUNDS_S, TTFT_BOUNDS_S, Histogram
from kervan.fleet.stream import Stream
from kervan.policy import routing, stall
from kervan.policy.prefill_speed import PrefillSpeed

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0  # chosen, not measured: its two round trips take milliseconds
LONGEST_STEP_S = 2.0  # what is longer between two steps was a time without work
STEP_WEIGHT = 0.1  # of the newest step in the mean: about the last ten count
MAX_TTFTS = 1000  # kept between two looks at the traffic
# A replica stands still if nothing has come for so many of its steps, and so many seconds.
STILL_STEPS, STILL_S = 5, 0.25
NO_LOAD = wire.Pong(0, 0, 0.0, 0, False)


@dataclass(frozen=True, slots=True)
class Member:
    """A replica as the directory lists it.

    `public_key`: its CURVE key; empty: it speaks plain text. `is_draining`: it drains, or was told to; `leaves_in_s`:
    when it will be gone, if that is known; `may_linger`: its streams may use that time. `risky_for_s`: for so long it
    is likelier to go than others.
    """

    replica_id: str
    address: str
    public_key: str = ""
    is_draining: bool = field(default=False, compare=False)
    leaves_in_s: float | None = field(default=None, compare=False)
    may_linger: bool = field(default=False, compare=False)
    risky_for_s: float = field(default=0.0, compare=False)


def members(snapshot: Snapshot) -> list[Member]:
    """The replicas that a client can link to, those that drain too: it moves its streams off them."""
    called_likely = {entry.node for entry in snapshot.nodes if any(n.kind == "rebalance" for n in entry.notices)}
    return [
        Member(
            r.id,
            r.address,
            r.public_key,
            r.state == "draining",
            r.leaves_in_s,
            r.may_linger,
            _risky_for_s(r, called_likely),
        )
        for r in snapshot.replicas
        if r.is_reachable
    ]


def _risky_for_s(replica: ReplicaEntry, called_likely: set[str]) -> float:
    is_called_likely = not called_likely.isdisjoint((replica.node, *replica.nodes))
    is_spot = replica.pool == SPOT
    return routing.risky_for_s(is_spot=is_spot, age_s=replica.ready_for_s, is_called_likely=is_called_likely)


@dataclass(slots=True)
class ReplicaTally:
    """Streams of one replica so far: those that ended there, and those that went on elsewhere. It outlives its link.

    `ttft`: from placing one there to its first token from there; `tpot`: per token after that. Tokens of prompts in the
    prefix cache, of streams that gave a first token there: predicted, possible where the most of each was, and found.
    `prefilled_tokens`: of the same streams, those that were computed; `generated_tokens`: that came of it, but for
    those of its link since traffic was last looked at.
    """

    num_served: int = 0
    num_moved: int = 0
    unlinked_s: float = 0.0
    predicted_cached_tokens: int = 0
    possible_cached_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    tpot: Histogram = field(default_factory=lambda: Histogram(TPOT_BOUNDS_S))


@dataclass(slots=True, eq=False)
class ReplicaLink:
    """A live connection to one replica.

    `told` gets what other gateways tell of prefixes there, `news` is what they are told next; both are kept by
    `prefixes.Prefixes`. `streams`, by wire id, and their part of `load` are kept by `placement.Placements`; `calls`,
    by number, by `calls.Calls`. The listener keeps what the replica says (`pong`, `num_outputs`, `output_s`), `follow`
    what the directory says. `drain_deadline_s` and all other moments are of this process's monotonic clock.
    """

    member: Member
    input: zmq.asyncio.Socket
    output: zmq.asyncio.Socket
    monitors: tuple[zmq.asyncio.Socket, ...]
    facts: wire.EngineFacts
    clock_skew_s: float
    load: routing.ReplicaLoad
    news: bytearray = field(default_factory=bytearray)  # of prefixes, for the other gateways
    num_told: int = 1  # gateways when `news` was last added to
    told: Callable[[bytes], None] = lambda _: None
    streams: dict[str, Stream] = field(default_factory=dict)
    calls: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    pong: wire.Pong = NO_LOAD
    pong_s: float = 0.0
    tally: ReplicaTally = field(default_factory=ReplicaTally)
    num_tokens: int = 0
    prefill: PrefillSpeed = field(default_factory=PrefillSpeed)
    ttfts_s: list[float] = field(default_factory=list)  # since traffic was last asked for
    num_outputs: int = 0  # received
    output_s: float = 0.0  # when the last one was received, or nothing was missing
    is_told_to_drain: bool = False  # by the directory, which may know before the replica does
    draining_since_s: float = 0.0
    emptied_s: float = 0.0  # when its last stream left
    drain_deadline_s: float | None = None
    risky_until_s: float = 0.0
    may_linger: bool = False
    _step_s: float | None = None  # between two steps, a mean over about the last ten
    stalled_at_s: float | None = None  # when it was first found to stand still since its last step
    _stepped_s: float = 0.0

    @property
    def replica_id(self) -> str:
        """As the directory lists it."""
        return self.member.replica_id

    def hear(self, pong: wire.Pong) -> None:
        """Take a PONG: what the replica reports of its load, and a sign of life."""
        self.load.hear(pong.other_tokens, pong.num_gateways, pong.running + pong.waiting)
        self.pong, self.pong_s = pong, time.monotonic()
        if pong.prefixes:
            self.told(pong.prefixes)
        self.load.is_draining = self.is_draining
        self.load.is_risky = self.pong_s < self.risky_until_s

    def follow(self, member: Member) -> None:
        """Take what the directory says of the replica now. A drain that it has told of is not taken back."""
        now_s = time.monotonic()
        self.risky_until_s = now_s + member.risky_for_s
        self.load.is_risky = member.risky_for_s > 0
        if member.is_draining:
            self.is_told_to_drain = self.load.is_draining = True
            self.may_linger = member.may_linger
            if member.leaves_in_s is not None:
                self.drain_deadline_s = now_s + member.leaves_in_s

    @property
    def is_draining(self) -> bool:
        """Whether it is to get nothing more; the directory or the replica has said so."""
        return self.is_told_to_drain or self.pong.is_draining

    def stepped(self) -> None:
        """The engine has sent the outputs of a step."""
        now_s = time.monotonic()
        gap_s, self._stepped_s = now_s - self._stepped_s, now_s
        self.load.is_on_trial = False
        if gap_s < LONGEST_STEP_S:  # else it had nothing to do
            self._step_s = gap_s if self._step_s is None else self._step_s + STEP_WEIGHT * (gap_s - self._step_s)

    @property
    def stepped_s(self) -> float:
        """When outputs of a step came last."""
        return self._stepped_s

    @property
    def step_s(self) -> float | None:
        """Seconds between its last steps, a mean; None before the first ones."""
        return self._step_s

    def stalled_s(self, now_s: float) -> float:
        """How long it has had work, or been silent, without a step that gave this gateway a token."""
        if not self.pong_s:
            return 0.0
        return max(0.0, now_s - max(self.pong_s - self.pong.stalled_s, self._stepped_s))

    @property
    def is_long_in_step(self) -> bool:
        """Whether it stands still in a step, and still reports: what that step computes may be the reason."""
        now_s = time.monotonic()
        is_reporting = now_s - self.pong_s < stall.MIN_PATIENCE_S
        return self.pong.step_tokens > 0 and is_reporting and self.stalled_s(now_s) > stall.MIN_PATIENCE_S

    def found_stalled(self, now_s: float) -> None:
        """It was found to stand still; maybe not for the first time since its last step, as it looks idle meanwhile."""
        if self.stalled_at_s is None or self.stalled_at_s <= self._stepped_s:
            self.stalled_at_s = now_s

    def stood_still_before(self, stream: Stream) -> bool:
        """Whether it stood still when a stream was placed there, has made no step since, and so not because of it.

        It was found so before: its streams were moved off then, so it looked idle and got new ones. Or it was found so
        later, but streams there had waited for a step for too long already when this one came (`came_late`).
        """
        if self.stalled_at_s is None or self._stepped_s >= self.stalled_at_s:
            return False
        return self.stalled_at_s <= stream.placed_s or (stream.came_late and self._stepped_s < stream.placed_s)

    def is_late(self, now_s: float) -> bool:
        """Whether streams there that generate have had no token for longer than it takes."""
        return self._is_still(now_s) and any(stream.gave_token for stream in self.streams.values())

    def _is_still(self, now_s: float) -> bool:
        return now_s - self._stepped_s > max(STILL_STEPS * (self._step_s or 0.0), STILL_S)

    def pace_s(self, now_s: float) -> float | None:
        """Seconds between two tokens of a stream there; None if that is not known, or it stands still."""
        return None if self._step_s is None or self._is_still(now_s) else self._step_s

    def note_ttft(self, ttft_s: float) -> None:
        """Add the TTFT of one stream; `fleet.traffic` collects them."""
        self.tally.ttft.observe(ttft_s)
        if len(self.ttfts_s) < MAX_TTFTS:
            self.ttfts_s.append(ttft_s)

    def close(self) -> None:
        """Close its sockets; what was not sent is dropped."""
        for socket, monitor in zip((self.input, self.output), self.monitors, strict=True):
            _close(socket, monitor)


class LinkRefusedError(EngineError):
    """The replica named a reason not to serve this gateway."""


async def open_link(context: zmq.asyncio.Context, member: Member, hello: wire.Hello, secret: str) -> ReplicaLink:
    """A link over which requests may be sent. `hello`: all but the proof, which is made of `secret` for this link.

    It is encrypted if the member has a public key.

    Raises: TimeoutError without an answer in `HANDSHAKE_TIMEOUT_S`; LinkRefusedError.
    """
    identity = uuid.uuid4().bytes
    proof = auth.link_proof(secret, session=identity, gateway_id=hello.gateway_id, replica_id=member.replica_id)
    hello = msgspec.structs.replace(hello, proof=proof)
    opened = [_connect(context, member.address, identity, member.public_key, secret)]
    input_socket = opened[0][0]
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            sent_s = time.monotonic()
            await input_socket.send_multipart([wire.HELLO, msgspec.msgpack.encode(hello)])
            kind, payload = await input_socket.recv_multipart()
            received_s = time.monotonic()
            if kind == wire.REFUSED:
                raise LinkRefusedError(payload.decode())
            welcome = msgspec.msgpack.decode(payload, type=wire.Welcome)
            opened.append(_connect(context, welcome.output_address, identity, member.public_key, secret))
            output_socket = opened[1][0]
            await output_socket.send(wire.SUBSCRIBE)
            while await output_socket.recv() != wire.SUBSCRIBED:
                pass
    except BaseException:
        for socket, monitor in opened:
            _close(socket, monitor)
        raise
    # Half the round trip bounds the error; on one host both clocks are the same and the skew is zero.
    skew_s = (sent_s + received_s) / 2 - welcome.monotonic_s
    if abs(skew_s) <= received_s - sent_s:
        skew_s = 0.0
    logger.info("linked to replica %s at %s", member.replica_id, member.address, extra={"replica": member.replica_id})
    monitors = tuple(monitor for _, monitor in opened)
    load = routing.ReplicaLoad(member.replica_id, 0)
    return ReplicaLink(
        member, input_socket, output_socket, monitors, welcome.facts, skew_s, load, output_s=time.monotonic()
    )


def _connect(
    context: zmq.asyncio.Context, address: str, identity: bytes, public_key: str, secret: str
) -> tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]:
    """A connecting socket, and the one that tells when its connection breaks."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    wire.configure(socket)
    if public_key:
        curve.connect_as(socket, curve.of_gateways(secret), public_key.encode())
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.connect(address)
    return socket, monitor


def _close(socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
    """Close both without stopping the I/O thread.

    ZMQ's I/O thread writes events to the monitor and waits until they are taken. With the monitor closed and the
    events still on, the next event blocks that thread for good, and with it all sockets of the context.
    """
    socket.disable_monitor()
    monitor.close()
    socket.close(0)
