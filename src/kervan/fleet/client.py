"""The fleet as one engine: links to all replicas, the journal, placement, and moving streams off lost replicas.

Everything here runs on one asyncio loop and knows no engine: a `Codec` turns requests into frames and frames into
outputs (`kervan.fleet.vllm.codec` for vLLM). Life of a stream:

    add -> placed on a replica -> outputs -> finished
             |      ^                |
             |      +---- moved <----+   its replica was lost or drains: prompt + generated tokens go elsewhere
             +--> held                   no replica can take it now; placed when one comes, failed after a while

One whose client has come back begins with what its journal has (`kervan.fleet.reconnect.journal`), and is placed
after that.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from kervan.errors import EngineError
from kervan.fleet import stalls, wire
from kervan.fleet.codec import Codec, Outputs
from kervan.fleet.directory import Traffic
from kervan.fleet.evacuation import Evacuations
from kervan.fleet.link import LinkRefusedError, Member, ReplicaLink, open_link
from kervan.fleet.listener import ENGINE_DIED, LinkListener, send_ping
from kervan.fleet.reconnect.copy_sender import CopySender
from kervan.fleet.reconnect.journal import Attempt, current_attempt
from kervan.fleet.stalls import StallDetector
from kervan.fleet.stream import Stream
from kervan.fleet.traffic import TrafficMeter
from kervan.policy import quarantine, routing

logger = logging.getLogger(__name__)

RECONNECT_PERIOD_S = 0.5


@dataclass(slots=True)
class ClientCounts:
    """Events since the client started."""

    moved: int = 0
    lost_replicas: int = 0
    given_up: int = 0
    expired: int = 0
    late_outputs: int = 0


class ReplicaLostError(EngineError):
    """A replica was lost before it answered a call."""


class FleetClient:
    """Speaks to every replica of a fleet; the engine-core client of vLLM is built on it.

    `outputs` carries decoded engine outputs, wire ids already turned back into request ids. `copy_sender` is given when
    another gateway keeps copies of the journals; what an engine gave comes out when that one has it.
    """

    def __init__(self, codec: Codec, *, secret: str, hold_timeout_s: float = 300.0, gateway_id: str | None = None):
        self.codec = codec
        self.gateway_id = gateway_id or uuid.uuid4().hex[:8]
        self.outputs: asyncio.Queue[Outputs] = asyncio.Queue()
        self.counts = ClientCounts()
        self.copy_sender: CopySender | None = None
        self.refusals: dict[str, str] = {}
        self._hello = wire.Hello(wire.PROTOCOL, codec.engine_version, self.gateway_id, layouts=codec.layouts)
        self._secret = secret
        self._hold_timeout_s = hold_timeout_s
        self._context = zmq.asyncio.Context()
        self._members: dict[str, Member] = {}
        self._links: dict[str, ReplicaLink] = {}
        self._meter = TrafficMeter()
        self._loads: list[routing.ReplicaLoad] = []
        self._link_tasks: dict[Member, asyncio.Task[None]] = {}
        self._streams: dict[str, Stream] = {}
        self._held: deque[Stream] = deque()
        self._num_awaiting = 0
        self._link_up = asyncio.Event()
        self._call_ids = itertools.count(1)
        self._is_closing = False
        self._evacuations = Evacuations(self._links, self._move, codec)
        self._stalls = StallDetector()
        self._own_tasks = [asyncio.create_task(self._expire_held()), asyncio.create_task(self._watch_for_stalls())]

    # ---- what a gateway asks

    @property
    def links(self) -> list[ReplicaLink]:
        return list(self._links.values())

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def num_held(self) -> int:
        return len(self._held) + self._num_awaiting

    @property
    def capacity_streams(self) -> int:
        """Streams that the live replicas run at once: the sum of their `max_num_seqs`."""
        return sum(link.facts.max_num_seqs for link in self._links.values() if not link.is_draining)

    @property
    def completed_per_s(self) -> float:
        """Completed streams per second, averaged over about 10 s."""
        return self._meter.completed_per_s

    def traffic(self) -> dict[str, Traffic]:
        """What came from each replica since the last call, by its id; of those that are gone, their last counts."""
        return self._meter.look(self._links)

    async def wait_for_link(self) -> ReplicaLink:
        """The first live link, as soon as there is one."""
        while not self._links:
            await self._link_up.wait()
        return next(iter(self._links.values()))

    def set_members(self, members: Iterable[Member]) -> None:
        """Follow the directory: link to new members.

        A member that is no longer listed keeps its link as long as it lives: the directory is soft state, and
        its loss must not cut streams.
        """
        self._members = {member.replica_id: member for member in members}
        for member in self._members.values():
            if member not in self._link_tasks:
                task = asyncio.create_task(self._keep_link(member), name=f"link-{member.replica_id}")
                self._link_tasks[member] = task
                task.add_done_callback(functools.partial(self._link_ended, member))
        for link in self.links:
            self._hear_of_leaving(link)
        self._evacuations.look()

    def _hear_of_leaving(self, link: ReplicaLink) -> None:
        member = self._members.get(link.replica_id)
        if member is not None:
            link.be_risky(member.risky_for_s)
        if member is not None and member.is_leaving:
            link.leave()
            link.may_linger = member.may_linger
            if member.leaves_in_s is not None:
                link.leaves_at_s = time.monotonic() + member.leaves_in_s

    def _link_ended(self, member: Member, task: asyncio.Task[None]) -> None:
        self._link_tasks.pop(member, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("link to replica %s ended: %r", member.replica_id, error, exc_info=error)

    async def close(self) -> None:
        """End all links; streams are not finished."""
        self._is_closing = True
        tasks = [*self._link_tasks.values(), *self._evacuations.tasks, *self._own_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    # ---- streams

    async def add(self, request: Any) -> None:
        """Take a request: place it now, or hold it until a replica can take it."""
        stream = self.codec.describe(request)
        known = self._streams.get(stream.request_id)
        if known is not None:  # a further part of a streaming input goes where the first went
            await self._continue(known, request)
            return
        stream.wire_id = stream.request_id
        self._streams[stream.request_id] = stream
        attempt = current_attempt.get()
        if attempt is not None and attempt.begin():
            stream.attempt = attempt
            if attempt.journal.data:
                stream.replaying = asyncio.create_task(self._replay(stream, attempt))
                return
        await self._place(stream)

    async def _replay(self, stream: Stream, attempt: Attempt) -> None:
        """Give out what was generated before, each output when the last one was taken, and place the stream then.

        One by one, because vLLM joins outputs that wait, and one that tells both what the client has and what it has
        not could not be cut.
        """
        count = 0
        for data in attempt.journal.outputs():
            try:
                outputs = self.codec.recorded(data, stream.request_id)
            except (msgspec.MsgspecError, ValueError) as error:  # of another version of vLLM
                self._give_up(stream, f"its journal cannot be read: {error}")
                return
            (output,) = outputs.outputs
            stream.generated += output.new_token_ids
            count += len(output.new_token_ids)
            self.outputs.put_nowait(outputs)
            if output.finish_reason is not None:
                self._forget(stream)
                return
            await attempt.wait_for(count)
        stream.replaying = None
        stream.epoch += 1  # so that it is sent with its tokens
        await self._place(stream)

    async def _continue(self, stream: Stream, request: Any) -> None:
        stream.request = request
        stream.is_movable = False
        link = self._links.get(stream.replica_id or "")
        if link is not None:
            await link.input.send_multipart(self.codec.encode_add(stream), copy=False)

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Forget streams and free their replicas."""
        by_link: dict[str, list[str]] = {}
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            if stream.replica_id is not None:
                by_link.setdefault(stream.replica_id, []).append(stream.wire_id)
            self._forget(stream)
        for replica_id, wire_ids in by_link.items():
            link = self._links.get(replica_id)
            if link is not None:
                await link.input.send_multipart(self.codec.encode_abort(wire_ids), copy=False)

    async def _place(self, stream: Stream, target: str | None = None) -> None:
        """On replica `target` if it can take it, else where routing says."""
        placement = routing.decide(self._loads, is_suspect=stream.is_suspect)
        chosen = self._links.get(placement.replica_id or "")
        if chosen is not None and chosen.load.is_risky and self._is_long(stream):
            placement = routing.safer(self._loads, chosen.load, is_suspect=stream.is_suspect) or placement
        if target in self._links and not self._links[target].is_draining and not stream.is_suspect:
            placement = routing.Placement(target, "evacuated to it")
        if placement.replica_id is None:
            if stream.held_since_s is None:
                stream.held_since_s = time.monotonic()
            self._held.append(stream)
            return
        link = self._links[placement.replica_id]
        stream.held_since_s = None
        stream.replica_id = link.replica_id
        stream.gave_token = False
        if stream.epoch:
            stream.wire_id = f"{stream.request_id}~{stream.epoch}"
        stream.cost_tokens = routing.cost_tokens(
            stream.prompt_tokens + len(stream.generated), stream.remaining_output_tokens
        )
        link.load.add(stream.cost_tokens)
        link.load.num_suspects += stream.is_suspect
        link.streams[stream.wire_id] = stream
        stream.placed_s = time.monotonic()
        await link.input.send_multipart(self.codec.encode_add(stream), copy=False)
        if stream.is_suspect:  # should the replica die, its answer tells that it was alive until then
            await send_ping(link)

    def _is_long(self, stream: Stream) -> bool:
        """Whether much is still to come: as much as may, or where that says little, as usually does."""
        num_generated, rest = len(stream.generated), stream.remaining_output_tokens
        if rest < routing.LONG_OUTPUT_TOKENS:
            return False
        expected = self._evacuations.lengths.remaining_tokens(num_generated, max_remaining_tokens=rest)
        return expected is None or expected >= routing.LONG_OUTPUT_TOKENS

    async def _place_held(self) -> None:
        for _ in range(len(self._held)):
            stream = self._held.popleft()
            if self._streams.get(stream.request_id) is stream:
                await self._place(stream)

    def _unplace(self, stream: Stream, link: ReplicaLink | None) -> None:
        if link is not None and link.streams.pop(stream.wire_id, None) is not None:
            link.load.add(-stream.cost_tokens)
            link.load.num_suspects -= stream.is_suspect
        stream.replica_id = None

    def _forget(self, stream: Stream) -> None:
        link = self._links.get(stream.replica_id or "")
        was_suspect = stream.is_suspect
        self._unplace(stream, link)
        self._end_wait(stream)
        if stream.replaying is not None and stream.replaying is not asyncio.current_task():
            stream.replaying.cancel()
        self._streams.pop(stream.request_id, None)
        if stream.held_since_s is not None:
            with contextlib.suppress(ValueError):
                self._held.remove(stream)
        if was_suspect and self._held:
            asyncio.get_running_loop().create_task(self._place_held())

    def _give_up(self, stream: Stream, why: str) -> None:
        logger.error("stream %s is given up: %s", stream.request_id, why)
        self._forget(stream)
        self._put(self.codec.failure(stream.request_id))

    async def _move(self, stream: Stream, link: ReplicaLink, target: str) -> None:
        self._unplace(stream, link)
        self._count_move(stream, link)
        await self._place(stream, target)

    def _count_move(self, stream: Stream, link: ReplicaLink) -> None:
        stream.epoch += 1
        self.counts.moved += 1
        link.tally.num_moved += 1

    async def _expire_held(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            deadline_s = time.monotonic() - self._hold_timeout_s
            for stream in list(self._held):
                if stream.held_since_s is not None and stream.held_since_s < deadline_s:
                    self.counts.expired += 1
                    self._give_up(stream, f"no replica could take it for {self._hold_timeout_s:.0f} s")

    # ---- utility calls

    async def call(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """The answers of all live replicas to an engine method; one that is lost meanwhile needs not answer.

        Waits for a first replica, also when all were lost. Raises: EngineError when a replica reports a failure.
        """
        while True:
            await self.wait_for_link()
            asked = [self._call_one(link, method, args) for link in self.links]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLostError):
                    raise answer
            told = [answer for answer in answers if not isinstance(answer, ReplicaLostError)]
            if told:
                return told
            if self._is_closing:
                raise EngineError(f"the gateway ended before a replica answered {method}")

    async def _call_one(self, link: ReplicaLink, method: str, args: tuple[Any, ...]) -> Any:
        call_id = next(self._call_ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.calls[call_id] = future
        await link.input.send_multipart(self.codec.encode_utility(call_id, method, args), copy=False)
        return await future

    # ---- links

    async def _keep_link(self, member: Member) -> None:
        """Link to a member, again and again, for as long as it is listed."""
        while self._members.get(member.replica_id) == member:
            try:
                link = await open_link(self._context, member, self._hello, self._secret)
            except LinkRefusedError as error:
                if self.refusals.get(member.replica_id) != str(error):
                    logger.error("replica %s refuses this gateway: %s", member.replica_id, error)
                self.refusals[member.replica_id] = str(error)
                await asyncio.sleep(10 * RECONNECT_PERIOD_S)
                continue
            except TimeoutError:
                await asyncio.sleep(RECONNECT_PERIOD_S)
                continue
            except (zmq.ZMQError, msgspec.MsgspecError, ValueError) as error:
                logger.error("what answers at %s is no replica: %r", member.address, error)
                await asyncio.sleep(10 * RECONNECT_PERIOD_S)
                continue
            self.refusals.pop(member.replica_id, None)
            self._hear_of_leaving(link)
            link.tally = self._meter.tally(member.replica_id)
            self._links[member.replica_id] = link
            self._sort_loads()
            self._link_up.set()
            reason = "closed"
            try:
                await self._acquit(link)
                await self._place_held()
                self._evacuations.look()
                reason = await LinkListener(link, self.codec, self._deliver, self._evacuations.look).run()
            finally:
                await self._lose(link, reason)
            await asyncio.sleep(RECONNECT_PERIOD_S)

    def _sort_loads(self) -> None:
        """By id, so that ties go the same way everywhere."""
        self._loads = sorted((link.load for link in self._links.values()), key=lambda load: load.replica_id)

    def _deliver(self, link: ReplicaLink, outputs: Outputs) -> None:
        kept = []
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
                    self._first_token(link, stream)
                stream.generated += output.new_token_ids
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
                self._evacuations.lengths.observe(len(stream.generated))
                link.tally.num_served += 1
                self._forget(stream)
                self._meter.count_completed()
            kept.append(output)
        if kept or outputs.scheduler_stats is not None:
            outputs.outputs = kept
            outputs.timestamp += link.clock_skew_s
            self._put(outputs)

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

    def _first_token(self, link: ReplicaLink, stream: Stream) -> None:
        stream.gave_token = True
        ttft_s = time.monotonic() - stream.placed_s
        prefilled_tokens = stream.prompt_tokens + len(stream.generated)
        self._evacuations.prefill.observe(prefilled_tokens, ttft_s)
        link.note_ttft(ttft_s)
        queued = min(stream.cost_tokens - 1, prefilled_tokens)
        stream.cost_tokens -= queued
        link.load.add(-queued)
        if stream.is_suspect:
            stream.struck.clear()
            stream.unseen_losses = 0
            link.load.num_suspects -= 1
            if self._held:
                asyncio.get_running_loop().create_task(self._place_held())

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(stalls.PERIOD_S)
            was_stalled = {link.replica_id for link in self.links if link.load.is_stalled}
            stalled = self._stalls.look(self.links, self._evacuations.prefill.known_tokens_per_s)
            for link in self.links:
                if link.replica_id in stalled:
                    await self._leave_stalled(link, stalled[link.replica_id])
            if any(link.replica_id in was_stalled and not link.load.is_stalled for link in self.links):
                await self._place_held()

    async def _leave_stalled(self, link: ReplicaLink, reason: str) -> None:
        """Move streams off a replica that stands still; it may go on, so this is no loss.

        A stream without a token may be what it stands still over: such a one is tried alone elsewhere, and if that
        replica stands still too, it waits for what becomes of it there.
        """
        left = []
        for wire_id, stream in list(link.streams.items()):
            is_here = link.streams.get(wire_id) is stream
            if not is_here or not stream.is_movable or (not stream.gave_token and stream.is_suspect):
                continue
            is_suspect = not stream.gave_token
            left.append(wire_id)
            self._unplace(stream, link)
            stream.unseen_losses += is_suspect
            self._count_move(stream, link)
            await self._place(stream)
        if left and self._links.get(link.replica_id) is link:
            logger.warning("%d streams leave replica %s: it %s", len(left), link.replica_id, reason)
            await link.input.send_multipart(self.codec.encode_abort(left), copy=False)

    async def _lose(self, link: ReplicaLink, reason: str) -> None:
        if self._links.get(link.replica_id) is link:
            del self._links[link.replica_id]
            self._sort_loads()
        link.tally.unlinked_s = time.monotonic()
        if not self._links:
            self._link_up.clear()
        for future in link.calls.values():
            if not future.done():
                future.set_exception(ReplicaLostError(f"replica {link.replica_id} was lost: {reason}"))
        link.close()
        if self._is_closing:
            return
        self.counts.lost_replicas += 1
        streams = list(link.streams.values())
        logger.warning("replica %s is lost (%s) with %d streams", link.replica_id, reason, len(streams))
        for stream in streams:
            await self._judge(stream, link, reason)
        await self._place_held()

    async def _judge(self, stream: Stream, link: ReplicaLink, reason: str) -> None:
        verdict = quarantine.decide(
            strikes=len(stream.struck),
            unseen_losses=stream.unseen_losses,
            gave_token=stream.gave_token,
            was_alive=link.pong_s > stream.placed_s,
        )
        self._unplace(stream, link)
        if verdict.strikes > len(stream.struck):
            stream.struck.append(link.replica_id)
        elif not verdict.strikes:
            stream.struck.clear()
        stream.unseen_losses = verdict.unseen_losses
        if not stream.is_movable:
            self._convict(stream, "its replica was lost and it cannot move")
            return
        if verdict.action == "give_up":
            if reason == ENGINE_DIED or verdict.strikes < quarantine.MAX_STRIKES:
                self._convict(stream, verdict.reason)
            else:
                stream.awaits_verdict = True
                self._num_awaiting += 1
                loop = asyncio.get_running_loop()
                loop.call_later(quarantine.RETURN_WAIT_S, self._pass_verdict, stream, stream.epoch, verdict.reason)
            return
        self._count_move(stream, link)
        await self._place(stream)

    def _convict(self, stream: Stream, why: str) -> None:
        self.counts.given_up += 1
        if stream.attempt is not None:  # it would only take down more replicas
            stream.attempt.journal.refusal = f"it ended with an error: {why}"
            if self.copy_sender is not None:
                self.copy_sender.change(stream.attempt.journal)
        self._give_up(stream, why)

    def _pass_verdict(self, stream: Stream, epoch: int, why: str) -> None:
        """Give up a stream whose replicas have not come back."""
        if stream.awaits_verdict and stream.epoch == epoch and not self._is_closing:
            self._convict(stream, why)

    def _end_wait(self, stream: Stream) -> None:
        self._num_awaiting -= stream.awaits_verdict
        stream.awaits_verdict = False

    async def _acquit(self, link: ReplicaLink) -> None:
        """A lost replica is back: it was silent, not dead, so no stream has killed it."""
        for stream in list(self._streams.values()):
            if link.replica_id not in stream.struck:
                continue
            stream.struck.remove(link.replica_id)
            stream.unseen_losses += 1
            if stream.awaits_verdict:
                self._end_wait(stream)
                stream.epoch += 1
                self.counts.moved += 1
                await self._place(stream)
