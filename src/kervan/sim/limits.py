"""vLLM's settings that decide memory and batches, with the defaults of 0.24 to 0.32."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.vendor.vllm_names import GPU_MEMORY_UTILIZATION, RUNNER_V2_ARCHITECTURES

LARGE_GPU_GIB = 70  # from here on vLLM's defaults are larger, but on A100; source: EngineArgs.get_batch_defaults, 0.24
LARGEST_GPU_GIB = 160  # from here on they are larger once more since 0.32
NEWEST = (0, 32)
MAX_GRAPH_TOKENS = 512  # largest captured CUDA graph; source: vLLM 0.24's default capture sizes
BLOCK_TOKENS = 16
# Bytes of a number in the KV cache; `auto` takes the checkpoint's type.
KV_DTYPE_BYTES = {
    "auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "fp8_inc": 1.0,
    "nvfp4": 0.5 + 1 / 16,
}  # fmt: skip
# The engine arguments that `limits` reads.
COUNTED = frozenset(
    {"max_num_batched_tokens", "max_num_seqs", "max_model_len", "gpu_memory_utilization", "kv_cache_dtype"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Engine arguments under vLLM's names, the bytes of a cached value, and which of vLLM's model runners serves."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    kv_dtype_bytes: float = 2.0
    is_runner_v2: bool = True


def batch_defaults(gpu: Gpu, vllm: tuple[int, int] = NEWEST) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) of vLLM's server on this GPU.

    Source: EngineArgs.get_batch_defaults, 0.24 and 0.32.
    """
    if gpu.memory_gib >= LARGEST_GPU_GIB and vllm >= (0, 32):
        return 16384, 1024
    if gpu.memory_gib >= LARGE_GPU_GIB and "a100" not in gpu.name.lower():
        return 8192, 1024
    return 2048, 256


def limits(
    spec: ModelSpec,
    gpu: Gpu,
    arguments: Mapping[str, Any],
    *,
    needed_tokens: int = 0,
    vllm: tuple[int, int] = NEWEST,
) -> EngineLimits:
    """What vLLM, of version `vllm`, would use with these engine arguments.

    `needed_tokens`: the longest request of the workload; without `max_model_len`, 8192 or the power of two that holds
    it, and no more than the model allows.

    Raises: ConfigError for a value that is no number or out of range.
    """
    default_tokens, default_seqs = batch_defaults(gpu, vllm)

    def number(name: str, default: float, least: float, most: float) -> float:
        value = arguments.get(name)
        if value is None:
            return default
        try:
            converted = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"engine argument {name}={value!r} is not a number; write for example {name}={default:g}"
            ) from error
        if not least <= converted <= most:
            raise ConfigError(
                f"engine argument {name}={value} is outside {least:g} to {most:g}; the default is {default:g}"
            )
        return converted

    budget = int(number("max_num_batched_tokens", default_tokens, 64, 1e7))
    fitting = max(8192, 1 << max(0, needed_tokens - 1).bit_length())
    kv_dtype = str(arguments.get("kv_cache_dtype", "auto"))
    if kv_dtype not in KV_DTYPE_BYTES:
        raise ConfigError(f"engine argument kv_cache_dtype={kv_dtype!r} is none of {', '.join(KV_DTYPE_BYTES)}")
    return EngineLimits(
        max_num_batched_tokens=budget,
        max_num_seqs=int(number("max_num_seqs", min(budget, default_seqs), 1, budget)),
        max_model_len=int(number("max_model_len", min(fitting, spec.max_model_len), 1, 1e8)),
        gpu_memory_utilization=number("gpu_memory_utilization", GPU_MEMORY_UTILIZATION, 0.01, 1.0),
        kv_dtype_bytes=spec.kv_dtype_bytes if kv_dtype == "auto" else KV_DTYPE_BYTES[kv_dtype],
        is_runner_v2=spec.architecture in RUNNER_V2_ARCHITECTURES,
    )
