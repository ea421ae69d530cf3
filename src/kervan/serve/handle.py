"""A fleet called from Python: by other Serve deployments, actors and drivers of its Ray cluster. No HTTP in between."""

import asyncio
import contextlib
import os
import uuid
from collections.abc import Sequence
from typing import Any

import ray

from kervan.errors import FleetError
from kervan.fleet.client import FleetClient
from kervan.fleet.link import members
from kervan.fleet.vllm.logs import kept_handlers
from kervan.gateway.asgi import ASGIApp
from kervan.gateway.local import CompletionRequest
from kervan.serve.directory.client import find_directory
from kervan.vendor.vllm_names import CHAT_PATH, COMPLETIONS_PATH

FOLLOW_S = 1.0


class FleetHandle:
    """vLLM's frontend over a fleet's replicas in this process: tokens come straight from them.

    The first call takes as long as importing vLLM does, and the process must be on a node that can (GPU fleets: one
    with such a GPU, though none is used). It belongs to the event loop of its first call.
    """

    def __init__(self, name: str):
        """Raises: FleetError when there is no such fleet on this cluster."""
        self.name = name
        self._directory = find_directory(name)
        self._starting: asyncio.Task[ASGIApp] | None = None
        self._following: asyncio.Task[None] | None = None
        self._fleet: FleetClient | None = None
        self._frontend: Any = None
        self._is_closed = False

    def generate(self, prompt: str | Sequence[int], **fields: Any) -> CompletionRequest:
        """Continue a text, or token ids. `fields`: those of POST /v1/completions, such as `max_tokens`."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        return CompletionRequest(self.ready, COMPLETIONS_PATH, {"prompt": given, **fields})

    def chat(self, messages: Sequence[dict[str, Any]], **fields: Any) -> CompletionRequest:
        """Answer a conversation. `fields`: those of POST /v1/chat/completions."""
        return CompletionRequest(self.ready, CHAT_PATH, {"messages": list(messages), **fields})

    async def ready(self) -> ASGIApp:
        """Return when the fleet can be called; calls wait for it by themselves.

        Raises: FleetError after `close`; ConfigError when vLLM refuses the fleet's arguments here.
        """
        if self._is_closed:
            raise FleetError(
                f"the handle of fleet {self.name!r} is closed; get another: kervan.get_fleet({self.name!r})"
            )
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> ASGIApp:
        config, secret, _ = await self._directory.fleet()
        os.environ.update(config.env)
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # vLLM must see which kind of GPU this node has
            del os.environ["CUDA_VISIBLE_DEVICES"]
        with kept_handlers():
            from kervan.fleet.vllm.frontend import OpenAIFrontend, VllmCodec

        name = f"py-{uuid.uuid4().hex[:6]}"
        self._fleet = FleetClient(
            VllmCodec(),
            secret=secret,
            encrypts=config.encrypts,
            hold_timeout_s=config.hold_timeout_s,
            gateway_id=name,
            routes_by_prefix=config.routing == "prefix",
        )
        self._following = asyncio.create_task(self._follow(self._fleet))
        is_twin = config.engine == "twin"
        self._frontend = await OpenAIFrontend.start(self._fleet, config.engine_argv, is_twin=is_twin)
        app: ASGIApp = self._frontend.app
        return app

    async def _follow(self, fleet: FleetClient) -> None:
        async for snapshot in self._directory.follow(poll_s=FOLLOW_S, retry_s=FOLLOW_S):
            with contextlib.suppress(FleetError):  # a directory that is away changes nothing
                fleet.set_secret((await self._directory.fleet()).secret)
            fleet.set_members(members(snapshot))

    async def close(self) -> None:
        """Leave the fleet; calls that are open end with an error."""
        self._is_closed = True
        tasks = [task for task in (self._starting, self._following) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._frontend is not None:
            await self._frontend.close()
        if self._fleet is not None:
            await self._fleet.close()


def get_fleet(name: str = "default") -> FleetHandle:
    """The fleet of this name on the Ray cluster that this process has joined.

    Raises: FleetError when this process has joined none, or there is no such fleet.
    """
    if not ray.is_initialized():
        raise FleetError(
            "this process has joined no Ray cluster; call ray.init(address=...) first, or run on the cluster"
        )
    return FleetHandle(name)
