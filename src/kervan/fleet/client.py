"""The fleet as one engine: what a gateway asks of all replicas, and what they give.

Everything here runs on one asyncio loop and knows no engine: a `Codec` turns requests into frames and frames into
outputs (`kervan.fleet.vllm.codec` for vLLM). Life of a stream:

    add -> placed on a replica -> outputs -> finished
             |      ^                |
             |      +---- moved <----+   its replica was lost or drains: prompt + generated tokens go elsewhere
             +--> held                   no replica can take it now; placed when one comes, failed after a while

One whose client has come back begins with what its journal has (`kervan.fleet.reconnect`), and is placed after that.

    links.py       makes and reads the links to replicas          placement.py   where each stream is
    admitted.py    room and turns of requests with many streams
    losses.py      streams off lost and stalled replicas          evacuation.py  streams off draining replicas
    calls.py       engine methods on all replicas                 traffic.py, demand.py  what is counted
"""

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from kervan.config.workload import Slo
from kervan.errors import EngineError
from kervan.fleet.admitted import Admitted, StreamFailure, Ticket
from kervan.fleet.calls import Calls
from kervan.fleet.codec import Codec, Outputs
from kervan.fleet.demand import DemandMeter
from kervan.fleet.directory import DemandCounts, Traffic
from kervan.fleet.evacuation import Evacuations
from kervan.fleet.link import Member, ReplicaLink, ReplicaTally
from kervan.fleet.links import Links
from kervan.fleet.losses import Losses
from kervan.fleet.placement import Placements
from kervan.fleet.prefixes import EMPTYING, Prefixes
from kervan.fleet.reconnect.copy_sender import CopySender
from kervan.fleet.reconnect.journal import Attempt, current_attempt
from kervan.fleet.reconnect.replay import replay
from kervan.fleet.stream import Stream
from kervan.fleet.timeline import current_request
from kervan.fleet.traffic import ClientCounts, QueueCause, TrafficMeter
from kervan.fleet.usage import current_charge
from kervan.policy import admission
from kervan.policy.output_length import LengthEstimate
from kervan.policy.prefill_speed import PrefillSpeed

logger = logging.getLogger(__name__)


