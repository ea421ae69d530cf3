"""Sizes of models from their config.json, worked by hand."""

import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.errors import ConfigError
from kervan.facts.architecture import Attention, ModelSpec, StateLayer, parse


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


LLAMA = config("llama3-8b")
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "vocab_size": 129280, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
}  # fmt: skip
DELTA = {
    "full_attention_interval": 4, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_value_head_dim": 128,
    "linear_key_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip


def llama(**changed: Any) -> ModelSpec:
    return parse(LLAMA | changed, "test")


@pytest.mark.parametrize(
    ("found", "billions"),
    [
        (LLAMA, 8.03),
        (config("llama3-70b"), 70.55),
        (config("mixtral-8x7b"), 46.7),
        (config("qwen3-30b-a3b"), 30.5),
        (DEEPSEEK, 671.0),
    ],
    ids=["8b", "70b", "mixtral", "qwen3-30b", "deepseek"],
)
def test_parameters_are_those_on_the_models_pages(found: dict[str, Any], billions: float) -> None:
    assert parse(found, "test").parameters / 1e9 == pytest.approx(billions, rel=0.003)


def test_kv_bytes_per_token() -> None:
    # Keys and values x KV heads x head size x 2 bytes: 8B 2 x 8 x 128 x 2 = 4 KiB in each of 32 layers.
    assert llama().kv_bytes_per_token == 128 * 1024
    assert parse(config("llama3-70b"), "test").kv_bytes_per_token == 320 * 1024
    # A latent vector of 512 + 64 numbers, whole on every GPU: 61 x 576 x 2 = 70,272.
    deepseek = parse(DEEPSEEK, "test")
    assert deepseek.kv_bytes_per_token == deepseek.kv_bytes(8) == 70_272
    # Above 8 GPUs the 8 KV heads are copied: no less than one head each.
    assert llama().kv_bytes(8) == llama().kv_bytes(16) == 32 * 2 * 128 * 2


def test_dense_layers_among_experts() -> None:
    def layers(**changed: Any) -> set[int]:
        spec = parse(DEEPSEEK | {"num_hidden_layers": 6} | changed, "test")
        return {layer for layer, one in enumerate(spec.layers) if one.experts is not None}

    assert layers() == {3, 4, 5}
    assert layers(moe_layer_freq=2) == {4}
    assert layers(moe_layer_freq=[0, 1, 0, 1, 1, 1]) == {1, 3, 4, 5}
    assert layers(moe_layer_freq=None, first_k_dense_replace=None, interleave_moe_layer_step=2) == {1, 3, 5}
    assert layers(moe_layer_freq=None, first_k_dense_replace=None, mlp_only_layers=[0, 1]) == {2, 3, 4, 5}


def test_llama4_has_its_own_names_for_widths() -> None:
    spec = llama(
        model_type="llama4_text", num_local_experts=16, num_experts_per_tok=1, intermediate_size=8192,
        intermediate_size_mlp=16384, interleave_moe_layer_step=2,
    )  # fmt: skip
    assert spec.experts is not None
    assert (spec.intermediate, spec.experts.width, spec.experts.shared_width) == (16384, 8192, 8192)


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ({}, "ffffff"),
        ({"sliding_window": 128}, "ssssss"),
        ({"sliding_window": 128, "use_sliding_window": False}, "ffffff"),
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 3}, "sfsfsf"),
        ({"sliding_window": 128, "sliding_window_pattern": 3}, "ssfssf"),
        ({"sliding_window": 128, "sliding_window_pattern": "LLLG"}, "sssfss"),
        ({"sliding_window": 128, "model_type": "gemma2"}, "sfsfsf"),
        ({"sliding_window": 128, "model_type": "gemma3_text"}, "sssssf"),
        ({"attention_chunk_size": 128, "layer_types": ["chunked_attention"] * 3 + ["full_attention"] * 3}, "cccfff"),
        (DELTA | {"full_attention_interval": 3}, "llfllf"),
    ],
)  # fmt: skip
def test_kinds_of_layers(changed: dict[str, Any], kinds: str) -> None:
    spec = llama(num_hidden_layers=6, **changed)
    mixers = [layer.mixers[0] for layer in spec.layers]
    assert "".join("l" if isinstance(one, StateLayer) else one.reach[0] for one in mixers) == kinds  # type: ignore[union-attr]
    assert all(one.window == 128 for one in mixers if isinstance(one, Attention) and one.reach != "full")


