"""What two gateways say to each other about copies of journals, and the connection that carries it.

The sender connects to one peer, the holder. Frames are msgpack behind their length; `number` counts those of a
connection:

    holder -> sender    nonce: `NONCE_BYTES` bytes, once and first
    sender -> holder    CopyHello    [number, [record, ...]]: what is new in all journals since the last one
    holder -> sender    0: welcome    number: all up to it is held
"""

import asyncio
import logging
import socket
from typing import cast

import msgspec

logger = logging.getLogger(__name__)

PROTOCOL = 2
MAX_FRAME_BYTES = 1 << 28  # a frame with a longer length is no frame
_HEAD_BYTES = 4
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class CopyHello(msgspec.Struct, frozen=True):
    """A gateway introduces itself. `proof`: `auth.copies_proof`."""

    protocol: int
    engine_version: str
    gateway_id: str
    proof: bytes


class Open(msgspec.Struct, frozen=True, tag="o", array_like=True):
    """A journal, from now on called `number` on this connection."""

    number: int
    stream_id: str
    key_digest: bytes
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class More(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """Its `data` goes on."""

    number: int
    data: bytes
    num_tokens: int


class State(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """Whether it is being answered from, whether it is whole, and why it cannot be given again."""

    number: int
    is_running: bool
    is_finished: bool
    refusal: str


class Drop(msgspec.Struct, frozen=True, tag="d", array_like=True):
    """It is kept no longer; its number is not used again."""

    number: int


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """What is new in several journals."""

    number: int
    records: list[Open | More | State | Drop]


frame_decoder = msgspec.msgpack.Decoder(Frame)
encode = msgspec.msgpack.Encoder().encode


class FramedConnection(asyncio.Protocol):
    """Cuts what comes into frames, and gives them to `receive` until that says that the connection is over."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._rest = b""
        self.is_lost = False

    def receive(self, frames: list[bytes]) -> bool:
        """Take at least one frame; False ends the connection. Raises: LookupError, MsgspecError for no frame."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        frames, at = [], 0
        while len(data) - at >= _HEAD_BYTES:
            end = at + _HEAD_BYTES + int.from_bytes(data[at : at + _HEAD_BYTES], "big")
            if end - at > MAX_FRAME_BYTES:
                self.close()
                return
            if end > len(data):
                break
            frames.append(data[at + _HEAD_BYTES : end])
            at = end
        self._rest = data[at:]
        try:
            is_good = not frames or self.receive(frames)
        except (msgspec.MsgspecError, LookupError) as error:
            logger.warning("what came over a connection for copies is none: %r", error)
            is_good = False
        if not is_good:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def write(self, payload: bytes) -> None:
        """Send one frame."""
        self._transport.write(len(payload).to_bytes(_HEAD_BYTES, "big") + payload)

    def close(self) -> None:
        """Break the connection; what was not sent is dropped."""
        self._transport.abort()
