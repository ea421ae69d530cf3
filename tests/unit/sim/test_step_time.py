"""Step times: the terms, and what may never make a step slower."""

import dataclasses
import json
from typing import Any

import pytest
from harness.places import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.facts import hardware
from kervan.facts.architecture import in_fp8, parse
from kervan.facts.layout import Layout
from kervan.sim import limits as engine
from kervan.sim.constants import Constants
from kervan.sim.step_time import Batch, StepTime


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


GPU = hardware.gpu("H200")
SPECS = {name: parse(config(name), name) for name in ("llama3-8b", "llama3-70b", "qwen3-30b-a3b")}
SPECS["llama3-70b in fp8"] = in_fp8(SPECS["llama3-70b"])
BATCHES = st.builds(
    lambda sequences, length, prompt: Batch(
        sequences, float(sequences * length), prompt, prompt * prompt / 2.0, sequences + 1
    ),
    st.integers(1, 512), st.integers(1, 8000), st.integers(0, 8000),
)  # fmt: skip


def step_time(name: str = "llama3-8b", layout: Layout = Layout(), gpu: hardware.Gpu = GPU) -> StepTime:  # noqa: B008
    return StepTime(SPECS[name], layout, gpu, engine.limits(SPECS[name], gpu, {}), Constants())


@settings(max_examples=40, deadline=None)
@given(BATCHES, st.sampled_from(sorted(SPECS)), st.sampled_from([1, 2, 4]), st.floats(1.0, 4.0))
def test_better_hardware_is_never_slower(batch: Batch, name: str, tp: int, factor: float) -> None:
    base = step_time(name, Layout(tp)).total_s(batch)
    for changed in ("bandwidth_bytes_s", "bf16_flops", "fp8_flops"):
        better = dataclasses.replace(GPU, **{changed: getattr(GPU, changed) * factor})
        assert step_time(name, Layout(tp), better).total_s(batch) <= base * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(BATCHES, st.sampled_from(sorted(SPECS)), st.sampled_from([Layout(), Layout(2), Layout(2, 2), Layout(1, 3)]))
def test_terms_add_up_to_the_whole(batch: Batch, name: str, layout: Layout) -> None:
    time = step_time(name, layout)
    parts = [time.terms(i, batch).total_s for i in range(layout.pp)]
    assert parts == pytest.approx([time.stage_s(i, batch) for i in range(layout.pp)])
    assert time.stages_s(batch) == pytest.approx(parts)
    assert time.total_s(batch) == pytest.approx(sum(parts) + (layout.pp - 1) * time.hand_over_s(batch))


def test_one_stream_reads_all_weights_once() -> None:
    # 7.50e9 weights of 2 bytes beside the table at 4.8 TB/s are 3.13 ms; kernels and less than full speed come on top.
    found_s = step_time().total_s(Batch(1, 1024.0, 0, 0.0, 1))
    assert 3.13e-3 < found_s < 6e-3


def test_stages_share_out_the_layers_but_not_their_sum() -> None:
    batch = Batch(16, 16 * 1024.0, 0, 0.0, 16)
    one, two = step_time(), step_time(layout=Layout(pp=2))
    assert max(two.stages_s(batch)) < one.total_s(batch)
    assert two.total_s(batch) > 0.95 * one.total_s(batch)


def test_a_network_between_stages_takes_longer() -> None:
    spec = SPECS["llama3-70b"]
    limits = engine.limits(spec, GPU, {})
    batch = Batch(0, 0.0, 8192, 8192 * 512.0, 8)
    inside = StepTime(spec, Layout(8, 2), GPU, limits, Constants())
    across = StepTime(spec, Layout(8, 2), GPU, limits, Constants(), network_bytes_s=12.5e9)
    # 2 x 8192 tokens x 8192 x 2 bytes / 8 ranks = 33.6 MB at 12.5 GB/s: 2.7 ms.
    assert across.hand_over_s(batch) - inside.hand_over_s(batch) == pytest.approx(2.7e-3, rel=0.1)


def test_experts_in_fp8_are_computed_at_its_rate() -> None:
    """Prompts of many tokens are bound by arithmetic: about half the time on H200, where FP8 has twice the rate."""
    spec = SPECS["qwen3-30b-a3b"]
    many = Batch(0, 0, 8192, 8192 * 512.0, 8)
    limits = engine.limits(spec, GPU, {})
    plain, quantised = (
        StepTime(one, Layout(), GPU, limits, Constants()).terms(0, many).experts for one in (spec, in_fp8(spec))
    )
    assert quantised == pytest.approx(plain / 2, rel=0.05)


def prompts(count: int, more: int = 0) -> Batch:
    """Prompts of 1,024 tokens, and so many sequences that run."""
    return Batch(more, 1152.0 * more, 1024 * count, count * 1024 * 512.0, count + more)


