"""Why an engine could not start, in one line with the fix."""

import re

from kervan.errors import CapacityError, ConfigError, EngineError, KervanError
from kervan.fleet.control import FailureKind


def diagnosed(error: BaseException) -> KervanError | None:
    """The kervan error for what vLLM raised while it started, if its cause has a known fix."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        if isinstance(cause, KervanError):
            return cause
        text = " ".join(str(cause).split())
        for pattern, kervan_error, fix in KNOWN:
            if re.search(pattern, text, re.IGNORECASE):
                return kervan_error(f"{_shorten(text)} Fix: {fix}")
    return None


def explain(error: BaseException) -> KervanError:
    """The kervan error for whatever vLLM raised while it started; for an unknown cause, with vLLM's own text."""
    if (diagnosis := diagnosed(error)) is not None:
        return diagnosis
    text = " ".join(str(error).split())
    kind_of_error = ConfigError if type(error).__name__ in ("ValidationError", "ValueError", "OSError") else EngineError
    return kind_of_error(f"vLLM did not start: {type(error).__name__}: {_shorten(text)}")


def kind(error: KervanError) -> FailureKind:
    """The name under which a process reports `error`."""
    if isinstance(error, ConfigError):
        return "ConfigError"
    return "CapacityError" if isinstance(error, CapacityError) else "EngineError"


def _shorten(text: str, limit: int = 600) -> str:
    text = text if len(text) <= limit else text[:limit] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."


# The texts are those of vLLM 0.24 and 0.32; a test holds one of each.
KNOWN: tuple[tuple[str, type[KervanError], str], ...] = (
    (
        r"free memory on device|externally held weights on device",
        CapacityError,
        "stop what else uses the GPU, or give vLLM less: --engine-arg gpu_memory_utilization=0.8",
    ),
    (
        r"available memory on node .* is less than",
        CapacityError,
        "stop what else uses the machine, or give vLLM less: --engine-arg gpu_memory_utilization=0.5 and a smaller "
        "--env VLLM_CPU_KVCACHE_SPACE=GiB",
    ),
    (
        r"no available memory for the cache blocks|kv cache is needed|larger than the available kv cache memory"
        r"|cannot auto-fit max_model_len",
        CapacityError,
        "a shorter context (--engine-arg max_model_len=4096), more GPUs per replica (--tp), or more memory for "
        "the cache (GPU: --engine-arg gpu_memory_utilization=0.95; CPU: --env VLLM_CPU_KVCACHE_SPACE=GiB)",
    ),
    (
        r"out of memory|not enough (\w+ )?(memory|ram)|can't allocate memory",
        CapacityError,
        "more GPUs per replica (--tp), a quantised model, or --engine-arg gpu_memory_utilization=0.8",
    ),
    (
        r"^'kervan-canary'$",
        EngineError,
        "--pp 1, or GPUs: vLLM's CPU backend (0.29 to 0.32) loses a request between pipeline stages",
    ),
    (
        r"max_model_len.*(greater|larger).*derived",
        ConfigError,
        "a max_model_len within the model's own context length",
    ),
    (
        r"attention heads.*must be divisible by tensor parallel",
        ConfigError,
        "a --tp that divides the number of attention heads",
    ),
    (
        r"model architectures? .* (are not supported|failed to be inspected|is not supported)",
        ConfigError,
        "a model that this vLLM supports",
    ),
)
