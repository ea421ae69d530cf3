"""Bytes on each GPU against arithmetic by hand and against vLLM's own reports."""

import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.facts.layout import Layout, stages
from kervan.sim import limits as engine
from kervan.sim import memory
from kervan.sim.memory import GIB


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


GPU = hardware.gpu("H200")
SMALL = parse(config("llama3-8b"), "8b")
DEEPSEEK = parse(config("deepseek-v3"), "deepseek-v3")


@pytest.mark.parametrize(
    "line",
    (MODELS.parent / "records/memory-h200-2026-11-22.jsonl").read_text().splitlines(),
    ids=["8b", "8b-90", "70b"],
)
def test_what_vllm_reported_on_h200(line: str) -> None:
    row = json.loads(line)
    spec = parse(config(row["model"]), "test")
    limits = engine.limits(spec, GPU, {"gpu_memory_utilization": row["gpu_memory_utilization"]})
    found = memory.estimate(spec, Layout(row["tp"], row["pp"]), GPU, limits)
    assert found.weights_gib == pytest.approx(row["weights_gib_per_gpu"], rel=0.01)
    assert found.kv_tokens == pytest.approx(row["kv_cache_tokens"], rel=0.02)


REPORTED_H100 = [
    row
    for path in sorted((MODELS.parent / "records").glob("planner-points-2xh100-2026-11-27*.json"))
    for row in json.loads(path.read_text())["memory"]
]


@pytest.mark.parametrize("row", REPORTED_H100, ids=[f"{row['model']}-{n}" for n, row in enumerate(REPORTED_H100)])
def test_what_vllm_reported_on_two_h100(row: dict[str, Any]) -> None:
    """Experts shared out, two stages, two tensor parallel GPUs; model runners V1 and V2."""
    gpu = hardware.gpu("H100")
    spec = parse(config(row["model"]), "test")
    limits = engine.limits(spec, gpu, {"gpu_memory_utilization": row["gpu_memory_utilization"]})
    found = memory.estimate(spec, Layout(row["tp"], row["pp"], ep=row["ep"]), gpu, limits)
    assert found.weights_gib == pytest.approx(row["weights_gib_per_gpu"], rel=0.01)
    assert found.kv_tokens == pytest.approx(row["kv_cache_tokens"], rel=0.02)


def test_the_table_is_on_the_first_stage_and_the_head_on_the_last() -> None:
    table = 128256 * 4096 * 2
    first, last = (memory.weight_bytes(SMALL, Layout(pp=2), stage) for stage in stages(SMALL, 2))
    assert first == last  # 16 layers and one table each
    tied = parse(config("llama3-8b") | {"tie_word_embeddings": True}, "tied")
    whole = range(32)
    assert memory.weight_bytes(SMALL, Layout(), whole) - memory.weight_bytes(tied, Layout(), whole) == table
    assert memory.weight_bytes(tied, Layout(pp=2), range(16, 32)) == last  # a copy, since the other one is elsewhere


def test_quantised_layers_beside_what_is_left() -> None:
    fp8 = parse(config("llama3-8b") | {"quantization_config": {"quant_method": "fp8"}}, "fp8")
    tables = 2 * 128256 * 4096 * 2
    norms = 32 * 2 * 4096 * 2
    both = [memory.weight_bytes(spec, Layout(), range(32)) - tables - norms for spec in (SMALL, fp8)]
    assert both[1] == both[0] / 2


def test_windows_and_states_bound_what_a_sequence_keeps() -> None:
    limits = engine.limits(SMALL, GPU, {})
    sliding = parse(config("llama3-8b") | {"sliding_window": 128}, "sliding")
    each = 4096  # bytes of a token in a layer
    for length in (1000, 100_000):
        kept = min(length, 127 + 8192 + 16)
        assert memory.sequence_bytes(sliding, Layout(), limits, range(32), length) == 32 * each * kept
        assert memory.sequence_bytes(SMALL, Layout(), limits, range(32), length) == 32 * each * length


@pytest.mark.parametrize("gpu", ["L4", "A100", "H100", "H200", "B200"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_pool_is_never_negative(gpu: str, tp: int) -> None:
    spec, one = parse(config("llama3-70b"), "70b"), hardware.gpu(gpu)
    found = memory.estimate(spec, Layout(tp), one, engine.limits(spec, one, {}))
    assert found.kv_tokens >= 0
    assert found.kv_tokens % 16 == 0
    assert (found.kv_gib <= 0) == (not found.fits) or found.kv_gib * GIB < 16 * found.kv_bytes_per_token
    assert found.weights_gib + found.kv_gib < found.total_gib


def test_ranks_hold_all_but_the_routed_experts_whole() -> None:
    """DeepSeek-V3 in FP8 on 8 GPUs: 58 layers of 256 experts of 3 x 7168 x 2048 weights are 653.9e9 of its 671.0e9."""
    whole, one, eight = (
        memory.weight_bytes(DEEPSEEK, size, range(61)) for size in (Layout(), Layout(ep=8, attention_dp=8), Layout(8))
    )
    assert whole - one == pytest.approx(653_908_770_816 * 7 / 8)
    assert one == pytest.approx(
        100.5e9, rel=0.01
    )  # 653.9e9 / 8 = 81.7e9, and 18.8e9 of attention, shared experts, head
    assert eight < one


def test_each_rank_has_a_kv_cache_of_its_own() -> None:
    """A latent vector of 61 x 576 x 2 = 70,272 bytes is on every GPU with TP8, and on one of 8 with ranks."""
    limits = engine.limits(DEEPSEEK, GPU, {"max_num_batched_tokens": 2048})
    cut, ranks = (memory.estimate(DEEPSEEK, size, GPU, limits) for size in (Layout(8), Layout(ep=8, attention_dp=8)))
    assert ranks.kv_bytes_per_token == cut.kv_bytes_per_token == 70_272
    assert cut.kv_tokens == pytest.approx(cut.kv_gib * GIB / 70_272, abs=16)
    assert ranks.kv_tokens == pytest.approx(8 * ranks.kv_gib * GIB / 70_272, abs=8 * 16)
    # All tokens of all ranks reach the experts' kernels of each: 8 x 2048 x 8 chosen x (3 x 2048 + 7168) x 2 bytes.
    residual = 3 * 2048 * 7168 * 2
    assert ranks.activations_gib * GIB == pytest.approx(8 * 2048 * 8 * 13_312 * 2 + residual, rel=1e-6)
