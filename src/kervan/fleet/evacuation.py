"""Moves streams off replicas that drain, as the policy says and for as long as they are there."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from kervan.fleet.codec import Codec
from kervan.fleet.histogram import Histogram
from kervan.fleet.link import ReplicaLink
from kervan.fleet.prefixes import Prefixes
from kervan.fleet.stream import Stream
from kervan.policy import evacuation
from kervan.policy.evacuation import EvacuationState, LeavingStream, TargetReplica
from kervan.policy.output_length import LengthEstimate
from kervan.policy.prefill_speed import PrefillSpeed

logger = logging.getLogger(__name__)

IDLE_PERIOD_S = 1.0  # how often a draining replica without a decision to come is looked at


class Evacuations:
    """Those of one client: owns a task for each of its replicas that drains, for as long as it is linked and drains.

    `links`: the live ones, by replica; read whenever a decision is due. `move` places a stream on another replica, or
    where routing says if that one cannot take it. `lengths` and `prefill` are the client's, which tells them what it
    sees; `drain_s` is, too, and gets how long each drain took here.
    """

    def __init__(
        self,
        codec: Codec,
        links: Mapping[str, ReplicaLink],
        lengths: LengthEstimate,
        prefill: PrefillSpeed,
        prefixes: Prefixes,
        move: Callable[[Stream, ReplicaLink, str], Awaitable[None]],
        drain_s: Histogram,
    ) -> None:
        self._codec = codec
        self._links = links
        self._lengths = lengths
        self._prefill = prefill
        self._prefixes = prefixes
        self._move = move
        self._drain_s = drain_s
        self._tasks: dict[ReplicaLink, asyncio.Task[None]] = {}
        self._targets_changed = asyncio.Event()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """To be cancelled when the client closes."""
        return list(self._tasks.values())

    def update(self) -> None:
        """Evacuate what drains now; to be called when replicas come, or begin to drain."""
        self._targets_changed.set()
        for link in self._links.values():
            if link.is_draining and link not in self._tasks:
                link.draining_since_s = time.monotonic()
                task = asyncio.create_task(self._evacuate(link), name=f"evacuate-{link.replica_id}")
                self._tasks[link] = task
                task.add_done_callback(functools.partial(self._task_ended, link))

    def _task_ended(self, link: ReplicaLink, task: asyncio.Task[None]) -> None:
        self._tasks.pop(link, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("evacuation of %s ended: %r", link.replica_id, error, exc_info=error)

    async def _evacuate(self, link: ReplicaLink) -> None:
        is_empty = False
        while self._links.get(link.replica_id) is link and link.is_draining:
            self._targets_changed.clear()
            pause_s: float | None = None
            if link.streams:
                others = self._links.values()
                targets = [other for other in others if not (other.is_draining or other.load.is_doubtful)]
                state = evacuation_state(
                    link,
                    targets,
                    lengths=self._lengths,
                    prefill_tokens_per_s=self._prefill.tokens_per_s,
                    cached_tokens=self._prefixes.cached_tokens,
                )
                decision = evacuation.decide(state)
                pause_s = decision.ask_again_s
                if decision.moves:
                    await self._carry_out(link, decision.moves)
                    about = {"replica": link.replica_id}
                    logger.info("replica %s drains: %s", link.replica_id, decision.reason, extra=about)
            if not link.streams and not is_empty:
                is_empty = True
                self._note_empty(link)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._targets_changed.wait(), pause_s or IDLE_PERIOD_S)

        if not is_empty and not link.streams:  # it went with them
            self._note_empty(link)

    def _note_empty(self, link: ReplicaLink) -> None:
        self._drain_s.observe(max(0.0, link.emptied_s - link.draining_since_s))

    async def _carry_out(self, link: ReplicaLink, moves: Sequence[evacuation.Move]) -> None:
        moved = []
        for move in moves:
            stream = link.streams.get(move.stream_id)
            if stream is not None:  # it has not ended meanwhile
                await self._move(stream, link, move.replica_id)
                moved.append(move.stream_id)
        if moved:
            await link.input.send_multipart(self._codec.encode_abort(moved), copy=False)


def evacuation_state(
    link: ReplicaLink,
    targets: Sequence[ReplicaLink],
    *,
    lengths: LengthEstimate,
    prefill_tokens_per_s: float,
    cached_tokens: Callable[[Stream, Collection[str]], dict[str, int]] = lambda stream, among: {},
) -> EvacuationState:
    """What one gateway tells the policy of a replica that drains, and of what its `targets` can take.

    It takes its share of the targets' room and speed; the other gateways take theirs. `cached_tokens`: what the prefix
    caches of some replicas have of a stream (`Prefixes.cached_tokens`).
    """
    now_s, names = time.monotonic(), {target.replica_id for target in targets}
    return EvacuationState(
        streams=[_leaving(stream, lengths, cached_tokens(stream, names)) for stream in link.streams.values()],
        targets=[_target(target, prefill_tokens_per_s, now_s) for target in targets],
        deadline_s=None if link.drain_deadline_s is None else max(0.0, link.drain_deadline_s - now_s),
        may_linger=link.may_linger,
        elapsed_s=now_s - link.draining_since_s,
        source_s_per_token=link.pace_s(now_s),
    )


def _leaving(stream: Stream, lengths: LengthEstimate, cached_tokens: dict[str, int]) -> LeavingStream:
    num_generated, rest = len(stream.generated), stream.remaining_output_tokens
    return LeavingStream(
        stream_id=stream.wire_id,
        context_tokens=stream.prompt_tokens + num_generated,
        max_remaining_tokens=rest,
        expected_remaining_tokens=lengths.remaining_tokens(num_generated, max_remaining_tokens=rest),
        is_movable=stream.is_movable,
        gave_token=stream.gave_token,
        cached_tokens=cached_tokens,
    )


def _target(link: ReplicaLink, prefill_tokens_per_s: float, now_s: float) -> TargetReplica:
    facts, pong = link.facts, link.pong
    share = 1 / max(1, pong.num_gateways)
    running = max(pong.running + pong.waiting, len(link.streams))
    queued = sum(s.prompt_tokens + len(s.generated) for s in link.streams.values() if not s.gave_token)
    free_kv_tokens = facts.num_gpu_blocks * facts.block_size * (1 - pong.kv_cache_usage)
    return TargetReplica(
        replica_id=link.replica_id,
        free_streams=int(share * max(0, facts.max_num_seqs - running)),
        free_kv_tokens=int(share * free_kv_tokens) - queued,
        prefill_tokens_per_s=share * prefill_tokens_per_s,
        queued_prefill_tokens=link.load.queued_tokens,
        step_s=link.pace_s(now_s) or 0.0,
        max_step_tokens=facts.max_num_batched_tokens or None,
    )