def test_a_prompt_in_fp8_computes_whole_pairs_of_tiles() -> None:
    # 68.5e9 weights x 2 x 1,024 tokens at 1,979 Tflop/s x 0.70 x 0.88: 115 ms. 1,032 tokens are five pairs of 128 rows
    # and not four: 144 ms.
    time = step_time("llama3-70b in fp8")
    assert time.terms(0, prompts(1)).compute == pytest.approx(0.115, rel=0.01)
    assert time.terms(0, prompts(1, 8)).compute == pytest.approx(0.144, rel=0.01)
    assert time.terms(0, prompts(1, 256)).compute == pytest.approx(0.144, rel=0.01)


def test_a_gpu_without_fp8_units_computes_its_weights_in_16_bit() -> None:
    a100 = hardware.gpu("A100")
    plain, stored = (step_time(name, gpu=a100) for name in ("llama3-70b", "llama3-70b in fp8"))
    for batch in (prompts(1), prompts(1, 8)):
        assert stored.terms(0, batch).compute == pytest.approx(plain.terms(0, batch).compute, rel=0.01)
    assert stored.terms(0, prompts(1)).kernels == plain.terms(0, prompts(1)).kernels


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(0, 9000), st.integers(0, 300), st.sampled_from(sorted(SPECS)))
def test_more_to_do_never_takes_less(sequences: int, prompt: int, more: int, name: str) -> None:
    time = step_time(name)
    times_s = [time.total_s(Batch(n, 1000.0 * n, prompt, prompt * 512.0, n + 1)) for n in (sequences, sequences + more)]
    assert times_s[0] <= times_s[1] * (1 + 1e-9)


RANKS = Layout(ep=4, attention_dp=4)


@settings(max_examples=40, deadline=None)
@given(BATCHES)
def test_ranks_share_the_work_of_experts_as_those_of_tp_do(batch: Batch) -> None:
    ranks, cut = step_time("qwen3-30b-a3b", RANKS), step_time("qwen3-30b-a3b", Layout(4, ep=4))
    terms = ranks.terms(0, batch)
    assert terms.total_s == pytest.approx(ranks.total_s(batch))
    assert terms.experts == pytest.approx(cut.terms(0, batch).experts)  # all tokens, and each GPU has the same experts
    assert (terms.all_reduce, cut.terms(0, batch).exchange) == (0, 0)


@pytest.mark.parametrize(
    ("batch", "of_rank"),
    [
        # 10 sequences on 4 ranks: 3 on the fullest, with 3 tenths of the context.
        (Batch(10, 5000.0, 0, 0.0, 10), Batch(3, 1500.0, 0, 0.0, 3)),
        # One prompt is on one rank, and the others wait for it; so is one that is computed in part alone.
        (Batch(4, 400.0, 1000, 5e5, 5), Batch(1, 100.0, 1000, 5e5, 2)),
        (Batch(4, 400.0, 1000, 5e5, 4), Batch(1, 100.0, 1000, 5e5, 1)),
        # Six prompts on 4 ranks: two on the fullest.
        (Batch(0, 0.0, 6000, 3e6, 6), Batch(0, 0.0, 2000, 1e6, 2)),
    ],
)  # fmt: skip
def test_a_step_waits_for_the_fullest_rank(batch: Batch, of_rank: Batch) -> None:
    """Beside the experts, a step takes what that rank alone would take with its own requests."""
    ranks, alone = step_time("qwen3-30b-a3b", RANKS).terms(0, batch), step_time("qwen3-30b-a3b").terms(0, of_rank)
    for term in ("weights", "compute", "kv_read", "prefill_attention", "head", "overhead", "kernels"):
        assert getattr(ranks, term) == pytest.approx(getattr(alone, term)), term


def test_all_tokens_go_to_all_ranks_and_back() -> None:
    """256 tokens of 7,168 numbers, FP8 with a scale for 128 out and 16 bit back, 7 of 8 parts over NVLink: 58 layers
    of 1.89 MB + 3.67 MB, x 7/8 at 450 x 0.95 GB/s, are 0.66 ms; the latencies are 2 x 58 x 1.75 x 6.4 us = 1.30 ms.
    """
    spec = parse(config("deepseek-v3"), "deepseek-v3")
    times = StepTime(spec, Layout(ep=8, attention_dp=8), GPU, engine.limits(spec, GPU, {}), Constants())
    found = times.terms(0, Batch(256, 256 * 1536.0, 0, 0.0, 256))
    assert found.exchange == pytest.approx(0.66e-3 + 1.30e-3, rel=0.01)


def test_one_rank_without_a_graph_leaves_all_without() -> None:
    """A prompt of 1,024 tokens on one rank: all wait for a host that launches 48 layers, 2.04 ms each."""
    times = step_time("qwen3-30b-a3b", RANKS)
    with_prompt = Batch(64, 64 * 1024.0, 1024, 1024 * 512.0, 65)
    assert times.total_s(with_prompt) == pytest.approx(48 * 2.04e-3, rel=0.01)
    assert times.total_s(Batch(64, 64 * 1024.0, 0, 0.0, 64)) < 0.02
