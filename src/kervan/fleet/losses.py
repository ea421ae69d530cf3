"""What becomes of streams whose replica is lost, or stands still."""

import asyncio
import logging
from collections.abc import Callable

from kervan.fleet import stalls
from kervan.fleet.codec import Codec
from kervan.fleet.link import ReplicaLink
from kervan.fleet.links import Links
from kervan.fleet.listener import ENGINE_DIED
from kervan.fleet.placement import Placements
from kervan.fleet.stalls import StallDetector
from kervan.fleet.stream import Stream
from kervan.fleet.traffic import ClientCounts
from kervan.policy import quarantine
from kervan.policy.prefill_speed import PrefillSpeed

logger = logging.getLogger(__name__)


class Losses:
    """Moves the streams of one client off replicas that are lost or stand still, and rejects those that take them down.

    A stream is suspected from the loss of its replica before it gave a token (counted in its `losses` and
    `unproven_losses`) until it gives one, and a replica tries one suspect at a time. It is cleared of each loss whose
    replica comes back. Once enough are proven it is rejected: at once if its engine said that it died, else after
    `quarantine.RETURN_WAIT_S`, unless a replica comes back meanwhile; it is in no place while that is pending.
    """

    def __init__(
        self,
        codec: Codec,
        links: Links,
        placements: Placements,
        prefill: PrefillSpeed,
        counts: ClientCounts,
        reject: Callable[[Stream, str], None],
    ) -> None:
        self._codec = codec
        self._links = links
        self._placements = placements
        self._prefill = prefill
        self._counts = counts
        self._reject = reject
        self._stalls = StallDetector()
        self._missing: set[str] = set()  # links to these broke, and they are listed still
        self._is_closing = False

    def close(self) -> None:
        """Move and reject no more streams."""
        self._is_closing = True

    # ---- replicas that are lost

    async def replica_lost(self, link: ReplicaLink, reason: str) -> None:
        """A replica was lost: its streams move to others, or end with an error."""
        if self._is_closing:
            return
        if link.streams or not link.is_draining:  # else it left, as was said
            self._count(link, reason)
        streams = list(link.streams.values())
        about = {"replica": link.replica_id}
        logger.warning("replica %s is lost (%s) with %d streams", link.replica_id, reason, len(streams), extra=about)
        for stream in streams:
            await self._move_or_reject(stream, link, reason)
        await self._placements.place_held()

    def _count(self, link: ReplicaLink, reason: str) -> None:
        self._counts.broken_links += 1
        if reason == ENGINE_DIED or not self._links.is_listed(link.replica_id):
            self._counts.lost_replicas += 1
        else:
            self._missing.add(link.replica_id)

    async def _move_or_reject(self, stream: Stream, link: ReplicaLink, reason: str) -> None:
        if stream.is_movable and not stream.gave_token and link.stood_still_before(stream):
            await self._placements.move(stream, link, reason="lost")  # what was wrong there was so before it came
            return
        stream.num_stalls += not stream.gave_token and link.is_long_in_step
        decision = quarantine.decide(
            losses=len(stream.losses),
            unproven_losses=stream.unproven_losses,
            gave_token=stream.gave_token,
            was_alive=link.pong_s > stream.placed_s,
            stalls=stream.num_stalls,
        )
        self._placements.unplace(stream, link)
        if decision.losses > len(stream.losses):
            stream.losses.append(link.replica_id)
        elif not decision.losses:
            stream.losses.clear()
        if stream.gave_token:
            stream.num_stalls = 0
        stream.unproven_losses = decision.unproven_losses
        if not stream.is_movable:
            self._reject(stream, "its replica was lost and it cannot move")
        elif decision.action != "reject":
            await self._placements.move(stream, link, reason="lost")
        elif reason == ENGINE_DIED or decision.losses < quarantine.MAX_LOSSES:
            self._reject(stream, decision.reason)
        else:
            stream.is_rejection_pending = True
            loop = asyncio.get_running_loop()
            loop.call_later(quarantine.RETURN_WAIT_S, self._reject_pending, stream, stream.epoch, decision.reason)

    def _reject_pending(self, stream: Stream, epoch: int, why: str) -> None:
        """Reject a stream whose replicas have not come back."""
        if stream.is_rejection_pending and stream.epoch == epoch and not self._is_closing:
            self._reject(stream, why)

    async def replica_returned(self, link: ReplicaLink) -> None:
        """It was silent, not dead, so no stream has killed it: those that were suspected of it are cleared of it."""
        if link.replica_id in self._missing:
            self._missing.remove(link.replica_id)
            self._counts.returned_replicas += 1
        for stream in list(self._placements.streams.values()):
            if link.replica_id not in stream.losses:
                continue
            stream.losses.remove(link.replica_id)
            stream.unproven_losses += 1
            if stream.is_rejection_pending:
                stream.is_rejection_pending = False
                await self._placements.place_again(stream, reason="lost")

    def members_changed(self) -> None:
        """The directory has told of a change: what it lists no more, and had broken its link, was lost."""
        gone = {replica_id for replica_id in self._missing if not self._links.is_listed(replica_id)}
        self._missing -= gone
        self._counts.lost_replicas += len(gone)

    def clear(self, stream: Stream, link: ReplicaLink) -> None:
        """A suspect gave a token at `link`: it kills no replica, and another may be tried there."""
        stream.losses.clear()
        stream.unproven_losses = stream.num_stalls = 0
        link.load.num_suspects -= 1
        self._placements.place_held_soon()

    # ---- replicas that stand still

    async def watch_for_stalls(self) -> None:
        """Move streams off replicas that stand still, until cancelled."""
        while True:
            await asyncio.sleep(stalls.PERIOD_S)
            links = list(self._links.live.values())
            was_stalled = [link for link in links if link.load.is_stalled]
            reasons = self._stalls.look(links, self._prefill.known_tokens_per_s)
            for link in links:
                if link.replica_id in reasons:
                    await self._move_off_stalled(link, reasons[link.replica_id])
            if any(not link.load.is_stalled for link in was_stalled):
                await self._placements.place_held()

    async def _move_off_stalled(self, link: ReplicaLink, reason: str) -> None:
        """It may go on, so this is no loss.

        A stream without a token may be what it stands still over, unless it came when it stood still already: such a
        one is tried alone elsewhere, and if that replica stands still too, it waits for what becomes of it there.
        """
        moved = []
        for wire_id, stream in list(link.streams.items()):
            is_here = link.streams.get(wire_id) is stream
            is_suspect = not stream.gave_token and not link.stood_still_before(stream)
            if not is_here or not stream.is_movable or (is_suspect and stream.is_suspect):
                continue
            moved.append(wire_id)
            self._placements.unplace(stream, link)
            stream.unproven_losses += is_suspect
            stream.num_stalls += is_suspect and link.is_long_in_step
            await self._placements.move(stream, link, reason="stalled")
        if moved and self._links.live.get(link.replica_id) is link:
            about = {"replica": link.replica_id}
            logger.warning("%d streams move off replica %s: it %s", len(moved), link.replica_id, reason, extra=about)
            await link.input.send_multipart(self._codec.encode_abort(moved), copy=False)
