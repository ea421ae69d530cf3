"""Published models by the fields of their config.json that matter: parameters, KV cache, and what is refused."""

import json
from typing import Any

import pytest
from harness.places import MODELS
from hypothesis import given
from hypothesis import strategies as st

from kervan.errors import ConfigError
from kervan.facts.architecture import Attention, LatentAttention, ModelSpec, StateLayer, parse

LLAMA: dict[str, Any] = json.loads((MODELS / "llama3-8b" / "config.json").read_text())


def model(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **fields}


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
    }  # fmt: skip


NEMOTRON_SUPER = model(
    "NemotronHForCausalLM", "nemotron_h", **sizes(4096, 88, 32, 2, 2688, 131072), head_dim=128, conv_kernel=4, expand=2,
    hybrid_override_pattern="MEMEMEM*" "EMEMEMEM*" "EMEMEMEM*" "EMEMEMEMEM*" "EMEMEMEMEM*" "EMEMEMEMEM*" "EMEMEMEMEM*"
    "EMEMEMEM*" "EMEMEMEME",
    mamba_head_dim=64, mamba_num_heads=128, n_groups=8, ssm_state_size=128, n_routed_experts=512, n_shared_experts=1,
    num_experts_per_tok=22, moe_intermediate_size=2688, moe_latent_size=1024, moe_shared_expert_intermediate_size=5376,
)  # fmt: skip
NEMOTRON_NANO = model(
    "NemotronHForCausalLM", "nemotron_h", **sizes(4480, 56, 40, 8, 15680, 131072), head_dim=128, conv_kernel=4,
    hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", mamba_head_dim=80,
    mamba_num_heads=128, n_groups=8, ssm_state_size=128,
)  # fmt: skip
JAMBA = model(
    "JambaForCausalLM", "jamba", **sizes(4096, 32, 32, 8, 14336, 65536), attn_layer_period=8, attn_layer_offset=4,
    expert_layer_period=2, expert_layer_offset=1, num_experts=16, num_experts_per_tok=2, mamba_d_state=16,
    mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=256,
)  # fmt: skip
QWEN3_NEXT = model(
    "Qwen3NextForCausalLM", "qwen3_next", **sizes(2048, 48, 16, 2, 5120, 151936), full_attention_interval=4,
    head_dim=256, linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_value_head_dim=128, moe_intermediate_size=512, num_experts=512, num_experts_per_tok=10,
    shared_expert_intermediate_size=512, tie_word_embeddings=False,
)  # fmt: skip
QWEN35 = model(
    "Qwen3_5ForConditionalGeneration", "qwen3_5", text_config=dict(
        **sizes(5120, 64, 24, 4, 17408, 248320), model_type="qwen3_5_text", attn_output_gate=True, head_dim=256,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 16, full_attention_interval=4,
        linear_num_key_heads=16, linear_num_value_heads=48, linear_key_head_dim=128, linear_value_head_dim=128,
        mamba_ssm_dtype="float32",
    ), tie_word_embeddings=False, vision_config={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
                                                 "out_hidden_size": 5120, "patch_size": 16, "spatial_merge_size": 2},
)  # fmt: skip
KIMI_LINEAR = model(
    "KimiLinearForCausalLM", "kimi_linear", **sizes(2304, 27, 32, 32, 9216, 163840), first_k_dense_replace=1,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, num_experts=256,
    moe_intermediate_size=1024, num_experts_per_token=8, num_shared_experts=1, model_max_length=1048576,
    linear_attn_config={"full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
                        "kda_layers": [n for n in range(1, 27) if n % 4], "short_conv_kernel_size": 4},
)  # fmt: skip
MINIMAX = model(
    "MiniMaxText01ForCausalLM", "minimax_text_01", **sizes(6144, 80, 64, 8, 9216, 200064), head_dim=128,
    attn_type_list=[int(n % 8 == 7) for n in range(80)], num_local_experts=32, num_experts_per_tok=2,
)  # fmt: skip
GEMMA3N = model(
    "Gemma3nForConditionalGeneration", "gemma3n",
    text_config={"model_type": "gemma3n_text", "num_hidden_layers": 35, "intermediate_size": [16384] * 35},
)  # fmt: skip
GEMMA4 = model(
    "Gemma4ForConditionalGeneration", "gemma4", text_config=dict(
        **sizes(2816, 30, 16, 8, 2112, 262144), model_type="gemma4_text", attention_k_eq_v=True, enable_moe_block=True,
        global_head_dim=512, head_dim=256, hidden_size_per_layer_input=0, moe_intermediate_size=704, num_experts=128,
        top_k_experts=8, num_global_key_value_heads=2, num_kv_shared_layers=0, sliding_window=1024,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
    ),
)  # fmt: skip
GEMMA3_27B = model(
    "Gemma3ForConditionalGeneration", "gemma3", text_config={
        "model_type": "gemma3_text", "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "sliding_window": 1024,
    },
)  # fmt: skip
FALCON_H1 = model(
    "FalconH1ForCausalLM", "falcon_h1", **sizes(5120, 72, 20, 4, 21504, 261120), head_dim=128, mamba_d_ssm=4096,
    mamba_d_head=128, mamba_d_state=256, mamba_n_groups=2, mamba_n_heads=32, mamba_d_conv=4,
)  # fmt: skip
BAMBA = model(
    "BambaForCausalLM", "bamba", **sizes(4096, 32, 32, 8, 14336, 128256), attn_layer_indices=[9, 18, 27],
    mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_n_heads=128,
)  # fmt: skip
GRANITE4 = model(
    "GraniteMoeHybridForCausalLM", "granitemoehybrid", **sizes(4096, 40, 32, 8, 768, 100352), tie_word_embeddings=True,
    layer_types=["attention" if n % 10 == 5 else "mamba" for n in range(40)], mamba_d_head=64, mamba_d_state=128,
    mamba_n_groups=1, mamba_n_heads=128, num_local_experts=72, num_experts_per_tok=10, shared_intermediate_size=1536,
)  # fmt: skip
LFM2 = model(
    "Lfm2ForCausalLM", "lfm2", **sizes(2048, 16, 32, 8, 12288, 65536), conv_L_cache=3, block_multiple_of=256,
    block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=True, full_attn_idxs=[2, 5, 8, 10, 12, 14],
)  # fmt: skip
LONGCAT = model(
    "LongcatFlashForCausalLM", "longcat_flash", hidden_size=6144, num_layers=28, num_attention_heads=64,
    vocab_size=131072, ffn_hidden_size=12288, expert_ffn_hidden_size=2048, n_routed_experts=512, zero_expert_num=256,
    moe_topk=12, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip
STEP3 = model(
    "Step3TextForCausalLM", "step3_text", **sizes(7168, 61, 64, 1, 18432, 128815), head_dim=256, share_q_dim=2048,
    num_attention_groups=1, moe_num_experts=48, moe_top_k=3, moe_intermediate_size=5120, share_expert_dim=5120,
    moe_layers_enum=",".join(str(n) for n in range(4, 60)),
)  # fmt: skip
ZAMBA2 = model(
    "Zamba2ForCausalLM", "zamba2", **sizes(3584, 81, 32, 32, 14336, 32000), adapter_rank=128, attention_head_dim=224,
    attention_hidden_size=7168, mamba_d_state=64, mamba_d_conv=4, mamba_expand=2, mamba_headdim=64, mamba_ngroups=2,
    n_mamba_heads=112, num_mem_blocks=2, use_shared_attention_adapter=False,
    layers_block_type=["hybrid" if n == 6 or (n > 6 and n % 6 == 5) else "mamba" for n in range(81)],
)  # fmt: skip
MAMBA_CODESTRAL = model(
    "Mamba2ForCausalLM", "mamba2", hidden_size=4096, num_hidden_layers=64, vocab_size=32768, state_size=128, expand=2,
    conv_kernel=4, head_dim=64, num_heads=128, n_groups=8, intermediate_size=8192,
)  # fmt: skip
MIMO = model(
    "MiMoV2FlashForCausalLM", "mimo_v2_flash", **sizes(4096, 48, 64, 4, 16384, 152576), head_dim=192, v_head_dim=128,
    swa_num_attention_heads=64, swa_num_key_value_heads=8, swa_head_dim=192, swa_v_head_dim=128, sliding_window=128,
    hybrid_layer_pattern=[int(n not in (0, *range(5, 48, 6))) for n in range(48)], moe_layer_freq=[0] + [1] * 47,
    n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048,
)  # fmt: skip
DBRX = model(
    "DbrxForCausalLM", "dbrx", d_model=6144, n_layers=40, n_heads=48, vocab_size=100352, max_seq_len=32768,
    attn_config={"kv_n_heads": 8, "clip_qkv": 8},
    ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
)  # fmt: skip
BLOOM = model("BloomForCausalLM", "bloom", n_embed=14336, n_layer=70, num_attention_heads=112, vocab_size=250880)
APERTUS = model("ApertusForCausalLM", "apertus", **sizes(4096, 32, 32, 8, 21504, 131072))
V32 = model(
    "DeepseekV32ForCausalLM", "deepseek_v32", **sizes(7168, 61, 128, 128, 18432, 129280), q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256,
    num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048, first_k_dense_replace=3, index_head_dim=128,
    index_n_heads=64, index_topk=2048,
)  # fmt: skip
V4_FLASH = model(
    "DeepseekV4ForCausalLM", "deepseek_v4", hidden_size=4096, num_hidden_layers=43, num_attention_heads=64,
    num_key_value_heads=1, vocab_size=129280, head_dim=512, q_lora_rank=1024, qk_rope_head_dim=64, o_groups=8,
    o_lora_rank=1024, index_head_dim=128, index_n_heads=64, index_topk=512, hc_mult=4, moe_intermediate_size=2048,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=6, num_hash_layers=3, sliding_window=128,
    compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0], expert_dtype="fp4",
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions", "kv_bytes"),
    [
        # Attention in 8 layers of 2 KV heads: 8 x 2 x 2 x 128 x 2.
        pytest.param(NEMOTRON_SUPER, 120.7, 8_192, id="Nemotron 3 Super: experts in a smaller space"),
        pytest.param(NEMOTRON_NANO, 8.89, 16_384, id="Nemotron Nano 9B v2: M, * and -"),
        pytest.param(JAMBA, 51.6, 16_384, id="Jamba 1.5 Mini: every eighth layer"),
        pytest.param(QWEN3_NEXT, 79.7, 24_576, id="Qwen3-Next 80B: three of four layers linear"),
        pytest.param(QWEN35, 26.9, 65_536, id="Qwen3.5 27B: gated attention, nested"),
        pytest.param(KIMI_LINEAR, 49.1, 8_064, id="Kimi Linear: 7 layers x 576 x 2"),
        pytest.param(MINIMAX, 456.1, 40_960, id="MiniMax-Text-01: 10 of 80 layers"),
        pytest.param(GEMMA3N, 6.84, 40_960, id="Gemma 3n E4B: 15 layers share a cache, defaults left out"),
        # 25 sliding layers of 8 x 256 and 5 full ones of 2 x 512, keys and values.
        pytest.param(GEMMA4, 25.2, (25 * 8 * 256 + 5 * 2 * 512) * 4, id="Gemma 4 26B: two shapes of layers"),
        pytest.param(GEMMA3_27B, 27.0, 507_904, id="Gemma 3 27B: vocabulary left out"),
        pytest.param(FALCON_H1, 33.6, 147_456, id="Falcon H1 34B: attention beside Mamba"),
        pytest.param(BAMBA, 9.78, 12_288, id="Bamba 9B: numbers of layers"),
        pytest.param(GRANITE4, 32.2, 16_384, id="Granite 4 H Small: words for layers"),
        pytest.param(LFM2, 1.17, 12_288, id="LFM2 1.2B: short convolutions"),
        pytest.param(LONGCAT, 560.0, 64_512, id="LongCat Flash: two attentions in a layer"),
        pytest.param(STEP3, 316.0, 62_464, id="Step-3: shared queries"),
        pytest.param(ZAMBA2, 7.36, 13 * 4 * 7168, id="Zamba2 7B: two blocks, used 13 times"),
        pytest.param(MAMBA_CODESTRAL, 7.29, 0, id="Mamba Codestral: no attention"),
        pytest.param(MIMO, 308.8, (9 * 4 + 39 * 8) * (192 + 128) * 2, id="MiMo V2 Flash: values smaller than keys"),
        pytest.param(DBRX, 131.6, 163_840, id="DBRX: fields in parts"),
        pytest.param(BLOOM, 176.2, 70 * 2 * 14336 * 2, id="Bloom"),
        pytest.param(APERTUS, 8.05, 131_072, id="Apertus 8B: no gate"),
        # A latent vector of 576 numbers, and 128 bytes with a scale of 4 for the indexer.
        pytest.param(V32, 671.9, 61 * (576 * 2 + 132), id="DeepSeek V3.2: an indexer"),
        pytest.param(V4_FLASH, 284.3, 21 * (584 + 132) / 4 + 20 * 584 / 128, id="DeepSeek V4 Flash: compressed"),
    ],
)  # fmt: skip
def test_published_models(config: dict[str, Any], billions: float, kv_bytes: float) -> None:
    spec = parse(config, "config.json")
    assert spec.is_known
    assert spec.parameters / 1e9 == pytest.approx(billions, rel=0.004)
    assert spec.kv_bytes_per_token == pytest.approx(kv_bytes)


