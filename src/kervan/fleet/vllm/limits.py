"""Requests that vLLM accepts but that would kill an engine: refused at the gateway instead."""

import functools
from collections.abc import Sized
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from kervan.fleet.vllm import versions

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
# Each of the n sequences is a request of its own; vLLM's own bound (16,384) lets one request fill a fleet.
MAX_N = 128


def violation(params: SamplingParams, entry_limits: dict[str, int]) -> tuple[str, str, Any] | None:
    """(message, parameter, value) of the first limit that `params` breaks, or None."""
    if params.n > MAX_N:
        return f"n={params.n} sequences exceed {MAX_N}; ask for at most {MAX_N} at once", "n", params.n
    for name, limit in entry_limits.items():
        value = getattr(params, name, None)
        if isinstance(value, Sized) and len(value) > limit:
            return f"{name} has {len(value)} entries; this engine takes at most {limit}", name, len(value)
    for name in ("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
        value = getattr(params, name, None)
        if isinstance(value, int) and not -INT32_MAX <= value <= INT32_MAX:
            return f"{name}={value} is outside the 32-bit range", name, value
    if params.seed is not None and not -INT64_MAX <= params.seed <= INT64_MAX:
        return f"seed={params.seed} is outside the 64-bit range", "seed", params.seed
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token_id in getattr(params, name, None) or ():
            if not 0 <= int(token_id) <= INT32_MAX:
                return f"{name} names token id {token_id}; ids are in 0..{INT32_MAX}", name, token_id
    return None


def install() -> None:
    """Check these limits wherever this process makes `SamplingParams`: before an answer starts, so as 400."""
    if getattr(SamplingParams._verify_args, "is_kervan", False):
        return
    entry_limits = versions.runner_limits()
    verify = SamplingParams._verify_args

    @functools.wraps(verify)
    def verify_with_limits(self: SamplingParams) -> None:
        verify(self)
        broken = violation(self, entry_limits)
        if broken is not None:
            message, parameter, value = broken
            raise VLLMValidationError(message, parameter=parameter, value=value)

    verify_with_limits.is_kervan = True  # type: ignore[attr-defined]
    SamplingParams._verify_args = verify_with_limits
