"""What a model's family (`model_type`) says beside its fields: transformers' defaults, and how its blocks are made.

`defaults.json` has the defaults of transformers 5.19's configs; tests/contract/test_model_counts.py compares them, and
says how to write it anew.
"""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

# Families whose blocks are counted as transformers and vLLM make them: tests/contract/test_model_counts.py.
KNOWN = frozenset(
    [
        "afmoe", "apertus", "arcee", "axk1", "bailing_moe", "bailing_moe_v2", "bamba", "bloom", "chatglm", "cohere",
        "cohere2", "cohere2_moe", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
        "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "gemma",
        "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite",
        "glm_moe_dsa", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa",
        "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe",
        "hy_v3", "hy_v4", "hyperclovax", "internlm2", "jamba", "kimi_k2", "kimi_linear", "laguna", "lfm2", "lfm2_moe",
        "llama", "llama4_text", "longcat_flash", "mamba", "mamba2", "mimo", "mimo_v2_flash", "minicpm", "minicpm3",
        "minimax", "minimax_m1", "minimax_m2", "minimax_text_01", "ministral", "ministral3", "mistral", "mixtral",
        "nemotron", "nemotron-nas", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "phi",
        "phi3", "phimoe", "qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "smollm3",
        "solar", "stablelm", "starcoder2", "step3_text", "step3p5", "zamba2",
    ]
)  # fmt: skip
# MLPs of two matrices, without a gate.
UNGATED = frozenset(
    [
        "gpt2", "gpt-sw3", "opt", "gpt_neox", "gpt_bigcode", "gptj", "codegen", "falcon", "starcoder2", "phi",
        "nemotron", "nemotron_h", "apertus", "arcee", "bloom", "mpt",
    ]
)  # fmt: skip
# Output gates as wide as the queries, whatever the fields say.
GATED_ATTENTION = frozenset(["qwen3_next", "afmoe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"])
# What "mamba", "linear_attention" or "conv" layers are.
STATES = {
    "jamba": "mamba1", "mamba": "mamba1", "falcon_mamba": "mamba1",
    "bamba": "mamba2", "granitemoehybrid": "mamba2", "falcon_h1": "mamba2", "zamba2": "mamba2", "nemotron_h": "mamba2",
    "mamba2": "mamba2",
    "qwen3_next": "delta", "qwen3_5_text": "delta", "qwen3_5_moe_text": "delta", "olmo_hybrid": "delta",
    "kimi_linear": "kda", "minimax": "lightning", "minimax_m1": "lightning", "minimax_text_01": "lightning",
    "lfm2": "convolution", "lfm2_moe": "convolution",
}  # fmt: skip
PURE_STATE = frozenset(["mamba", "falcon_mamba", "mamba2"])  # no attention and no MLP
ENCODERS = frozenset(
    [
        "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "modernbert",
        "nomic_bert", "camembert", "mpnet", "ernie", "xlm-roberta-xl", "gte", "jina_bert", "clip", "siglip", "siglip2",
        "vit", "dinov2", "colbert", "data2vec-text", "esm", "eurobert",
    ]
)  # fmt: skip
SPEECH = frozenset(
    [
        "whisper", "wav2vec2", "wav2vec2-bert", "hubert", "speech_to_text", "seamless_m4t", "seamless_m4t_v2",
        "moonshine", "parakeet", "parakeet_ctc", "cohere_asr", "fireredasr2", "speecht5", "unispeech", "funasr",
        "nemotron_asr_streaming", "kyutai_speech_to_text", "musicgen", "bark", "vits",
    ]
)  # fmt: skip
ENCODER_DECODERS = frozenset(
    [
        "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "nllb-moe", "t5gemma",
        "led",
    ]
)  # fmt: skip
RECURRENT = frozenset(
    [
        "rwkv", "rwkv5", "rwkv6", "rwkv7", "recurrent_gemma", "xlstm", "retnet", "zaya",
    ]
)  # fmt: skip

# Beside transformers' own (`defaults.json`): what it or vLLM fills in by code.
MORE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bloom": {"max_position_embeddings": 2048},  # ALiBi: any length, trained with this one
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"num_shared_expert": 1},
    "hy_v3": {"first_k_dense_replace": 1},
    "hy_v4": {"first_k_dense_replace": 1},
    "laguna": {"first_k_dense_replace": 1},
    "mimo_v2_flash": {"first_k_dense_replace": 1},
    "nemotron_h": {"mamba_ssm_cache_dtype": "float32"},  # source: NemotronHForCausalLMConfig, vLLM 0.32
    "olmo_hybrid": {"full_attention_interval": 4},
    "qwen3_next": {"full_attention_interval": 4},
    "qwen3_5_text": {"full_attention_interval": 4},
    "qwen3_5_moe_text": {"full_attention_interval": 4},
}
# Sizes that must be in a file itself, unless they are in a nested part: those are written without what equals defaults.
SIZES = frozenset(
    [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "n_embd",
        "n_layer",
        "n_head", "n_layers", "n_heads", "d_model", "num_layers", "ffn_dim", "ffn_hidden_size",
    ]
)  # fmt: skip
# Every which layer sees everything, where a file with a window does not say.
WINDOW_PATTERNS = {
    "olmo3": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "cohere2": 4,
    "gpt_oss": 2,
}
# `intermediate_size` is there that of an expert.
DENSE_WIDTHS = {"llama4_text": ("intermediate_size_mlp",), "cohere2_moe": ("prefix_dense_intermediate_size",)}
# Text models whose nested part says no `model_type` of its own, by the whole model's.
TEXT_TYPES = {
    "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_text",
    "llama4": "llama4_text", "paligemma": "gemma", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2",
    "glm4v_text": "glm4", "glm4v_moe_text": "glm4_moe", "glm4v": "glm4", "glm4v_moe": "glm4_moe",
    "step3_vl": "step3_text",
    "qwen3_vl": "qwen3_vl_text", "qwen3_vl_moe": "qwen3_vl_moe_text", "llava": "llama", "llava_next": "llama",
    "mistral3": "mistral", "pixtral": "mistral", "qwen2_audio": "qwen2", "MiniMaxText01": "minimax_text_01",
    "minimax-text-01": "minimax_text_01", "MiniMaxM1": "minimax_m1", "kimi_k25": "kimi_k2",
    "qwen2_5_omni_text": "qwen2", "qwen2_5_omni_thinker": "qwen2",
    "deepseek_vl_v2": "deepseek_v2",
}  # fmt: skip
# Old names of families, by the architecture in the file.
BY_ARCHITECTURE = {"MiniMaxText01ForCausalLM": "minimax_text_01", "MiniMaxM1ForCausalLM": "minimax_m1"}


def defaults_of(model_type: str, *, is_nested: bool) -> dict[str, Any]:
    """What stands in for fields that are missing, as transformers fills them in. Sizes only in a nested part."""
    found: dict[str, Any] = {**_transformers_defaults().get(model_type, {}), **MORE_DEFAULTS.get(model_type, {})}
    return {name: value for name, value in found.items() if is_nested or name not in SIZES}


@functools.cache
def _transformers_defaults() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        resources.files("kervan.facts.architecture").joinpath("defaults.json").read_text()
    )
    return found
