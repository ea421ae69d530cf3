"""What a GPU waits for: traces made by hand, whose shares can be worked out on paper."""

import json
from typing import Any

import pytest

from kervan.facts import hardware
from kervan.profile import device
from kervan.profile import trace as traces

H200 = hardware.gpu("H200")


def kernel(name: str, ts: float, dur: float, cat: str = "kernel", stream: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": stream}


def trace_of(*events: dict[str, Any]) -> traces.TorchTrace:
    file = {"traceEvents": list(events), "deviceProperties": [{"name": "NVIDIA H200"}], "baseTimeNanoseconds": 5}
    return traces.read(json.dumps(file).encode())


DECODE = kernel("execute_context_0(0)_generation_64(64)", 0, 60, cat="gpu_user_annotation")
PREFILL = kernel("execute_context_1(2048)_generation_0(0)", 60, 40, cat="gpu_user_annotation")


def test_shares_add_up_and_say_what_the_gpu_waits_for() -> None:
    # Of 100 us: 30 a product in a decode, 10 NCCL, 5 a copy, 20 a product in a prefill; 35 nothing, of which 15 idle.
    found = device.use(
        trace_of(
            DECODE, PREFILL, kernel("nvjet_tst_64x8", 0, 30), kernel("ncclDevKernel_AllReduce", 30, 10),
            kernel("Memcpy HtoD", 40, 5, cat="gpu_memcpy"), kernel("nvjet_tst_256x128", 60, 20),
        ),
        (0, 100), [(85, 100)], H200,
    )  # fmt: skip
    assert found.shares == pytest.approx(
        {"memory": 0.3, "communication": 0.1, "copies": 0.05, "compute": 0.2, "nothing to do": 0.15, "host": 0.2}
    )
    assert (found.waits_for, found.num_kernels) == ("memory", 4)
    assert [(k.name, k.calls, k.bound) for k in found.kernels[:2]] == [
        ("nvjet_tst_64x8", 1, "memory"), ("nvjet_tst_256x128", 1, "compute"),
    ]  # fmt: skip


def test_kernels_beside_each_other_are_not_counted_twice() -> None:
    found = device.use(trace_of(DECODE, kernel("a", 0, 50), kernel("ncclB", 0, 50, stream=9)), (0, 100), [], H200)
    assert found.shares == pytest.approx({"memory": 0.25, "communication": 0.25, "nothing to do": 0, "host": 0.5})


def test_kernels_without_work_before_or_after_wait_for_nothing_to_do() -> None:
    found = device.use(trace_of(kernel("k", 200, 5)), (0, 100), [(0, 100)], H200)
    assert found.shares == {"nothing to do": 1.0, "host": 0.0} and found.kernels == ()


@pytest.mark.parametrize(
    ("name", "step", "bound"),
    [
        # The edge of an H200: 989.5e12 / 4.8e12 = 206 tokens.
        ("void cutlass::Kernel2<cutlass_80_wmma_gemm>(int)", 64, "memory"),
        ("void cutlass::Kernel2<cutlass_80_wmma_gemm>(int)", 205, "memory"),
        ("void cutlass::Kernel2<cutlass_80_wmma_gemm>(int)", 207, "compute"),
        ("fused_moe_kernel", 4096, "compute"),
        ("void at::native::vectorized_elementwise_kernel<4>", 4096, "memory"),
        ("cross_device_reduce_1stage all_reduce", 64, "communication"),
    ],
)
def test_the_roofline_is_by_tokens_of_the_step(name: str, step: int, bound: str) -> None:
    batch = traces.StepBatch(0, 1, 0, 0, step, step)
    assert device.bound_of(traces.Event(name, cat="kernel"), batch, H200) == bound


def test_attention_reads_in_a_decode_and_computes_in_a_prefill() -> None:
    event = traces.Event("flash_fwd_splitkv_kernel", cat="kernel")
    assert device.bound_of(event, traces.StepBatch(0, 1, 0, 0, 64, 64), H200) == "memory"
    assert device.bound_of(event, traces.StepBatch(0, 1, 1, 2048, 8, 8), H200) == "compute"
    assert device.bound_of(event, None, H200) == "unknown"


def test_a_gpu_that_is_not_in_the_table_has_no_side_of_its_roofline() -> None:
    batch = traces.StepBatch(0, 1, 0, 0, 64, 64)
    assert device.bound_of(traces.Event("gemm", cat="kernel"), batch, None) == "unknown"


def test_names_lose_their_templates() -> None:
    name = "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<X>>(int, X)"
    assert device.short_name(name) == "at::native::elementwise_kernel"
    assert device.short_name("(anonymous)") == "(anonymous)"
