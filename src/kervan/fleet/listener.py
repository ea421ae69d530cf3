"""Takes what a replica sends over one link, until the link is over."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from kervan.errors import EngineError
from kervan.fleet import wire
from kervan.fleet.codec import Codec, Outputs
from kervan.fleet.link import ReplicaLink

logger = logging.getLogger(__name__)

SETTLE_S = 0.01  # between the break of one connection and the last bytes of the other
ENGINE_DIED = "the engine died"


async def send_ping(link: ReplicaLink) -> None:
    """Renew the lease; the replica answers with PONG."""
    ping = wire.Ping(link.load.own_tokens, link.load.num_suspects, bytes(link.news))
    link.news.clear()
    await link.input.send_multipart([wire.PING, msgspec.msgpack.encode(ping)])


class LinkListener:
    """Of one link. `deliver` gets the engine's outputs.

    `drain_changed` is called when the replica says that it drains.
    """

    def __init__(
        self,
        link: ReplicaLink,
        codec: Codec,
        deliver: Callable[[ReplicaLink, Outputs], None],
        drain_changed: Callable[[], None],
    ) -> None:
        self._link = link
        self._codec = codec
        self._deliver = deliver
        self._drain_changed = drain_changed

    async def run(self) -> str:
        """Why the link is over. All that came before that has been delivered."""
        reason = await _first_of(self._take_outputs(), self._watch(), self._ping())
        await self._read_rest()
        return reason

    async def _take_outputs(self) -> str:
        """Until the engine says that it is dead, or an output is missing."""
        receive = self._link.output.recv_multipart
        while True:
            ending = self._take(await receive(copy=False))
            if ending is not None:
                return ending

    def _take(self, frames: Sequence[zmq.Frame]) -> str | None:
        """Deliver one output message; why the link is over, if it is."""
        link = self._link
        if len(frames) == 1 and frames[0].bytes == wire.ENGINE_DEAD:
            return ENGINE_DIED
        number = wire.decode_number(frames[0].bytes)
        if number != link.num_outputs + 1:
            return f"output {link.num_outputs + 1} was lost, {number} came"
        link.num_outputs, link.output_s = number, time.monotonic()
        outputs = self._codec.decode(frames[1:])
        if outputs.utility_output is not None:
            self._resolve(outputs.utility_output)
        else:
            self._deliver(link, outputs)
        return None

    def _resolve(self, response: Any) -> None:
        future = self._link.calls.pop(response.call_id, None)
        if future is None or future.done():
            return
        if response.failure_message is not None:
            future.set_exception(EngineError(f"replica {self._link.replica_id}: {response.failure_message}"))
        else:
            future.set_result(response.result.result if response.result is not None else None)

    async def _watch(self) -> str:
        """Until one of the connections breaks."""
        watches = [asyncio.ensure_future(recv_monitor_message(monitor)) for monitor in self._link.monitors]
        try:
            await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watch in watches:
                watch.cancel()
        return "its connection broke"

    async def _ping(self) -> str:
        """Keep the lease until the replica says that it has ended, or outputs that were sent are missing.

        Follows the replica's load and whether it drains.
        """
        link = self._link

        async def send() -> None:
            while True:
                await send_ping(link)
                await asyncio.sleep(wire.PING_PERIOD_S)

        sender = asyncio.create_task(send())
        try:
            while True:
                kind, payload = await link.input.recv_multipart()
                if kind == wire.REFUSED:
                    return payload.decode()
                if kind != wire.PONG:
                    continue
                was_draining = link.is_draining
                link.hear(msgspec.msgpack.decode(payload, type=wire.Pong))
                now_s = link.pong_s
                if link.pong.num_outputs <= link.num_outputs:
                    link.output_s = now_s
                elif now_s - link.output_s > wire.OUTPUT_TIMEOUT_S:
                    return f"{link.pong.num_outputs} outputs were sent and {link.num_outputs} came"
                if link.is_draining and not was_draining:
                    logger.info("replica %s drains", link.replica_id)
                    self._drain_changed()
        finally:
            sender.cancel()

    async def _read_rest(self) -> None:
        """Take what came before the link ended: tokens need not be computed again, and signs of life count."""
        link = self._link
        await asyncio.sleep(SETTLE_S)  # the other connection's last bytes may come a moment after the first one broke
        with contextlib.suppress(zmq.Again):
            while self._take(await link.output.recv_multipart(zmq.NOBLOCK, copy=False)) is None:
                pass
        with contextlib.suppress(zmq.Again):
            while True:
                kind, payload = await link.input.recv_multipart(zmq.NOBLOCK)
                if kind == wire.PONG:
                    link.hear(msgspec.msgpack.decode(payload, type=wire.Pong))


async def _first_of(*jobs: Awaitable[str]) -> str:
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
