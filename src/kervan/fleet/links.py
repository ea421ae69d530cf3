"""A client's links to its replicas: one for each that the directory lists, made again when it breaks."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import zmq
import zmq.asyncio

from kervan.fleet import wire
from kervan.fleet.codec import Codec, Outputs
from kervan.fleet.link import LinkRefusedError, Member, ReplicaLink, open_link
from kervan.fleet.listener import LinkListener
from kervan.policy.routing import FleetLoad

logger = logging.getLogger(__name__)

RECONNECT_PERIOD_S = 0.5


class Links:
    """Owns the links of one client and the tasks that make and read them.

    A link is in `live`, by its replica's id, from when requests may be sent over it until it is lost. `opened` is
    called with each that has come into it, and `lost` with each that has left it and why; before that, `deliver` has
    got all outputs that came. `drain_changed` is called when a replica says that it drains. `fleet`: what routing
    sees of the live ones.
    `refusals`: why, by id, for each member that refuses this gateway.

    `secret`: that of the fleet; it may change, for links from then on. With `encrypts`, a member that has no public key
    is refused: nothing is ever sent in plain text then.

    A member that is no longer listed keeps its link as long as that lives: the directory is soft state, and its loss
    must not cut streams.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        gateway_id: str,
        secret: str,
        encrypts: bool,
        deliver: Callable[[ReplicaLink, Outputs], None],
        opened: Callable[[ReplicaLink], Awaitable[None]],
        lost: Callable[[ReplicaLink, str], Awaitable[None]],
        drain_changed: Callable[[], None],
    ) -> None:
        self.live: dict[str, ReplicaLink] = {}
        self.fleet = FleetLoad()
        self.refusals: dict[str, str] = {}
        self._codec = codec
        self._hello = wire.Hello(wire.PROTOCOL, codec.engine_version, gateway_id, layouts=codec.layouts)
        self.secret = secret
        self._encrypts = encrypts
        self._deliver = deliver
        self._opened = opened
        self._lost = lost
        self._drain_changed = drain_changed
        self._context = zmq.asyncio.Context()
        self._members: dict[str, Member] = {}
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        self._has_live = asyncio.Event()

    async def first(self) -> ReplicaLink:
        """A live link, as soon as there is one."""
        while not self.live:
            await self._has_live.wait()
        return next(iter(self.live.values()))

    def set_members(self, members: Iterable[Member]) -> None:
        """Follow the directory: link to new members, and tell the links what it says of theirs."""
        self._members = {member.replica_id: member for member in members}
        for member in self._members.values():
            if member not in self._tasks:
                task = asyncio.create_task(self._keep(member), name=f"link-{member.replica_id}")
                self._tasks[member] = task
                task.add_done_callback(functools.partial(self._task_ended, member))
        for link in self.live.values():
            self._update(link)

    def is_listed(self, replica_id: str) -> bool:
        """Whether the directory lists it, as far as it has told."""
        return replica_id in self._members

    def _update(self, link: ReplicaLink) -> None:
        member = self._members.get(link.replica_id)
        if member is not None:
            link.follow(member)

    def _task_ended(self, member: Member, task: asyncio.Task[None]) -> None:
        self._tasks.pop(member, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("link to replica %s ended: %r", member.replica_id, error, exc_info=error)

    async def close(self) -> None:
        """End all links; `lost` is called with each."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _keep(self, member: Member) -> None:
        """Link to a member, again and again, for as long as it is listed."""
        while self._members.get(member.replica_id) == member:
            try:
                if self._encrypts and not member.public_key:
                    raise LinkRefusedError("the replica has no public key, and this fleet's traffic is encrypted")
                link = await open_link(self._context, member, self._hello, self.secret)
            except LinkRefusedError as error:
                if self.refusals.get(member.replica_id) != str(error):
                    about = {"replica": member.replica_id}
                    logger.error("replica %s refuses this gateway: %s", member.replica_id, error, extra=about)
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
            self._add(link)
            reason = "closed"
            try:
                await self._opened(link)
                reason = await LinkListener(link, self._codec, self._deliver, self._drain_changed).run()
            finally:
                self._remove(link)
                await self._lost(link, reason)
            await asyncio.sleep(RECONNECT_PERIOD_S)

    def _add(self, link: ReplicaLink) -> None:
        self.refusals.pop(link.replica_id, None)
        self._update(link)
        self.live[link.replica_id] = link
        self.fleet = FleetLoad(link.load for link in self.live.values())
        self._has_live.set()

    def _remove(self, link: ReplicaLink) -> None:
        if self.live.get(link.replica_id) is link:
            del self.live[link.replica_id]
            self.fleet = FleetLoad(link.load for link in self.live.values())
        if not self.live:
            self._has_live.clear()
        link.close()
