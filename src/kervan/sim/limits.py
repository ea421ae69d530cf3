"""vLLM's settings that decide memory and batches, with the defaults of 0.24 to 0.32."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.architecture import ModelSpec, in_fp8
from kervan.facts.hardware import Gpu
from kervan.vendor.vllm_names import (
    COUNTED_ARGUMENTS,
    GPU_MEMORY_UTILIZATION,
    HARMLESS_ARGUMENTS,
    RUNNER_V2_ARCHITECTURES,
    UNCOUNTED_ARGUMENTS,
)

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
DTYPES = ("auto", "bfloat16", "float16", "half")  # of 16 bits, as weights and arithmetic are counted
# Other names that vLLM takes for the way a checkpoint is stored, by that of `ModelSpec.quantization`.
METHODS = {
    "modelopt": ("modelopt", "modelopt_mxfp8"), "modelopt mixed": ("modelopt", "modelopt_mixed"),
    "nvfp4": ("modelopt", "modelopt_fp4", "compressed-tensors"), "mxfp4": ("mxfp4", "gpt_oss_mxfp4"),
    "gptq": ("gptq", "gptq_marlin"), "awq": ("awq", "awq_marlin"),
}  # fmt: skip


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


def check_counted(spec: ModelSpec, arguments: Mapping[str, Any]) -> None:
    """Engine arguments that change memory or speed are counted, or refused.

    Raises: ConfigError for a name that vLLM does not have, for an argument that changes what is not counted, and for a
    `dtype`, `quantization` or `max_model_len` that vLLM refuses for this model or that is not counted.
    """
    for name, value in arguments.items():
        if name in UNCOUNTED_ARGUMENTS:
            if not _is_left_out(value, UNCOUNTED_ARGUMENTS[name]):
                raise ConfigError(
                    f"engine argument {name}={value} changes memory or speed, and a plan does not count it; plan "
                    "without it, and add it to kervan up with a layout of your own"
                )
        elif name not in COUNTED_ARGUMENTS and name not in HARMLESS_ARGUMENTS:
            known = sorted({*COUNTED_ARGUMENTS, *HARMLESS_ARGUMENTS, *UNCOUNTED_ARGUMENTS})
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see 'vllm serve --help=all' for the names"
            raise ConfigError(f"vLLM has no engine argument {name!r}; {hint}")
    dtype = str(arguments.get("dtype") or "auto")
    if dtype not in DTYPES:
        raise ConfigError(f"engine argument dtype={dtype} is not counted; use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    _check_quantization(spec, arguments.get("quantization"))
    try:
        length = float(arguments.get("max_model_len") or 0)
    except (TypeError, ValueError):
        return  # `limits` says what is wrong
    if spec.has_max_model_len and length > spec.max_model_len:
        raise ConfigError(
            f"engine argument max_model_len={arguments['max_model_len']} is above the {spec.max_model_len} tokens of "
            f"{spec.source}, and vLLM refuses that; use at most max_model_len={spec.max_model_len}"
        )


def _is_left_out(value: Any, default: str) -> bool:
    """Whether a value is like leaving the argument out. YAML's null is left out by `kervan up`."""
    if value is None or value in ({}, []):
        return True
    if str(value).lower() == default:
        return True
    try:
        return float(value) == float(default)
    except (TypeError, ValueError):
        return False


def _check_quantization(spec: ModelSpec, method: Any) -> None:
    if method is None or (spec.quantization is None and method == "fp8"):
        return
    if spec.quantization is None:
        raise ConfigError(
            f"engine argument quantization={method} is not counted for a model that is stored in 16 bit; use "
            f"quantization=fp8, or plan with the config.json of a checkpoint in {method}"
        )
    own = spec.quantization.method
    if method not in METHODS.get(own, (own,)):
        raise ConfigError(
            f"engine argument quantization={method} is not how {spec.source} is stored: {own}, and vLLM takes nothing "
            "else for it; leave quantization out"
        )


def as_served(spec: ModelSpec, arguments: Mapping[str, Any]) -> ModelSpec:
    """The model as vLLM holds it with these arguments: `quantization=fp8` makes FP8 of 16 bit weights."""
    return in_fp8(spec) if spec.quantization is None and arguments.get("quantization") == "fp8" else spec


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
