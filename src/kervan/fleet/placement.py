"""Where each stream of a client is: on a replica, or held until one can take it."""

import asyncio
import time
from collections.abc import Callable

from kervan.fleet import wire
from kervan.fleet.codec import Codec
from kervan.fleet.demand import DemandMeter
from kervan.fleet.link import ReplicaLink
from kervan.fleet.links import Links
from kervan.fleet.listener import send_ping
from kervan.fleet.prefixes import Prefixes
from kervan.fleet.stream import Stream
from kervan.fleet.traffic import ClientCounts, MoveReason
from kervan.policy import routing
from kervan.policy.output_length import LengthEstimate
from kervan.policy.prefill_speed import PrefillSpeed
from kervan.policy.prefix import Match

EXPIRY_PERIOD_S = 1.0


class Placements:
    """Owns the streams of one client, by request id in `streams`, and which of them are held.

    Each is in one place: in `streams` of the link that its `replica_id` names, with its cost (and itself, if it is a
    suspect) charged to that link's load; or held; or in neither, while its journal is given out again, its
    rejection is pending, or it waits for its turn (`admitted.py`). A stream is in no place when it is forgotten. It
    gets a new `epoch` whenever it is placed again.
    """

    def __init__(
        self,
        codec: Codec,
        links: Links,
        lengths: LengthEstimate,
        prefill: PrefillSpeed,
        prefixes: Prefixes,
        counts: ClientCounts,
        demand: DemandMeter,
        *,
        hold_timeout_s: float,
        give_up: Callable[[Stream, str], None],
        reject: Callable[[Stream, str], None],
        forgotten: Callable[[Stream], None],
    ) -> None:
        self.streams: dict[str, Stream] = {}
        self._codec = codec
        self._links = links
        self._lengths = lengths
        self._prefill = prefill
        self._prefixes = prefixes
        self._counts = counts
        self._demand = demand
        self._hold_timeout_s = hold_timeout_s
        self._give_up = give_up
        self._reject = reject
        self._forgotten = forgotten
        self._held: dict[Stream, None] = {}  # in the order in which they came
        self._retry: asyncio.Task[None] | None = None

    @property
    def num_held(self) -> int:
        """Streams that wait for a replica, or for what becomes of the one that was lost with them."""
        return len(self._held) + self.num_rejections_pending

    @property
    def num_rejections_pending(self) -> int:
        """Of these, streams that wait for what becomes of the replica that was lost with them."""
        return sum(stream.is_rejection_pending for stream in self.streams.values())

    async def place(self, stream: Stream, target: str | None = None) -> None:
        """On replica `target` if it can take it, else where routing says; held if none can."""
        match = self._prefixes.match(stream)
        placement = self._choose(stream, target, match)
        if placement.replica_id is None:
            if stream.held_since_s is None:
                stream.held_since_s = time.monotonic()
                if stream.timeline is not None:
                    stream.timeline.note("held", why=placement.reason)
            self._held[stream] = None
            return
        link = self._links.live[placement.replica_id]
        stream.held_since_s = None
        stream.replica_id = link.replica_id
        stream.gave_token = False
        if stream.epoch:
            stream.wire_id = f"{stream.request_id}~{stream.epoch}"
        stream.queued_tokens = stream.prompt_tokens + len(stream.generated)
        if match is not None:
            self._prefixes.placed(stream, link, match)
            stream.queued_tokens -= int(link.load.prefix_trust * stream.expected_cached_tokens)
        if not stream.epoch:
            self._demand.placed(stream)
        stream.cost_tokens = routing.cost_tokens(stream.queued_tokens, stream.remaining_output_tokens)
        link.load.add(stream.cost_tokens)
        link.load.take(stream.queued_tokens)
        stream.is_queued = True
        link.load.num_suspects += stream.is_suspect
        stream.placed_s = time.monotonic()
        stream.came_late = link.is_late(stream.placed_s)
        link.streams[stream.wire_id] = stream
        if stream.timeline is not None:
            stream.timeline.note("placed", link.replica_id, placement.reason, stream.queued_tokens)
        frames = self._codec.encode_add(stream)
        longest = max(memoryview(frame).nbytes for frame in frames)
        if longest > wire.MAX_FRAME_BYTES:  # a replica breaks the connection over it, and all streams there would move
            self._reject(stream, f"a part of it has {longest} bytes; a replica takes {wire.MAX_FRAME_BYTES} in one")
            return
        await link.input.send_multipart(frames, copy=False)
        if stream.is_suspect:  # should the replica die, its answer tells that it was alive until then
            await send_ping(link)

    def _choose(self, stream: Stream, target: str | None, match: Match | None) -> routing.Placement:
        live, fleet = self._links.live, self._links.fleet
        if target in live and not live[target].is_draining and not stream.is_suspect:
            return routing.Placement(target, "evacuated to it")
        placement = routing.decide(fleet.replicas, is_suspect=stream.is_suspect)
        chosen = fleet.by_id.get(placement.replica_id or "")
        if chosen is None:
            return placement
        has_hint = match is not None and (match.num_spans > 0 or stream.session != "")
        is_long = (chosen.is_risky or has_hint) and self._is_long(stream)
        if chosen.is_risky and is_long:
            placement = routing.safer(fleet.replicas, chosen, is_suspect=stream.is_suspect) or placement
            chosen = fleet.by_id[placement.replica_id or ""]
        if match is None or not has_hint or stream.is_suspect:
            return placement
        prompt_tokens = stream.prompt_tokens + len(stream.generated)
        if match.num_spans:
            better = routing.for_prefix(
                fleet,
                chosen,
                match,
                prompt_tokens=prompt_tokens,
                prefill_tokens_per_s=self._prefill.tokens_per_s,
                avoids_risky=is_long,
            )
        else:
            better = routing.for_session(
                fleet, chosen, stream.session, prompt_tokens=prompt_tokens, avoids_risky=is_long
            )
        return better or placement

    def _is_long(self, stream: Stream) -> bool:
        """Whether much is still to come: as much as may, or where that says little, as usually does."""
        num_generated, rest = len(stream.generated), stream.remaining_output_tokens
        if rest < routing.LONG_OUTPUT_TOKENS:
            return False
        expected = self._lengths.remaining_tokens(num_generated, max_remaining_tokens=rest)
        return expected is None or expected >= routing.LONG_OUTPUT_TOKENS

    async def move(
        self, stream: Stream, link: ReplicaLink, target: str | None = None, *, reason: MoveReason = "drained"
    ) -> None:
        """Off `link`, where it was placed, to another replica (see `place`); the engine there is not told."""
        self.unplace(stream, link)
        link.tally.num_moved += 1
        await self.place_again(stream, target, reason=reason)

    async def place_again(self, stream: Stream, target: str | None = None, *, reason: MoveReason) -> None:
        """Place a stream again that was placed before, and is now neither placed nor held."""
        stream.epoch += 1
        self._counts.moves[reason] += 1
        if stream.timeline is not None:
            since_s = stream.paused_since_s or 0.0
            stream.timeline.note("moved", why=reason, tokens=len(stream.generated), since_s=since_s)
        await self.place(stream, target)

    def unplace(self, stream: Stream, link: ReplicaLink | None) -> None:
        """Take it off `link`, if it is there."""
        if link is not None and link.streams.pop(stream.wire_id, None) is not None:
            link.load.add(-stream.cost_tokens)
            self.prefilled(stream, link)
            link.load.release()
            link.load.num_suspects -= stream.is_suspect
            if stream.gave_token and (num_after := len(stream.generated) - stream.num_before - 1) > 0:
                link.tally.tpot.observe(max(0.0, link.stepped_s - stream.began_s) / num_after)
            if not link.streams:
                link.emptied_s = time.monotonic()
            if stream.generated and stream.paused_since_s is None:
                stream.paused_since_s = max(link.stepped_s, stream.placed_s) if stream.gave_token else stream.placed_s
        stream.replica_id = None

    def prefilled(self, stream: Stream, link: ReplicaLink) -> None:
        """Its prompt is computed there."""
        if stream.is_queued:
            link.load.prefilled(stream.queued_tokens)
            stream.is_queued, stream.queued_tokens = False, 0

    def forget(self, stream: Stream) -> None:
        """The stream is over: remove it."""
        was_suspect = stream.is_suspect
        self.unplace(stream, self._links.live.get(stream.replica_id or ""))
        stream.is_rejection_pending = False
        if stream.replaying is not None and stream.replaying is not asyncio.current_task():
            stream.replaying.cancel()
        self.streams.pop(stream.request_id, None)
        self._held.pop(stream, None)
        self._forgotten(stream)
        if was_suspect:
            self.place_held_soon()

    async def place_held(self) -> None:
        """Try to place all held streams, in their order."""
        for stream in list(self._held):
            if stream in self._held:  # neither placed nor over since
                del self._held[stream]
                await self.place(stream)

    def place_held_soon(self) -> None:
        """`place_held` in the event loop's next turn: a replica may take a suspect again."""
        if self._held:
            self._retry = asyncio.get_running_loop().create_task(self.place_held())

    async def expire_held(self) -> None:
        """Give up what is held for longer than `hold_timeout_s`, once a second, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            deadline_s = time.monotonic() - self._hold_timeout_s
            for stream in list(self._held):
                if stream.held_since_s is not None and stream.held_since_s < deadline_s:
                    self._counts.broken["expired"] += 1
                    self._give_up(stream, f"no replica could accept it for {self._hold_timeout_s:g} s (hold_timeout_s)")
