"""What clients are told of a stream that ended with an error: why, in place of vLLM's "Internal server error"."""

import functools
from typing import Any

from kervan.fleet.admitted import current_ticket
from kervan.fleet.vllm import versions


def install() -> None:
    """Tell it wherever this process answers for a failed stream of an admitted request."""
    serving = versions.serving_class()
    raise_if_error = serving._raise_if_error
    if getattr(raise_if_error, "is_kervan", False):
        return

    @functools.wraps(raise_if_error)
    def raise_with_reason(self: Any, finish_reason: str | None, request_id: str) -> None:
        ticket = current_ticket.get()
        failure = ticket.failure if ticket is not None else None
        if finish_reason == "error" and failure is not None:
            raise versions.generation_error(failure.reason, is_transient=failure.is_transient)
        raise_if_error(self, finish_reason, request_id)

    raise_with_reason.is_kervan = True  # type: ignore[attr-defined]
    serving._raise_if_error = raise_with_reason
