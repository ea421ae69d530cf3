"""Sends copies of a gateway's journals to another gateway, so that a stream outlives its own gateway.

What a step of an engine gave goes to the peer in one frame, and to the clients when the peer has it: so what a client
has seen is never lost with its gateway. A peer that takes longer than `HOLD_S` to say so is not waited for until it has
caught up; a peer that is lost is replaced, and the next one gets all journals from their beginning.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kervan.fleet import auth, pinned_tls
from kervan.fleet.reconnect.copy_frames import (
    PROTOCOL,
    CopyHello,
    Drop,
    Frame,
    FramedConnection,
    More,
    Open,
    State,
    encode,
)
from kervan.fleet.reconnect.journal import Journal
from kervan.fleet.reconnect.store import JournalStore
from kervan.policy import replication
from kervan.policy.replication import Peer

logger = logging.getLogger(__name__)

HOLD_S = 0.25  # clients wait no longer for a copy
LOST_S = 5.0  # a peer that acknowledges nothing for so long is left
RETRY_S = 0.5
FAILED_S = 5.0  # how long others come before a peer that did not answer
CONNECT_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
MAX_CATCH_UP_BYTES = 1 << 20  # of a frame, while the peer catches up


class _HolderConnection(FramedConnection):
    """The connection to the peer, known by `digest` (`pinned_tls`). `introduce` makes the hello of its nonce."""

    def __init__(
        self,
        digest: str,
        introduce: Callable[[bytes], bytes],
        heard: Callable[[int], None],
        lost: Callable[["_HolderConnection"], None],
    ):
        super().__init__()
        self._digest = digest
        self._introduce = introduce
        self._has_introduced = False
        self._heard = heard
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not pinned_tls.is_pinned(transport, self._digest):
            logger.warning("what answers for a gateway that keeps copies has another certificate than that gateway's")
            self.close()

    def receive(self, frames: list[bytes]) -> bool:
        if not self._has_introduced:
            self._has_introduced = True
            self.write(self._introduce(frames.pop(0)))
        if frames:
            self._heard(msgspec.msgpack.decode(frames[-1], type=int))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost(self)


@dataclass(slots=True)
class _Cursor:
    """What the peer was sent of a journal. `number`: its name on the connection."""

    number: int
    num_bytes: int = 0
    num_tokens: int = 0
    state: tuple[bool, bool, str] = (True, False, "")


class CopySender:
    """Sends this gateway's own journals to a peer, and holds back what clients must not see before the peer has it."""

    def __init__(self, journals: JournalStore, *, own_id: str, own_node: str, secret: str, engine_version: str):
        self._journals = journals
        self._own_id, self._own_node = own_id, own_node
        self._secret, self._engine_version = secret, engine_version
        self._peers: Sequence[Peer] = ()
        self._failed: dict[str, float] = {}
        self._peers_changed = asyncio.Event()
        self._connection: _HolderConnection | None = None
        self._changed: dict[Journal, None] = {}  # in the order of their first change
        self._cursors: dict[Journal, _Cursor] = {}
        self._next_journal = 0
        self._sent = self._acknowledged = 0
        self._heard_s = 0.0
        self._progress = asyncio.Event()
        self._held: deque[tuple[int, float, Callable[[], None]]] = deque()
        self.peer: Peer | None = None
        self.is_holding = False
        self.num_late = 0
        self._is_closing = False
        self._tasks = [asyncio.create_task(self._keep_connection()), asyncio.create_task(self._watch())]

    def set_peers(self, peers: Sequence[Peer]) -> None:
        """Follow the directory."""
        self._peers = [peer for peer in peers if peer.gateway_id != self._own_id]
        self._peers_changed.set()
        wanted = self._choose()
        if self._connection is not None and wanted != self.peer:
            self._connection.close()  # it is no longer listed: it leaves, or is gone

    async def close(self) -> None:
        """Send what is left, wait a little until the peer has it, and end."""
        self._is_closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                self.flush()
                while self._connection is not None and (self._changed or self._acknowledged < self._sent):
                    await self._progress.wait()
                    self._progress.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
        self._release_all()

    # ---- what the gateway tells

    def change(self, journal: Journal) -> None:
        """Something is new in it; it goes to the peer with the next `deliver`, `flush` or `copied`."""
        if self._connection is not None:
            self._changed[journal] = None

    def deliver(self, then: Callable[[], None]) -> None:
        """Send what is new, and call `then` when the peer has it, in the order of the calls."""
        if self.is_holding and self._changed:
            self._send()
        if self.is_holding and self._acknowledged < self._sent:
            self._held.append((self._sent, time.monotonic(), then))
        else:
            then()

    def flush(self) -> None:
        """Send what is new."""
        self.deliver(lambda: None)

    async def copied(self) -> None:
        """Return when the peer has all that is new now, or is not waited for."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.deliver(lambda: None if done.done() else done.set_result(None))
        await done

    # ---- the connection

    def _choose(self) -> Peer | None:
        now_s = time.monotonic()
        failed = [peer_id for peer_id, at_s in self._failed.items() if now_s - at_s < FAILED_S]
        choice = replication.decide(
            own_id=self._own_id, own_node=self._own_node, peers=self._peers, current=self.peer, failed=failed
        )
        return choice.peer

    async def _keep_connection(self) -> None:
        while True:
            self.peer = peer = self._choose()
            if peer is None:
                self._peers_changed.clear()
                await self._peers_changed.wait()
                continue
            try:
                await self._connect(peer)
                if self._choose() != peer:
                    raise ConnectionError("it has left meanwhile")
                logger.info("gateway %s keeps the copies of this one's journals", peer.gateway_id)
                await self._catch_up()
            except OSError as error:  # TimeoutError is one
                logger.info("gateway %s takes no copies: %s", peer.gateway_id, str(error) or type(error).__name__)
                if self._connection is not None:
                    self._connection.close()
            if peer in self._peers:  # else it was left because it leaves
                self._failed[peer.gateway_id] = time.monotonic()
            await asyncio.sleep(RETRY_S)

    async def _connect(self, peer: Peer) -> None:
        place, digest = pinned_tls.split(peer.address)
        host, _, port = place.rpartition(":")
        tls = pinned_tls.unchecked_context() if digest else None
        self._cursors.clear()
        self._sent, self._acknowledged, self._next_journal = 0, -1, 0
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _HolderConnection(digest, self._hello, self._hear, self._lose),
                host.strip("[]"),
                int(port),
                ssl=tls,
            )
            if connection.is_lost:
                raise ConnectionError("the connection was lost")
            self._connection = connection
            while self._acknowledged < 0:
                await self._next_progress()
        self._changed = {journal: None for journal in self._journals if journal.is_own}

    def _hello(self, nonce: bytes) -> bytes:
        proof = auth.copies_proof(self._secret, nonce=nonce, gateway_id=self._own_id)
        return encode(CopyHello(PROTOCOL, self._engine_version, self._own_id, proof))

    async def _catch_up(self) -> None:
        """Send all journals piece by piece, and begin to hold outputs back when the peer has them; until it is lost."""
        while True:
            if not self.is_holding and self._acknowledged == self._sent:
                self._send(MAX_CATCH_UP_BYTES)
                self.is_holding = not self._changed
            await self._next_progress()

    async def _next_progress(self) -> None:
        """Raises: ConnectionError when the connection is lost."""
        self._progress.clear()
        if self._connection is not None:
            await self._progress.wait()
        if self._connection is None:
            raise ConnectionError("the connection was lost")

    def _hear(self, number: int) -> None:
        self._acknowledged = number
        self._heard_s = time.monotonic()
        while self._held and self._held[0][0] <= number:
            self._held.popleft()[2]()
        if not self.is_holding or self._is_closing:
            self._progress.set()

    def _lose(self, connection: _HolderConnection) -> None:
        if self._connection is connection:
            self._connection = None
            self.is_holding = False
            self._changed.clear()
            self._progress.set()
            self._release_all()

    def _release_all(self) -> None:
        while self._held:
            self._held.popleft()[2]()

    async def _watch(self) -> None:
        """Stop waiting for a peer that is late, and leave one that is silent."""
        while True:
            await asyncio.sleep(HOLD_S / 5)
            now_s = time.monotonic()
            if self._connection is None or self._acknowledged >= self._sent:
                self._heard_s = now_s
            elif now_s - self._heard_s > LOST_S:
                logger.warning(
                    "gateway %s has acknowledged nothing for %.0f s", self.peer and self.peer.gateway_id, LOST_S
                )
                self._connection.close()
            if self._held and now_s - self._held[0][1] > HOLD_S:
                self.num_late += 1
                self.is_holding = False
                self._release_all()
                self._progress.set()

    # ---- frames

    def _send(self, max_bytes: int | None = None) -> None:
        """What is new in all journals as one frame, or as much of it as `max_bytes`."""
        assert self._connection is not None
        records: list[Any] = []
        num_bytes = 0
        while self._changed and (max_bytes is None or num_bytes < max_bytes):
            journal = next(iter(self._changed))
            del self._changed[journal]
            num_bytes += self._add_records(journal, records)
        if records:
            self._sent += 1
            self._connection.write(encode(Frame(self._sent, records)))

    def _add_records(self, journal: Journal, records: list[Any]) -> int:
        """What is new in one; its size."""
        cursor = self._cursors.get(journal)
        if journal.is_dropped:
            if cursor is not None:
                del self._cursors[journal]
                records.append(Drop(cursor.number))
            return 0
        num_bytes = 0
        if cursor is None:
            self._next_journal += 1
            self._cursors[journal] = cursor = _Cursor(self._next_journal)
            head = journal.stream_id, journal.key_digest, journal.path, journal.headers, journal.body
            records.append(Open(cursor.number, *head))
            num_bytes += len(journal.body)
        if cursor.num_bytes < len(journal.data):
            data = bytes(journal.data[cursor.num_bytes :])
            num_tokens = journal.num_tokens - cursor.num_tokens
            records.append(More(cursor.number, data, num_tokens))
            cursor.num_bytes, cursor.num_tokens = len(journal.data), journal.num_tokens
            num_bytes += len(data)
        state = journal.ended_s is None, journal.is_finished, journal.refusal
        if state != cursor.state:
            records.append(State(cursor.number, *state))
            cursor.state = state
        return num_bytes