class FleetClient:
    """Speaks to every replica of a fleet; the engine-core client of vLLM is built on it.

    Owns what comes out: `outputs` carries decoded engine outputs, wire ids already turned back into request ids. Each
    stream that was added and not aborted ends there once. `copy_sender` is given when another gateway keeps copies of
    the journals; what an engine gave comes out when that one has it. `encrypts` False: replicas without keys are spoken
    to as well, for measuring and for those of tests.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        secret: str,
        encrypts: bool = True,
        hold_timeout_s: float = 300.0,
        gateway_id: str | None = None,
        routes_by_prefix: bool = True,
    ):
        self.codec = codec
        self.gateway_id = gateway_id or uuid.uuid4().hex[:8]
        self.outputs: asyncio.Queue[Outputs] = asyncio.Queue()
        self.counts = ClientCounts()
        self.copy_sender: CopySender | None = None
        self.num_gateways = 1  # that share the fleet, this one included
        self.demand = DemandMeter()
        self._meter = TrafficMeter()
        self._lengths = LengthEstimate()
        self._prefill = PrefillSpeed()
        self.prefixes = Prefixes(codec, secret, is_on=routes_by_prefix)
        self._links = Links(
            codec,
            gateway_id=self.gateway_id,
            secret=secret,
            encrypts=encrypts,
            deliver=self._deliver,
            opened=self._link_opened,
            lost=self._link_lost,
            drain_changed=self._drain_changed,
        )
        self._placements = Placements(
            codec,
            self._links,
            self._lengths,
            self._prefill,
            self.prefixes,
            self.counts,
            self.demand,
            hold_timeout_s=hold_timeout_s,
            give_up=functools.partial(self._give_up, is_transient=True),
            reject=self._reject,
            forgotten=self._forgotten,
        )
        self._evacuations = Evacuations(
            codec,
            self._links.live,
            self._lengths,
            self._prefill,
            self.prefixes,
            self._placements.move,
            self.counts.drain_s,
        )
        self._losses = Losses(codec, self._links, self._placements, self._prefill, self.counts, self._reject)
        self._calls = Calls(codec, self._links)
        self._admitted = Admitted(lambda: admission.bulk_slots(self.capacity_streams, self.num_gateways))
        self._placing_next: asyncio.Task[None] | None = None
        self._tasks = [
            asyncio.create_task(self._placements.expire_held()),
            asyncio.create_task(self._losses.watch_for_stalls()),
        ]

    # ---- what is known of the fleet

    @property
    def links(self) -> list[ReplicaLink]:
        """The live links, one per replica."""
        return list(self._links.live.values())

    def set_secret(self, secret: str) -> None:
        """Prove the fleet's secret with another one from now on: its keys have changed."""
        self._links.secret = secret

    @property
    def refusals(self) -> dict[str, str]:
        """Replica id -> the reason for which it refuses this gateway."""
        return self._links.refusals

    @property
    def num_streams(self) -> int:
        """Streams in flight, held ones too."""
        return len(self._placements.streams)

    @property
    def num_outstanding(self) -> int:
        """Streams in flight, and those that admitted requests are about to open."""
        return self.num_streams + self._admitted.num_unopened

    @property
    def num_bulk(self) -> int:
        """Of `num_outstanding`, those of bulk requests."""
        return self._admitted.num_bulk

    @property
    def num_held(self) -> int:
        """Streams that wait for a replica."""
        return self._placements.num_held

    @property
    def capacity_streams(self) -> int:
        """Streams that the live replicas run at once: the sum of their `max_num_seqs`."""
        return sum(link.facts.max_num_seqs for link in self._links.live.values() if not link.is_draining)

    @property
    def completed_per_s(self) -> float:
        """Completed streams per second, averaged over about 10 s."""
        return self._meter.completed_per_s

    def traffic(self) -> dict[str, Traffic]:
        """What came from each replica since the last call, by its id; of those that are gone, their last counts."""
        return self._meter.look(self._links.live)

    def take_demand(self) -> DemandCounts:
        """What clients asked and got since the last call, and what waits and runs now."""
        return self.demand.take(self._placements.streams.values(), self._links.live)

    def set_slo(self, slo: Slo) -> None:
        """What counts as good, and has a bucket in each replica's histograms."""
        if slo != self.demand.slo:
            self.demand.slo = slo
            self._meter.set_slo(slo)

    def queued(self) -> dict[QueueCause, int]:
        """Streams that wait, by what for; takes about a microsecond for ten streams."""
        pending = self._placements.num_rejections_pending
        return {
            "no_replica": self.num_held - pending,
            "lost_replica": pending,
            "bulk_turn": self._admitted.num_waiting,
            "first_token": sum(not s.gave_token for link in self._links.live.values() for s in link.streams.values()),
        }

    def generated_tokens(self, replica_id: str) -> int:
        """Tokens that came from a replica so far."""
        link, tally = self._links.live.get(replica_id), self._meter.tallies.get(replica_id)
        return (0 if tally is None else tally.generated_tokens) + (0 if link is None else link.num_tokens)

    @property
    def tallies(self) -> Mapping[str, ReplicaTally]:
        """Replica id -> counts of its streams, over its earlier links too."""
        return self._meter.tallies

    async def wait_for_link(self) -> ReplicaLink:
        """The first live link, as soon as there is one."""
        return await self._links.first()

    def set_members(self, members: Iterable[Member]) -> None:
        """Follow the directory: link to new members; one that is no longer listed keeps its link while that lives."""
        self._links.set_members(members)
        self._losses.members_changed()
        self._evacuations.update()

    async def call(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """The answers of all live replicas to an engine method; one that is lost meanwhile needs not answer.

        Waits for a first replica, also when all were lost. Raises: EngineError when a replica reports a failure, or the
        client closes before one has answered.
        """
        answers = await self._calls.call(method, args)
        if method in EMPTYING:
            self.prefixes.emptied()
        return answers

    async def close(self) -> None:
        """End all links; streams are not finished."""
        self._losses.close()
        self._calls.close()
        tasks = [*self._tasks, *self._evacuations.tasks]
        if self._placing_next is not None:
            tasks.append(self._placing_next)
        for task in tasks:
            task.cancel()
        await self._links.close()  # at once: a link that opened now would begin anew what has been cancelled
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- streams

    def take_room(self, num_streams: int, *, is_bulk: bool, session: str = "") -> Ticket:
        """Room for the streams of an admitted request; its work must be done within the ticket."""
        return self._admitted.take(num_streams, is_bulk=is_bulk, session=session)

    async def add(self, request: Any) -> None:
        """Take a request: place it now, or hold it until a replica can take it."""
        stream = self.codec.describe(request)
        earlier = self._placements.streams.get(stream.request_id)
        if earlier is not None:  # a further part of a streaming input goes where the first went
            await self._continue(earlier, request)
            return
        stream.wire_id = stream.request_id
        self._placements.streams[stream.request_id] = stream
        self.demand.arrived(stream)
        record = current_request.get()
        if record is not None:
            stream.record = record
            stream.timeline = record.open(stream.request_id, stream.prompt_tokens, stream.arrived_s)
        self.counts.started += 1
        if (charge := current_charge.get()) is not None:
            charge.opened(stream)
        has_turn = self._admitted.open(stream)
        attempt = current_attempt.get()
        if attempt is not None and attempt.begin():
            stream.attempt = attempt
            if attempt.journal.data:
                stream.replaying = asyncio.create_task(self._replay(stream, attempt))
                return
        if has_turn:
            await self._placements.place(stream)
        elif stream.timeline is not None:
            stream.timeline.note("waits", why="streams of requests with many take turns")

    def _forgotten(self, stream: Stream) -> None:
        self._admitted.close(stream)
        if stream.charge is not None:
            stream.charge.ended(stream)
        self._place_next_soon()

    def _place_next_soon(self) -> None:
        if self._admitted.has_next and (self._placing_next is None or self._placing_next.done()):
            self._placing_next = asyncio.create_task(self._place_next())

    async def _place_next(self) -> None:
        while self._admitted.has_next:
            await self._placements.place(self._admitted.next())

    async def _continue(self, stream: Stream, request: Any) -> None:
        stream.request = request
        stream.is_movable = False
        link = self._links.live.get(stream.replica_id or "")
        if link is not None:
            await link.input.send_multipart(self.codec.encode_add(stream), copy=False)

    async def _replay(self, stream: Stream, attempt: Attempt) -> None:
        """Give out what was generated before, and place the stream then, if there is more to come."""
        try:
            has_ended = await replay(attempt, stream, self.codec, self.outputs.put_nowait)
        except EngineError as error:
            self.counts.broken["replay"] += 1
            self._give_up(stream, str(error))
            return
        if stream.timeline is not None:
            stream.timeline.note("replayed", tokens=len(stream.generated))
        if has_ended:
            self._end(stream, "replayed")
            self.counts.ended["good"] += 1
            self._placements.forget(stream)
            return
        stream.replaying = None
        stream.epoch += 1  # so that it is sent with its tokens
        await self._placements.place(stream)

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Forget streams and abort them at their replicas; unknown ids are ignored."""
        by_replica: dict[str, list[str]] = {}
        for request_id in request_ids:
            stream = self._placements.streams.get(request_id)
            if stream is None:
                continue
            if stream.replica_id is not None:
                by_replica.setdefault(stream.replica_id, []).append(stream.wire_id)
            self._end(stream, "abort")
            self.counts.ended["left"] += 1
            self._placements.forget(stream)
        for replica_id, wire_ids in by_replica.items():
            link = self._links.live.get(replica_id)
            if link is not None:
                await link.input.send_multipart(self.codec.encode_abort(wire_ids), copy=False)

    def _reject(self, stream: Stream, why: str) -> None:
        """End a stream that would only take down more replicas; its client cannot come back to it."""
        self.counts.broken["given_up"] += 1
        if stream.attempt is not None:
            stream.attempt.journal.refusal = f"it ended with an error: {why}"
            if self.copy_sender is not None:
                self.copy_sender.change(stream.attempt.journal)
        self._give_up(stream, why)

    def _give_up(self, stream: Stream, why: str, *, is_transient: bool = False) -> None:
        """End a stream with an error."""
        logger.error("stream %s is given up: %s", stream.request_id, why, extra=stream.ids())
        self.counts.ended["broken"] += 1
        if stream.ticket is not None:
            stream.ticket.failure = StreamFailure(f"the request was given up: {why}", is_transient)
        self._end(stream, f"error: {why}")
        self._placements.forget(stream)
        self._put(self.codec.failure(stream.request_id))

    @staticmethod
    def _end(stream: Stream, why: str) -> None:
        """It is remembered how it ended."""
        if stream.timeline is not None:
            stream.timeline.note("ended", stream.replica_id or "", why, len(stream.generated))

    # ---- what comes of the links

    async def _link_opened(self, link: ReplicaLink) -> None:
        link.tally = self._meter.tally(link.replica_id)
        self.prefixes.opened(link)
        await self._losses.replica_returned(link)
        await self._placements.place_held()
        self._place_next_soon()
        self._evacuations.update()

    async def _link_lost(self, link: ReplicaLink, reason: str) -> None:
        link.tally.unlinked_s = time.monotonic()
        link.tally.generated_tokens += link.num_tokens
        link.num_tokens = 0
        if link.replica_id not in self._links.live:  # else it has been linked to again, at another address
            self.prefixes.lost(link)
        self._calls.fail(link, reason)
        await self._losses.replica_lost(link, reason)

    def _drain_changed(self) -> None:
        self._evacuations.update()

    def _deliver(self, link: ReplicaLink, outputs: Outputs) -> None:
        """Take what a step gave: one call per step, so nothing here may wait."""
        kept, num_generated = [], 0
        streams, load = link.streams, link.load
        if outputs.outputs:
            link.stepped()
        for output in outputs.outputs:
            stream = streams.get(output.request_id)
            if stream is None:
                self.counts.late_outputs += 1
                continue
            num_new = len(output.new_token_ids)
            if num_new:
                if not stream.gave_token:
                    self._first_token(link, stream, output)
                stream.generated += output.new_token_ids
                num_generated += num_new
                link.num_tokens += num_new
                # At least 1 stays charged while the stream runs: it still holds a place in the batch.
                paid = min(num_new, stream.cost_tokens - 1)
                stream.cost_tokens -= paid
                load.add(-paid)
            if stream.epoch:
                self.codec.restore(output, stream)
            if stream.attempt is not None:
                self._record(stream.attempt, output)
            if output.finish_reason is not None:
                self._lengths.observe(len(stream.generated))
                self._count_end(stream, str(output.finish_reason))
                link.tally.num_served += 1
                self.prefixes.ended(stream, link)
                self.codec.finish(output, stream)
                self._end(stream, str(output.finish_reason))
                self._placements.forget(stream)
                self._meter.count_completed()
            kept.append(output)
        self.demand.generated(num_generated)
        if kept or outputs.scheduler_stats is not None:
            outputs.outputs = kept
            outputs.timestamp += link.clock_skew_s
            self._put(outputs)

    def _count_end(self, stream: Stream, finish_reason: str) -> None:
        is_good = self.demand.finished(stream)
        if finish_reason == "error":
            self.counts.ended["broken"] += 1
            self.counts.broken["engine"] += 1
        elif finish_reason == "abort":
            self.counts.ended["left"] += 1
        else:
            self.counts.ended["good" if is_good else "slow"] += 1

    def _first_token(self, link: ReplicaLink, stream: Stream, output: Any) -> None:
        stream.gave_token = True
        cached_tokens = self.codec.cached_tokens(output)
        if stream.timeline is not None:
            queue_s = self.codec.queue_s(output)
            stream.timeline.note(
                "first token",
                link.replica_id,
                cached_tokens=-1 if cached_tokens is None else cached_tokens,
                queue_s=-1.0 if queue_s is None else queue_s,
            )
        if not stream.generated:
            self.demand.first_token(stream)
            stream.cached_tokens = cached_tokens or 0
        stream.began_s, stream.num_before = time.monotonic(), len(stream.generated)
        ttft_s = stream.began_s - stream.placed_s
        prefilled_tokens = stream.prompt_tokens + len(stream.generated)
        prefilled_tokens -= stream.expected_cached_tokens if cached_tokens is None else cached_tokens
        link.tally.prefilled_tokens += max(0, prefilled_tokens)
        if stream.epoch:
            self.counts.moved_tokens += max(0, prefilled_tokens)
        self._prefill.observe(prefilled_tokens, ttft_s)
        link.prefill.observe(prefilled_tokens, ttft_s)
        link.load.prefill_tokens_per_s = link.prefill.known_tokens_per_s or 0.0
        self.prefixes.first_token(stream, link, cached_tokens)
        link.note_ttft(ttft_s)
        if stream.paused_since_s is not None:
            pause_s = time.monotonic() - stream.paused_since_s
            self.counts.move_pause_s.observe(pause_s)
            stream.paused_since_s = None
            logger.info(
                "stream %s goes on at replica %s after %d tokens and %.0f ms",
                *(stream.request_id, link.replica_id, len(stream.generated), pause_s * 1e3),
                extra={"replica": link.replica_id, **stream.ids()},
            )
        queued = min(stream.cost_tokens - 1, stream.queued_tokens)
        stream.cost_tokens -= queued
        link.load.add(-queued)
        self._placements.prefilled(stream, link)
        if stream.is_suspect:
            self._losses.clear(stream, link)

    def _record(self, attempt: Attempt, output: Any) -> None:
        journal = attempt.journal
        journal.record(self.codec.record(output), len(output.new_token_ids))
        if self.copy_sender is not None:
            self.copy_sender.change(journal)

    def _put(self, outputs: Outputs) -> None:
        """Give outputs to whoever asks for them, if need be when another gateway has a copy."""
        if self.copy_sender is None:
            self.outputs.put_nowait(outputs)
        else:
            self.copy_sender.deliver(functools.partial(self.outputs.put_nowait, outputs))
