"""What a gateway keeps so that clients can come back: its journals, their copies elsewhere, and copies of others'."""

import asyncio
import socket
import time

from kervan.fleet.directory import Snapshot
from kervan.fleet.reconnect.journal import Journal, Journals
from kervan.fleet.reconnect.replication import CopyHolder, Replicator
from kervan.gateway.page import Row
from kervan.policy.replication import Peer

SWEEP_PERIOD_S = 1.0


class Kept:
    """Journals for `replay_s` after their end, `max_bytes` of them at most."""

    def __init__(
        self, *, gateway_id: str, node: str, secret: str, engine_version: str, replay_s: float, max_bytes: int
    ) -> None:
        self.journals = Journals(replay_s=replay_s, max_bytes=max_bytes, now=time.monotonic)
        self.replicator = Replicator(
            self.journals, own_id=gateway_id, own_node=node, secret=secret, engine_version=engine_version
        )
        self.journals.dropped = self._dropped
        self._holder = CopyHolder(self.journals, secret=secret, engine_version=engine_version)
        self._sweeping = asyncio.create_task(self._sweep())

    async def listen(self, sock: socket.socket) -> None:
        """Take copies there."""
        await self._holder.listen(sock)

    def update(self, snapshot: Snapshot) -> None:
        """Follow the directory; one that has just started and knows nobody changes nothing."""
        peers = [Peer(g.id, g.node, g.copies_address) for g in snapshot.gateways if g.copies_address]
        if peers:
            self.replicator.set_peers(peers)

    def changed(self, journal: Journal) -> None:
        """Tell the gateway with the copies, at once."""
        self.replicator.change(journal)
        self.replicator.flush()

    def _dropped(self, journal: Journal) -> None:
        if journal.is_own:
            self.replicator.change(journal)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            self.journals.sweep()
            self.replicator.flush()

    async def close(self) -> None:
        """Leave; what was sent stays with the gateway that has it."""
        self._sweeping.cancel()
        await asyncio.gather(self._sweeping, return_exceptions=True)
        await self.replicator.close()
        self._holder.close()

    def metrics(self) -> list[Row]:
        """Name, kind, help and value."""
        return [
            ("kervan_replay_bytes", "gauge", "Journals and copies that this gateway keeps.", self.journals.num_bytes),
            ("kervan_replay_is_copied", "gauge", "1: another gateway has all that clients have seen.",
             float(self.replicator.is_holding)),
            ("kervan_replay_late_total", "counter", "Times when the copy was too slow to wait for.",
             self.replicator.num_late),
            ("kervan_replay_dropped_total", "counter", "Journals dropped before their time for want of memory.",
             self.journals.num_dropped),
        ]  # fmt: skip