@pytest.mark.parametrize(
    ("config", "billions"),
    [(GEMMA4, 3.82), (NEMOTRON_SUPER, 12.2), (QWEN3_NEXT, 3.6), (KIMI_LINEAR, 3.1), (GRANITE4, 8.8), (V4_FLASH, 13.3)],
)
def test_active_parameters(config: dict[str, Any], billions: float) -> None:
    """Of a token of text, with the head and without the embedding table."""
    assert parse(config, "config.json").active_parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_layers_of_a_small_hybrid_by_hand() -> None:
    spec = parse(
        model(
            "NemotronHForCausalLM", "nemotron_h", **sizes(64, 3, 4, 2, 96, 100), head_dim=16, conv_kernel=4, expand=2,
            hybrid_override_pattern="M*-", mamba_head_dim=32, mamba_num_heads=4, n_groups=2, ssm_state_size=8,
        ),
        "small",
    )  # fmt: skip
    state, attention, mlp = spec.layers
    # in: two of 128 for the gate and the state's input, 2 groups x 8 for each of B and C, 4 steps; out: 128.
    inner = 4 * 32
    channels = inner + 2 * 2 * 8
    assert sum(one.size() for one in state.weights) == (2 * inner + 2 * 2 * 8 + 4) * 64 + 64 * inner
    assert state.small == 64 + channels * (4 + 1) + inner + 3 * 4
    assert isinstance(state.mixers[0], StateLayer)
    assert state.mixers[0].state_bytes() == channels * 3 * 2 + inner * 8 * 4
    # Queries of 4 x 16, keys and values of 2 x 16 each; no gate in the MLP.
    assert attention.parameters == 64 * (64 + 32 + 32) + 64 * 64 + 64
    assert mlp.parameters == 2 * 64 * 96 + 64
    assert spec.parameters == 2 * 100 * 64 + state.parameters + attention.parameters + mlp.parameters
    # On two GPUs the state, its matrices and the heads are halved; norms and convolutions are not.
    assert state.weight_bytes(2, 2.0) == sum(one.size() for one in state.weights) / 2 * 2 + state.small * 2


