"""What a Hugging Face `config.json` says of a model: the sizes of its weights, per tensor, and of its KV cache."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kervan.errors import ConfigError
from kervan.facts.model import EXPERT_FIELDS

LayerKind = Literal["full", "sliding", "linear"]
Part = Literal["attention", "mlp", "experts", "router", "embedding", "head"]

# Families whose blocks are as counted here: attention, then a gated MLP or experts. Others are counted in the same way,
# and the spec says so (`is_known`).
KNOWN = frozenset(
    {
        "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "gemma", "gemma2",
        "gemma3", "gemma3_text", "phi3", "deepseek_v2", "deepseek_v3", "kimi_k2", "gpt_oss", "glm4", "glm4_moe",
        "olmo2", "olmoe", "granite", "granitemoe", "cohere", "cohere2", "llama4_text", "starcoder2", "gpt2", "opt",
        "gpt_neox", "falcon", "internlm2", "smollm3", "exaone4", "minimax_m2", "ernie4_5", "ernie4_5_moe",
    }
)  # fmt: skip
UNGATED = frozenset(["gpt2", "opt", "gpt_neox", "gpt_bigcode", "falcon", "starcoder2", "phi", "nemotron"])
# Whose configs leave `tie_word_embeddings` out when it is true.
TIED = frozenset(
    ["gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "opt", "falcon", "cohere", "cohere2", "starcoder2"]
)
# Every which layer sees everything, where a config with a window does not say. Source: transformers' defaults.
WINDOW_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
DENSE_WIDTHS = {"llama4_text": ("intermediate_size_mlp",)}  # `intermediate_size` is there that of an expert
DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float": 4.0}
MAX_SIZE = 10**8  # beyond it a field is a mistake


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are stored. `bytes_per_weight` includes scales; parts in `kept` stay in the model's own type.

    `computes_fp8` / `computes_fp4`: activations are quantised too, so the GPU's rates for that type count.
    """

    method: str
    bytes_per_weight: float
    kept: frozenset[Part] = frozenset()
    computes_fp8: bool = False
    computes_fp4: bool = False


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2): ranks and head sizes. `query_rank` 0: queries are not compressed."""

    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts of each layer in `layers`, plus a shared MLP of width `shared_width` (0: none)."""

    count: int
    per_token: int
    width: int
    shared_width: int
    layers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Architecture facts. `layers` names the kind of each layer's attention; `window` is that of sliding ones.

    `mlp_matrices`: 3 with a gate, 2 without. `linear_state_bytes`: what a sequence keeps in each linear-attention
    layer, whatever its length.
    """

    source: str
    architecture: str
    is_known: bool
    layers: tuple[LayerKind, ...]
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    mlp_matrices: int
    vocab: int
    is_tied: bool
    weight_bytes: float
    max_model_len: int
    window: int = 0
    mla: Mla | None = None
    experts: Experts | None = None
    quantization: Quantization | None = None
    linear_state_bytes: int = 0

    @property
    def num_layers(self) -> int:
        """Transformer layers, whatever their kind of attention."""
        return len(self.layers)

    def bytes_per_weight(self, part: Part) -> float:
        """Bytes that one weight of this part takes, with scales."""
        q = self.quantization
        return self.weight_bytes if q is None or part in q.kept else q.bytes_per_weight

    def attention_matrices(self, tp: int = 1) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's attention matrices on one of `tp` GPUs; a KV head is never cut."""
        h = self.hidden
        heads = self.num_heads // tp
        if self.mla is not None:
            m = self.mla
            query = heads * (m.nope_dim + m.rope_dim)
            first = [(m.query_rank, h), (query, m.query_rank)] if m.query_rank else [(query, h)]
            return [
                *first,
                (m.kv_rank + m.rope_dim, h),
                (heads * (m.nope_dim + m.value_dim), m.kv_rank),
                (h, heads * m.value_dim),
            ]
        kv = max(1, self.num_kv_heads // tp)
        return [((heads + 2 * kv) * self.head_dim, h), (h, heads * self.head_dim)]

    def mlp_shape(self, width: int, tp: int = 1) -> list[tuple[int, int]]:
        """(outputs, inputs) of a dense MLP of this width on one of `tp` GPUs."""
        share = math.ceil(width / tp)
        return [((self.mlp_matrices - 1) * share, self.hidden), (self.hidden, share)]

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) routes its tokens to experts, in place of a dense MLP."""
        return self.experts is not None and layer in self.experts.layers

    @property
    def parameters(self) -> int:
        """All weights that are matrices; norms and biases (below 0.1%) are left out."""
        total = self.vocab * self.hidden * (1 if self.is_tied else 2)
        attention = sum(n * k for n, k in self.attention_matrices())
        for layer in range(self.num_layers):
            total += attention
            if self.has_experts(layer):
                assert self.experts is not None
                e = self.experts
                total += self.hidden * e.count + e.count * self.mlp_matrices * self.hidden * e.width
                total += self.mlp_matrices * self.hidden * e.shared_width
            else:
                total += self.mlp_matrices * self.hidden * self.intermediate
        return total

    @property
    def active_parameters(self) -> int:
        """Those that one token passes, without the embedding table."""
        total = self.vocab * self.hidden
        attention = sum(n * k for n, k in self.attention_matrices())
        for layer in range(self.num_layers):
            e = self.experts if self.has_experts(layer) else None
            width = self.intermediate if e is None else e.per_token * e.width + e.shared_width
            total += attention + self.mlp_matrices * self.hidden * width + (self.hidden * e.count if e else 0)
        return total

    def kv_bytes_per_token(self, tp: int = 1, *, kv_dtype_bytes: float = 2.0, kind: LayerKind = "full") -> float:
        """KV cache that one token takes in one layer on one of `tp` GPUs.

        Latent attention is not divided by `tp` (every GPU keeps the whole latent vector).
        """
        if kind == "linear":
            return 0.0
        if self.mla is not None:
            return (self.mla.kv_rank + self.mla.rope_dim) * kv_dtype_bytes
        return 2 * max(1, self.num_kv_heads // tp) * self.head_dim * kv_dtype_bytes


def parse(config: Mapping[str, Any], source: str) -> ModelSpec:
    """The spec in a `config.json`; `source` names the file in errors.

    Raises: ConfigError that names the field which is missing or absurd.
    """
    text = config.get("text_config")
    fields: dict[str, Any] = {**config, **text} if isinstance(text, Mapping) else dict(config)
    get = _Fields(fields, source)
    model_type = str(fields.get("model_type", ""))
    hidden = get.number("hidden_size", "n_embd", "d_model")
    num_layers = get.number("num_hidden_layers", "n_layer", "num_layers", most=10_000)
    heads = get.number("num_attention_heads", "n_head", most=100_000)
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        kv_heads = 1
    else:
        kv_heads = get.number("num_key_value_heads", "num_kv_heads", default=heads, most=100_000)
    if heads % kv_heads:
        raise ConfigError(
            f"{source}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
            "fetch the file again"
        )
    head_dim = get.number("head_dim", default=max(1, hidden // heads))
    experts = _experts(get, num_layers)
    layers, window = _layers(get, num_layers)
    dtype = str(fields.get("torch_dtype") or fields.get("dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{source}: torch_dtype={dtype!r} is none of {', '.join(DTYPE_BYTES)}; fetch the file again")
    intermediate = get.number(
        *DENSE_WIDTHS.get(model_type, ()), "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size",
        default=experts.width if experts else (4 * hidden if model_type in ("gpt2", "gpt_bigcode", "falcon") else None),
    )  # fmt: skip
    names = fields.get("architectures") or config.get("architectures") or [model_type or "unknown"]
    return ModelSpec(
        source=source,
        architecture=str(names[0] if isinstance(names, Sequence) and not isinstance(names, str) else names),
        is_known=model_type in KNOWN,
        layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        mlp_matrices=2 if model_type in UNGATED else 3,
        vocab=get.number("vocab_size"),
        is_tied=bool(fields.get("tie_word_embeddings", model_type in TIED)),
        weight_bytes=min(2.0, DTYPE_BYTES[dtype]),  # vLLM loads float32 weights as 16 bit
        max_model_len=get.number("max_position_embeddings", "n_positions", "n_ctx", default=8192),
        window=window,
        mla=_mla(get),
        experts=experts,
        quantization=_quantization(config.get("quantization_config") or fields.get("quantization_config"), source),
        linear_state_bytes=_linear_state(get) if "linear" in layers else 0,
    )


class _Fields:
    """Reads whole numbers, and says which field is wrong."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields = fields
        self.source = source

    def number(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
                    value = max(value)
                else:
                    raise ConfigError(f"{self.source}: {name}={value!r} is not a whole number; fetch the file again")
            if not least <= value <= most:
                raise ConfigError(f"{self.source}: {name}={value} is outside {least} to {most}; fetch the file again")
            return value
        if default is None:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise ConfigError(
                f"{self.source} has no field {names[0]!r}{others}, so the model's size is not known; "
                "copy it from the model's page"
            )
        return default


def _experts(get: _Fields, num_layers: int) -> Experts | None:
    fields = get.fields
    count = get.number(*EXPERT_FIELDS, default=0, least=0, most=100_000)
    if count < 2:
        return None
    per_token = get.number("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", default=1)
    if per_token > count:
        raise ConfigError(
            f"{get.source}: num_experts_per_tok={per_token} is above the {count} experts; fetch the file again"
        )
    width = get.number("moe_intermediate_size", "intermediate_size")
    shared = get.number("shared_expert_intermediate_size", default=0, least=0)
    shared = shared or width * get.number(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0, least=0
    )
    if fields.get("model_type") == "llama4_text":
        shared = width
    first = get.number("first_k_dense_replace", "moe_layer_start_index", default=0, least=0)
    every = get.number("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", default=1, least=1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"{get.source}: mlp_only_layers={dense!r} is not a list of layers; fetch the file again")
    each = fields.get("moe_layer_freq")
    if isinstance(each, list):  # one flag for each layer
        return Experts(
            count, per_token, width, shared, frozenset(i for i, flag in enumerate(each[:num_layers]) if flag)
        )
    layers = (i for i in range(num_layers) if i >= first and (i + 1) % every == 0 and i not in dense)
    if each is not None:  # DeepSeek counts from 0, Qwen from 1
        layers = (i for i in range(num_layers) if i >= first and i % every == 0)
    return Experts(count, per_token, width, shared, frozenset(layers))


def _layers(get: _Fields, num_layers: int) -> tuple[tuple[LayerKind, ...], int]:
    """The kind of each layer's attention, and the window of sliding ones."""
    fields = get.fields
    window = fields.get("sliding_window")
    if window is None:
        window = fields.get("attention_chunk_size")
        if fields.get("layer_types") is None:
            window = 0  # Llama 4 says which of its layers are chunked in newer files only
    window = window if isinstance(window, int) and not isinstance(window, bool) and 0 < window <= MAX_SIZE else 0
    if fields.get("use_sliding_window") is False:
        window = 0
    kinds: list[LayerKind]
    named = fields.get("layer_types")
    if isinstance(named, list):
        if len(named) < num_layers:
            raise ConfigError(
                f"{get.source}: layer_types names {len(named)} layers of {num_layers}; fetch the file again"
            )
        kinds = []
        for word in named[:num_layers]:
            if word in ("full_attention", "attention", "global"):
                kinds.append("full")
            elif word in ("sliding_attention", "chunked_attention", "local"):
                kinds.append("sliding" if window else "full")
            elif word == "linear_attention":
                kinds.append("linear")
            else:
                raise ConfigError(
                    f"{get.source}: layer_types has {word!r}, whose memory kervan cannot count; known are "
                    "full_attention, sliding_attention, chunked_attention and linear_attention"
                )
        return tuple(kinds), window
    model_type = fields.get("model_type")
    every = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern")
    if every is None:
        every = WINDOW_PATTERNS.get(model_type) if isinstance(model_type, str) else None
    if window and isinstance(every, str) and every and not set(every) - {"L", "G"}:  # EXAONE 4: LLLG
        kinds = ["full" if every[i % len(every)] == "G" else "sliding" for i in range(num_layers)]
        return tuple(kinds), window
    if window and isinstance(every, int) and every > 1:
        return tuple("full" if (i + 1) % every == 0 else "sliding" for i in range(num_layers)), window
    every = fields.get("full_attention_interval")
    if isinstance(every, int) and every > 1:
        return tuple("full" if (i + 1) % every == 0 else "linear" for i in range(num_layers)), window
    return ("sliding" if window else "full",) * num_layers, window


def _linear_state(get: _Fields) -> int:
    """State of a gated delta net (Qwen3-Next): one matrix per value head in float32, and the convolution's tail.

    Source: vLLM's GatedDeltaNet state shapes, 0.24.
    """
    values, keys = get.number("linear_num_value_heads"), get.number("linear_num_key_heads")
    value_dim, key_dim = get.number("linear_value_head_dim"), get.number("linear_key_head_dim")
    tail = get.number("linear_conv_kernel_dim", default=4) - 1
    return values * value_dim * key_dim * 4 + (2 * keys * key_dim + values * value_dim) * tail * 2


def _mla(get: _Fields) -> Mla | None:
    if not get.fields.get("kv_lora_rank"):
        return None
    return Mla(
        query_rank=get.number("q_lora_rank", default=0, least=0),
        kv_rank=get.number("kv_lora_rank"),
        nope_dim=get.number("qk_nope_head_dim"),
        rope_dim=get.number("qk_rope_head_dim"),
        value_dim=get.number("v_head_dim"),
    )


def _quantization(settings: Any, source: str) -> Quantization | None:
    """What `quantization_config` says.

    Raises: ConfigError for a method whose size is not known.
    """
    if not isinstance(settings, Mapping):
        return None
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "").lower()
    kept = _kept(settings)
    if method in ("fp8", "fbgemm_fp8", "ptpc_fp8", "modelopt") and "nvfp4" not in str(settings).lower():
        return Quantization(method, 1.0, kept, computes_fp8=True)
    if "nvfp4" in str(settings).lower():
        return Quantization(
            "nvfp4", 0.5 + 1 / 16, kept, computes_fp4="input_activations" in str(settings) or method == "modelopt"
        )
    if method == "mxfp4":
        return Quantization(method, 0.5 + 1 / 32, kept | {"attention", "router", "embedding", "head"})
    if method == "bitsandbytes":
        return Quantization(method, 0.5 + 4 / 64 if settings.get("load_in_4bit") else 1.0, kept)
    bits, group = settings.get("bits") or settings.get("w_bit"), settings.get("group_size") or 128
    if method == "compressed-tensors":
        weights = _first_weights(settings)
        bits, group = weights.get("num_bits"), weights.get("group_size") or 0
        if bits == 8:
            is_float = weights.get("type") == "float"
            return Quantization(method, 1.0, kept, computes_fp8=is_float and "input_activations" in str(settings))
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ConfigError(
            f"{source}: quantization_config with quant_method={method!r} and bits={bits!r} is not known, so the "
            "weights' size is not either; known are fp8, gptq, awq, compressed-tensors, mxfp4, nvfp4 and bitsandbytes"
        )
    scales = (2 + bits / 8) / group if isinstance(group, int) and group > 0 else 0.0
    return Quantization(method, bits / 8 + scales, kept)


