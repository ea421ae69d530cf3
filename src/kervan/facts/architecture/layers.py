"""Which kind of attention or state, and which MLP, each layer of a model has: every spelling of it in one place."""

from dataclasses import dataclass
from typing import Any, Literal

from kervan.errors import ConfigError
from kervan.facts.architecture import families
from kervan.facts.architecture.fields import MAX_SIZE, Fields, brief

MixerKind = Literal["full", "sliding", "chunked", "state", "both", "none"]
FeedKind = Literal["dense", "experts", "both", "none"]

MIXER_WORDS: dict[str, MixerKind] = {
    "full_attention": "full", "attention": "full", "global": "full", "global_attention": "full", "full": "full",
    "deepseek_sparse_attention": "full", "indexed_attention": "full", "compressed_sparse_attention": "full",
    "heavily_compressed_attention": "full", "attention_full": "full", "mla": "full",
    "sliding_attention": "sliding", "local": "sliding", "swa": "sliding", "sliding_window": "sliding",
    "local_attention": "sliding", "sliding_window_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "state", "mamba": "state", "mamba2": "state", "conv": "state", "short_conv": "state",
    "gated_delta_net": "state", "kda": "state", "lightning_attention": "state",
    "hybrid": "both",
}  # fmt: skip
USUAL_WORDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention", "mamba", "conv")
FEED_WORDS: dict[str, FeedKind] = {
    "dense": "dense", "mlp": "dense", "sparse": "experts", "moe": "experts", "hash_moe": "experts",
}  # fmt: skip
# Fields that say the same in other ways: the first that a file has counts.
_SPELLINGS = (
    "layer_types", "layers_block_type", "full_attention_interval", "sliding_window_pattern", "_sliding_window_pattern",
    "global_attn_every_n_layers", "full_attn_idxs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """What each layer is made of, and the window of sliding and chunked ones."""

    mixers: list[MixerKind]
    feeds: list[FeedKind]
    window: int = 0


def read(f: Fields, model_type: str, num_layers: int, *, has_experts: bool) -> LayerKinds:
    """The kinds of all layers.

    Raises: ConfigError for a word or a number that is not known.
    """
    pattern = f.get("hybrid_override_pattern")
    words = f.get("layers_block_type") if model_type == "nemotron_h" else None
    if pattern is not None and model_type in families.KNOWN - {"nemotron_h"}:
        raise ConfigError(
            f"{f.source}: hybrid_override_pattern={brief(pattern)} is a field of model_type 'nemotron_h', and "
            f"model_type is {model_type!r}, for which vLLM does not read it; correct model_type, or delete the field"
        )
    if pattern is not None or words is not None:
        return _one_each(f, num_layers, pattern, words)
    window = _window(f)
    mixers = _mixers(f, model_type, num_layers, window)
    feeds = _feeds(f, model_type, num_layers, has_experts=has_experts)
    if model_type in families.PURE_STATE:
        feeds = ["none"] * num_layers
    return LayerKinds(mixers, feeds, window)


def _one_each(f: Fields, num_layers: int, pattern: Any, words: Any) -> LayerKinds:
    """Nemotron-H: a layer is attention, a state, an MLP or experts, and nothing else."""
    f.understood("sliding_window", "layers_block_type", "hybrid_override_pattern", "layer_types")
    names: dict[str, tuple[MixerKind, FeedKind]] = {
        "M": ("state", "none"), "*": ("full", "none"), "-": ("none", "dense"), "E": ("none", "experts"),
        "mamba": ("state", "none"), "linear_attention": ("state", "none"), "attention": ("full", "none"),
        "full_attention": ("full", "none"), "mlp": ("none", "dense"), "moe": ("none", "experts"),
    }  # fmt: skip
    name = "hybrid_override_pattern" if words is None else "layers_block_type"
    each = (list(pattern.replace("|", "")) if isinstance(pattern, str) else pattern) if words is None else words
    if not isinstance(each, list) or len(each) < num_layers:
        named = f"names {len(each)} layers" if isinstance(each, list) else "is no list of layers"
        raise ConfigError(
            f"{f.source}: {name}={brief(pattern or words)} {named}, and num_hidden_layers is {num_layers}; "
            "fetch the file again"
        )
    for word in each:
        if not isinstance(word, str) or word not in names:
            raise f.refuse(name, f"it has {brief(word)}, so the model's size is not known", ["M", "*", "-", "E"])
    found = [names[word] for word in each[:num_layers]]
    return LayerKinds([mixer for mixer, _ in found], [feed for _, feed in found])


def _window(f: Fields) -> int:
    window = f.get("sliding_window", "sliding_window_size")
    f.understood("max_window_layers", "window_size", "use_sliding_window", "attention_chunk_size")
    if window is None and (f.has("layer_types") or f.has("no_rope_layers")):
        window = f.get("attention_chunk_size")
        if not f.has("layer_types"):
            window = 0  # Llama 4 says which of its layers are chunked in newer files only
    if isinstance(window, list):
        window = max((one for one in window if type(one) is int), default=0)
    window = window if type(window) is int and 0 < window <= MAX_SIZE else 0
    return 0 if f.get("use_sliding_window") is False else window


def _mixers(f: Fields, model_type: str, n: int, window: int) -> list[MixerKind]:
    f.understood(*_SPELLINGS)
    for reader in (_named, _indexed):
        found = reader(f, model_type, n)
        if found is not None:
            return [_with_window(kind, window) for kind in found]
    if model_type in families.PURE_STATE or model_type == "granitemoehybrid":
        return ["state"] * n
    if model_type == "falcon_h1":
        return ["both"] * n
    return _periodic(f, model_type, n, window)


def _with_window(kind: MixerKind, window: int) -> MixerKind:
    return "full" if kind in ("sliding", "chunked") and not window else kind


def _named(f: Fields, model_type: str, n: int) -> list[MixerKind] | None:
    """A word for each layer."""
    for name in ("layer_types", "layers_block_type", "block_types", "mixer_types"):
        words = f.each(name, n)
        if words is None:
            continue
        for word in words:
            if not isinstance(word, str) or word not in MIXER_WORDS:
                raise f.refuse(name, f"it has {brief(word)}, whose memory kervan cannot count", USUAL_WORDS)
        # transformers 5 calls Zamba2's layers "linear_attention" and "hybrid".
        return [MIXER_WORDS[word] for word in words]
    flags = f.each("attn_type_list", n)  # MiniMax-Text-01: 1 is softmax attention
    if flags is not None:
        return ["full" if flag == 1 else "state" for flag in flags]
    flags = f.each("hybrid_layer_pattern", n)  # MiMo-V2: 1 is a window
    if flags is not None:
        return ["sliding" if flag == 1 else "full" for flag in flags]
    return None


def _indexed(f: Fields, model_type: str, n: int) -> list[MixerKind] | None:
    """Numbers of the layers with attention."""
    own = f.get("linear_attn_config")
    if isinstance(own, dict):  # Kimi-Linear counts layers from 1
        full = own.get("full_attn_layers")
        if not isinstance(full, list) or not full:
            raise f.refuse("linear_attn_config", "it has no full_attn_layers, so the layers' kinds are not known")
        return ["full" if layer + 1 in full else "state" for layer in range(n)]
    for name, other in (("full_attn_idxs", "state"), ("attn_layer_indices", "state"), ("hybrid_layer_ids", "both")):
        listed = f.get(name)
        if name == "attn_layer_indices" and model_type == "bamba" and listed is None:
            listed = []
        if isinstance(listed, list):
            inside: MixerKind = "full" if other == "state" else "both"
            return [inside if layer in listed else "state" for layer in range(n)]
    if f.has("attn_layer_period"):
        every = f.number("attn_layer_period")
        offset = f.number("attn_layer_offset", default=0, least=0)
        return ["full" if layer % every == offset else "state" for layer in range(n)]
    return None


def _periodic(f: Fields, model_type: str, n: int, window: int) -> list[MixerKind]:
    """Every which layer is another kind."""
    every = f.get("full_attention_interval", "linear_attention_interval")
    if type(every) is int and every > 1:
        return ["full" if (layer + 1) % every == 0 else "state" for layer in range(n)]
    every = f.get("layer_group_size")
    if type(every) is int and every > 1:  # Ling 2.5: the last of each group, and what is left over
        whole = n // every * every
        return ["full" if (layer + 1) % every == 0 or layer >= whole else "state" for layer in range(n)]
    every = f.get("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "layer_switch")
    if every is None:
        every = families.WINDOW_PATTERNS.get(model_type)
    if window and isinstance(every, str) and every and not set(every) - {"L", "G"}:  # EXAONE 4: LLLG
        return ["full" if every[layer % len(every)] == "G" else "sliding" for layer in range(n)]
    if window and type(every) is int and every > 1:
        return ["full" if (layer + 1) % every == 0 else "sliding" for layer in range(n)]
    if window and isinstance(every, list) and len(every) >= n:
        return ["sliding" if flag else "full" for flag in every[:n]]
    if window and model_type in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        first = f.number("max_window_layers", default=0, least=0)
        return ["full" if layer < first else "sliding" for layer in range(n)]
    return ["sliding" if window else "full"] * n


def _feeds(f: Fields, model_type: str, n: int, *, has_experts: bool) -> list[FeedKind]:
    """Which layers route to experts."""
    f.understood(
        "first_k_dense_replace", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval",
        "num_dense_layers",
        "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "mlp_only_layers", "moe_layers",
        "expert_layer_period", "expert_layer_offset", "moe_every_n_layers", "n_dense_layers", "enable_moe_block",
        "first_moe_layer", "moe_layers_enum", "prefix_dense_sliding_window_pattern",
    )  # fmt: skip
    words = f.each("mlp_layer_types", n)
    if not has_experts:
        return ["dense"] * n
    if words is not None:
        for word in words:
            if not isinstance(word, str) or word not in FEED_WORDS:
                raise f.refuse("mlp_layer_types", f"it has {brief(word)}", sorted(FEED_WORDS))
        return [FEED_WORDS[word] for word in words]
    each = f.get("moe_layer_freq")
    if isinstance(each, list):  # a flag for each layer
        return ["experts" if flag else "dense" for flag in f.each("moe_layer_freq", n) or []]
    named = f.get("moe_layers", "moe_layers_enum")
    if isinstance(named, str):
        named = [int(one) for one in named.split(",") if one.strip().isdecimal()]
    if isinstance(named, list):
        return ["experts" if layer in named else "dense" for layer in range(n)]
    dense = f.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"{f.source}: mlp_only_layers={brief(dense)} is not a list of layers; fetch the file again")
    if f.has("expert_layer_period"):
        every = f.number("expert_layer_period")
        offset = f.number("expert_layer_offset", default=0, least=0)
        return ["experts" if layer % every == offset else "dense" for layer in range(n)]
    first = f.number(
        "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "n_dense_layers", default=0, least=0
    )
    last = f.get("moe_layer_end_index")
    end = last + 1 if type(last) is int and 0 <= last < n else n
    every = f.number(
        "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "moe_layer_interval", default=1, least=1
    )
    from_one = each is None  # DeepSeek counts from 0, Qwen from 1
    return [
        "experts" if first <= layer < end and (layer + from_one) % every == 0 and layer not in dense else "dense"
        for layer in range(n)
    ]
