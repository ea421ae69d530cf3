"""LoRA adapters that are loaded and unloaded while vLLM's app runs, under numbers that mean the same in all gateways.

An engine knows an adapter by the number that comes with each request (`lora_int_id`) and loads it from its path at the
first request. Each app counts for itself: two gateways would give two adapters one number, and an engine that has the
one would answer with it for the other.
"""

import contextvars
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

# The numbers: vLLM's own count of those that the arguments name, the same everywhere; drawn ones, for what a client
# loads; and those that follow from the name, for what a plugin finds by it. Model runner V2 has 31 bits for them.
DRAWN_IDS = range(1 << 20, 1 << 30)
NAMED_IDS = range(1 << 30, (1 << 31) - 1)

_resolving: contextvars.ContextVar[str | None] = contextvars.ContextVar("resolving", default=None)


class AdapterChange(msgspec.Struct, frozen=True):
    """The last that happened to an adapter: it was loaded, or with `request` None unloaded.

    `request`: vLLM's LoRARequest as a list. `changed_s`: Unix time.
    """

    name: str
    changed_s: float
    gateway_id: str
    request: list[Any] | None

    @property
    def order(self) -> tuple[float, str]:
        """The later of two changes has the greater one."""
        return self.changed_s, self.gateway_id


def named_id(name: str) -> int:
    """The number of an adapter that is found by its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return NAMED_IDS[int.from_bytes(digest[:8], "big") % len(NAMED_IDS)]


class _Numbers:
    """Stands in for vLLM's counter of adapters."""

    def inc(self, _: int) -> int:
        """The number of the next one."""
        name = _resolving.get()
        return named_id(name) if name is not None else DRAWN_IDS[secrets.randbelow(len(DRAWN_IDS))]


class Adapters:
    """Those of one app; `on_change` is awaited before a client learns that its adapter is loaded or unloaded.

    `app`: with its state filled in, and the adapters of its arguments loaded.
    """

    def __init__(self, app: Any, gateway_id: str, on_change: Callable[[], Awaitable[None]]) -> None:
        self._models = app.state.openai_serving_models
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._changes: dict[str, AdapterChange] = {}
        self._models.lora_id_counter = _Numbers()
        self._follow_loads()
        self._follow_resolvers()

    @property
    def can_change(self) -> bool:
        """Whether clients may load and unload adapters."""
        from vllm import envs  # seconds to import

        return bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING)

    @property
    def changes(self) -> list[AdapterChange]:
        """The last change of each adapter that had one."""
        return list(self._changes.values())

    def merge(self, changes: Iterable[AdapterChange]) -> bool:
        """Take over what other gateways know of later; whether there was any.

        Raises: msgspec.ValidationError for a request of another vLLM version.
        """
        from vllm.lora.request import LoRARequest

        is_news = False
        for change in changes:
            known = self._changes.get(change.name)
            if known is not None and known.order >= change.order:
                continue
            if change.request is None:
                self._models.lora_requests.pop(change.name, None)
            else:
                self._models.lora_requests[change.name] = msgspec.convert(change.request, LoRARequest)
            self._changes[change.name] = change
            is_news = True
        return is_news

    async def _note(self, name: str) -> None:
        known = self._changes.get(name)
        # After all that is known here, whatever the clocks of other nodes say.
        now_s = max(time.time(), known.changed_s + 1e-3 if known is not None else 0.0)
        request = self._models.lora_requests.get(name)
        told = None if request is None else msgspec.to_builtins(request)
        self._changes[name] = AdapterChange(name, now_s, self._gateway_id, told)
        await self._on_change()

    def _follow_loads(self) -> None:
        for name in ("load_lora_adapter", "unload_lora_adapter"):
            setattr(self._models, name, self._followed(getattr(self._models, name)))

    def _followed(self, change: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def followed(request: Any, *args: Any, **kwargs: Any) -> Any:
            result = await change(request, *args, **kwargs)
            if isinstance(result, str):  # else it is vLLM's error
                await self._note(request.lora_name)
            return result

        return followed

    def _follow_resolvers(self) -> None:
        resolve = self._models.resolve_lora

        async def resolved(lora_name: str) -> Any:
            token = _resolving.set(lora_name)
            try:
                return await resolve(lora_name)
            finally:
                _resolving.reset(token)

        self._models.resolve_lora = resolved
