"""Builds the blocks of a layer from a model's fields: the shapes of their matrices, as vLLM's layers make them.

Sources: transformers 5.19 (`models/*/modeling_*.py`) for shapes, vLLM 0.32 for what tensor parallelism divides and for
states (`MambaStateShapeCalculator`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.facts.architecture import families
from kervan.facts.architecture.fields import Fields, brief
from kervan.facts.architecture.quantization import Storages
from kervan.facts.architecture.spec import (
    Attention,
    Cut,
    Experts,
    LatentAttention,
    Mlp,
    Part,
    Reach,
    Side,
    StateLayer,
    Weight,
)

INDEX_SCALE_BYTES = 4  # a float32 scale for each 128 numbers of an indexer's key
V4_VECTOR_BYTES = 584  # 448 of fp8, 64 of bf16, 8 scales; source: DeepseekV4Attention.get_kv_cache_spec, vLLM 0.32
STATE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "auto": 2.0}


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes blocks of layer number `layer`."""

    fields: Fields
    model_type: str
    hidden: int
    storages: Storages
    layer: int

    def weight(self, part: Part, modules: str | Sequence[str], outputs: Side, inputs: Side) -> Weight:
        """A matrix with its storage."""
        names = (modules,) if isinstance(modules, str) else tuple(modules)
        return Weight(part, names, outputs, inputs, self.storages.of(part, names, self.layer))

    # ---- attention

    def attention(
        self,
        reach: Reach,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int = 0,
        value_dim: int = 0,
        gate: Side = (),
        has_cache: bool = True,
        has_value: bool = True,
        inputs: int = 0,
        outputs: int = 0,
        query_rank: int = 0,
    ) -> Attention:
        """`gate`: outputs beside the queries. `inputs` and `outputs`: where they are not the model's hidden size.
        `query_rank`: queries are made from so many numbers, whole on every GPU as the keys are (Step-3).
        """
        value_dim = value_dim or head_dim
        parts: Side = ((query_rank or Cut(heads, head_dim)), *gate)
        if has_cache:
            parts += (Cut(kv_heads, head_dim), *((Cut(kv_heads, value_dim),) if has_value else ()))
        qkv = self.weight(
            "attention", [f"self_attn.{one}_proj" for one in ("q", "k", "v", "qkv")], parts, (inputs or self.hidden,)
        )
        more: tuple[Weight, ...] = ()
        if query_rank:
            more = (self.weight("attention", "self_attn.wq", (Cut(heads, head_dim),), (query_rank,)),)
        out = self.weight("attention", "self_attn.o_proj", (outputs or self.hidden,), (Cut(heads, value_dim),))
        return Attention(
            reach=reach,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            weights=(qkv, *more, out),
            window=window if reach != "full" else 0,
            has_cache=has_cache,
        )

    def latent(self, heads: int, *, is_gated: bool = False) -> LatentAttention:
        """Multi-head latent attention, with an indexer where the fields give one and this layer has its own.

        `is_gated`: a gate as wide as the values of all heads.
        """
        f, h = self.fields, self.hidden
        query_rank = f.number("q_lora_rank", default=0, least=0)
        kv_rank, rope = f.number("kv_lora_rank"), f.number("qk_rope_head_dim")
        nope, value = f.number("qk_nope_head_dim"), f.number("v_head_dim")
        weights = self._latent_weights(heads, query_rank, kv_rank, nope, rope, value)
        if is_gated:
            weights += (self.weight("attention", "self_attn.gate_proj", (Cut(heads, value),), (h,)),)
        selected = f.number("index_topk", default=0, least=0)
        index_dim = f.number("index_head_dim", default=128) if selected else 0
        index_heads = f.number("index_n_heads", default=64) if selected else 0
        has_indexer = bool(selected) and self._has_indexer()
        if has_indexer:
            weights += (
                self.weight("attention", "self_attn.indexer.wq_b", (index_heads * index_dim,), (query_rank or h,)),
                self.weight("attention", "self_attn.indexer.wk", (index_dim,), (h,)),
                self.weight("router", "self_attn.indexer.weights_proj", (index_heads,), (h,)),
            )
        return LatentAttention(
            num_heads=heads,
            latent_dims=kv_rank + rope,
            weights=weights,
            score_dims_each=kv_rank,
            selected=selected,
            index_bytes=index_dim + index_dim / 128 * INDEX_SCALE_BYTES if has_indexer else 0.0,
            index_dims=index_heads * index_dim if has_indexer else 0,
        )

    def _latent_weights(
        self, heads: int, query_rank: int, kv_rank: int, nope: int, rope: int, value: int
    ) -> tuple[Weight, ...]:
        h = self.hidden
        first: tuple[Weight, ...]
        if query_rank:
            first = (
                self.weight("attention", "self_attn.q_a_proj", (query_rank,), (h,)),
                self.weight("attention", "self_attn.q_b_proj", (Cut(heads, nope + rope),), (query_rank,)),
            )
        else:
            first = (self.weight("attention", "self_attn.q_proj", (Cut(heads, nope + rope),), (h,)),)
        return (
            *first,
            self.weight("attention", "self_attn.kv_a_proj_with_mqa", (kv_rank + rope,), (h,)),
            self.weight("attention", "self_attn.kv_b_proj", (Cut(heads, nope + value),), (kv_rank,)),
            self.weight("attention", "self_attn.o_proj", (h,), (Cut(heads, value),)),
        )

    def _has_indexer(self) -> bool:
        """Some layers use what the one before chose. Source: `models/deepseek_v32/attention.py`, vLLM 0.32."""
        f = self.fields
        f.understood("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
        types, pattern = f.get("indexer_types"), f.get("index_topk_pattern")
        if isinstance(types, list) and self.layer < len(types):
            return bool(types[self.layer] == "full")
        if isinstance(pattern, str | list) and self.layer < len(pattern):
            return bool(pattern[self.layer] != "S")
        every = f.number("index_topk_freq", default=1)
        offset = f.number("index_skip_topk_offset", default=2, least=0)
        return bool(max(self.layer - offset + 1, 0) % every == 0)

    def wide_latent(self, heads: int) -> Attention:
        """Latent attention whose keys and values are expanded before they are cached (MiniCPM3 in vLLM)."""
        f = self.fields
        query_rank, kv_rank = f.number("q_lora_rank", default=0, least=0), f.number("kv_lora_rank")
        nope, rope = f.number("qk_nope_head_dim"), f.number("qk_rope_head_dim")
        value = f.number("v_head_dim", default=self.hidden // heads)
        return Attention(
            reach="full",
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=nope + rope,
            value_dim=nope + rope,  # vLLM pads values to the size of keys
            weights=self._latent_weights(heads, query_rank, kv_rank, nope, rope, value),
        )

    def compressed(self, heads: int, ratio: int, window: int) -> LatentAttention:
        """DeepSeek-V4: a window of latent vectors, and one for each `ratio` tokens (0: the window alone)."""
        f, h = self.fields, self.hidden
        head_dim, query_rank = f.number("head_dim"), f.number("q_lora_rank")
        groups, out_rank = f.number("o_groups"), f.number("o_lora_rank")
        if ratio not in (0, 1, 4, 128):
            raise ConfigError(
                f"{f.source}: compress_ratios has {brief(ratio)}, which vLLM does not serve; known are 0, 4 and 128"
            )
        weights = [
            self.weight("attention", "self_attn.q_a_proj", (query_rank,), (h,)),
            self.weight("attention", "self_attn.q_b_proj", (Cut(heads, head_dim),), (query_rank,)),
            self.weight("attention", "self_attn.kv_proj", (head_dim,), (h,)),
            self.weight("attention", "self_attn.o_a_proj", (Cut(groups, out_rank),), (heads * head_dim // groups,)),
            self.weight("attention", "self_attn.o_b_proj", (h,), (Cut(groups, out_rank),)),
        ]
        selected = index_dim = index_heads = 0
        if ratio > 1:  # vectors overlap where few tokens make one
            both = 2 * (2 if ratio == 4 else 1)
            weights.append(self.weight("router", "self_attn.compressor.kv_proj", (both * head_dim,), (h,)))
        if ratio == 4:
            selected = f.number("index_topk")
            index_dim, index_heads = f.number("index_head_dim"), f.number("index_n_heads")
            weights += [
                self.weight("router", "self_attn.indexer.compressor.kv_proj", (4 * index_dim,), (h,)),
                self.weight("attention", "self_attn.indexer.wq_b", (index_heads * index_dim,), (query_rank,)),
                self.weight("router", "self_attn.indexer.weights_proj", (index_heads,), (h,)),
            ]
        return LatentAttention(
            num_heads=heads,
            latent_dims=head_dim,
            weights=tuple(weights),
            score_dims_each=head_dim,
            latent_bytes=V4_VECTOR_BYTES,
            selected=selected,
            index_bytes=index_dim + index_dim / 128 * INDEX_SCALE_BYTES if index_dim else 0.0,
            index_dims=index_heads * index_dim,
            tokens_per_vector=max(1, ratio),
            window=window,
            has_context=ratio > 1,
        )

    # ---- states

    def state(self, kind: str) -> tuple[StateLayer, int]:
        """A layer that keeps a state, and its numbers beside matrices."""
        makers = {
            "mamba1": self._mamba1,
            "mamba2": self._mamba2,
            "delta": self._delta,
            "kda": self._kda,
            "lightning": self._lightning,
            "convolution": self._convolution,
        }
        return makers[kind]()

    def _state_number_bytes(self, default: str) -> float:
        word = str(self.fields.get("mamba_ssm_cache_dtype", "mamba_ssm_dtype") or default).removeprefix("torch.")
        if word not in STATE_BYTES:
            raise ConfigError(
                f"{self.fields.source}: mamba_ssm_dtype={brief(word)} is none of {', '.join(STATE_BYTES)}; "
                "fetch the file again"
            )
        return STATE_BYTES[word]

    def _mamba1(self) -> tuple[StateLayer, int]:
        f, h = self.fields, self.hidden
        f.understood("mamba_conv_bias", "mamba_proj_bias", "use_bias", "use_conv_bias")
        inner = f.number("mamba_expand", "expand", default=2) * h
        if self.model_type in families.PURE_STATE:
            inner = f.number("intermediate_size", default=inner)
        state = f.number("mamba_d_state", "state_size", default=16)
        kernel = f.number("mamba_d_conv", "conv_kernel", default=4)
        rank = f.get("mamba_dt_rank", "time_step_rank")
        rank = -(-h // 16) if rank in (None, "auto") else f.number("mamba_dt_rank", "time_step_rank")
        weights = (
            self.weight("state", "mamba.in_proj", (Cut(inner), Cut(inner)), (h,)),
            self.weight("state", "mamba.x_proj", (rank + 2 * state,), (Cut(inner),)),
            self.weight("state", "mamba.dt_proj", (Cut(inner),), (rank,)),
            self.weight("state", "mamba.out_proj", (h,), (Cut(inner),)),
        )
        layer = StateLayer(
            name="mamba",
            weights=weights,
            conv_channels=inner,
            conv_tail=kernel - 1,
            state_numbers=inner * state,
            state_number_bytes=self._state_number_bytes("auto"),
            units=inner,
        )
        return layer, inner * (kernel + state + 3)

    def _mamba2(self) -> tuple[StateLayer, int]:
        f, h = self.fields, self.hidden
        f.understood("mamba_conv_bias", "mamba_proj_bias", "use_bias", "use_conv_bias", "projectors_bias")
        f.understood("add_bias_linear", "mamba_expand", "expand", "time_step_rank")
        inner = f.number("mamba_d_ssm", "mamba_intermediate", default=f.number("mamba_expand", "expand", default=2) * h)
        heads = f.number("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
        names = ("head_dim",) if self.model_type == "mamba2" else ("mamba_d_head", "mamba_head_dim", "mamba_headdim")
        dim = max(1, inner // heads) if f.get(*names) in (None, "auto") else f.number(*names)
        inner = heads * dim
        groups = f.number("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
        state = f.number("mamba_d_state", "ssm_state_size", "state_size")
        kernel = f.number("mamba_d_conv", "conv_kernel", default=4)
        channels = inner + 2 * groups * state
        parts: Side = (Cut(inner), Cut(inner), Cut(groups, state), Cut(groups, state), Cut(heads))
        weights = (
            self.weight("state", "mamba.in_proj", parts, (h,)),
            self.weight("state", "mamba.out_proj", (h,), (Cut(inner),)),
        )
        layer = StateLayer(
            name="mamba2",
            weights=weights,
            conv_channels=channels,
            conv_tail=kernel - 1,
            state_numbers=inner * state,
            state_number_bytes=self._state_number_bytes("auto"),
            units=heads,
        )
        return layer, channels * (kernel + 1) + inner + 3 * heads

    def _delta(self) -> tuple[StateLayer, int]:
        """A gated delta net (Qwen3-Next)."""
        f, h = self.fields, self.hidden
        values, keys = f.number("linear_num_value_heads"), f.number("linear_num_key_heads")
        value_dim, key_dim = f.number("linear_value_head_dim"), f.number("linear_key_head_dim")
        kernel = f.number("linear_conv_kernel_dim", default=4)
        if values % keys:
            raise ConfigError(
                f"{f.source}: linear_num_key_heads={keys} does not divide linear_num_value_heads={values}; "
                "fetch the file again"
            )
        channels = 2 * keys * key_dim + values * value_dim
        parts: Side = (Cut(keys, key_dim), Cut(keys, key_dim), Cut(values, value_dim), Cut(values, value_dim))
        weights = (
            self.weight("state", ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkv"), parts, (h,)),
            self.weight("state", ("linear_attn.in_proj_ba", "linear_attn.in_proj_b"), (Cut(values), Cut(values)), (h,)),
            self.weight("state", "linear_attn.out_proj", (h,), (Cut(values, value_dim),)),
        )
        layer = StateLayer(
            name="gated delta net",
            weights=weights,
            conv_channels=channels,
            conv_tail=kernel - 1,
            state_numbers=values * value_dim * key_dim,
            state_number_bytes=self._state_number_bytes("auto"),
            units=keys,
        )
        return layer, channels * kernel + 2 * values + value_dim

    def _kda(self) -> tuple[StateLayer, int]:
        """Kimi delta attention: a gate of low rank for each channel."""
        f, h = self.fields, self.hidden
        own = f.part("linear_attn_config")
        source = own if own.given else f
        own.understood("kda_layers", "full_attn_layers")
        heads = source.number("num_heads", "linear_num_heads")
        dim = source.number("head_dim") if own.given else f.number("linear_head_dim")
        kernel = source.number("short_conv_kernel_size", "linear_conv_kernel_dim", default=4)
        if unknown := own.not_understood():
            raise own.refuse(unknown[0], "it stands in linear_attn_config, so the model's size is not known")
        proj: Side = (Cut(heads, dim),)
        weights = (
            self.weight("state", [f"self_attn.{one}_proj" for one in "qkv"], proj * 3, (h,)),
            self.weight("state", ("self_attn.f_a_proj", "self_attn.g_a_proj"), (2 * dim,), (h,)),
            self.weight("state", ("self_attn.f_b_proj", "self_attn.g_b_proj"), proj * 2, (dim,)),
            self.weight("state", "self_attn.b_proj", (Cut(heads),), (h,)),
            self.weight("state", "self_attn.o_proj", (h,), proj),
        )
        layer = StateLayer(
            name="KDA",
            weights=weights,
            conv_channels=3 * heads * dim,
            conv_tail=kernel - 1,
            state_numbers=heads * dim * dim,
            state_number_bytes=self._state_number_bytes("float32"),
            units=heads,
        )
        return layer, 3 * heads * dim * kernel + heads * dim + heads + dim

    def _lightning(self) -> tuple[StateLayer, int]:
        """Lightning attention (MiniMax-Text-01): linear attention with an output gate, no convolution."""
        f, h = self.fields, self.hidden
        heads = f.number("num_attention_heads")
        dim = f.number("head_dim", default=max(1, h // heads))
        proj: Side = (Cut(heads, dim),)
        weights = (
            self.weight("state", "self_attn.qkv_proj", proj * 3, (h,)),
            self.weight("state", "self_attn.output_gate", proj, (h,)),
            self.weight("state", "self_attn.out_proj", (h,), proj),
        )
        layer = StateLayer(
            name="lightning attention",
            weights=weights,
            conv_channels=0,
            conv_tail=0,
            state_numbers=heads * dim * dim,
            state_number_bytes=self._state_number_bytes("auto"),
            units=heads,
        )
        return layer, heads * dim

    def _convolution(self) -> tuple[StateLayer, int]:
        """A gated short convolution (LFM2)."""
        f, h = self.fields, self.hidden
        f.understood("conv_bias", "conv_dim", "conv_dim_out")
        kernel = f.number("conv_L_cache", default=3)
        weights = (
            self.weight("state", "conv.in_proj", (Cut(h), Cut(h), Cut(h)), (h,)),
            self.weight("state", "conv.out_proj", (h,), (Cut(h),)),
        )
        layer = StateLayer(
            name="short convolution",
            weights=weights,
            conv_channels=h,
            conv_tail=kernel - 1,
            state_numbers=0,
            state_number_bytes=2.0,
            units=h,
        )
        return layer, h * kernel

    # ---- MLPs and experts

    def mlp(self, width: int, matrices: int, *, prefix: str = "mlp", inputs: int = 0) -> Mlp:
        """A dense MLP."""
        return Mlp(width=width, matrices=matrices, weights=self._mlp_weights("mlp", prefix, width, matrices, inputs))

    def _mlp_weights(self, part: Part, prefix: str, width: int, matrices: int, inputs: int = 0) -> tuple[Weight, ...]:
        size = inputs or self.hidden
        names = [f"{prefix}.{one}" for one in ("up_proj", "gate_proj", "gate_up_proj")]
        return (
            self.weight(part, names if matrices == 3 else names[:1], (Cut(width),) * (matrices - 1), (size,)),
            self.weight(part, f"{prefix}.down_proj", (size,), (Cut(width),)),
        )

    def experts(
        self,
        count: int,
        per_token: float,
        width: int,
        matrices: int,
        *,
        shared_width: int = 0,
        latent: int = 0,
        idle: int = 0,
    ) -> Experts:
        """`latent`: the size that routed experts work in (0: the hidden size). `idle`: choices that compute nothing."""
        h = self.hidden
        router = self.weight("router", "mlp.gate", (count + idle,), (h,))
        weights: tuple[Weight, ...] = (router,)
        if latent:
            weights += (
                self.weight("mlp", "mlp.fc1_latent_proj", (latent,), (h,)),
                self.weight("mlp", "mlp.fc2_latent_proj", (h,), (latent,)),
            )
        if shared_width:
            weights += self._mlp_weights("mlp", "mlp.shared_experts", shared_width, matrices)
        return Experts(
            count=count,
            per_token=per_token * count / (count + idle),
            width=width,
            inputs=latent or h,
            matrices=matrices,
            shared_width=shared_width,
            each=self._mlp_weights("experts", "mlp.experts.0", width, matrices, latent),
            weights=weights,
        )
