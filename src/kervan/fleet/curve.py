"""Who may connect to a replica, and what makes the connection unreadable to others: ZMQ's CURVE (CurveZMQ, RFC 26).

| key pair | drawn | who knows the secret half | how the other side knows the public half |
|---|---|---|---|
| of a replica | by its process, at its start | that process alone | the fleet's directory lists it beside the address |
| of the gateways | derived from the fleet's secret | all gateways and replicas of the fleet | derived as well |

Each connection has keys of its own beside them, so one who records traffic cannot read it later with these. There is no
fall-back to plain text: a socket with keys speaks to nobody without. What a gateway proves in HELLO (`auth`) comes
after that, and stays what a session stands on.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

_DOMAIN = b"kervan"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # ZeroMQ's RFC 27: libzmq asks there whether a client may connect
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
LOG_PERIOD_S = 60.0


class KeyPair(NamedTuple):
    """Both halves as Z85 text, 40 characters each."""

    public: bytes
    private: bytes


def draw() -> KeyPair:
    """A new pair, for one replica."""
    public, private = zmq.curve_keypair()
    return KeyPair(public, private)


def of_gateways(secret: str) -> KeyPair:
    """The pair with which the gateways of a fleet connect."""
    private = z85.encode(hmac.digest(secret.encode(), b"kervan gateways' CURVE key", hashlib.sha256))
    return KeyPair(zmq.curve_public(private), private)


def serve(socket: zmq.Socket[Any], pair: KeyPair) -> None:
    """Let a socket that is not bound yet take only clients whom a `Doorkeeper` of its context lets in."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.private)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a doorkeeper nobody comes in


def connect_as(socket: zmq.Socket[Any], pair: KeyPair, server: bytes) -> None:
    """Let a socket that is not connected yet speak only to one who has the private half of `server`.

    Raises: ValueError when that is no key.
    """
    try:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    except zmq.ZMQError as error:
        raise ValueError(f"{server!r} is no public key") from error
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.private)


class Doorkeeper:
    """Answers for one context which clients may connect, by their public keys, and logs that others have tried.

    Belongs to the thread that polls `sockets` and calls `look`, within the seconds of a handshake; to be made before
    any socket is bound. `allowed`: the public keys, as Z85 text. `name`: of the replica, for the log.
    """

    def __init__(self, context: zmq.Context[Any], allowed: Callable[[], Collection[bytes]], name: str) -> None:
        self._allowed = allowed
        self._name = name
        self._requests: zmq.Socket[bytes] = zmq.Socket(context, zmq.REP)
        self._requests.bind(_ZAP_ADDRESS)
        self._monitors: list[zmq.Socket[bytes]] = []
        self._num_unlogged = 0
        self._logged_s = float("-inf")

    def watch(self, router: zmq.Socket[bytes]) -> None:
        """Log those too who come to this socket without speaking CURVE, or to another key than its own."""
        self._monitors.append(router.get_monitor_socket(_FAILED))

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """Where something is to be read when `look` has something to do."""
        return [self._requests, *self._monitors]

    def look(self) -> None:
        """Answer what libzmq asks now, and take what the monitors tell."""
        while self._requests.poll(0):
            self._answer(self._requests.recv_multipart())
        for monitor in self._monitors:
            while monitor.poll(0):
                recv_monitor_message(monitor)
                self._note("a connection without this fleet's keys, or not of ZMQ, was closed")

    def _answer(self, frames: list[bytes]) -> None:
        version, request, _, address, _, mechanism, *credentials = frames
        is_allowed = mechanism == b"CURVE" and z85.encode(credentials[0]) in self._allowed()
        status = (b"200", b"OK") if is_allowed else (b"400", b"not of this fleet")
        self._requests.send_multipart([version, request, *status, b"", b""])
        if not is_allowed:
            self._note(f"a connection from {address.decode()} with other keys than this fleet's was closed")

    def _note(self, text: str) -> None:
        """One line in `LOG_PERIOD_S`: a stranger must not fill the disk."""
        now_s = time.monotonic()
        if now_s - self._logged_s < LOG_PERIOD_S:
            self._num_unlogged += 1
            return
        more = f" (and {self._num_unlogged} more since the last such line)" if self._num_unlogged else ""
        logger.warning("replica %s: %s%s", self._name, text, more, extra={"replica": self._name})
        self._num_unlogged, self._logged_s = 0, now_s
