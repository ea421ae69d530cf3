"""Moving streams off replicas that leave, as the policy says and for as long as they are there."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from kervan.fleet import evacuees
from kervan.fleet.codec import Codec
from kervan.fleet.evacuees import PrefillSpeed
from kervan.fleet.link import ReplicaLink
from kervan.fleet.stream import Stream
from kervan.policy import evacuation
from kervan.policy.output_length import LengthEstimate

logger = logging.getLogger(__name__)

IDLE_PERIOD_S = 1.0


class Evacuations:
    """Those of one client: a task for each of its replicas that drains.

    `links`: the client's own, by replica; read whenever a decision is due. `move` places a stream on another replica,
    or where routing says if that one cannot take it. The client tells `lengths` and `prefill` what it sees.
    """

    def __init__(
        self,
        links: Mapping[str, ReplicaLink],
        move: Callable[[Stream, ReplicaLink, str], Awaitable[None]],
        codec: Codec,
    ) -> None:
        self.lengths = LengthEstimate()
        self.prefill = PrefillSpeed()
        self._links = links
        self._move = move
        self._codec = codec
        self._tasks: dict[ReplicaLink, asyncio.Task[None]] = {}
        self._targets_changed = asyncio.Event()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """To be cancelled when the client closes."""
        return list(self._tasks.values())

    def look(self) -> None:
        """See to it that the streams of draining replicas leave; call it when replicas come, or begin to drain."""
        self._targets_changed.set()
        for link in self._links.values():
            if link.is_draining and link not in self._tasks:
                link.leaving_since_s = time.monotonic()
                task = asyncio.create_task(self._evacuate(link), name=f"evacuate-{link.replica_id}")
                self._tasks[link] = task
                task.add_done_callback(functools.partial(self._ended, link))

    def _ended(self, link: ReplicaLink, task: asyncio.Task[None]) -> None:
        self._tasks.pop(link, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("evacuation of %s ended: %r", link.replica_id, error, exc_info=error)

    async def _evacuate(self, link: ReplicaLink) -> None:
        while self._links.get(link.replica_id) is link and link.is_draining:
            self._targets_changed.clear()
            pause_s: float | None = None
            if link.streams:
                others = self._links.values()
                targets = [other for other in others if not other.is_draining and not other.load.is_stalled]
                state = evacuees.state(
                    link, targets, lengths=self.lengths, prefill_tokens_per_s=self.prefill.tokens_per_s
                )
                decision = evacuation.decide(state)
                pause_s = decision.ask_again_s
                if decision.moves:
                    await self._carry_out(link, decision.moves)
                    logger.info("replica %s leaves: %s", link.replica_id, decision.reason)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._targets_changed.wait(), pause_s or IDLE_PERIOD_S)

    async def _carry_out(self, link: ReplicaLink, moves: Sequence[evacuation.Move]) -> None:
        left = []
        for move in moves:
            stream = link.streams.get(move.stream_id)
            if stream is not None:  # it has not ended meanwhile
                await self._move(stream, link, move.replica_id)
                left.append(move.stream_id)
        if left:
            await link.input.send_multipart(self._codec.encode_abort(left), copy=False)