def test_layers_that_only_some_of_an_indexer_have() -> None:
    """GLM-5.2 chooses in every fourth layer; the others use what the one before chose."""
    shared = V32 | {"index_topk_freq": 4, "index_skip_topk_offset": 3, "num_hidden_layers": 12}
    mixers = [layer.mixers[0] for layer in parse(shared, "x").layers]
    assert [isinstance(one, LatentAttention) and one.index_bytes == 132 for one in mixers] == [
        True, True, True, False, False, False, True, False, False, False, True, False,
    ]  # fmt: skip
    named = parse(V32 | {"indexer_types": ["full"] * 3 + ["shared"] * 58}, "x")
    assert named.kv_bytes_per_token == 61 * 576 * 2 + 3 * 132


def test_blocks_of_nemotron_nas() -> None:
    """Half of the KV heads, an MLP of its own width, and blocks without attention or with nothing."""
    blocks = [
        {"attention": {"n_heads_in_group": 8, "no_op": False}, "ffn": {"ffn_mult": 2.625, "no_op": False}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 1.0, "no_op": False}},
        {"attention": {"no_op": True}, "ffn": {"no_op": True}},
    ]
    config = model("DeciLMForCausalLM", "nemotron-nas", **sizes(8192, 3, 64, 64, 1, 128256), block_configs=blocks)
    spec = parse(config | {"intermediate_size": None, "num_key_value_heads": None}, "nas")
    # 2 x 2.625 x 8192 / 3 = 14,336; 5,461 rounded up to 256 is 5,632.
    assert [one.width for layer in spec.layers for one in layer.feed_forwards] == [14336, 5632]  # type: ignore[union-attr]
    assert spec.kv_bytes_per_token == 2 * 8 * 128 * 2
    assert spec.layers[2].parameters == 0


