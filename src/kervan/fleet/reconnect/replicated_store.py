"""What a gateway keeps so that clients can come back: its journals, their copies elsewhere, and copies of others'."""

import asyncio
import socket
import ssl
import time

from kervan import metrics
from kervan.fleet.auth import Secrets
from kervan.fleet.directory import Snapshot
from kervan.fleet.reconnect.copy_holder import CopyHolder
from kervan.fleet.reconnect.copy_sender import CopySender
from kervan.fleet.reconnect.journal import Journal
from kervan.fleet.reconnect.store import JournalStore
from kervan.metrics import Descriptor
from kervan.policy.replication import Peer

SWEEP_PERIOD_S = 1.0


class ReplicatedStore:
    """Journals for `replay_s` after their end, `max_bytes` of them at most; and a connection for copies each way.

    `journals` has both kinds, this gateway's own and copies of others'; of its own, `copy_sender` sends what is new.
    """

    def __init__(
        self, *, gateway_id: str, node: str, secrets: Secrets, engine_version: str, replay_s: float, max_bytes: int
    ) -> None:
        self.journals = JournalStore(replay_s=replay_s, max_bytes=max_bytes, now=time.monotonic)
        self.copy_sender = CopySender(
            self.journals, own_id=gateway_id, own_node=node, secret=secrets.present, engine_version=engine_version
        )
        self.journals.dropped = self._dropped
        self._holder = CopyHolder(self.journals, secrets=secrets, engine_version=engine_version)
        self._sweeping = asyncio.create_task(self._sweep())

    async def listen(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Take copies there."""
        await self._holder.listen(sock, tls)

    def update(self, snapshot: Snapshot) -> None:
        """Follow the directory; one that has just started and knows nobody changes nothing."""
        peers = [Peer(g.id, g.node, g.copies_address) for g in snapshot.gateways if g.copies_address]
        if peers:
            self.copy_sender.set_peers(peers)

    def changed(self, journal: Journal) -> None:
        """Tell the gateway with the copies, at once."""
        self.copy_sender.change(journal)
        self.copy_sender.flush()

    def _dropped(self, journal: Journal) -> None:
        if journal.is_own:
            self.copy_sender.change(journal)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            self.journals.sweep()
            self.copy_sender.flush()

    async def close(self) -> None:
        """Leave; what was sent stays with the gateway that has it."""
        self._sweeping.cancel()
        await asyncio.gather(self._sweeping, return_exceptions=True)
        await self.copy_sender.close()
        self._holder.close()

    def metrics(self) -> dict[Descriptor, float]:
        """What it tells of itself."""
        return {
            metrics.REPLAY_BYTES: self.journals.num_bytes,
            metrics.REPLAY_COPIED: self.copy_sender.is_holding,
            metrics.REPLAY_LATE: self.copy_sender.num_late,
            metrics.REPLAY_DROPPED: self.journals.num_dropped,
        }
