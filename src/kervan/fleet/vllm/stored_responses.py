"""Responses that vLLM's app keeps in its process (VLLM_ENABLE_RESPONSES_API_STORE), under ids that name the gateway.

vLLM keeps them until the process ends, with the messages that the next turn of a conversation needs, the events of
background responses, and their tasks.
"""

import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

_ID = re.compile(r"resp_(.{1,100})_[0-9a-f]{32}")


def new_id(gateway_id: str) -> str:
    """The id of a response that this gateway will keep."""
    return f"resp_{gateway_id}_{secrets.token_hex(16)}"


def owner_id(response_id: str) -> str | None:
    """The gateway that an id names; None for one that a client has chosen."""
    found = _ID.fullmatch(response_id)
    return found[1] if found else None


class StoredResponses:
    """Those of one app. `app`: with its state filled in."""

    def __init__(self, app: Any, gateway_id: str) -> None:
        serving = getattr(app.state, "openai_serving_responses", None)
        self._serving = serving if serving is not None and serving.enable_store else None
        if self._serving is not None:
            self._serving.create_responses = _named(self._serving.create_responses, gateway_id)

    @property
    def is_kept(self) -> bool:
        """Whether vLLM keeps any."""
        return self._serving is not None

    def has(self, response_id: str) -> bool:
        """Whether it is here."""
        return self._serving is not None and response_id in self._serving.response_store


def _named(create: Callable[..., Awaitable[Any]], gateway_id: str) -> Callable[..., Awaitable[Any]]:
    async def create_named(request: Any, raw_request: Any = None) -> Any:
        if "request_id" not in request.model_fields_set:
            request.request_id = new_id(gateway_id)
        return await create(request, raw_request)

    return create_named