def test_the_cache_of_a_layer_that_reads_another_ones() -> None:
    spec = parse(GEMMA3N, "gemma")
    mixers = [layer.mixers[0] for layer in spec.layers]
    assert [isinstance(one, Attention) and one.has_cache for one in mixers] == [True] * 20 + [False] * 15
    assert [one.reach for one in mixers if isinstance(one, Attention)][:5] == ["sliding"] * 4 + ["full"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"hybrid_override_pattern": "M-M*"},
            r"hybrid_override_pattern='M-M\*' is a field .* model_type is 'llama', .* correct model_type, or delete the field",
        ),
        (
            {"hybrid_override_pattern": "M-M*", "model_type": "nemotron_h"},
            r"hybrid_override_pattern='M-M\*' names 4 layers, and num_hidden_layers is 32",
        ),
        ({"hybrid_override_pattern": "Q" * 32, "model_type": "nemotron_h"}, "it has 'Q', so the model's size is not known; known are M"),
        ({"attn_layer_plan": [1, 2]}, r"attn_layer_plan=\[1, 2\] is not understood, so the model's size is not known"),
        ({"num_memory_slots": 7}, "num_memory_slots=7 is not understood"),
        ({"expert_choice_routing": True}, "expert_choice_routing=True is not understood"),
        ({"cross_attention_layers": [3, 8]}, "cross_attention_layers"),
        ({"layer_types": ["quadratic"] * 32}, "layer_types=.* is not understood: it has 'quadratic'"),
        ({"layer_types": ["linear_attention"] * 32}, "no field that kervan knows says of what size"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 32"),
        ({"num_local_experts": 8}, "8 experts and no field 'num_experts_per_tok'"),
        ({"num_local_experts": [64, 64], "num_experts_per_tok": 2}, r"num_local_experts=\[64, 64\] is not a whole"),
        ({"linear_attn_config": {"full_attn_layers": [4], "num_heads": 2, "head_dim": 8, "kv_rank": 3}}, "kv_rank=3"),
        ({"hidden_size": "x" * 100_000}, "hidden_size='xxx.* is not a whole number"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(LLAMA | changed, "config.json")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"attn_layer_plan": None}, {"num_memory_slots": 0}, {"expert_choice_routing": False}, {"attention_dropout": 0.1},
        {"layer_norm_eps": 1e-5}, {"rope_scaling": {"factor": 2}}, {"router_aux_loss_coef": 0.1}, {"num_beam_groups": 1},
        {"num_nextn_predict_layers": 1}, {"mtp_layers_block_type": ["moe"]}, {"attn_implementation": "sdpa"},
        {"quantum_flux": 3}, {"image_token_index": 5}, {"head_dim": None},
    ],
)  # fmt: skip
def test_what_changes_no_size_is_no_reason_to_refuse(changed: dict[str, Any]) -> None:
    assert parse(LLAMA | changed, "config.json").parameters == parse(LLAMA, "config.json").parameters


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (model("BertModel", "bert", **sizes(768, 12, 12, 12, 3072, 30522)), "an encoder generates nothing"),
        (model("XLMRobertaForSequenceClassification", "xlm-roberta"), "an encoder generates nothing"),
        (model("Qwen2ForRewardModel", "qwen2"), "an encoder generates nothing"),
        (model("WhisperForConditionalGeneration", "whisper", d_model=1280), "a speech model"),
        (model("T5ForConditionalGeneration", "t5", is_encoder_decoder=True), "an encoder and a decoder"),
        (model("RwkvForCausalLM", "rwkv", hidden_size=4096), "a recurrent model that vLLM does not serve"),
        (model("MPTForCausalLM", "mpt", d_model=4096), "gone from vLLM"),
    ],
)
def test_models_that_generate_no_text_in_vllm(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(config, "config.json")


def test_what_vllm_has_dropped_is_said() -> None:
    assert "0.23.0 is the last" in parse(BAMBA, "bamba").notes[0]
    assert parse(LLAMA, "llama").notes == ()


def test_towers_are_counted_or_said() -> None:
    # 27 blocks of 4 x 1152^2 + 2 x 1152 x 4304, patches of 16 x 16 x 3, and a merger of 4 x 1152 to itself and to 5120.
    tower = 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 768 * 1152 + 4608 * 4608 + 4608 * 5120
    spec = parse(QWEN35, "qwen")
    assert spec.tower == tower
    assert "vision_config are counted" in spec.notes[0]
    said = parse(GEMMA3N | {"vision_config": {"architecture": "mobilenetv5_300m_enc", "hidden_size": 2048}}, "gemma")
    assert said.tower == 0
    assert "vision_config is not counted" in said.notes[0]


QUANTISED: list[tuple[dict[str, Any], float, str]] = [
    # 70B in NVFP4 is 39.8 GiB: 4.5 bits for all but the two tables.
    ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, 39.8, "fp8"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 67.7, "fp8"),
    ({"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 67.7, "fp8"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, 37.0, "auto"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        f"model.layers.{n}.mlp.{name}": {"quant_algo": "NVFP4"} for n in range(80)
        for name in ("up_proj", "down_proj")}}, 55.9, "auto"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "gib", "kv_cache"), QUANTISED)
