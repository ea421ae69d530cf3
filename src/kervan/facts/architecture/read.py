"""Reads a Hugging Face `config.json`: the model's layers and their matrices, or why they cannot be counted."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.architecture import assemble, families, layers, quantization, towers
from kervan.facts.architecture.fields import Fields, brief, is_off
from kervan.facts.architecture.spec import Cut, ModelSpec, Storage, Weight
from kervan.vendor.vllm_names import REMOVED_ARCHITECTURES

LENGTHS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "model_max_length",
    "max_sequence_length",
)  # fmt: skip
# Ropes whose factor is in the length already.
SCALED_ROPES = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float": 4.0}
TEXT_PARTS = ("text_config", "llm_config", "language_config", "language_model_config")
MAX_LAYERS = 10_000
# Fields that the reader of a whole class understands, beside those that it asks for.
UNDERSTOOD = (
    "model_type", "architectures", "attention_bias", "qkv_bias", "mlp_bias", "use_bias", "bias", "use_qkv_bias",
    "add_qkv_bias", "add_bias_linear", "enable_bias", "qk_head_dim", "head_dim", "hidden_act", "num_hash_layers",
    "attn_bias", "o_bias", "lm_head_bias", "embedding_bias", "conv_bias", "norm_bias", "use_conv_bias",
    "zero_expert_type",
    "hidden_act_type", "first_layer_fusion", "quantization_config", "compression_config", "query_key_layer_scaling",
    "apply_query_key_layer_scaling", "attention_type", "attn_module_list_cfg", "max_sequence_length", "max_seq_len",
    "indexer_types", "layer_idx_shift", "attention_k_eq_v", "rope_head_dim", "block_size", "hybrid_block_size",
    "attention_method", "use_moe", "moe_every_n_layer", "num_heads", "layer_switch", "use_mixed_mlp_moe",
    "mlp_intermediate_size", "mamba_use_mlp", "mlp_expansion_factor", "use_shared_block_lora", "moe_layer_num_skipped",
)  # fmt: skip
# Fields that are understood with these values, and change layers with others.
ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_method": ("MLA",), "mamba_use_mlp": (True,), "moe_layer_num_skipped": (0,), "moe_every_n_layer": (1,),
}  # fmt: skip


def parse(config: Mapping[str, Any], source: str) -> ModelSpec:
    """The spec in a `config.json`; `source` names the file in errors.

    Raises: ConfigError that names the field which is missing, absurd or not understood, or the kind of model that
    generates no text.
    """
    architecture = _architecture(config)
    _refuse_what_generates_no_text(config, architecture, source)
    found, model_type, is_nested = _text_part(config, architecture)
    f = Fields(found, source, families.defaults_of(model_type, is_nested=is_nested))
    f.understood(*UNDERSTOOD)
    if not f.flag("use_cla"):
        f.understood("cla_share_factor")
    _refuse_other_values(f)
    spec = _spec(f, config, model_type, architecture)
    if unknown := f.not_understood():
        gone = f" ({architecture} is gone from newer vLLM)" if architecture in REMOVED_ARCHITECTURES else ""
        raise ConfigError(
            f"{source}: {unknown[0]}={brief(found[unknown[0]])} is not understood, so the model's size is not known"
            f"{gone}; if it changes no layer, attention, expert or cache, set it to null in a copy of the file"
        )
    return spec


def _refuse_other_values(f: Fields) -> None:
    """Raises: ConfigError for fields that are understood with one value alone."""
    for name, values in ONE_VALUE.items():
        value = f.given.get(name)
        if not is_off(value) and value not in values:
            raise f.refuse(name, "so the model's size is not known", [str(one) for one in values])


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, Sequence) and not isinstance(names, str) and names:
        return str(names[0])[:100]
    return str(names or config.get("model_type") or "unknown")[:100]


def _refuse_what_generates_no_text(config: Mapping[str, Any], architecture: str, source: str) -> None:
    model_type = str(config.get("model_type", ""))[:100]
    generates = re.search(r"CausalLM|LMHead|ConditionalGeneration|ChatModel|Generat", architecture) is not None
    if model_type in families.SPEECH or re.search(r"ForCTC|ForRNNT|SpeechSeq2Seq|Whisper", architecture):
        raise ConfigError(
            f"{source}: {architecture} is a speech model, and kervan plans models that generate text from tokens; "
            "give a language model"
        )
    is_encoder = model_type in families.ENCODERS and not (generates and config.get("is_decoder"))
    if is_encoder or re.search(
        r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|Retrieval|Ranking)|RewardModel$"
        r"|EmbeddingModel$",
        architecture,
    ):
        raise ConfigError(
            f"{source}: {architecture} is an encoder, and an encoder generates nothing; give a language model"
        )
    if model_type in families.ENCODER_DECODERS or (config.get("is_encoder_decoder") and not _has_text_part(config)):
        raise ConfigError(
            f"{source}: {architecture} is an encoder and a decoder, which vLLM does not serve; give a decoder alone"
        )
    if model_type in families.RECURRENT:
        raise ConfigError(
            f"{source}: model_type={model_type!r} is a recurrent model that vLLM does not serve; give another model"
        )
    if model_type == "mpt" or architecture in ("MPTForCausalLM", "MptForCausalLM"):
        raise ConfigError(
            f"{source}: {architecture} is gone from vLLM (0.28 was the last with it), so its layout is not counted; "
            "give a model that vLLM serves"
        )


def _has_text_part(config: Mapping[str, Any]) -> bool:
    return any(isinstance(config.get(name), Mapping) for name in (*TEXT_PARTS, "thinker_config"))


def _text_part(config: Mapping[str, Any], architecture: str) -> tuple[dict[str, Any], str, bool]:
    """The fields of the language model (its own over those of the whole file), its family, and whether it is nested."""
    outer = dict(config)
    is_nested = False
    for name in ("thinker_config", *TEXT_PARTS):
        inner = outer.pop(name, None)
        if isinstance(inner, Mapping):
            outer = {key: value for key, value in outer.items() if key != "model_type"} | dict(inner)
            is_nested = True
    model_type = str(outer.get("model_type") or config.get("model_type") or "")[:100]
    model_type = families.TEXT_TYPES.get(model_type, model_type)
    model_type = families.BY_ARCHITECTURE.get(architecture, model_type)
    return {key: value for key, value in outer.items() if not towers.is_tower(key, value)}, model_type, is_nested


def _spec(f: Fields, config: Mapping[str, Any], model_type: str, architecture: str) -> ModelSpec:
    hidden = f.number("hidden_size", "n_embd", "n_embed", "d_model")
    n = f.num_layers = _num_layers(f)
    heads, kv_heads = _heads(f, model_type)
    head_dim = f.number("head_dim", "attention_head_dim", "kv_channels", default=0, least=0) or max(1, hidden // heads)
    own_bytes = _weight_bytes(f)
    settings = config.get("quantization_config") or f.get("quantization_config", "compression_config")
    storages = quantization.read(settings, own_bytes, str(f.get("expert_dtype") or ""), f.source)
    vocab = f.number("vocab_size", "padded_vocab_size")
    experts = assemble.expert_numbers(f, model_type)
    kinds = layers.read(f, model_type, n, has_experts=experts is not None)
    maker = assemble.LayerMaker(f, model_type, hidden, storages, kinds, experts, heads, kv_heads, head_dim)
    made = maker.all(n)
    table = Weight("embedding", ("embed_tokens",), (Cut(vocab),), (hidden,), storages.of("embedding", (), 0))
    head = Weight("head", ("lm_head",), (Cut(vocab),), (hidden,), storages.of("head", (), 0))
    notes = [*_notes(f, model_type, architecture, storages), *maker.notes]
    tower, tower_notes = towers.count(config, f.source)
    return ModelSpec(
        source=f.source,
        architecture=architecture,
        is_known=model_type in families.KNOWN,
        layers=made,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=maker.widest,
        vocab=vocab,
        is_tied=bool(f.get("tie_word_embeddings")),
        weight_bytes=own_bytes,
        max_model_len=_max_model_len(f, model_type),
        has_max_model_len=f.has(*LENGTHS),
        table=table,
        head=head,
        quantization=storages.quantization,
        extra_tables=_extra_tables(f, model_type, hidden, n, own_bytes),
        tower=tower,
        notes=(*notes, *tower_notes),
    )


def _num_layers(f: Fields) -> int:
    if isinstance(found := f.get("layers_block_type"), list) and not f.has("num_hidden_layers"):
        return len(found)
    return f.number("num_hidden_layers", "n_layer", "num_layers", "n_layers", most=MAX_LAYERS)


def _positions(f: Fields) -> int:
    return f.number(*LENGTHS, default=8192)


def _max_model_len(f: Fields, model_type: str) -> int:
    """Tokens that vLLM allows. Source: `_get_and_verify_max_len`, vLLM 0.32."""
    rope = f.get("rope_scaling", "rope_parameters")
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
    factor = rope.get("factor") if isinstance(rope, Mapping) else None
    if kind in SCALED_ROPES or "gemma3" in model_type or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
        factor = 1
    return int(_positions(f) * factor)


def _weight_bytes(f: Fields) -> float:
    dtype = str(f.get("torch_dtype", "dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"{f.source}: torch_dtype={brief(dtype)} is none of {', '.join(DTYPE_BYTES)}; fetch the file again"
        )
    return min(2.0, DTYPE_BYTES[dtype])  # vLLM loads float32 weights as 16 bit


def _heads(f: Fields, model_type: str) -> tuple[int, int]:
    f.understood("multi_query", "new_decoder_architecture", "multi_query_attention")
    if model_type in families.PURE_STATE:
        return 1, 1
    heads = f.number("num_attention_heads", "n_head", "n_heads", most=100_000)
    attn = f.part("attn_config")
    if f.get("multi_query") and not f.get("new_decoder_architecture"):
        f.understood("num_kv_heads", "num_key_value_heads")
        kv_heads = 1
    elif f.get("multi_query_attention"):
        kv_heads = f.number("multi_query_group_num")
    else:
        default = attn.number("kv_n_heads", default=heads, most=100_000)
        attn.understood("model_type")
        if unknown := attn.not_understood():
            raise attn.refuse(unknown[0], "it stands in attn_config, so the model's size is not known")
        kv_heads = f.number(
            "num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_groups", "num_query_groups",
            default=default, most=100_000,
        )  # fmt: skip
    if heads % kv_heads:
        raise ConfigError(
            f"{f.source}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
            "fetch the file again"
        )
    return heads, kv_heads


def _extra_tables(f: Fields, model_type: str, hidden: int, n: int, own_bytes: float) -> tuple[Weight, ...]:
    """Learned positions, and Gemma 3n's and 4's embeddings for each layer."""
    storage = Storage(own_bytes)
    found = []
    if model_type in ("gpt2", "gpt-sw3", "gpt_bigcode", "opt"):
        positions = _positions(f) + (2 if model_type == "opt" else 0)
        found.append(Weight("embedding", ("wpe",), (positions,), (hidden,), storage))
        width = f.number("word_embed_proj_dim", default=hidden)
        if width != hidden:
            raise f.refuse("word_embed_proj_dim", f"only the hidden size {hidden} is")
    if each := f.number("hidden_size_per_layer_input", default=0, least=0):
        words = f.number("vocab_size_per_layer_input", default=0, least=0) or f.number("vocab_size")
        found.append(Weight("embedding", ("embed_tokens_per_layer",), (Cut(words),), (n * each,), storage))
        found.append(Weight("embedding", ("per_layer_model_projection",), (n * each,), (hidden,), storage))
    f.understood("vocab_size_per_layer_input")
    if inputs := f.number("altup_num_inputs", default=0, least=0):
        found.append(Weight("embedding", ("altup_projections",), (2 * (inputs - 1) * hidden,), (hidden,), storage))
    return tuple(found)


def _notes(f: Fields, model_type: str, architecture: str, storages: quantization.Storages) -> list[str]:
    notes = []
    if model_type not in families.KNOWN:
        notes.append(
            f"kervan does not know {architecture} (model_type {model_type!r}): memory and speed are counted as if its "
            "layers were attention and MLPs, or experts, of the sizes in its config.json; with other parts in it, both "
            "are further off."
        )
    if architecture in REMOVED_ARCHITECTURES:
        notes.append(
            f"{architecture} is gone from newer vLLM: {REMOVED_ARCHITECTURES[architecture]} is the last with it."
        )
    method = re.search(r"nvfp4|fp8|awq|gptq|int4|int8", f.source, re.I)
    if storages.quantization is None and method is not None:
        notes.append(
            f"{f.source} says {method[0]} in its name, and its config.json nothing of quantisation: counted as 16 bit; "
            "fetch hf_quant_config.json beside it if the model has one."
        )
    return notes
