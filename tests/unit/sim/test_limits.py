"""vLLM's defaults by GPU and version, and the KV cache's type."""

import json
from typing import Any

import pytest
from harness.places import MODELS

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
