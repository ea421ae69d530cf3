"""Models as transformers builds them and as vLLM reads them, against what kervan counts from their config.json.

For every family that transformers knows as a causal language model and vLLM serves (or kervan counts): the default
config with few layers, built on torch's meta device, where a parameter is a shape without memory.
"""

import dataclasses
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from kervan.errors import ConfigError  # noqa: E402
from kervan.facts.architecture import Attention, LatentAttention, ModelSpec, families, fields, parse  # noqa: E402
from kervan.vendor import vllm_names  # noqa: E402

pytestmark = pytest.mark.timeout(600)  # imports alone take a minute on a machine that does other work too

NUM_LAYERS = 8
# What a family's own defaults leave out, without which transformers itself cannot build it.
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "gemma3n_text": {"num_kv_shared_layers": 3},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {"num_hidden_layers": None},
    "zamba2": {"num_hidden_layers": 54},
}
# Families that are not counted, by the words of the refusal.
REFUSED = {
    "hrm_text": "H_cycles=2 is not understood",
    "inkling_text": "hybrid_sliding",
}
# Families whose default config transformers 5.19 cannot build a model of, and one that it builds otherwise.
NOT_BUILT = {
    "dbrx": "its attention config lacks rope_theta",
    "qwen4_exp": "its indexer has no sizes",
    "qwen4_exp_text": "its indexer has no sizes",
    "longcat_flash": "transformers gives experts that compute nothing a first matrix; vLLM does not",
}


def vllm_source(path: str) -> str:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    return (Path(found.origin).parent / path).read_text()


def served() -> set[str]:
    """Architectures that the installed vLLM has as text generators."""
    text = vllm_source("model_executor/models/registry.py")
    start, end = text.index("_TEXT_GENERATION_MODELS = {"), text.index("_EMBEDDING_MODELS = {")
    return set(re.findall(r'^    "(\w+)":', text[start:end], re.M))


def model_types() -> list[str]:
    names = served() if importlib.util.find_spec("vllm") else set()
    return sorted(
        kind
        for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if (name if isinstance(name, str) else name[0]) in names or kind in families.KNOWN
    )


MODEL_TYPES = model_types()


