"""Puts a model's layers together: attention or state, MLP or experts, by kind and by family."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.architecture import families, quantization
from kervan.facts.architecture.blocks import Builder
from kervan.facts.architecture.fields import Fields, brief
from kervan.facts.architecture.layers import LayerKinds
from kervan.facts.architecture.spec import Cut, FeedForward, Layer, Mixer, Reach, Weight
from kervan.facts.model import EXPERT_FIELDS

# Sizes of states, which matter where a layer has one.
STATE_FIELDS = (
    "conv_L_cache", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_n_heads", "mamba_d_head",
    "mamba_n_groups", "mamba_conv_bias", "mamba_proj_bias", "linear_num_value_heads", "linear_num_key_heads",
    "linear_value_head_dim", "linear_key_head_dim", "linear_conv_kernel_dim", "ssm_state_size", "mamba_num_heads",
    "mamba_head_dim", "n_groups", "expand",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertNumbers:
    count: int
    per_token: int
    width: int
    shared_width: int
    latent: int
    idle: int


def expert_numbers(f: Fields, model_type: str) -> ExpertNumbers | None:
    ffn = f.part("ffn_config")  # DBRX
    f.understood("norm_topk_prob", "moe_latent_size", "zero_expert_num")
    count = f.number(*EXPERT_FIELDS, default=0, least=0, most=100_000)
    count = count or ffn.number("moe_num_experts", default=0, least=0, most=100_000)
    if model_type == "gemma4_text" and not f.flag("enable_moe_block"):
        count = 0
    if model_type == "jamba" and count < 2:
        count = 0
    names = (
        "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k_experts", "moe_top_k",
        "experts_per_token", "num_selected_experts", "experts_top_k", "num_activated_experts",
        "n_activated_experts",
    )  # fmt: skip
    f.understood(*names)
    width_names = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "expert_intermediate_size")
    f.understood(
        *width_names, "shared_expert_intermediate_size", "shared_intermediate_size", "n_shared_experts",
        "num_shared_experts", "moe_num_shared_experts", "moe_shared_expert_intermediate_size", "num_shared_expert",
        "n_shared_expert", "shared_experts_intermediate_size", "moe_shared_intermediate_size", "share_expert_dim",
    )  # fmt: skip
    if count < 2:
        return None
    per_token = f.number(*names, default=0, least=0) or ffn.number("moe_top_k", default=0, least=0)
    if not per_token:
        raise ConfigError(
            f"{f.source} has {count} experts and no field 'num_experts_per_tok' that says how many a token passes; "
            "copy it from the model's page"
        )
    if per_token > count:
        raise ConfigError(
            f"{f.source}: num_experts_per_tok={per_token} is above the {count} experts; fetch the file again"
        )
    if ffn.given:
        width = ffn.number("ffn_hidden_size")
        ffn.understood("hidden_size", "model_type")
        if unknown := ffn.not_understood():
            raise ffn.refuse(unknown[0], "it stands in ffn_config, so the model's size is not known")
    else:
        width = f.number(*width_names, default=0, least=0) or f.number("intermediate_size")
    shared = f.number(
        "shared_expert_intermediate_size", "shared_intermediate_size", "shared_experts_intermediate_size",
        "moe_shared_intermediate_size", "share_expert_dim", default=0, least=0,
    )  # fmt: skip
    num_shared = f.number(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert", "n_shared_expert",
        default=0, least=0,
    )  # fmt: skip
    if own := f.number("moe_shared_expert_intermediate_size", default=0, least=0):
        shared = own * (num_shared or 1)
    shared = shared or width * num_shared
    if model_type == "llama4_text":
        shared = width
    return ExpertNumbers(
        count,
        per_token,
        width,
        shared,
        f.number("moe_latent_size", default=0, least=0),
        f.number("zero_expert_num", default=0, least=0),
    )


class LayerMaker:
    """Makes all layers of a model; those that are equal become one object."""

    def __init__(
        self,
        f: Fields,
        model_type: str,
        hidden: int,
        storages: quantization.Storages,
        kinds: LayerKinds,
        experts: ExpertNumbers | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self.f = f
        self.model_type = model_type
        self.hidden = hidden
        self.storages = storages
        self.kinds = kinds
        self.experts = experts
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.is_latent = f.has("kv_lora_rank") and f.number("kv_lora_rank", default=0, least=0) > 0
        f.understood("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "use_mla", "mla_use_nope")
        if model_type in families.STATES and not {"state", "both"} & set(kinds.mixers):
            f.understood(*STATE_FIELDS)  # of layers that this model has none of
        if model_type in families.PURE_STATE:
            f.understood("intermediate_size")
        self.matrices = 2 if model_type in families.UNGATED else 3
        self.notes: list[str] = []
        self.widest = 1
        self._hybrids = 0

    def all(self, n: int) -> tuple[Layer, ...]:
        blocks = self.f.get("block_configs")
        made: dict[Layer, Layer] = {}
        found = []
        for index in range(n):
            b = Builder(self.f, self.model_type, self.hidden, self.storages, index)
            layer = self._of_block(b, blocks, n) if isinstance(blocks, list) else self._layer(b, n)
            found.append(made.setdefault(layer, layer))
        return tuple(found)

    # ---- a layer

    def _layer(self, b: Builder, n: int) -> Layer:
        mixer, feed = self.kinds.mixers[b.layer], self.kinds.feeds[b.layer]
        if self.model_type == "longcat_flash":
            return self._double(b)
        if self.model_type == "zamba2":
            return self._zamba(b)
        mixers: list[Mixer] = []
        small = (1 if mixer == "none" or feed == "none" else 2) * self.hidden
        if mixer in ("state", "both"):
            state, more = b.state(self._state_kind())
            mixers.append(state)
            small += more
        if mixer in ("full", "sliding", "chunked", "both"):
            mixers.append(self._attention(b, "full" if mixer == "both" else mixer, n))
        feeds: list[FeedForward] = []
        if feed in ("experts", "both") and self.experts is not None:
            e = self.experts
            feeds.append(
                b.experts(
                    e.count,
                    e.per_token,
                    e.width,
                    self.matrices,
                    shared_width=e.shared_width,
                    latent=e.latent,
                    idle=e.idle,
                )
            )
        is_beside = self.model_type == "gemma4_text" and feed == "experts"  # a dense MLP beside the experts
        if feed in ("dense", "both") or is_beside:
            width = self._dense_width(b.layer, n)
            feeds.insert(0, b.mlp(width, self.matrices))
            self.widest = max(self.widest, width)
        elif self.experts is not None:
            self.widest = max(self.widest, self._any_width())
        mixers_and_more, extra = self._beside(b, mixers)
        return Layer(tuple(mixers_and_more), tuple(feeds), small + extra)

    def _any_width(self) -> int:
        """The dense width that a file with experts everywhere gives as well, for workspaces."""
        assert self.experts is not None
        return self._dense_width(0, 1, default=self.experts.width)

    def _beside(self, b: Builder, mixers: list[Mixer]) -> tuple[list[Mixer], int]:
        """Small matrices of Gemma 3n and 4 and hyper-connections, as numbers."""
        f, h = self.f, self.hidden
        each = f.number("hidden_size_per_layer_input", default=0, least=0)
        extra = 2 * h * each
        if rank := f.number("laurel_rank", default=0, least=0):
            extra += 2 * h * rank
        if inputs := f.number("altup_num_inputs", default=0, least=0):
            extra += inputs * h
        if streams := f.number("hc_mult", default=0, least=0):  # hyper-connections before attention and MLP
            mixes = 2 if self.model_type == "hy_v4" else 2 + streams
            extra += 2 * mixes * streams * streams * h
        return mixers, extra

    def _state_kind(self) -> str:
        f = self.f
        kind = families.STATES.get(self.model_type)
        if kind is not None:
            return kind
        if f.has("linear_num_value_heads"):
            return "delta"
        if f.has("linear_attn_config", "linear_num_heads"):
            return "kda"
        if f.has("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"):
            return "mamba2"
        if f.has("mamba_dt_rank"):
            return "mamba1"
        if f.has("conv_L_cache"):
            return "convolution"
        raise ConfigError(
            f"{f.source}: model_type={brief(self.model_type)} has layers that keep a state, and no field that kervan "
            "knows says of what size; known are Mamba 1 and 2, gated delta nets, KDA, lightning attention and LFM2"
        )

    # ---- attention

    def _attention(self, b: Builder, reach: Reach, n: int) -> Mixer:
        f = self.f
        ratios = f.get("compress_ratios")
        if isinstance(ratios, list) or f.has("compress_rates"):
            return b.compressed(self.heads, self._ratio(b.layer, n), self.kinds.window)
        if self.model_type == "minicpm3":
            return b.wide_latent(self.heads)
        if self.is_latent:
            return b.latent(self.heads, is_gated=self.model_type == "hy_v4")
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.head_dim
        value_dim = f.number("v_head_dim", default=head_dim)
        own = f.get("per_layer_config")  # Gemma 4 in transformers 5
        own = own.get(str(b.layer).zfill(len(str(n - 1)))) or own.get(str(b.layer)) if isinstance(own, dict) else None
        if isinstance(own, dict):
            part = Fields(own, f.source)
            heads = part.number("num_attention_heads", default=heads)
            kv_heads = part.number("num_key_value_heads", default=kv_heads)
            head_dim = value_dim = part.number("head_dim", default=head_dim)
        has_value = True
        if f.has("num_attention_heads_per_layer"):
            each = f.each("num_attention_heads_per_layer", n)
            heads = Fields({"heads": each[b.layer]}, f.source).number("heads") if each else heads
        if f.has("global_head_dim") and reach == "full":
            head_dim = value_dim = f.number("global_head_dim")
        if f.has("num_global_key_value_heads") and reach == "full" and f.flag("attention_k_eq_v"):
            kv_heads = f.number("num_global_key_value_heads")
        f.understood("num_global_key_value_heads")
        if f.flag("attention_k_eq_v") and reach == "full":
            has_value = False  # keys serve as values, and both are cached
        swa = ("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim")
        f.understood(*swa, "add_swa_attention_sink_bias", "add_full_attention_sink_bias")
        if reach == "sliding":
            heads = f.number(swa[0], default=heads)
            kv_heads = f.number(swa[1], default=kv_heads)
            head_dim = f.number(swa[2], default=head_dim)
            value_dim = f.number(swa[3], default=value_dim if f.has("v_head_dim") else head_dim)
        other = f.get("attention_other_setting")  # Step-3.5: heads of sliding layers
        if isinstance(other, dict) and other.get("attention_type") == f"{reach}_attention":
            part = Fields(other, f.source)
            heads = part.number("num_attention_heads", default=heads)
            kv_heads = part.number("num_attention_groups", default=kv_heads)
            head_dim = value_dim = part.number("head_dim", default=head_dim)
        if heads % kv_heads:
            raise ConfigError(
                f"{f.source}: layer {b.layer} has {kv_heads} KV heads, which do not divide its {heads} attention "
                "heads; fetch the file again"
            )
        return b.attention(
            reach,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            window=self.kinds.window,
            gate=self._gate(heads, head_dim),
            has_cache=b.layer < n - f.number("num_kv_shared_layers", default=0, least=0, most=n),
            has_value=has_value,
            query_rank=f.number("share_q_dim", default=0, least=0),
        )

    def _gate(self, heads: int, head_dim: int) -> tuple[Cut, ...]:
        f = self.f
        f.understood("attn_output_gate", "output_gate_type")
        asked = f.get("attn_output_gate")
        if asked or (asked is None and self.model_type in families.GATED_ATTENTION):
            return (Cut(heads, head_dim),)
        gating = f.get("gating") if self.model_type == "laguna" else None
        if gating in ("per-element", "per_element", "elementwise"):
            return (Cut(heads, head_dim),)
        if gating or f.flag("use_head_wise_attn_gate"):
            return (Cut(heads),)
        return ()

    def _ratio(self, layer: int, n: int) -> int:
        f = self.f
        ratios = f.get("compress_ratios")
        f.understood("compress_rates", "index_topk", "index_head_dim", "index_n_heads", "sliding_window")
        if isinstance(ratios, list):
            each = f.each("compress_ratios", n) or []
            return each[layer] if type(each[layer]) is int else -1
        rates = f.get("compress_rates")
        words = f.get("layer_types")
        if not isinstance(rates, dict) or not isinstance(words, list) or len(words) < n:
            raise f.refuse("compress_rates", "it comes without the layers' types")
        rate = rates.get(words[layer], 0)
        return rate if type(rate) is int else -1

    # ---- MLPs

    def _dense_width(self, layer: int, n: int, default: int | None = None) -> int:
        f = self.f
        names = (
            *families.DENSE_WIDTHS.get(self.model_type, ()), "intermediate_size", "n_inner", "ffn_dim",
            "ffn_hidden_size", "expanded_inner_size",
        )  # fmt: skip
        four = ("gpt2", "gpt-sw3", "gpt_bigcode", "falcon", "bloom", "gptj", "codegen", "gpt_neox")
        if default is None and self.model_type in four:
            default = 4 * self.hidden
        if self.model_type == "granitemoehybrid" and self.experts is None:
            return f.number("shared_intermediate_size", "intermediate_size")
        each = f.get("intermediate_size")
        if isinstance(each, list) and len(each) >= n:
            width = each[layer]
            if type(width) is not int or not 0 < width < 10**8:
                raise ConfigError(
                    f"{f.source}: intermediate_size has {brief(width)}, which is no width; fetch the file again"
                )
        else:
            width = f.number(*names, default=default)
        if self.model_type == "lfm2" and f.flag("block_auto_adjust_ff_dim"):
            f.understood("block_ffn_dim_multiplier", "block_multiple_of", "block_dim", "block_ff_dim")
            multiplier = f.ratio("block_ffn_dim_multiplier")
            width = int(2 * width / 3)
            if multiplier is not None:
                width = int(multiplier * width)
            multiple = f.number("block_multiple_of", default=256)
            width = multiple * math.ceil(width / multiple)
        f.understood(
            "block_ffn_dim_multiplier", "block_multiple_of", "block_dim", "block_ff_dim", "block_mlp_init_scale"
        )
        f.understood("block_use_swiglu", "block_norm_eps", "block_use_xavier_init", "block_out_init_scale")
        f.understood("block_auto_adjust_ff_dim", *names)
        shared = f.number("num_kv_shared_layers", default=0, least=0)
        if f.flag("use_double_wide_mlp") and layer >= n - shared:
            width *= 2
        return width

    # ---- families with layers of their own

    def _double(self, b: Builder) -> Layer:
        """LongCat-Flash: two attentions and two dense MLPs in each layer, with the experts beside."""
        assert self.experts is not None
        e = self.experts
        width = self._dense_width(b.layer, 1)
        self.widest = max(self.widest, width)
        experts = b.experts(e.count, e.per_token, e.width, 3, idle=e.idle)
        return Layer((b.latent(self.heads),) * 2, (b.mlp(width, 3), b.mlp(width, 3), experts), 4 * self.hidden)

    def _zamba(self, b: Builder) -> Layer:
        """Zamba2: Mamba layers, some of them after a shared block of attention and MLP over twice the hidden size."""
        f, h = self.f, self.hidden
        state, more = b.state("mamba2")
        f.understood(
            "use_shared_mlp_adapter", "num_query_groups", "attention_hidden_size", "kv_channels", "ffn_hidden_size"
        )
        f.understood("use_shared_attention_adapter", "adapter_rank", "num_mem_blocks", "use_mem_rope", "ft_lora")
        small = 2 * h + more
        if self.kinds.mixers[b.layer] != "both":
            return Layer((state,), (), small)
        size = f.number("attention_hidden_size", default=2 * h)
        dim = f.number("attention_head_dim", default=size // self.heads)
        attention = b.attention("full", heads=self.heads, kv_heads=self.kv_heads, head_dim=dim, inputs=size, outputs=h)
        width = f.number("intermediate_size", "ffn_hidden_size", default=4 * h)
        self.widest = max(self.widest, width)
        rank = f.number("adapter_rank", default=128)
        small += h * h + rank * (h + 2 * width)
        if f.flag("use_shared_attention_adapter"):
            small += 3 * rank * 2 * size
        mlp = b.mlp(width, 3)
        if self._hybrids >= f.number("num_mem_blocks", default=1):
            attention = dataclasses.replace(attention, weights=_copies(attention.weights))
            mlp = dataclasses.replace(mlp, weights=_copies(mlp.weights))
        self._hybrids += 1
        return Layer((state, attention), (mlp,), small + size)

    def _of_block(self, b: Builder, blocks: list[Any], n: int) -> Layer:
        """Nemotron-NAS: each block says its KV heads and the width of its MLP, or that it has none."""
        f, h = self.f, self.hidden
        f.understood("block_configs", "num_key_value_heads", "intermediate_size")
        if len(blocks) < n or not isinstance(blocks[b.layer], Mapping):
            raise ConfigError(f"{f.source}: block_configs has {len(blocks)} blocks of {n} layers; fetch the file again")
        part = Fields(blocks[b.layer], f.source)
        attention, ffn = part.part("attention"), part.part("ffn")
        attention.understood("num_sink_tokens", "unshifted_sink", "use_prefill_window_in_sink_attention")
        mixers: list[Mixer] = []
        feeds: list[FeedForward] = []
        small = 0
        if attention.flag("replace_with_linear"):
            small += h * h
        elif not attention.flag("no_op"):
            group = attention.number("n_heads_in_group", default=0, least=0)
            kv = self.heads // group if group else attention.number("num_key_value_heads")
            mixers.append(b.attention("full", heads=self.heads, kv_heads=kv, head_dim=self.head_dim))
        if ffn.flag("replace_with_linear"):
            small += h * h
        elif not ffn.flag("no_op"):
            multiple = ffn.ratio("ffn_mult")
            if multiple is not None:
                width = math.ceil(int(2 * multiple * h / 3) / 256) * 256
            else:
                width = ffn.number("intermediate_size")
            self.widest = max(self.widest, width)
            feeds.append(b.mlp(width, 3))
        for one in (part, attention, ffn):
            if unknown := one.not_understood():
                raise one.refuse(unknown[0], "it stands in block_configs, so the model's size is not known")
        return Layer(tuple(mixers), tuple(feeds), small + h * (bool(mixers) + bool(feeds)))


def _copies(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    return tuple(dataclasses.replace(weight, is_copy=True) for weight in weights)
