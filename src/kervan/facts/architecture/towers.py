"""What sees or hears in a multimodal model: a vision transformer's parameters, or a sentence that it is not counted."""

from collections.abc import Mapping
from typing import Any

_PARTS = (
    "vision_config", "audio_config", "talker_config", "token2wav_config", "code2wav_config", "speech_config",
    "audio_encoder_config", "vision_tower_config", "visual", "vit_config", "image_config", "video_config",
    "vision_model_config", "sound_config", "encoder_config", "projector_config", "speech_encoder_config",
    "audio_processor", "embd_layer", "vision_encoder_config", "vae_config", "vit_model_config", "resampler_config",
)  # fmt: skip
# Whose vision MLP has a gate.
_GATED = ("qwen2_5_vl", "pixtral", "glm4v", "glm4v_moe", "kimi_vl", "qwen2_5_omni_vision_encoder", "dots_vit")
_UNUSED = ("talker_config", "token2wav_config", "code2wav_config")  # vLLM serves the thinker alone


def is_tower(name: str, value: Any) -> bool:
    """Whether a field of the file describes a tower, and not the language model."""
    return name in _PARTS and isinstance(value, Mapping | str | list)


def count(config: Mapping[str, Any], source: str) -> tuple[int, tuple[str, ...]]:
    """(parameters of the vision tower, notes on what is not counted).

    Each GPU holds the whole tower: vLLM may cut it by tp, and the difference is small beside the language model.
    """
    total = 0
    notes = []
    for outer in (config, config.get("thinker_config")):
        if not isinstance(outer, Mapping):
            continue
        for name in _PARTS:
            part = outer.get(name)
            if not isinstance(part, Mapping) or not part or name in _UNUSED:
                continue
            size = _transformer(part, outer) if name in ("vision_config", "vit_config") else 0
            total += size
            if size:
                notes.append(
                    f"the {size / 1e6:.0f} million parameters of {name} are counted on each GPU, not in the sum."
                )
            else:
                notes.append(f"{source}: {name} is not counted: its weights take memory beside those counted here.")
    return total, tuple(notes)


def _transformer(part: Mapping[str, Any], outer: Mapping[str, Any]) -> int:
    """Parameters of a vision transformer: blocks, patches, positions, and the projector that merges patches."""

    def number(*names: str) -> int:
        for name in names:
            value = part.get(name)
            if type(value) is int and 0 < value < 10**6:
                return value
        return 0

    hidden = number("embed_dim", "hidden_size", "width") if "embed_dim" in part else number("hidden_size", "width")
    depth = number("depth", "num_hidden_layers", "layers", "num_layers", "vt_num_hidden_layers")
    hidden = hidden or number("vt_hidden_size")
    ratio = part.get("mlp_ratio")
    width = number("intermediate_size", "vt_intermediate_size")
    if not width and isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio < 100:
        width = int(hidden * ratio)
    if not (hidden and depth and width):
        return 0
    kind = str(part.get("model_type") or outer.get("model_type") or "")
    matrices = 3 if kind in _GATED or outer.get("model_type") in _GATED else 2
    blocks = depth * (4 * hidden * hidden + matrices * hidden * width)
    patch, channels = number("patch_size", "spatial_patch_size"), number("in_channels", "num_channels", "in_chans") or 3
    patches = patch * patch * channels * (number("temporal_patch_size") or 1) * hidden
    image = number("image_size")
    positions = number("num_position_embeddings") or ((image // patch) ** 2 if image and patch else 0)
    merge = (number("spatial_merge_size") or 1) ** 2
    out = number("out_hidden_size")
    if out:  # Qwen: two layers over merged patches, again for each level of the tower that is mixed in
        levels = part.get("deepstack_visual_indexes")
        mergers = 1 + (len(levels) if isinstance(levels, list) else 0)
        projector = mergers * (merge * hidden * merge * hidden + merge * hidden * out)
    else:
        text = outer.get("text_config") or outer.get("llm_config") or {}
        size = text.get("hidden_size") if isinstance(text, Mapping) else None
        size = size if type(size) is int and 0 < size < 10**6 else hidden
        projector = hidden * size + size * size
    return blocks + patches + positions * hidden + projector
