"""Calls of engine methods on all replicas: vLLM's utilities, such as `add_lora` or `is_sleeping`."""

import asyncio
import itertools
from typing import Any

from kervan.errors import EngineError
from kervan.fleet.codec import Codec
from kervan.fleet.link import ReplicaLink
from kervan.fleet.links import Links


class ReplicaLostError(EngineError):
    """A replica was lost before it answered a call."""


class Calls:
    """Those of one client; owns their numbers.

    A call is in the `calls` of each link that it was made over until it is answered there or the link is lost, so each
    ends. The link's listener takes the answers.
    """

    def __init__(self, codec: Codec, links: Links) -> None:
        self._codec = codec
        self._links = links
        self._ids = itertools.count(1)
        self._is_closing = False

    async def call(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """The answers of all live replicas to an engine method; one that is lost meanwhile needs not answer.

        Waits for a first replica, also when all were lost. Raises: EngineError when a replica reports a failure, or the
        client closes before one has answered.
        """
        while True:
            await self._links.first()
            calls = [self._call_one(link, method, args) for link in self._links.live.values()]
            results = await asyncio.gather(*calls, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, ReplicaLostError):
                    raise result
            answers = [result for result in results if not isinstance(result, ReplicaLostError)]
            if answers:
                return answers
            if self._is_closing:
                raise EngineError(f"the gateway ended before a replica answered {method}")

    async def _call_one(self, link: ReplicaLink, method: str, args: tuple[Any, ...]) -> Any:
        call_id = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.calls[call_id] = future
        await link.input.send_multipart(self._codec.encode_utility(call_id, method, args), copy=False)
        return await future

    def fail(self, link: ReplicaLink, reason: str) -> None:
        """The link was lost: calls over it that have no response fail with ReplicaLostError."""
        for future in link.calls.values():
            if not future.done():
                future.set_exception(ReplicaLostError(f"replica {link.replica_id} was lost: {reason}"))

    def close(self) -> None:
        """Make no call again that loses its last replica."""
        self._is_closing = True
