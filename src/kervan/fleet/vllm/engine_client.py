"""A fleet in the place of vLLM's engine-core client, so that `AsyncLLM` and all above it run unchanged."""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine.core_client import EngineCoreClient

from kervan.fleet.client import FleetClient
from kervan.fleet.wire import EngineFacts


class FleetEngineClient:
    """The surface of vLLM's `AsyncMPClient` that `AsyncLLM` uses, over a `FleetClient`.

    The fleet counts as one engine, index 0. `resources.engine_dead` stays False: vLLM exits when it is set, but a
    fleet without replicas waits for the next one.
    """

    def __init__(self, fleet: FleetClient, vllm_config: VllmConfig, facts: EngineFacts, renderer: Any = None):
        self._fleet = fleet
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        vllm_config.model_config.max_model_len = min(vllm_config.model_config.max_model_len, facts.max_model_len)
        vllm_config.cache_config.num_gpu_blocks = facts.num_gpu_blocks
        vllm_config.cache_config.block_size = facts.block_size
        if not vllm_config.cache_config.enable_prefix_caching:
            fleet.prefixes.is_on = False
        start_warmup = getattr(renderer, "start_mm_warmup_in_background", None)
        if start_warmup is not None:
            start_warmup()

    async def get_output_async(self) -> Any:
        outputs = await self._fleet.outputs.get()
        outputs.engine_index = 0  # type: ignore[attr-defined]
        return outputs

    async def add_request_async(self, request: Any) -> None:
        await self._fleet.add(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        await self._fleet.abort(request_ids)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Any `X_async(*args)` calls the engine method `X` on every live replica."""
        if not name.endswith("_async") or name.startswith("_"):
            raise AttributeError(name)
        method = name.removesuffix("_async")

        async def call(*args: Any, **kwargs: Any) -> Any:
            results = await self._fleet.call(method, (*args, *kwargs.values()))
            if all(isinstance(result, bool) for result in results):
                return all(results)
            return results[0]

        return call

    def dp_engines_running(self) -> bool:
        return False

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to end here: the replicas are not this client's."""


@contextlib.contextmanager
def injected(fleet: FleetClient, facts: EngineFacts) -> Iterator[None]:
    """Within, a new `AsyncLLM` gets `fleet` as its engine core."""
    original = EngineCoreClient.make_async_mp_client

    def make(vllm_config: VllmConfig, *_args: Any, renderer: Any = None, **_kwargs: Any) -> FleetEngineClient:
        return FleetEngineClient(fleet, vllm_config, facts, renderer)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original
