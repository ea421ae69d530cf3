"""What a twin pretends to be: sizes and step times, from a model's shape and a GPU, or as the user says."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kervan import plain_tokenizer
from kervan.config.fleet import FleetConfig
from kervan.errors import CapacityError, ConfigError
from kervan.facts import architecture, hardware
from kervan.facts import model as models
from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout
from kervan.plan.calibration import PRIOR
from kervan.sim import limits as engine_limits
from kervan.sim import memory
from kervan.sim.limits import BLOCK_TOKENS, EngineLimits
from kervan.sim.step_time import Batch, StepTime
from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

# Where the straight lines through the planner's step time are taken.
TYPICAL_SEQUENCES = 64
TYPICAL_PROMPT = 1024
MAX_PER_NODE = 100  # Ray Serve's own bound

# What the user may set with --twin, besides the fields of StepTiming and TwinLimits.
EXTRA = {"speed": 1.0, "kv_tokens": 0, "spot_per_node": 0, "start_s": 0.0}


def settings(config: FleetConfig) -> TwinSettings:
    """The twin of a fleet's engine.

    Raises: ConfigError for an unknown GPU or setting; CapacityError when the model does not fit.
    """
    described = models.read_config(config.model)
    if described is None:
        raise ConfigError(f"a twin of {config.model!r} needs its config.json; give the local directory that holds it")
    spec = architecture.parse(described, f"{config.model}/config.json")
    spec = engine_limits.as_served(spec, config.engine_args)
    gpu = hardware.gpu(config.gpu)
    given = _given(config.twin)
    layout = Layout(config.tp, config.pp, 1, config.ep)
    modelled = engine_limits.limits(spec, gpu, {"max_model_len": spec.max_model_len, **config.engine_args})
    values = _sizes(spec, gpu, layout, modelled, given) | _times(spec, gpu, layout, modelled)
    values |= _tokens(config.model, described, spec.vocab)
    values["enable_prefix_caching"] = _caches_prefixes(config.engine_args)
    values |= {key: value for key, value in given.items() if key not in EXTRA}
    timing = StepTiming(**{f.name: float(values[f.name]) for f in dataclasses.fields(StepTiming)})
    sizes: dict[str, Any] = {f.name: int(values[f.name]) for f in dataclasses.fields(TwinLimits) if f.name in values}
    limits = TwinLimits(**sizes | {"enable_prefix_caching": bool(values["enable_prefix_caching"])})
    _check(limits)
    return TwinSettings(timing, limits, given["speed"], given["start_s"])


def spot_per_node(config: FleetConfig) -> int:
    """How many of the fleet's spot replicas one node takes, as its GPUs would say of real ones; 0 for any number.

    Raises: ConfigError for an unknown setting.
    """
    return int(_given(config.twin)["spot_per_node"]) if config.engine == "twin" else 0


def start_s(config: FleetConfig) -> float:
    """How long a twin of the fleet pretends to start.

    Raises: ConfigError for an unknown setting.
    """
    return _given(config.twin)["start_s"]


def _given(settings: Mapping[str, Any]) -> dict[str, float]:
    fields = {f.name for f in (*dataclasses.fields(StepTiming), *dataclasses.fields(TwinLimits))}
    names = sorted(fields | set(EXTRA))
    given: dict[str, float] = dict(EXTRA)
    for key, value in settings.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ConfigError(f"a twin has no setting {key!r}; {hint} (--twin)")
        try:
            given[key] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"twin setting {key}={value!r} is not a number; write for example {key}=1 (--twin)"
            ) from error
        if not 0 <= given[key] < 1e12 or (key in ("speed", "mean_answer_tokens", "block_size") and given[key] == 0):
            raise ConfigError(f"twin setting {key}={value} is out of range; give a positive number (--twin)")
        if key == "spot_per_node" and given[key] not in range(MAX_PER_NODE + 1):
            raise ConfigError(
                f"twin setting {key}={value} is not a whole number in 0..{MAX_PER_NODE}, and more Ray Serve does not "
                f"count; use for example {key}=1, or 0 for any number (--twin)"
            )
    return given


def _sizes(
    spec: ModelSpec, gpu: Gpu, layout: Layout, limits: EngineLimits, given: Mapping[str, float]
) -> dict[str, float]:
    """vLLM's limits, and the KV pool that the planner expects."""
    room = memory.estimate(spec, layout, gpu, limits)
    kv_tokens = int(given["kv_tokens"]) or room.kv_tokens
    if kv_tokens < limits.max_model_len and "num_blocks" not in given:
        raise CapacityError(
            f"{room.weights_gib:.1f} GiB of weights per GPU leave {max(0.0, room.kv_gib):.1f} GiB of a {gpu.name}'s "
            f"{gpu.memory_gib:g} GiB for {kv_tokens} tokens, and one request may have {limits.max_model_len}; "
            f"use a larger --tp, or --engine-arg max_model_len={max(1, kv_tokens)}"
            if kv_tokens > 0
            else f"{room.weights_gib:.1f} GiB of weights per GPU do not fit a {gpu.name} with {gpu.memory_gib:g} GiB; "
            "use a larger --tp"
        )
    return {
        "num_blocks": kv_tokens // int(given.get("block_size", BLOCK_TOKENS)),
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_model_len": limits.max_model_len,
    }


