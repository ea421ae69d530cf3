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


# As torch's profiler named them on an H200 with vLLM 0.24, some of their template's arguments left out.
_MAINLOOP = (
    "flash::CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1>, cute::C<1> >, 128, cutlass::bfloat16_t, true, 1>"
)
_ATTENTION = f"flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<{_MAINLOOP}, flash::CollectiveEpilogueFwd<float> > >"
_COMBINE = "flash::FlashAttnFwdCombine<cute::tuple<cute::C<8>, cute::C<128> >, 5, 256, 1, false, cutlass::arch::Sm90>"
ATTENTION = f"void cutlass::device_kernel<{_ATTENTION} >({_ATTENTION}::Params)"
COMBINE = f"void cutlass::device_kernel<{_COMBINE} >({_COMBINE}::Params)"
SPLIT_K = (
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, false>(cublasLt::cublasSplitKParams<float>, "
    "float const*, __nv_bfloat16 const*, float*, __nv_bfloat16*)"
)
CACHE = (
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, (vllm::Fp8KVCacheDataType)0>(__nv_bfloat16 const*, int)"
)
INDEX = (
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_kernel_impl<"
    "at::native::OpaqueType<2> >(at::TensorIteratorBase&, c10::ArrayRef<long>)::{lambda(char*, long)#1}>(long)::"
    "{lambda(int)#1}>(long, at::native::gpu_index_kernel<int>(at::TensorIteratorBase&)::{lambda(int)#1})"
)
ARANGE = (
    "void (anonymous namespace)::elementwise_kernel_with_index<int, at::native::arange_cuda_out(c10::Scalar const&)::"
    "{lambda()#1}::operator()() const::{lambda(long)#1}>(int, function_traits<int>::result_type*)"
)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (ATTENTION, "flash::FlashAttnFwdSm90"),
        (COMBINE, "flash::FlashAttnFwdCombine"),
        (SPLIT_K, "cublasLt::splitKreduce_kernel"),
        (CACHE, "vllm::reshape_and_cache_flash_kernel"),
        (INDEX, "at::native::index_elementwise_kernel"),
        (ARANGE, "elementwise_kernel_with_index"),
        (INDEX[:150], "at::native::index_elementwise_kernel"),  # cut off, as reports cut long names off
        (ATTENTION[:110], "flash::FlashAttnFwdSm90"),
        ("void at::native::elementwise_kernel<128, 4, at::native::impl<X>>(int, X)", "at::native::elementwise_kernel"),
        ("std::enable_if<true, void>::type a::kernel<4>(int)", "a::kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
        ("Memset (Device)", "Memset"),
        ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_splitK_TNT", "nvjet_sm90_tst_128x8_64x12_2x1_v_bz_splitK_TNT"),
        ("(anonymous)", "(anonymous)"),
    ],
)
def test_a_kernels_name_says_what_runs(name: str, short: str) -> None:
    assert device.short_name(name) == short


@pytest.mark.parametrize(
    ("name", "prefill", "bound"),
    [
        (ATTENTION, 0, "memory"), (ATTENTION, 2048, "compute"), (COMBINE, 2048, "memory"), (CACHE, 2048, "memory"),
        (SPLIT_K, 2048, "memory"), ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_splitK_TNT", 2048, "compute"),
    ],
)  # fmt: skip
def test_what_only_adds_up_or_stores_waits_for_memory(name: str, prefill: int, bound: str) -> None:
    batch = traces.StepBatch(0, 1, bool(prefill), prefill, 64, 64)
    assert device.bound_of(traces.Event(name, cat="kernel"), batch, H200) == bound


def test_attention_that_reads_caches_is_told_apart_from_products_that_read_weights() -> None:
    found = device.use(trace_of(DECODE, kernel(ATTENTION, 0, 30), kernel("nvjet_tst", 30, 10)), (0, 50), [], H200)
    assert (found.shares["memory"], found.cache_reading) == pytest.approx((0.8, 0.6))