def small_config(model_type: str) -> Any:
    kind = CONFIG_MAPPING[model_type]
    name = getattr(kind, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    changed = {name: NUM_LAYERS, **NEEDED.get(model_type, {})}
    return kind(**{key: value for key, value in changed.items() if value is not None})


def as_file(config: Any, architecture: str) -> dict[str, Any]:
    """The config.json that transformers writes, with all fields."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found | {"architectures": [architecture]}


def architecture_of(model_type: str) -> str:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return name if isinstance(name, str) else str(name[0])


@pytest.mark.parametrize("model_type", [kind for kind in MODEL_TYPES if kind not in NOT_BUILT])
def test_parameters_are_those_of_the_model_that_transformers_builds(model_type: str) -> None:
    config = small_config(model_type)
    found = as_file(config, architecture_of(model_type))
    if model_type in REFUSED:
        with pytest.raises(ConfigError, match=re.escape(REFUSED[model_type])):
            parse(found, "config.json")
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = sum(one.numel() for one in model.parameters())
    spec = parse(found, "config.json")
    # Some multimodal families are built with their tower, others without.
    assert built in (pytest.approx(spec.parameters, rel=0.01), pytest.approx(spec.parameters + spec.tower, rel=0.01))


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) & families.KNOWN - {*NOT_BUILT, "gemma3"}))
def test_fields_that_are_left_out_are_filled_in_as_transformers_does(model_type: str) -> None:
    """The file with its sizes alone counts as the one with all fields."""
    config = CONFIG_MAPPING[model_type](**{
        key: value
        for key, value in NEEDED.get(model_type, {}).items()
        if value is not None and key not in ("layer_types", "num_kv_shared_layers")
    }) if model_type != "lfm2_moe" else small_config("lfm2_moe")  # fmt: skip
    whole = as_file(config, architecture_of(model_type))
    kept = {*families.SIZES, "architectures", "model_type", *NEEDED.get(model_type, {}), *PUBLISHED.get(model_type, ())}
    short = {name: value for name, value in whole.items() if name in kept}
    assert counts(parse(short, "short")) == counts(parse(whole, "whole"))


# Fields that every published file of a family has, and that its defaults do not fill in.
PUBLISHED = {
    "gemma4_text": ("layer_types", "per_layer_config"),
    "deepseek_v4": ("layer_types", "compress_rates", "mlp_layer_types"),
    "falcon_h1": ("mamba_d_head",),
    "hy_v4": ("indexer_types",),
    "kimi_linear": ("layer_types", "mlp_layer_types"),
    "laguna": ("layer_types", "mlp_layer_types", "num_attention_heads_per_layer", "gating"),
    "mimo_v2_flash": ("layer_types", "mlp_layer_types"),
    "minimax": ("layer_types",),
    "nemotron_h": ("layers_block_type",),
    "olmo_hybrid": ("linear_num_value_heads", "linear_num_key_heads", "linear_value_head_dim", "linear_key_head_dim"),
    "zamba2": ("layers_block_type", "hybrid_layer_ids"),
}  # fmt: skip


def counts(spec: ModelSpec) -> tuple[float, float, float, int]:
    return spec.parameters, spec.active_parameters, spec.kv_bytes_per_token, spec.max_model_len


# Fields whose defaults are kept beside those about layers, attention, experts and caches.
MORE_FIELDS = frozenset(
    [
        "max_position_embeddings", "n_positions", "tie_word_embeddings", "vocab_size", "vocab_size_per_layer_input",
        "model_max_length", "max_seq_len", "multi_query", "qk_rope_head_dim", "conv_kernel", "attention_chunk_size",
        "n_embd", "d_model", "first_k_dense_replace", "use_sliding_window", "n_inner", "mamba_ssm_cache_dtype",
        "interleave_moe_layer_step", "n_groups", "moe_layer_start_index",
    ]
)  # fmt: skip
LEFT_OUT = frozenset(["mamba_conv_bias", "use_conv_bias", "block_size", "max_window_layers"])


def transformers_defaults(model_type: str) -> dict[str, Any]:
    """Whole numbers, words and flags that a config class has for the fields that can change a model's size."""
    found = {}
    for field in dataclasses.fields(CONFIG_MAPPING[model_type]):
        value = field.default
        if not isinstance(value, bool | int | str) or value == "auto" or field.name in LEFT_OUT:
            continue
        is_off = fields.is_off(value) and field.name != "use_sliding_window"
        about = fields.is_about_layout(field.name) and not fields.is_harmless(field.name)
        if not is_off and not field.name.endswith("_bias") and (field.name in MORE_FIELDS or about):
            found[field.name] = value
    return dict(sorted(found.items()))


def test_defaults_are_transformers_own() -> None:
    """`python -m pytest tests/contract/test_model_counts.py -k defaults` with KERVAN_WRITE_DEFAULTS=1 writes them."""
    wanted = {kind: transformers_defaults(kind) for kind in sorted(families.KNOWN) if kind in CONFIG_MAPPING}
    path = Path(families.__file__).with_name("defaults.json")
    if os.environ.get("KERVAN_WRITE_DEFAULTS"):
        lines = [f" {json.dumps(kind)}: {json.dumps(values)}" for kind, values in wanted.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert json.loads(path.read_text()) == wanted


def test_heads_are_those_that_vllm_reads() -> None:
    """KV heads and the sizes of heads, of families whose attention layers are alike."""
    pytest.importorskip("vllm")
    import vllm.config  # noqa: F401 (first, or the next import is circular)
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    compared = 0
    for model_type in sorted(set(MODEL_TYPES) & families.KNOWN - set(NOT_BUILT) - families.PURE_STATE):
        config = small_config(model_type)
        config.architectures = [architecture_of(model_type)]
        spec = parse(as_file(config, architecture_of(model_type)), model_type)
        mixers = {one for layer in spec.layers for one in layer.mixers}
        heads = {(one.num_kv_heads, one.head_dim) for one in mixers if isinstance(one, Attention)}
        latent = {one.latent_dims for one in mixers if isinstance(one, LatentAttention)}
        kind = convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(model_type, convertors.ModelArchConfigConvertorBase)
        text = config.get_text_config()
        theirs = kind(config, text)
        if latent and model_type != "deepseek_v4":
            assert latent == {theirs.get_head_size()}, model_type
        elif len(heads) == 1 and model_type != "minicpm3":  # whose layers cache expanded keys of another size
            assert heads == {(theirs.get_total_num_kv_heads(), theirs.get_head_size())}, model_type
        compared += 1
    assert compared > 50


def test_states_are_those_that_vllm_keeps() -> None:
    pytest.importorskip("vllm")
    import vllm.config  # noqa: F401
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

    def state_bytes(shapes: tuple[tuple[int, ...], ...], *sizes: int) -> int:
        return sum(size * torch.Size(shape).numel() for shape, size in zip(shapes, sizes, strict=True))

    def ours(model_type: str, tp: int, **changed: Any) -> float:
        config = small_config(model_type)
        spec = parse(as_file(config, architecture_of(model_type)) | changed, model_type)
        return next(one.state_bytes(tp) for layer in spec.layers for one in layer.mixers if hasattr(one, "state_bytes"))

    for tp in (1, 2, 4):
        wanted = Shapes.mamba2_state_shape(tp, 8192, 8, 128, 64, 128, 4)
        assert ours("nemotron_h", tp) == state_bytes(wanted, 2, 4)
        assert ours("jamba", tp) == state_bytes(Shapes.mamba1_state_shape(tp, 8192, 16, 4), 2, 2)
        assert ours("qwen3_next", tp) == state_bytes(Shapes.gated_delta_net_state_shape(tp, 16, 32, 128, 128, 4), 2, 2)
        assert ours("kimi_linear", tp) == state_bytes(Shapes.kda_state_shape(tp, 32, 128), 2, 4)
        assert ours("lfm2", tp) == state_bytes(Shapes.short_conv_state_shape(tp, 2560, 3), 2)


def test_architectures_that_vllm_has_dropped() -> None:
    text = vllm_source("model_executor/models/registry.py")
    found = re.search(r"_PREVIOUSLY_SUPPORTED_MODELS = \{(.*?)\n\}", text, re.S)
    assert found is not None
    theirs = dict(re.findall(r'"(\w+)": "([\d.]+)"', found[1]))
    assert vllm_names.REMOVED_ARCHITECTURES.items() <= theirs.items()


def test_tables_name_families_that_are_there() -> None:
    assert {*NEEDED, *REFUSED, *NOT_BUILT} <= set(MODEL_TYPES), sys.version
