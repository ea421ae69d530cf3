"""Which layouts a model allows."""

import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.errors import ConfigError
from kervan.facts import layout
from kervan.facts.architecture import ModelSpec, parse
from kervan.facts.layout import Layout, parse_layout


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


SPEC = parse(config("llama3-70b"), "70b")
EXPERTS = parse(config("qwen3-30b-a3b"), "30b")


def names(gpus: int, gpus_per_node: int = 8) -> set[str]:
    return {str(one) for one in layout.sizes(SPEC, gpus=gpus, gpus_per_node=gpus_per_node)}


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (Layout(tp=3), "tp=3 does not divide 64 attention heads; use 1, 2, 4, 8, 16, 32 or 64"),
        (Layout(pp=81), "at most pp=80"),
        (Layout(tp=2, ep=2), "the model has none"),
    ],
)
def test_cuts_that_are_refused(one: Layout, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout.check(SPEC, one)


def test_experts_are_shared_out_over_all_gpus_of_a_layer_or_none() -> None:
    layout.check(EXPERTS, Layout(tp=2, ep=2))
    with pytest.raises(ConfigError, match="neither 1 nor tp=4"):
        layout.check(EXPERTS, Layout(tp=4, ep=2))


def test_stages_as_vllm_deals_them() -> None:
    assert [len(stage) for stage in layout.stages(SPEC, 3)] == [26, 27, 27] or [
        len(stage) for stage in layout.stages(SPEC, 3)
    ] == [27, 27, 26]
    assert [i for stage in layout.stages(SPEC, 7) for i in stage] == list(range(80))


def test_six_gpus_may_leave_two_idle() -> None:
    assert {"TP4", "TP2xPP3", "TP2xPP2", "TP1"} <= names(6)
    assert "TP3" not in names(6)  # 64 heads
    assert names(1) == {"TP1"}


def test_powers_of_two_leave_no_gpu_idle() -> None:
    for one in layout.sizes(SPEC, gpus=64, gpus_per_node=8):
        assert 64 % one.gpus_per_replica == 0
        assert one.tp <= 8


def test_three_nodes_are_three_stages() -> None:
    assert "TP8xPP3" in names(24)


def test_no_tensor_parallel_group_is_cut_by_a_node() -> None:
    # Two nodes of six: a TP4 on each, not three of them.
    assert layout.most_copies(Layout(tp=4), gpus=12, gpus_per_node=6) == 2
    assert layout.most_copies(Layout(tp=2, pp=2), gpus=12, gpus_per_node=6) == 3
    assert layout.nodes_per_replica(Layout(tp=8, pp=2), 8) == 2
    assert layout.nodes_per_replica(Layout(tp=4, pp=2), 8) == 1


@pytest.mark.parametrize("text", ["", "tp", "tp=0", "tp=-1", "x=2", "tp=2,tp=2", "tp=99999999", "tp=two"])
def test_bad_layouts(text: str) -> None:
    with pytest.raises(ConfigError):
        layout.parse_layout(text)


def test_a_layout_as_users_write_it() -> None:
    assert layout.parse_layout("tp=2, pp=2") == {"tp": 2, "pp": 2}


BLOCK_FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def test_blocks_of_fp8_weights_are_not_cut() -> None:
    """Experts of 768 on four GPUs are 192 wide, one and a half blocks; whole experts are not cut."""
    spec = parse(config("qwen3-30b-a3b") | BLOCK_FP8, "30b")
    layout.check(spec, Layout(tp=2))
    layout.check(spec, Layout(tp=4, ep=4))
    with pytest.raises(ConfigError, match=r"cuts the 768 of experts into 192 each, which the FP8 blocks of 128 do not"):
        layout.check(spec, Layout(tp=4))
    with pytest.raises(ConfigError, match=r"use 1 or 2 \(--tp, or --layout tp=\), or ep=4, which keeps experts whole"):
        layout.check(spec, Layout(tp=4))
    names = {str(one) for one in layout.sizes(spec, gpus=8, gpus_per_node=8)}
    assert {"TP2", "TP4xEP4", "TP2xEP2"} <= names
    assert "TP4" not in names


def test_states_are_cut_by_what_divides_their_heads() -> None:
    hybrid = config("llama3-8b") | {
        "model_type": "bamba", "attn_layer_indices": [4], "mamba_n_heads": 6, "mamba_d_head": 64, "mamba_d_state": 16,
        "mamba_n_groups": 1,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="tp=4 does not divide 6 units of a mamba2 layer; use 1 or 2"):
        layout.check(parse(hybrid, "hybrid"), Layout(tp=4))


def test_ranks_that_share_experts_are_one_replica() -> None:
    one = Layout(dp=2, ep=4, attention_dp=4)
    assert (str(one), one.gpus_per_replica, one.gpus, one.starts_with) == ("2 x ADP4xEP4", 4, 8, "vllm serve")
    assert (Layout(8, ep=8).gpus_per_replica, Layout(8, ep=8).starts_with) == (8, "kervan up")
    assert layout.parse_layout("attention_dp=8") == {"attention_dp": 8}
    found = {str(one) for one in layout.sizes(EXPERTS, gpus=8, gpus_per_node=8)}
    assert {"ADP2xEP2", "ADP4xEP4", "ADP8xEP8"} <= found
    assert not any(one.attention_dp > 1 for one in layout.sizes(SPEC, gpus=8, gpus_per_node=8))  # no experts
    assert not any(one.attention_dp > 4 for one in layout.sizes(EXPERTS, gpus=8, gpus_per_node=4))  # one node each
    assert layout.most_copies(Layout(ep=4, attention_dp=4), gpus=16, gpus_per_node=8) == 4
    assert layout.nodes_per_replica(Layout(ep=8, attention_dp=8), 8) == 1


@pytest.mark.parametrize(
    ("spec", "one", "words"),
    [
        (SPEC, Layout(ep=8, attention_dp=8), "the model has none; use dp=8"),
        (EXPERTS, Layout(tp=2, ep=4, attention_dp=4), "a rank is one GPU; use attention_dp=4 alone"),
        (EXPERTS, Layout(pp=2, ep=4, attention_dp=4), "tp=1 and pp=2 is not counted"),
        (EXPERTS, Layout(ep=2, attention_dp=4), "ep=2 does not; use ep=4"),
        (EXPERTS, Layout(ep=3, attention_dp=3), "does not divide 128 experts; use 2, 4, 8, 16, 32 or 64"),
    ],
)
def test_ranks_that_are_refused(spec: ModelSpec, one: Layout, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout.check(spec, one)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(), Layout(tp=2), Layout(pp=4), Layout(tp=2, pp=2, dp=4), Layout(tp=8, ep=8),
        Layout(ep=8, attention_dp=8, dp=2), Layout(tp=2, attention_dp=4, ep=8),
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_is_read_as_it_is_printed(layout: Layout) -> None:
    assert Layout(**parse_layout(str(layout))) == layout
    assert Layout(**parse_layout(str(layout).lower().replace(" ", ""))) == layout


@pytest.mark.parametrize("text", ["H200", "2 x", "TP2x", "xTP2", "TP", "QP2", "TP0", "TP2xTP4", "0 x TP2"])
def test_what_is_not_printed_so_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write for example tp=2,pp=2|give it once"):
        parse_layout(text)
