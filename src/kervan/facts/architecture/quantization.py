"""How a checkpoint stores its weights: what `quantization_config` says of each matrix, matched by the matrix's name.

Sources: vLLM 0.32, `model_executor/layers/quantization` (which lists name what, and how names are matched).
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kervan.errors import ConfigError
from kervan.facts.architecture.fields import brief
from kervan.facts.architecture.spec import (
    Attention,
    Experts,
    LatentAttention,
    Layer,
    Mlp,
    ModelSpec,
    Part,
    Quantization,
    StateLayer,
    Storage,
    Weight,
)

NEVER: frozenset[Part] = frozenset(["embedding", "head", "router"])  # vLLM leaves them in the model's own type
FP8 = Storage(1.0, "fp8")
NVFP4 = Storage(0.5 + 1 / 16, "fp4")  # a scale of 8 bits for 16 weights
MXFP4 = Storage(0.5 + 1 / 32)  # a scale of 8 bits for 32 weights
# By ModelOpt's names of algorithms (`quant_algo`).
MODELOPT = {
    "FP8": FP8, "FP8_PER_CHANNEL_PER_TOKEN": FP8, "FP8_PB_WO": FP8, "MXFP8": Storage(1 + 1 / 32, "fp8"),
    "NVFP4": NVFP4, "NVFP4_AWQ": NVFP4, "W4A16_NVFP4": Storage(0.5 + 1 / 16),
    "W4A16_AWQ": Storage(0.5 + 2.5 / 128), "W4A8_AWQ": Storage(0.5 + 2.5 / 128),
}  # fmt: skip
KNOWN = "fp8, gptq, awq, compressed-tensors, modelopt (FP8, NVFP4), mxfp4 and bitsandbytes"
_IGNORED = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "exclude")
# Other names of the same modules: the part of the path that says what they belong to.
_ALIASES = {
    "self_attn": ("attn", "attention", "self_attention", "mixer"),
    "mamba": ("mixer", "linear_attn", "self_attn"),
    "linear_attn": ("self_attn",),
    "mlp": ("feed_forward", "block_sparse_moe", "mixer", "moe"),
}


def in_fp8(spec: ModelSpec) -> ModelSpec:
    """The same model with those matrices in FP8 that vLLM's `quantization=fp8` takes: the layers', but no routers."""

    def weights(of: tuple[Weight, ...]) -> tuple[Weight, ...]:
        return tuple(one if one.part in NEVER else replace(one, storage=FP8) for one in of)

    def block(one: Any) -> Any:
        experts = {"each": weights(one.each)} if isinstance(one, Experts) else {}
        return replace(one, weights=weights(one.weights), **experts)

    made: dict[int, Layer] = {}  # layers of one shape stay one object
    for layer in spec.layers:
        if id(layer) not in made:
            mixers: tuple[Attention | LatentAttention | StateLayer, ...] = tuple(map(block, layer.mixers))
            feeds: tuple[Mlp | Experts, ...] = tuple(map(block, layer.feed_forwards))
            made[id(layer)] = replace(layer, mixers=mixers, feed_forwards=feeds)
    kv_cache = spec.quantization.kv_cache if spec.quantization else "auto"
    quantization = Quantization("fp8", FP8, FP8, kv_cache=kv_cache)
    return replace(spec, layers=tuple(made[id(layer)] for layer in spec.layers), quantization=quantization)


class Storages:
    """Says how each matrix of a layer is stored."""

    def __init__(self, quantization: Quantization | None, own_bytes: float, rules: Sequence["_Rule"], kept: "_Names"):
        self.quantization = quantization
        self._own = Storage(own_bytes)
        self._rules = rules
        self._kept = kept

    def of(self, part: Part, modules: Sequence[str], layer: int) -> Storage:
        """Of the matrix with these names within layer number `layer`; any name that is an exception makes it one."""
        q = self.quantization
        if q is None or part in NEVER:
            return self._own
        if q.method == "mxfp4" and part != "experts":
            return self._own
        if self._kept and self._kept.match_any(modules, layer):
            return self._own
        for rule in self._rules:
            if rule.names is None or rule.names.match_any(modules, layer):
                return rule.storage
        if self._rules:
            return self._own
        return q.experts if part == "experts" else q.storage


@dataclass(frozen=True, slots=True)
class _Rule:
    names: "_Names | None"  # None: all
    storage: Storage


class _Names:
    """Names of modules as a list has them: whole paths, parts of paths, `*` patterns, or `re:` and an expression."""

    def __init__(self, listed: Sequence[str], source: str) -> None:
        self._by_layer: dict[int, list[str]] = {}
        self._anywhere: list[str] = []
        expressions = []
        for name in listed:
            if name.startswith("re:"):
                expressions.append(name[3:])
            elif "*" in name or "?" in name:
                expressions.append(fnmatch.translate(name))
            elif found := re.search(r"\blayers\.(\d{1,6})\b", name):
                self._by_layer.setdefault(int(found[1]), []).append(f".{name}.")
            else:
                self._anywhere.append(f".{name}.")
        try:
            self._expression = re.compile("|".join(f"(?:{one})" for one in expressions)) if expressions else None
        except re.error as error:
            raise ConfigError(
                f"{source}: quantization_config names modules by {brief(expressions[0])}, which is no regular "
                f"expression ({error}); fetch the file again"
            ) from error
        text = " ".join(listed)
        self._prefixes = sorted(set(re.findall(r"(?:^|\s|re:)([\w.]*?)layers\.", text)) | {"model."})
        self._aliases = {
            usual: [other for other in others if re.search(rf"\b{other}\b", text)] for usual, others in _ALIASES.items()
        }

    def __bool__(self) -> bool:
        return bool(self._by_layer or self._anywhere or self._expression)

    def match_any(self, modules: Sequence[str], layer: int) -> bool:
        return any(self._match(name, layer) for module in modules for name in self._spellings(module, layer))

    def _spellings(self, module: str, layer: int) -> Iterator[str]:
        first, _, rest = module.partition(".")
        for word in (first, *self._aliases.get(first, ())):
            for prefix in self._prefixes:
                yield f"{prefix}layers.{layer}.{word}.{rest}" if rest else f"{prefix}layers.{layer}.{word}"

    def _match(self, name: str, layer: int) -> bool:
        if self._expression is not None and self._expression.match(name):
            return True
        dotted = f".{name}."
        return any(one in dotted for one in (*self._by_layer.get(layer, ()), *self._anywhere))


def read(settings: Any, own_bytes: float, expert_dtype: str, source: str) -> Storages:
    """The storages that `quantization_config` (or the content of `hf_quant_config.json`) gives.

    `own_bytes`: of a weight that is not quantised. `expert_dtype`: "fp4" where routed experts are MXFP4 beside FP8
    layers (DeepSeek-V4).

    Raises: ConfigError for a method whose size is not known.
    """
    nothing = _Names([], source)
    if not isinstance(settings, Mapping) or not settings:
        return Storages(None, own_bytes, (), nothing)
    inner = settings.get("quantization")
    if isinstance(inner, Mapping):  # as hf_quant_config.json nests it
        settings = {"quant_method": "modelopt", **settings, **inner}
    method = str(settings.get("quant_method") or ("modelopt" if settings.get("quant_algo") else "")).lower()
    kept = _Names(_listed(settings), source)
    rules: list[_Rule] = []
    name = method
    if method.startswith("modelopt"):
        name, storage, rules = _modelopt(settings, source)
    elif method in ("fp8", "fbgemm_fp8", "ptpc_fp8"):
        storage = FP8
    elif method == "mxfp4":
        storage = MXFP4
    elif method == "bitsandbytes":
        storage = Storage(0.5 + 4 / 64 if settings.get("load_in_4bit") else 1.0)
    elif method == "compressed-tensors":
        rules = [
            _Rule(_targets(group, source), _scheme(group, method, source))
            for group in _groups(settings)
            if isinstance(group.get("weights"), Mapping)
        ]
        rules.sort(key=lambda rule: rule.names is None)  # what is named before what is not
        storage = rules[-1].storage if rules else Storage(own_bytes)
        name = "nvfp4" if rules and storage.bytes_per_weight == NVFP4.bytes_per_weight else method
    elif method in ("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round", "moe_wna16"):
        storage = _grouped(settings, method, source)
    else:
        bits = settings.get("bits", settings.get("w_bit"))
        raise ConfigError(
            f"{source}: quantization_config with quant_method={brief(method)} and bits={brief(bits)} is not known, so "
            f"the weights' size is not either; known are {KNOWN}"
        )
    block = settings.get("weight_block_size")
    sides = (block[0], block[1]) if isinstance(block, list) and len(block) == 2 else (0, 0)
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 0 for side in sides):
        raise ConfigError(f"{source}: weight_block_size={brief(block)} is not two whole numbers; fetch the file again")
    experts = MXFP4 if expert_dtype == "fp4" else storage
    return Storages(Quantization(name, storage, experts, sides, _kv_cache(settings)), own_bytes, rules, kept)


def _listed(settings: Mapping[str, Any]) -> list[str]:
    for name in _IGNORED:
        listed = settings.get(name)
        if isinstance(listed, list) and listed:
            return [one for one in listed if isinstance(one, str)]
    return []


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    return [one for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []


def _targets(group: Mapping[str, Any], source: str) -> _Names | None:
    targets = group.get("targets")
    named = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    return None if not named or "Linear" in named else _Names(named, source)


def _modelopt(settings: Mapping[str, Any], source: str) -> tuple[str, Storage, list[_Rule]]:
    algorithm = str(settings.get("quant_algo") or "").upper()
    layers = settings.get("quantized_layers")
    if algorithm == "MIXED_PRECISION" and isinstance(layers, Mapping):
        named: dict[str, list[str]] = {}
        for layer, one in layers.items():
            named.setdefault(str(one.get("quant_algo") if isinstance(one, Mapping) else one).upper(), []).append(layer)
        rules = [_Rule(_Names(names, source), _algorithm(each, source)) for each, names in named.items()]
        smallest = min((rule.storage for rule in rules), key=lambda one: one.bytes_per_weight, default=FP8)
        return "modelopt mixed", smallest, rules
    if not algorithm:
        groups = _groups(settings)
        if not groups:  # "quant_method": "modelopt" alone is its first method
            return "modelopt", FP8, []
        storage = _scheme(groups[0], "modelopt", source)
        return "nvfp4" if storage.bytes_per_weight < 1 else "modelopt", storage, []
    return "nvfp4" if "NVFP4" in algorithm else "modelopt", _algorithm(algorithm, source), []


def _algorithm(name: str, source: str) -> Storage:
    if name not in MODELOPT:
        raise ConfigError(
            f"{source}: quant_algo={brief(name)} is not known, so the weights' size is not either; known are "
            f"{', '.join(MODELOPT)}"
        )
    return MODELOPT[name]


def _scheme(group: Mapping[str, Any], method: str, source: str) -> Storage:
    """A group of compressed-tensors: bits, and a scale for each group of weights."""
    weights = group["weights"] if isinstance(group.get("weights"), Mapping) else {}
    bits, size = weights.get("num_bits"), weights.get("group_size")
    is_float = weights.get("type") == "float"
    is_active = isinstance(group.get("input_activations"), Mapping)
    if bits == 8:
        return Storage(1.0, "fp8" if is_float and is_active else "16 bit")
    if bits == 4 and is_float:
        return Storage(0.5 + 1 / 32 if size == 32 else 0.5 + 1 / 16, "fp4" if is_active else "16 bit")
    return _grouped({"bits": bits, "group_size": size or 0}, method, source)


def _grouped(settings: Mapping[str, Any], method: str, source: str) -> Storage:
    """Whole numbers of some bits, and for each group of weights a scale of 16 bits and a zero of as many bits."""
    bits = settings.get("bits", settings.get("w_bit"))
    size = settings.get("group_size", settings.get("q_group_size", 128))
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ConfigError(
            f"{source}: quantization_config with quant_method={brief(method)} and bits={brief(bits)} is not known, so "
            f"the weights' size is not either; known are {KNOWN}"
        )
    scales = (2 + bits / 8) / size if isinstance(size, int) and size > 0 else 0.0
    return Storage(bits / 8 + scales)


def _kv_cache(settings: Mapping[str, Any]) -> str:
    """The KV cache's type that vLLM's `auto` takes from a checkpoint: fp8, nvfp4, or auto where it says nothing.

    Source: `get_kv_cache_quant_algo_string` and `Attention.__init__`, vLLM 0.32.
    """
    found = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
    if isinstance(found, Mapping):
        bits = found.get("num_bits")
        return "fp8" if bits == 8 else "nvfp4" if bits == 4 and found.get("type") == "float" else "auto"
    word = str(found or "").lower()
    return "fp8" if word.startswith("fp8") else "nvfp4" if word.startswith("nvfp4") else "auto"
