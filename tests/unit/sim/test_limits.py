"""vLLM's defaults by GPU and version, and the KV cache's type."""

import dataclasses
import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.sim import limits

LLAMA: dict[str, Any] = json.loads((MODELS / "llama3-8b" / "config.json").read_text())
FP8_CACHE = {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("gpu", "vllm", "wanted"),
    [
        ("H100", (0, 32), (8192, 1024)),
        ("H200", (0, 24), (8192, 1024)),
        ("A100", (0, 24), (2048, 256)),  # 80 GiB, and named
        ("A100", (0, 32), (2048, 256)),
        ("L4", (0, 32), (2048, 256)),
        ("T4", (0, 32), (2048, 256)),
        ("V100-32", (0, 24), (2048, 256)),
        ("RTX-A6000", (0, 32), (2048, 256)),
        ("RTX-PRO-6000", (0, 32), (8192, 1024)),
        ("H20", (0, 24), (8192, 1024)),
        ("H20-141", (0, 32), (8192, 1024)),
        ("MI325X", (0, 24), (8192, 1024)),
        ("MI325X", (0, 32), (16384, 1024)),
        ("MI355X", (0, 32), (16384, 1024)),
        ("B200", (0, 24), (8192, 1024)),
        ("B200", (0, 32), (16384, 1024)),
    ],
)
def test_batches_by_gpu_and_version(gpu: str, vllm: tuple[int, int], wanted: tuple[int, int]) -> None:
    found = limits.limits(parse(LLAMA, "8b"), hardware.gpu(gpu), {}, vllm=vllm)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == wanted
    given = limits.limits(parse(LLAMA, "8b"), hardware.gpu(gpu), {"max_num_batched_tokens": 128}, vllm=vllm)
    assert given.max_num_seqs == 128


@pytest.mark.parametrize("gpu", hardware.GPUS.values(), ids=hardware.GPUS)
def test_no_gpu_is_so_near_a_step_that_the_drivers_figure_matters(gpu: hardware.Gpu) -> None:
    # vLLM asks the driver (NVML, amdsmi) how much memory there is; `batch_defaults` goes by what CUDA counts.
    for step_gib in (limits.LARGE_GPU_GIB, limits.LARGEST_GPU_GIB):
        assert (gpu.memory_mib / 1024 >= step_gib) == (gpu.memory_gib >= step_gib)


@pytest.mark.parametrize(
    ("settings", "argument", "wanted"),
    [(None, "auto", 2), (FP8_CACHE, "auto", 1), (FP8_CACHE, "bfloat16", 2), (None, "fp8", 1), (None, "nvfp4", 0.5625)],
)
def test_the_type_of_the_cache(settings: dict[str, Any] | None, argument: str, wanted: float) -> None:
    spec = parse(LLAMA | {"quantization_config": settings}, "8b")
    assert limits.limits(spec, hardware.gpu("H100"), {"kv_cache_dtype": argument}).kv_dtype_bytes == wanted
    if argument == "auto":
        assert limits.limits(spec, hardware.gpu("H100"), {}).kv_dtype_bytes == wanted


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "half", "quantization": "fp8", "max_model_len": "8192", "kv_cache_dtype": "fp8"},
        {"seed": 1, "load_format": "dummy", "enable_prefix_caching": False, "tool_call_parser": "hermes"},
        # As if they were left out.
        {"enforce_eager": False, "cpu_offload_gb": "0", "enable_chunked_prefill": True, "stream_interval": "1"},
        {"speculative_config": None, "compilation_config": {}, "model_impl": "auto", "quantization": None},
    ],
)
def test_arguments_that_count_or_change_nothing(arguments: dict[str, Any]) -> None:
    limits.check_counted(parse(LLAMA, "8b"), arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enforce_eager": True}, "enforce_eager=True changes memory or speed, and a plan does not count it"),
        ({"cpu_offload_gb": "4"}, r"cpu_offload_gb=4 changes .* plan without it, and add it to kervan up"),
        ({"speculative_config": {"method": "ngram"}}, r"speculative_config=.* does not count it"),
        ({"enable_lora": True}, "enable_lora=True changes"),
        ({"num_gpu_blocks_override": "100"}, "num_gpu_blocks_override=100 changes"),
        ({"kv_cache_memory_bytes": "1000"}, "kv_cache_memory_bytes=1000 changes"),
        ({"decode_context_parallel_size": "2"}, "decode_context_parallel_size=2 changes"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill=False changes"),
        ({"max_modle_len": "4096"}, r"no engine argument 'max_modle_len'; did you mean max_model_len"),
        ({"zzz": "1"}, "see 'vllm serve --help=all'"),
        ({"dtype": "float32"}, "dtype=float32 is not counted; use auto, bfloat16, float16 or half"),
        ({"max_model_len": "8193"}, "max_model_len=8193 is above the 8192 tokens of 8b.*at most max_model_len=8192"),
        (
            {"quantization": "awq"},
            "quantization=awq is not counted for a model that is stored in 16 bit; use quant.*=fp8",
        ),
    ],
    ids=str,
)
def test_arguments_that_are_not_counted(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        limits.check_counted(parse(LLAMA, "8b"), arguments)


@pytest.mark.parametrize(
    ("settings", "method", "is_own"),
    [
        ({"quant_method": "fp8"}, "fp8", True),
        ({"quant_method": "awq", "bits": 4}, "awq_marlin", True),
        ({"quant_method": "awq", "bits": 4}, "fp8", False),
        ({"quant_method": "fp8"}, "awq", False),
        ({"quant_algo": "NVFP4"}, "modelopt_fp4", True),
    ],
)
def test_a_stored_quantisation_is_the_only_one(settings: dict[str, Any], method: str, is_own: bool) -> None:
    spec = parse(LLAMA | {"quantization_config": settings}, "8b")
    assert limits.as_served(spec, {"quantization": method}) is spec
    if is_own:
        limits.check_counted(spec, {"quantization": method})
        return
    with pytest.raises(ConfigError, match=f"quantization={method} is not how 8b is stored: {settings['quant_method']}"):
        limits.check_counted(spec, {"quantization": method})


def test_fp8_halves_the_layers() -> None:
    spec = parse(LLAMA, "8b")
    served = limits.as_served(spec, {"quantization": "fp8"})
    assert limits.as_served(spec, {}) is spec
    # 8.03 B weights, of which the two tables (2 x 128256 x 4096) stay in 16 bit.
    assert served.weights_bytes == pytest.approx(8.03e9 + 2 * 128256 * 4096, rel=0.001)


def test_a_length_that_the_config_does_not_say_is_not_checked() -> None:
    said = parse(LLAMA, "8b")
    arguments = {"max_model_len": "100000"}
    with pytest.raises(ConfigError, match="is above"):
        limits.check_counted(said, arguments)
    unsaid = dataclasses.replace(said, has_max_model_len=False)
    limits.check_counted(unsaid, arguments)
    assert limits.limits(unsaid, hardware.gpu("H200"), arguments).max_model_len == 100_000