def test_quantised_checkpoints(settings: dict[str, Any], gib: float, kv_cache: str) -> None:
    config = json.loads((MODELS / "llama3-70b" / "config.json").read_text())
    spec = parse(config | {"quantization_config": settings}, "70b")
    assert spec.weights_bytes / 2**30 == pytest.approx(gib, rel=0.01)
    assert spec.quantization is not None
    assert spec.quantization.kv_cache == kv_cache
    assert spec.kv_dtype_bytes == (1.0 if kv_cache == "fp8" else 2.0)
    assert spec.kv_bytes_per_token == 80 * 2 * 8 * 128 * spec.kv_dtype_bytes


def test_experts_in_another_type_than_the_rest() -> None:
    """Kimi K2 Thinking: experts in 4 bit, all else in 16; DeepSeek V4: experts in 4 bit, the rest in FP8."""
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "type": "int"}}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    }  # fmt: skip
    layer = parse(V32 | {"quantization_config": settings}, "kimi").layers[3]
    assert layer.experts is not None
    assert {one.storage.bytes_per_weight for one in layer.weights} == {2.0}
    assert {one.storage.bytes_per_weight for one in layer.experts.each} == {0.5 + 2.5 / 32}
    layer = parse(V4_FLASH, "v4").layers[3]
    assert layer.experts is not None
    assert {one.storage.bytes_per_weight for one in layer.experts.each} == {0.5 + 1 / 32}
    assert {one.storage.bytes_per_weight for one in layer.weights if one.part == "mlp"} == {1.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "vq", "bits": 2}, "quant_method='vq' and bits=2 is not known"),
        ({"quant_method": "modelopt", "quant_algo": "INT1"}, "quant_algo='INT1' is not known"),
        ({"quant_method": "fp8", "ignore": ["re:("]}, "which is no regular expression"),
        ({"quant_method": "fp8", "weight_block_size": ["a", 128]}, "is not two whole numbers"),
    ],
)
def test_quantisation_that_is_not_known(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(LLAMA | {"quantization_config": settings}, "config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
CONFIGS = [LLAMA, JAMBA, GEMMA4, V4_FLASH, KIMI_LINEAR, NEMOTRON_SUPER, ZAMBA2, DBRX]


@given(st.sampled_from(CONFIGS), st.data())
def test_any_value_of_any_field_is_counted_or_refused(config: dict[str, Any], data: st.DataObject) -> None:
    """No other error than ConfigError, in one line, and never a negative size."""
    part = config.get("text_config", config)
    name = data.draw(st.sampled_from([*part, "quantization_config", "layer_types", "sliding_window", "head_dim"]))
    changed = part | {name: data.draw(json_values)}
    changed = config | {"text_config": changed} if part is not config else changed
    try:
        spec = parse(changed, "config.json")
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert spec.parameters >= 0
    assert spec.active_parameters >= 0
    assert spec.kv_bytes_per_token >= 0


@pytest.mark.parametrize("config", CONFIGS)
def test_parts_are_the_whole(config: dict[str, Any]) -> None:
    """What `tp` GPUs hold together is all of it, and more where a part is on each of them."""
    spec: ModelSpec = parse(config, "config.json")
    whole = sum(layer.weight_bytes(1, 2.0) for layer in spec.layers)
    for tp in (2, 4):
        assert sum(layer.weight_bytes(tp, 2.0) for layer in spec.layers) * tp >= whole * 0.999
