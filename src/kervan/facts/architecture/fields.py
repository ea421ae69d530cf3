"""The fields of a `config.json`: reading them with errors that name them, and refusing those that are not understood.

A field is read, harmless, or off; any other one whose name is about layers, attention, experts or caches makes the
model's size unknown.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kervan.errors import ConfigError

MAX_SIZE = 10**8  # beyond it a field is a mistake
MAX_SHOWN = 60  # characters of a value in an error

# What can change the sizes of weights, caches or steps, by the words in a field's name.
_ABOUT_LAYOUT = re.compile(
    r"layer|dense|attn|attention|head|expert|moe|mamba|ssm|conv|kv|cache|window|sparse|index|mlp|block|hybrid|pattern"
    r"|state|lora|rank|latent|ffn|intermediate|expand|group|stack|depth|width|ngram|engram|memory|recurrent|delta"
    r"|linear|shared|compress|gate|gating|hidden|dim|size|residual_stream|hc_|altup|ple_|loop|cycles|share|cross|use_cla|cla_",
    re.I,
)
# Names with such words that change neither size nor speed, as patterns for whole names.
_HARMLESS = re.compile(
    "|".join(
        [
            # training, initialisation, regularisation
            r".*(dropout|_pdrop|drop_path\w*|jitter\w*|initiali[sz]\w+|init_\w+|_init|init|aux_loss\w*|loss\w*|z_loss\w*)",
            r"aux_loss_alpha|seq_aux|router_aux_loss_coef|layerdrop|.*_grad\w*|gradient_\w+|sequence_aux\w*",
            r"linear_(a_log|dt)_\w+|time_step_\w+|rescale_prenorm_residual|dt_(min|max|init\w*|scale)",
            # norms, activations, constants that scale
            r".*(norm_)?eps(ilon)?\w*|.*_(act|activation)(_fn)?|hidden_activation|.*_multipliers?|.*(softcap\w*|clamp\w*)",
            r".*_(alpha|beta)_factor|.*scal(e|es|ing)(_factor|_value)?(_\w+)?|clip_qkv|swiglu_\w+|.*_swiglu_limit",
            r"query_pre_attn_scalar|floor_scale|attn_temperature_tuning|residual_in_fp32|logits?_\w+|dim_model_base",
            r"apply_residual_connection_post_layernorm|do_layer_norm_before|layer_norm_elementwise_affine|norm_before_gate",
            r"mamba_norm_before_gate|mamba_rms_norm|use_(post|pre)_norm|(pre|post)_\w*norm\w*|.*norm_(type|position|class)",
            r"use_qk_norm|use_qk_layernorm|qk_layernorm\w*|qk_norm\w*|parallel_attn|use_parallel_residual|.*layernorm\w*",
            r"num_ln_in_parallel_attn|_remove_final_layer_norm|activation_sparsity_pattern|altup_(active_idx|coef_clip)",
            r"altup_correct_scale|hc_(eps|sinkhorn_iters|magnitude|post_mult_value)|attn_(implementation|type_name)",
            r"linear_allow_neg_eigval|mixer_rms_eps|mixer_rms_norm\w*|attention_sink_bias|learnable_sink_init|mup_\w+",
            # positions
            r".*rope\w*|.*rotary\w*|.*alibi\w*|position_embedding_type|no_rope_layer\w*|original_max_position_embeddings",
            r"swa_rope_theta|use_long_context|rel(ative)?_\w+|max_source_positions|layer_rope_theta|nope_layer_\w+",
            r"rotary_dim|log_scaling_\w+|initial_context_length|long_factor|short_factor|indexer_rope_interleave",
            # routing: which experts, not how many
            r"norm_topk_prob|norm_top_k_prob|scoring_func|topk_method|topk_group|n_group|num_expert_group|moe_renormalize",
            r"routed_scaling_factor|router_scaling_factor|route_scale|expert_selection_fn|score_function|router_logits\w*",
            r"moe_(normalize|norm_min|apply)\w*|.*router_\w*(bias|dtype|logit\w*|score\w*|func\w*|fn)|use_expert_bias",
            r"moe_router\w*|enable_moe_fp32_combine|shared_expert_combination_strategy|use_grouped_topk|n_limited_groups",
            r"num_limited_groups|moe_gate_act|gate_act\w*|use_gemm\w*|moe_group_limited\w*|hash_\w*seed|shared_expert_overlap",
            r"moe_shared_expert_overlap|ep_size|moe_capacity\w*|moe_eval_capacity\w*|moe_train_capacity\w*|moe_use_aux_free",
            r"moe_dropout_prob|moe_loss_weight|use_aux_free|moe_ep_size|moe_token_dropping|router_enable_expert_bias",
            r"use_routing_bias|use_router_score\w*|group_score\w*|moe_use_hardware_optimized\w*|expert_bias_update\w*",
            # names, tokens, labels, generation, kernels
            r".*token(s|_id|_ids|_index|_indices)?|.*_(id|ids)2?(label)?|(id2label|label2id)|_name_or_path|name_or_path|auto_map",
            r"use_cache|use_(bias_for_\w+|mamba_kernels|mambapy|associative_scan|mem_eff_path|flash_attn\w*|cache_\w+)",
            r"(use_)?fused?_\w+|_?attn_implementation\w*|(num_)?logits_to_keep|num_logits_to_keep|.*kernels?|.*chunk_size",
            r"output_(attentions|hidden_states|router_logits)|cache_implementation|is_(encoder_)?decoder\w*|is_decoder",
            r"add_cross_attention|cross_attention_hidden_size|tie_encoder_decoder|chunk_size_feed_forward|pruned_heads",
            r"summary_\w+|reorder_and_upcast_attn|scale_attn_\w+|slow_but_exact|pretraining_tp|use_bidirectional_attention",
            r"model_max_length|mlp_hidden_act|attn_(pdrop|dropout\w*)|causal(_mask)?|attention_softmax_in_fp32|.*_in_fp32",
            r"tensor_parallel\w*|.*_version|torch_dtype|dtype|.*_dtype|seed|task_specific_params|problem_type|return_dict",
            r"residual_dtype|finetuning_task|sep_token\w*|bos_\w+|eos_\w+|pad_\w+|classifier_\w*|.*_template|sequence_length",
            r"seq_length|max_seq_length|vocab_size_per_layer_input_\w+|unsloth\w*|rms_norm|block_auto_adjust_\w+_done",
            # generation settings that old files repeat, and other settings of a program
            r"num_beam\w*|\w*_repeat_ngram\w*|num_return_sequences|ignore_index|use_bfloat16|\w+_index$|torchscript",
            r"max_batch_size|pad_key_length|pre_allocate_kv_cache|pad_vocab_size\w*|pool_type|skip_cls_token|class_num",
            r"anyres_\w+|num_media_embeds|dense_list|group_limited_greedy|use_parallel_(block|embedding)|use_gated_activation",
            r"use_embedding_sharing|order_of_interleaved_layers|max_attn_value|moe_(gate|drop_tokens|random_routing\w*)",
            r"shared_moe_mode|need_fp32_gate|att_impl_type|mlp_type|conv_use_xavier_init|mla_scale_\w+|zero_centered",
            r"norm_\w+|query_num|slice_config|slice_mode|batch_vision_input|use_pos_enc|head_type|norm_head|multi_gate|tf_legacy_loss",
            r"attn_output_multiplier|moe_min_capacity|enable_expert_tensor_parallelism|interleaved_qkv|attn_rotary_emb",
            # heads for draft tokens, which vLLM loads with speculative decoding only
            r"(num_)?(nextn|mtp)_\w+|mtp_\w+|num_nextn_predict_layers|num_mtp_\w+|.*_mtp_\w*|use_mtp|n_predict|\w*_for_mtp\w*",
            # what towers say outside their own part of the file
            r"(vision|image|video|audio|speech|talker|code2wav|visual|img|mm|vit)_\w+|\w*_(vision|image|audio|video)\w*",
            r"projector_\w+|multimodal_projector_\w+|spatial_merge_size|downsample_ratio|select_layer|ps_version|deepstack\w*",
            r"dynamic_image_size|force_image_size|max_dynamic_patch|min_dynamic_patch|pad2square|use_thumbnail|template",
            r"vision_feature_\w+|image_grid_pinpoints|tile_tag|global_view_pos|candidate_resolutions|multimodal\w*|mm_\w+",
            r"use_image_\w+|enable_(audio_output|talker)|projection_dim|use_backbone_lora|use_llm_lora|patch_size",
        ]
    ),
    re.I,
)  # fmt: skip


def brief(value: object) -> str:
    """A value as an error shows it: at most one short line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep; a whole number of many thousand digits
        return f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class Fields:
    """One object of the file, that says which of its fields is wrong and remembers which were asked for.

    `defaults`: what stands in for fields that are not there.
    """

    def __init__(self, given: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.given = given
        self.source = source
        self._defaults = defaults or {}
        self.num_layers = 0  # a list with the same number for each of so many layers is that number
        self._read: set[str] = set()

    def get(self, *names: str) -> Any:
        """The first of these fields that is there, or its default; None without."""
        return self._find(names)[1]

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The name and value of the first that is there. A null in the file is no value, and asks for no default."""
        self._read.update(names)
        is_given = any(name in self.given for name in names)
        for name in names:
            value = self.given.get(name) if is_given else self._defaults.get(name)
            if value is not None:
                return name, value
        return names[0], None

    def has(self, *names: str) -> bool:
        """Whether the file itself or the defaults give one of these fields."""
        return self.get(*names) is not None

    def understood(self, *names: str) -> None:
        """Takes these fields as read: what they say is known by other means."""
        self._read.update(names)

    def flag(self, name: str) -> bool:
        """A field that is true or false."""
        return bool(self.get(name))

    def number(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number from `least` to `most`; `default` where no field has it.

        Raises: ConfigError that names the field which is missing or absurd.
        """
        name, value = self._find(names)
        if isinstance(value, list) and len(value) == self.num_layers and all(type(one) is int for one in value):
            value = value[0] if len(set(value)) == 1 else value
        if isinstance(value, float) and value.is_integer() and abs(value) <= most:
            value = int(value)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{self.source}: {name}={brief(value)} is not a whole number; fetch the file again")
            if not least <= value <= most:
                raise ConfigError(
                    f"{self.source}: {name}={brief(value)} is outside {least} to {most}; fetch the file again"
                )
            return value
        if default is None:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise ConfigError(
                f"{self.source} has no field {names[0]!r}{others}, so the model's size is not known; "
                "copy it from the model's page"
            )
        return default

    def ratio(self, name: str) -> float | None:
        """A number above 0 and below 1000; None where there is none.

        Raises: ConfigError for any other value.
        """
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1000:
            raise ConfigError(
                f"{self.source}: {name}={brief(value)} is not a number between 0 and 1000; fetch the file again"
            )
        return float(value)

    def each(self, name: str, count: int, what: str = "layers") -> list[Any] | None:
        """A list with something for each layer; None where it is missing or no list.

        Raises: ConfigError for one that is too short.
        """
        value = self.get(name)
        if not isinstance(value, list):
            return None
        if len(value) < count:
            raise ConfigError(f"{self.source}: {name} names {len(value)} {what} of {count}; fetch the file again")
        return value[:count]

    def part(self, name: str) -> "Fields":
        """An object within this one; an empty one where there is none."""
        value = self.get(name)
        return Fields(value if isinstance(value, Mapping) else {}, self.source)

    def not_understood(self) -> list[str]:
        """Fields about the model's layout that nobody asked for, and whose value is not that of one switched off."""
        return [
            name
            for name, value in self.given.items()
            if name not in self._read and not is_off(value) and is_about_layout(name) and not is_harmless(name)
        ]

    def refuse(self, name: str, why: str, known: Iterable[str] = ()) -> ConfigError:
        """The error for a field that is not understood."""
        listed = "; known are " + ", ".join(known) if known else ""
        return ConfigError(f"{self.source}: {name}={brief(self.given.get(name))} is not understood: {why}{listed}")


def is_about_layout(name: str) -> bool:
    """Whether a field of this name can say something of layers, attention, experts or caches."""
    return _ABOUT_LAYOUT.search(name) is not None


def is_harmless(name: str) -> bool:
    """Whether a field of this name changes neither size nor speed."""
    return _HARMLESS.fullmatch(name) is not None


def is_off(value: object) -> bool:
    """Whether a value means that there is nothing: none, no, zero, empty."""
    return value is None or value is False or value in (0, "", [], {}) or value == {"": None}