def _first_weights(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping):
        for group in groups.values():
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
                weights: Mapping[str, Any] = group["weights"]
                return weights
    return {}


# Names of modules, as the lists of unquantised ones have them, and the parts they are.
_MODULES: tuple[tuple[str, Part], ...] = (
    (r"lm_head", "head"),
    (r"embed", "embedding"),
    (r"self_attn|\battn|attention", "attention"),
    (r"router|mlp\.gate\b(?!_)|\bgate$", "router"),
    (r"(?<!shared_)experts", "experts"),
    (r"mlp\.(gate_proj|up_proj|down_proj|\*|\.\*)|\bmlp$", "mlp"),
)


_NOT_TEXT = r"vision|visual|audio|multi_?modal|mm_projector"  # its weights are not counted


def _kept(settings: Mapping[str, Any]) -> frozenset[Part]:
    """Parts that are left in the model's own type as a whole: those that a list of exceptions names for many layers."""
    kept: set[Part] = {"head", "embedding", "router"}
    listed = settings.get("ignore") or settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
    if not isinstance(listed, list):
        return frozenset(kept)
    names = [name for name in listed if isinstance(name, str) and not re.search(_NOT_TEXT, name)]
    for part_pattern, part in _MODULES:
        hits = [name for name in names if re.search(part_pattern, name)]
        is_general = any(name.startswith("re:") or not re.search(r"\.\d+\.", name) for name in hits)
        if is_general or len(hits) > 8:
            kept.add(part)
    return frozenset(kept)