def test_the_state_of_a_gated_delta_net() -> None:
    # A state of 32 x 128 x 128, and the last 3 inputs of a convolution over 2 x 2048 + 4096 channels, in 16 bit.
    state = llama(num_hidden_layers=4, **DELTA).layers[0].mixers[0]
    assert isinstance(state, StateLayer)
    assert state.state_bytes() == 32 * 128 * 128 * 2 + 8192 * 3 * 2
    assert state.state_bytes(4) == state.state_bytes() / 4
    # Qwen3.5 keeps it in 32 bit.
    state = llama(num_hidden_layers=4, mamba_ssm_dtype="float32", **DELTA).layers[0].mixers[0]
    assert isinstance(state, StateLayer)
    assert state.state_bytes() == 32 * 128 * 128 * 4 + 8192 * 3 * 2


def test_falcons_keys_and_values() -> None:
    assert llama(multi_query=True).num_kv_heads == 1
    assert llama(multi_query=True, new_decoder_architecture=True).num_kv_heads == 8


def test_gpt2_and_opt_by_their_names() -> None:
    spec = parse(
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
        "g",
    )
    positions, norms = 1024 * 768, 12 * 2 * 768
    assert spec.parameters == 50257 * 768 + positions + 12 * (4 * 768**2 + 2 * 4 * 768**2) + norms  # 124.3 million
    assert (spec.is_tied, spec.max_model_len) == (True, 1024)
    assert llama(model_type="opt", intermediate_size=None, ffn_dim=100, word_embed_proj_dim=4096).intermediate == 100


@pytest.mark.parametrize(
    ("found", "bytes_each", "kept"),
    [
        ({"quant_method": "fp8"}, 1.0, ()),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128, ()),
        ({"quant_method": "mxfp4"}, 0.5 + 1 / 32, ("attention", "mlp")),
        ({"quant_method": "fp8", "ignore": ["re:.*self_attn.*"]}, 1.0, ("attention",)),
        ({"quant_method": "fp8", "ignore": ["model.layers.1.self_attn.q_proj"]}, 1.0, ()),
        ({"quant_method": "fp8", "ignore": ["model.layers.0.self_attn"]}, 1.0, ("attention",)),
        ({"quant_method": "fp8", "ignore": ["model.layers.0.post_attention_layernorm"]}, 1.0, ()),
        ({"quant_method": "fp8", "ignore": ["model.layers.0*"]}, 1.0, ("attention", "mlp")),
        ({"quant_method": "fp8", "ignore": [f"visual.blocks.{i}.attn.qkv" for i in range(32)]}, 1.0, ()),
        ({"quant_method": "fp8", "ignore": ["re:.*shared_experts.*", "mlp.gate"]}, 1.0, ()),
        ({"quant_method": "fp8", "modules_to_not_convert": ["mlp"]}, 1.0, ("mlp",)),
    ],
)
def test_quantised_weights(found: dict[str, Any], bytes_each: float, kept: tuple[str, ...]) -> None:
    spec = llama(quantization_config=found)
    assert spec.quantization is not None
    assert spec.quantization.bytes_per_weight == pytest.approx(bytes_each)
    assert {weight.part for weight in spec.layers[0].weights if weight.storage.bytes_per_weight == 2.0} == set(kept)
    assert spec.table.storage.bytes_per_weight == spec.head.storage.bytes_per_weight == 2.0


@pytest.mark.parametrize("value", [0, -1, 10**30, 1.5, "x", {}, True, float("nan")])
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_absurd_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        llama(**{name: value})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no field '{name}'"):
        parse({key: value for key, value in LLAMA.items() if key != name}, "test")


def test_lists_that_are_none() -> None:
    with pytest.raises(ConfigError, match="mlp_only_layers=3 is not a list"):
        parse(DEEPSEEK | {"mlp_only_layers": 3}, "test")
    assert llama(quantization_config={"quant_method": "fp8", "ignore": 3}).quantization is not None


def test_an_unknown_family_is_counted_by_its_numbers() -> None:
    spec = llama(model_type="brand_new")
    assert not spec.is_known
    assert spec.parameters == llama().parameters


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        (None, 8192),
        ({"rope_type": "linear", "factor": 2.0}, 16384),
        ({"type": "dynamic", "factor": 4}, 32768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),  # is in the length
        ({"rope_type": "llama3", "factor": 8.0}, 8192),
        ({"rope_type": "default", "factor": None}, 8192),
    ],
)
def test_how_long_a_sequence_may_be(rope: dict[str, Any] | None, wanted: int) -> None:
    spec = parse(config("llama3-8b") | {"rope_scaling": rope}, "8b")
    assert (spec.max_model_len, spec.has_max_model_len) == (wanted, True)
