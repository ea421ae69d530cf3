"""Why an engine could not start, in one line with the fix."""

import re
from collections.abc import Sequence

from kervan.errors import CapacityError, ConfigError, EngineError, KervanError
from kervan.fleet import log_causes
from kervan.fleet.control import EngineFailed, FailureKind


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
        if (known := _known(" ".join(str(cause).split()))) is not None:
            return known
    return None


def _known(text: str) -> KervanError | None:
    for pattern, kervan_error, fix in KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return kervan_error(f"{_shorten(text)} Fix: {fix}")
    return None


def _last_known(causes: Sequence[str]) -> KervanError | None:
    return next((known for text in reversed(causes) if (known := _known(text)) is not None), None)


def explain(error: BaseException) -> KervanError:
    """The kervan error for whatever vLLM raised while it started; for an unknown cause, with vLLM's own text."""
    if (diagnosis := diagnosed(error)) is not None:
        return diagnosis
    return _unknown(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _unknown(text: str) -> KervanError:
    kind_of_error = ConfigError if text.startswith(("ValidationError:", "ValueError:", "OSError:")) else EngineError
    return kind_of_error(f"vLLM did not start: {_shorten(text)}")


def with_cause(failure: EngineFailed, log: str) -> EngineFailed:
    """The failure that an engine reported, or, where that only says that something else failed, what the log says did.

    `log`: what the engine and its workers wrote. Of several causes the last one counts whose fix is known.
    """
    if not log_causes.is_consequence(failure.message):
        return failure
    causes = log_causes.causes(log)
    if not causes:
        died = log_causes.death(log)
        return (
            failure
            if died is None
            else EngineFailed("EngineError", f"vLLM did not start: {_shorten(died)}{_of_signal(died)}")
        )
    error = _last_known(causes) or _unknown(causes[-1])
    return EngineFailed(kind(error), str(error))


def _of_signal(died: str) -> str:
    """The likely reason of a death by a signal, with its fix; empty for others."""
    return next((f" {text}" for name, text in SIGNALS.items() if died.endswith(name)), "")


def of_end(how: str, log: str) -> EngineFailed:
    """The failure of an engine process that ended while it started and said nothing. `how`: its post-mortem."""
    message = f"the engine process ended during start-up with {how}"
    if (known := _last_known(log_causes.causes(log))) is None:
        return EngineFailed("EngineError", message)
    return EngineFailed(kind(known), f"{_shorten(message)} Fix: {str(known).rpartition(' Fix: ')[2]}")


def kind(error: KervanError) -> FailureKind:
    """The name under which a process reports `error`."""
    if isinstance(error, ConfigError):
        return "ConfigError"
    return "CapacityError" if isinstance(error, CapacityError) else "EngineError"


def _shorten(text: str, limit: int = 600) -> str:
    text = text if len(text) <= limit else text[:limit] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."


SIGNALS = {
    "SIGKILL": "If the machine was out of memory, its kernel did that. Fix: a smaller model, or less for its cache "
    "(CPU: --env VLLM_CPU_KVCACHE_SPACE=GiB).",
    "SIGILL": "vLLM uses an instruction that this CPU lacks. Fix: --engine-arg dtype=float32.",
    "SIGBUS": "Fix: more shared memory (/dev/shm; for a container --shm-size).",
}
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
        r"gated repo|is restricted|awaiting a review|\b40[13] client error|invalid (user|hf) token",
        ConfigError,
        "ask for access on the model's page, and give a token that has it: --env HF_TOKEN=TOKEN",
    ),
    (
        r"not a valid model identifier|repository not found|\b404 client error",
        ConfigError,
        "check the model's name; a private model needs a token: --env HF_TOKEN=TOKEN",
    ),
    (
        r"couldn't connect to|max retries exceeded|name or service not known|temporary failure in name resolution"
        r"|cannot find the requested files in the (disk|local) cache|outgoing traffic has been disabled",
        ConfigError,
        "a connection to the Hugging Face hub, or a directory with the model in place of its name",
    ),
    (
        r"no space left on device|disk quota exceeded|not enough free disk space",
        CapacityError,
        "free some disk space, or keep models elsewhere: --env HF_HOME=DIRECTORY",
    ),
    (
        r"deserializing header|file not fully covered|incomplete ?metadata|header ?too ?(large|small)|invalid ?header"
        r"|pytorchstreamreader",
        ConfigError,
        "fetch the model's weights again: a file is cut off or damaged",
    ),
    (
        r"cannot find any model weights",
        ConfigError,
        "fetch the model's weights, or add --engine-arg load_format=dummy for random ones",
    ),
    (
        r"can't load tokenizer|instantiate the backend tokenizer|unable to load vocabulary|not a string.*tokenizer",
        ConfigError,
        "fetch the model's tokenizer files, or name another: --engine-arg tokenizer=DIRECTORY",
    ),
    (
        r"trust_remote_code",
        ConfigError,
        "--engine-arg trust_remote_code=true, if you trust the code that comes with the model",
    ),
    (
        r"cannot open shared object file|error while loading shared libraries|undefined symbol",
        EngineError,
        "install the vLLM that is built for this machine's driver, or add the library's directory: "
        "--env LD_LIBRARY_PATH=DIRECTORY",
    ),
    (
        r"driver .*(too old|insufficient)|no kernel image is available",
        EngineError,
        "a newer NVIDIA driver, or a vLLM that is built for this driver and GPU",
    ),
    (
        r"busy or unavailable",
        CapacityError,
        "stop what else uses the GPU",
    ),
    (
        r"invalid device ordinal|world size .*(larger|greater|exceeds)",
        ConfigError,
        "a --tp and --pp that this node's GPUs are enough for",
    ),
    (
        r"server socket has failed to listen|eaddrinuse",
        EngineError,
        "start again; another process took a port that the engine's workers had chosen",
    ),
    (
        r"not enough allowed NUMA nodes",
        ConfigError,
        "--env VLLM_CPU_OMP_THREADS_BIND=nobind, for workers that share the cores",
    ),
    (
        r"model architectures? .* (are not supported|failed to be inspected|is not supported)",
        ConfigError,
        "a model that this vLLM supports",
    ),
)
