"""What a twin pretends to be: sizes and step times, from a model's shape and a GPU, or as the user says."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from typing import Any

from kervan.errors import CapacityError, ConfigError
from kervan.facts import hardware
from kervan.facts import model as models
from kervan.facts.fleet import FleetConfig
from kervan.twin.engine import BLOCK_SIZE, Limits, StepTiming, TwinSettings

# Set by hand so that 1 and 64 streams come near bare vLLM 0.24 on an H200 (8B on one GPU, 70B on four; see
# tests/unit/test_twin_settings.py); the planner of a later version will measure them.
BANDWIDTH_SHARE = 0.82
FLOPS_SHARE = 0.75
STEP_OVERHEAD_S = 600e-6
LAYER_FLOOR_S = 13e-6
ALL_REDUCE_S = 10e-6  # two per layer, with tp > 1
STAGE_S = 300e-6  # handing over to the next pipeline stage
SEQUENCE_S = 10e-6
MEMORY_SHARE = 0.92
WORKSPACE_GIB = 2.0
MAX_PER_NODE = 100  # Ray Serve's own bound
LARGE_GPU_GIB = 70  # from here on vLLM's defaults are larger

# What the user may set with --twin, besides the fields of StepTiming and Limits.
EXTRA = {"speed": 1.0, "kv_tokens": 0, "spot_per_node": 0}


def settings(config: FleetConfig) -> TwinSettings:
    """The twin of a fleet's engine.

    Raises: ConfigError for an unknown GPU or setting; CapacityError when the model does not fit.
    """
    described = models.read_config(config.model)
    if described is None:
        raise ConfigError(f"a twin of {config.model!r} needs its config.json; give the local directory that holds it")
    shape = models.shape(described, f"{config.model}/config.json")
    gpu = hardware.gpu(config.gpu)
    given = _given(config.twin)
    values = _sizes(config, shape, gpu, given) | _times(config, shape, gpu) | _tokens(config, shape)
    values |= {key: value for key, value in given.items() if key not in EXTRA}
    timing = StepTiming(**{f.name: float(values[f.name]) for f in dataclasses.fields(StepTiming)})
    limits = Limits(**{f.name: int(values[f.name]) for f in dataclasses.fields(Limits) if f.name in values})
    _check(limits)
    return TwinSettings(timing, limits, given["speed"])


def spot_per_node(config: FleetConfig) -> int:
    """How many of the fleet's spot replicas one node takes, as its GPUs would say of real ones; 0 for any number.

    Raises: ConfigError for an unknown setting.
    """
    return int(_given(config.twin)["spot_per_node"]) if config.engine == "twin" else 0


def _given(words: Mapping[str, Any]) -> dict[str, float]:
    fields = {f.name for f in (*dataclasses.fields(StepTiming), *dataclasses.fields(Limits))}
    known = sorted(fields | set(EXTRA))
    given: dict[str, float] = dict(EXTRA)
    for key, value in words.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"a twin has no setting {key!r}; {hint} (--twin)")
        try:
            given[key] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"twin setting {key}={value!r} is no number; write for example {key}=1 (--twin)"
            ) from error
        if not 0 <= given[key] < 1e12 or (key in ("speed", "mean_answer_tokens", "block_size") and given[key] == 0):
            raise ConfigError(f"twin setting {key}={value} is out of range; give a positive number (--twin)")
        if key == "spot_per_node" and given[key] not in range(MAX_PER_NODE + 1):
            raise ConfigError(
                f"twin setting {key}={value} is no whole number in 0..{MAX_PER_NODE}, and more Ray Serve does not "
                f"count; use for example {key}=1, or 0 for any number (--twin)"
            )
    return given


def _sizes(config: FleetConfig, shape: models.Shape, gpu: hardware.Gpu, given: Mapping[str, float]) -> dict[str, float]:
    def argument(name: str, default: int) -> int:
        try:
            return int(config.engine_args.get(name) or default)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"engine argument {name}={config.engine_args[name]!r} is no whole number, and a twin needs one"
            ) from error

    is_large = gpu.memory_gib >= LARGE_GPU_GIB
    max_model_len = argument("max_model_len", shape.max_model_len)
    block_size = int(given.get("block_size", BLOCK_SIZE))
    weights_gib = shape.parameters * shape.bytes_per_parameter / 2**30 / config.world_size
    free_gib = gpu.memory_gib * MEMORY_SHARE - weights_gib - WORKSPACE_GIB
    kv_tokens = given["kv_tokens"] or free_gib * 2**30 * config.world_size / shape.kv_bytes_per_token
    if kv_tokens < max_model_len and "num_blocks" not in given:
        raise CapacityError(
            f"{weights_gib:.1f} GiB of weights per GPU leave {max(0.0, free_gib):.1f} GiB of a {gpu.name}'s "
            f"{gpu.memory_gib:g} GiB for {max(0, int(kv_tokens))} tokens, and one request may have {max_model_len}; "
            f"use a larger --tp, or --engine-arg max_model_len={max(1, int(kv_tokens))}"
            if kv_tokens > 0
            else f"{weights_gib:.1f} GiB of weights per GPU do not fit a {gpu.name} with {gpu.memory_gib:g} GiB; "
            "use a larger --tp"
        )
    return {
        "num_blocks": kv_tokens // block_size,
        "max_num_seqs": argument("max_num_seqs", 1024 if is_large else 256),
        "max_num_batched_tokens": argument("max_num_batched_tokens", 8192 if is_large else 2048),
        "max_model_len": max_model_len,
    }


def _times(config: FleetConfig, shape: models.Shape, gpu: hardware.Gpu) -> dict[str, float]:
    """A roofline: weights and KV cache are read at the GPU's bandwidth, prompts computed at its rate."""
    bandwidth = gpu.bandwidth_bytes_s * BANDWIDTH_SHARE * config.tp
    layers_s = shape.num_layers * (LAYER_FLOOR_S + (2 * ALL_REDUCE_S if config.tp > 1 else 0.0))
    weights_s = shape.active_parameters * shape.bytes_per_parameter / bandwidth
    return {
        "base_s": STEP_OVERHEAD_S + weights_s + layers_s + (config.pp - 1) * STAGE_S,
        "prefill_token_s": 2 * shape.active_parameters / (gpu.bf16_flops * FLOPS_SHARE * config.world_size),
        "sequence_s": SEQUENCE_S,
        "context_token_s": shape.kv_bytes_per_token / bandwidth,
    }


def _tokens(config: FleetConfig, shape: models.Shape) -> dict[str, float]:
    """The longest run of ids that are ordinary text."""
    special = sorted({shape.eos_token, *models.special_tokens(config.model)})
    edges = [-1, *(i for i in special if 0 <= i < shape.vocab_size), shape.vocab_size]
    first, last = max(((a + 1, b - 1) for a, b in itertools.pairwise(edges)), key=lambda run: run[1] - run[0])
    return {"first_token": first, "last_token": last, "eos_token": shape.eos_token}


def _check(limits: Limits) -> None:
    if limits.num_blocks * limits.block_size < limits.max_model_len:
        raise ConfigError(
            f"num_blocks={limits.num_blocks} blocks of {limits.block_size} tokens hold "
            f"{limits.num_blocks * limits.block_size}, and one request may have {limits.max_model_len}; use "
            f"num_blocks={-(-limits.max_model_len // limits.block_size)} or a smaller max_model_len"
        )
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        if getattr(limits, name) < 1:
            raise ConfigError(f"twin setting {name}={getattr(limits, name)} is below 1; give a positive number")
