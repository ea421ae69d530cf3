"""Takes copies of other gateways' journals, so that their clients can come back here."""

import asyncio
import logging
import secrets
import socket
import ssl

import msgspec

from kervan.fleet import auth
from kervan.fleet.reconnect.copy_frames import (
    PROTOCOL,
    CopyHello,
    Drop,
    FramedConnection,
    More,
    Open,
    State,
    encode,
    frame_decoder,
)
from kervan.fleet.reconnect.journal import Journal
from kervan.fleet.reconnect.store import JournalStore

logger = logging.getLogger(__name__)


class _SenderConnection(FramedConnection):
    """One sender's connection."""

    def __init__(self, holder: "CopyHolder"):
        super().__init__()
        self._holder = holder
        self._is_known = False
        self._nonce = secrets.token_bytes(auth.NONCE_BYTES)
        self._copies: dict[int, Journal] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._holder.connections.add(self)
        self.write(self._nonce)

    def receive(self, frames: list[bytes]) -> bool:
        if not self._is_known:
            hello = msgspec.msgpack.decode(frames.pop(0), type=CopyHello)
            if not self._holder.accepts(hello, self._nonce):
                return False
            self._is_known = True
            self.write(encode(0))
        number = 0
        for payload in frames:
            frame = frame_decoder.decode(payload)
            for record in frame.records:
                self._take(record)
            number = frame.number
        if number:
            self.write(encode(number))
        return True

    def _take(self, record: Open | More | State | Drop) -> None:
        journals = self._holder.journals
        if isinstance(record, More):
            self._copies[record.number].extend(record.data, record.num_tokens)
        elif isinstance(record, Open):
            copy = Journal(record.stream_id, record.key_digest, record.path, record.headers, record.body, is_own=False)
            self._copies[record.number] = copy
            kept = journals.get(record.stream_id)
            if kept is None or not kept.is_own:  # else its client has come here, and it goes on here
                journals.add(copy)
        elif isinstance(record, State):
            copy = self._copies[record.number]
            copy.refusal, copy.is_finished = record.refusal, record.is_finished
            if record.is_running:
                copy.ended_s = None
            elif copy.ended_s is None:
                journals.end(copy)
        else:
            journals.drop(self._copies.pop(record.number))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._holder.connections.discard(self)
        for copy in self._copies.values():
            if not copy.is_own and copy.ended_s is None:
                self._holder.journals.end(copy)


class CopyHolder:
    """Takes the copies of other gateways of the fleet into `journals`."""

    def __init__(self, journals: JournalStore, *, secrets: auth.Secrets, engine_version: str):
        self.journals = journals
        self.connections: set[_SenderConnection] = set()
        self._secrets = secrets
        self._engine_version = engine_version
        self._server: asyncio.Server | None = None

    async def listen(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Take copies there, from any number of gateways; `tls` None: in plain text."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _SenderConnection(self), sock=sock, ssl=tls)

    def accepts(self, hello: CopyHello, nonce: bytes) -> bool:
        """Whether a gateway that was sent `nonce` may send copies; the log says why not."""
        proofs = [auth.copies_proof(secret, nonce=nonce, gateway_id=hello.gateway_id) for secret in self._secrets.taken]
        if not any(auth.is_proof(hello.proof, proof) for proof in proofs):
            logger.warning("gateway %s does not know this fleet's secret; its copies are refused", hello.gateway_id)
            return False
        theirs, ours = (hello.protocol, hello.engine_version), (PROTOCOL, self._engine_version)
        if theirs != ours:
            logger.warning(
                "copies of gateway %s are refused: it speaks %s, this one %s", hello.gateway_id, theirs, ours
            )
        return theirs == ours

    def close(self) -> None:
        """Break all connections; the copies stay in `journals`."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close()