def _caches_prefixes(arguments: Mapping[str, Any]) -> bool:
    """vLLM's `enable_prefix_caching`, on by default."""
    given = arguments.get("enable_prefix_caching")
    if given is None or str(given).lower() in ("true", "1"):
        return True
    if str(given).lower() in ("false", "0"):
        return False
    raise ConfigError(f"engine argument enable_prefix_caching={given!r} is neither true nor false; use one of both")


def _times(spec: ModelSpec, gpu: Gpu, layout: Layout, limits: EngineLimits) -> dict[str, float]:
    """The planner's step time as a straight line in each of its arguments: one sequence and `TYPICAL_SEQUENCES`, no
    context and some, no prompt and a full budget.
    """
    step_time = StepTime(spec, layout, gpu, limits, PRIOR.constants)

    def step_s(sequences: int = 1, context: float = 0.0, prefill: int = 0) -> float:
        pairs = prefill * min(prefill, TYPICAL_PROMPT) / 2
        return step_time.total_s(Batch(sequences, context, prefill, pairs, sequences))

    alone_s = step_s()
    sequence_s = (step_s(TYPICAL_SEQUENCES) - alone_s) / (TYPICAL_SEQUENCES - 1)
    budget = limits.max_num_batched_tokens
    return {
        "base_s": alone_s - sequence_s,
        "prefill_token_s": (step_s(prefill=budget) - alone_s) / budget,
        "sequence_s": sequence_s,
        "context_token_s": sum(step_time.context_token_s(index) for index in range(layout.pp)),
    }


def _eos_token(described: Mapping[str, Any], vocab: int) -> int:
    text = described.get("text_config")
    eos = described.get("eos_token_id", text.get("eos_token_id") if isinstance(text, Mapping) else None)
    eos = eos[0] if isinstance(eos, list) and eos else eos
    return eos if isinstance(eos, int) else vocab - 1


def _tokens(model: str, described: Mapping[str, Any], vocab: int) -> dict[str, float]:
    """The longest run of ids that are ordinary text."""
    eos_token = _eos_token(described, vocab)
    is_plain = not plain_tokenizer.has_own(Path(model))
    special = sorted(
        {eos_token, *(plain_tokenizer.special_ids(described, vocab) if is_plain else models.special_tokens(model))}
    )
    edges = [-1, *(i for i in special if 0 <= i < vocab), vocab]
    first, last = max(((a + 1, b - 1) for a, b in itertools.pairwise(edges)), key=lambda run: run[1] - run[0])
    return {"first_token": first, "last_token": last, "eos_token": eos_token}


def _check(limits: TwinLimits) -> None:
    if limits.num_blocks * limits.block_size < limits.max_model_len:
        raise ConfigError(
            f"num_blocks={limits.num_blocks} blocks of {limits.block_size} tokens hold "
            f"{limits.num_blocks * limits.block_size}, and one request may have {limits.max_model_len}; use "
            f"num_blocks={-(-limits.max_model_len // limits.block_size)} or a smaller max_model_len"
        )
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        if getattr(limits, name) < 1:
            raise ConfigError(f"twin setting {name}={getattr(limits, name)} is below 1; give a positive number")
