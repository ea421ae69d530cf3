"""Frames between gateways and engine replicas.

Each replica binds two ROUTER sockets, `input` and `output`; a gateway connects a DEALER to each, both with the
same random identity (a session). Input frames are `[kind, payload...]`; kinds of one byte are vLLM's own request
types, the words below are kervan's. Output frames are vLLM's encoded outputs, or one of the words.

    gateway -> replica input    HELLO(Hello)   PING(Ping)   vLLM ADD / ABORT / UTILITY
    replica input -> gateway    WELCOME(Welcome) or REFUSED(text)   PONG(Pong)   REFUSED(text): the session is over
    gateway -> replica output   SUBSCRIBE
    replica output -> gateway   SUBSCRIBED   number, outputs: one message per engine step   ENGINE_CORE_DEAD

A session may send requests once both WELCOME and SUBSCRIBED have come: a ROUTER drops silently what it cannot
route, so outputs must not start before the output socket knows the session. Queues are unbounded for the same
reason. Should a connection break and come back by itself, what was sent meanwhile is gone: so output messages are
numbered from 1 in each session, and PONG says how many there were. vLLM's structs are positional, so gateway and
replica must run the same vLLM version: HELLO says both. All of it is inside of `curve`, unless the fleet is plain.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from kervan.fleet import auth, curve
from kervan.fleet.curve import KeyPair

PROTOCOL = 5

HELLO = b"HELLO"
WELCOME = b"WELCOME"
REFUSED = b"REFUSED"
PING = b"PING"
PONG = b"PONG"
SUBSCRIBE = b"SUBSCRIBE"
SUBSCRIBED = b"SUBSCRIBED"
ENGINE_DEAD = b"ENGINE_CORE_DEAD"  # vLLM's word

# In vLLM's `SamplingParams.extra_args` of a moved request: the tokens that it has generated. No client may set it.
GENERATED = "kervan_generated"

PING_PERIOD_S = 0.5
# A gateway that is silent for this long is dead: its requests are aborted.
LEASE_S = 10.0
# Outputs that the replica has sent and that have not come for this long are lost.
OUTPUT_TIMEOUT_S = 3.0
HEARTBEAT_PERIOD_MS = 500
# Of prefixes in one PING or PONG: 2,048 hashes, 131,072 tokens. So a replica tells each gateway 32 KiB/s at most.
MAX_NEWS_BYTES = 1 << 14
HEARTBEAT_TIMEOUT_MS = 2000
# The rest of a frame that is longer is not waited for. Requests with videos have the longest: their pixels, as floats.
MAX_FRAME_BYTES = 1 << 29
HANDSHAKE_TIMEOUT_MS = 5000  # of one that connects and does not go on


class EngineFacts(msgspec.Struct, frozen=True):
    """What an engine knows only after start-up.

    `entry_limits`: how many entries its model runner takes of a sampling parameter, by name.
    """

    max_model_len: int
    num_gpu_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int = 0  # 0: unknown
    entry_limits: dict[str, int] = {}


class Hello(msgspec.Struct, frozen=True):
    """A gateway introduces a session.

    `proof`: `auth.link_proof` of this session; gateways of earlier protocols have none. `layouts`: fields of vLLM's
    positional structs, in order, by the struct's name. A twin has no vLLM and reads them here; an engine has its own.
    """

    protocol: int
    engine_version: str
    gateway_id: str
    proof: bytes = b""
    layouts: dict[str, list[str]] = {}


class Welcome(msgspec.Struct, frozen=True):
    """The replica accepts; `monotonic_s` lets the gateway shift output timestamps to its own clock."""

    replica_id: str
    engine_version: str
    output_address: str
    monotonic_s: float
    facts: EngineFacts


class Ping(msgspec.Struct, frozen=True):
    """Keeps the session's lease; tells what this gateway has outstanding here.

    `num_suspects`: streams that are tried here since another replica was lost, or stood still, with them. `prefixes`:
    for the other gateways, hashes of what this one has sent here lately (`policy.prefix`), 8 bytes each, at most
    `MAX_NEWS_BYTES`.
    """

    outstanding_tokens: int
    num_suspects: int = 0
    prefixes: bytes = b""


class Pong(msgspec.Struct, frozen=True):
    """Load of the replica; `other_tokens`: outstanding tokens that other gateways sent here.

    `num_gateways`: those with a live session here, at least 1. `num_outputs`: output messages sent to this session so
    far. `stalled_s`: seconds for which the engine has had work and made no step. `step_tokens`: what its present step
    computes, 0 when it is in none; `expected_step_s`: what that should take, by its speed so far, 0 if it knows none.
    `prefixes`: as in the PINGs of the other gateways since the last PONG, the newest `MAX_NEWS_BYTES`.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    other_tokens: int
    is_draining: bool
    num_outputs: int = 0
    num_gateways: int = 1
    stalled_s: float = 0.0
    step_tokens: int = 0
    expected_step_s: float = 0.0
    prefixes: bytes = b""


def encode_number(number: int) -> bytes:
    """The number of an output message as a frame."""
    return number.to_bytes(8, "big")


def decode_number(frame: bytes) -> int:
    """The reverse of `encode_number`."""
    return int.from_bytes(frame, "big")


def refusal(
    hello: Hello, *, session: bytes, replica_id: str, engine_version: str, secrets: Sequence[str]
) -> str | None:
    """Why a replica must not serve the gateway that said `hello` over `session` (its ZMQ identity), or None.

    `secrets`: those of which it must know one.
    """
    if hello.protocol != PROTOCOL:
        return f"gateway speaks protocol {hello.protocol}, replica {PROTOCOL}; install one kervan version on all nodes"
    proofs = [
        auth.link_proof(secret, session=session, gateway_id=hello.gateway_id, replica_id=replica_id)
        for secret in secrets
    ]
    if not any(auth.is_proof(hello.proof, proof) for proof in proofs):
        return "the gateway does not know this fleet's secret; it belongs to another fleet"
    if hello.engine_version != engine_version:
        return (
            f"gateway runs vLLM {hello.engine_version}, replica vLLM {engine_version}; "
            "one fleet needs one vLLM version: install the same on all nodes"
        )
    return None


def bind(
    context: zmq.Context[zmq.Socket[bytes]], host: str, pair: KeyPair | None = None
) -> tuple[zmq.Socket[bytes], str]:
    """A ROUTER on a free port of `host`, and its address. `pair`: the replica's; None: it speaks plain text."""
    router = context.socket(zmq.ROUTER)
    configure(router)
    if pair is not None:
        curve.serve(router, pair)
    if ":" in host:
        router.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    router.bind(f"tcp://{host}:0")
    return router, router.getsockopt_string(zmq.LAST_ENDPOINT)


def configure(socket: zmq.Socket[Any]) -> None:
    """Unbounded queues, no linger, bounds on what strangers send, and heartbeats that find a dead host in seconds."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_PERIOD_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
