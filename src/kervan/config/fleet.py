"""What a user asks for: one fleet of one model."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from kervan.config import engine_arguments
from kervan.errors import ConfigError
from kervan.facts.markets import MARKETS, ON_DEMAND

Ingress = Literal["direct", "serve"]
Engine = Literal["vllm", "twin"]
Device = Literal["GPU", "CPU"]
NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")

MAX_REPLICAS = 4096
COUNT_PATTERN = re.compile(r"(\d{1,9})(?:\.\.(\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """The least and the most replicas of a pool."""

    minimum: int
    maximum: int

    def __str__(self) -> str:
        return str(self.minimum) if self.minimum == self.maximum else f"{self.minimum}..{self.maximum}"


def parse_bounds(pool: str, text: str) -> PoolBounds:
    """`2` or `0..6` as the bounds of a pool.

    Raises: ConfigError for anything else.
    """
    example = f"--pool {pool}:2 or --pool {pool}:0..6"
    found = COUNT_PATTERN.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"pool {pool}: {text!r} is no number and no range MIN..MAX; write for example {example}")
    bounds = PoolBounds(int(found[1]), int(found[2] or found[1]))
    if bounds.maximum < bounds.minimum:
        raise ConfigError(
            f"pool {pool}: {text!r} goes from {bounds.minimum} down to {bounds.maximum}; "
            f"write --pool {pool}:{bounds.maximum}..{bounds.minimum}"
        )
    if bounds.maximum > MAX_REPLICAS:
        raise ConfigError(f"pool {pool}: {bounds.maximum} is above {MAX_REPLICAS}; write for example {example}")
    return bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """One fleet; the words of `kervan up`, of its config file, and of recipes.

    `engine_args` has vLLM's own names and values. `gateways` 0 means one per 8 CPU cores, at most 4; with
    `max_gateways`, there are as many as their load asks for, from `gateways` to that. `env` goes to the engine and
    gateway processes. `ep`: GPUs over which each layer's experts are spread, 1 or `tp`. `nodes_per_replica`: nodes over
    which the pipeline stages of a replica are spread, 0 for as few as can hold them. `gpus_per_replica`: a share of one
    GPU, like 0.5, for a model that needs no more; 0 for `tp*pp` whole ones. `engine` "twin": simulated replicas, as if
    on `gpu`, with `twin` in place of what follows from model and GPU (`kervan.twin.settings`). `shared_port`: other
    fleets of the cluster may be on the port too, if they say so as well. `device`: what replicas run on, GPUs or CPU
    cores; empty for what the cluster has at the first start, which then stays. `pools`: by market type, how many
    replicas, as "2" or "0..6"; `replicas` is the sum of their least then. When spot replicas are missing for
    `fallback_after_s`, on-demand ones cover for them within their range, until spot has been whole for
    `fallback_hold_s`. `replay_s`: how long clients may come back to a stream that ended or broke, 0 for never; each
    gateway keeps `replay_max_mib` of such streams, those of other gateways too.
    """

    model: str
    name: str = "default"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    nodes_per_replica: int = 0
    gpus_per_replica: float = 0.0
    device: Literal["", "GPU", "CPU"] = ""
    replicas: int = 1
    pools: Mapping[str, str] = field(default_factory=dict)
    gateways: int = 0
    max_gateways: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    shared_port: bool = False
    ingress: Ingress = "direct"
    engine: Engine = "vllm"
    gpu: str = ""
    twin: Mapping[str, Any] = field(default_factory=dict)
    api_keys: tuple[str, ...] = ()
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    max_queued_streams: int = 1024
    hold_timeout_s: float = 300.0
    stall_timeout_s: float = 60.0
    drain_timeout_s: float = 60.0
    fallback_after_s: float = 15.0
    fallback_hold_s: float = 300.0
    replay_s: float = 0.0
    replay_max_mib: int = 256

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ConfigError(
                f"name {self.name!r} is not valid; use 1 to 40 lower-case letters, digits and hyphens, such as 'chat'"
            )
        for key, low, high in (
            ("tp", 1, 64),
            ("pp", 1, 64),
            ("ep", 1, 64),
            ("nodes_per_replica", 0, 64),
            ("gpus_per_replica", 0, 64 * 64),
            ("replicas", 0, MAX_REPLICAS),
            ("gateways", 0, 64),
            ("max_gateways", 0, 64),
            ("port", 1, 65535),
            ("max_queued_streams", 0, 10**9),
            ("hold_timeout_s", 0, 10**9),
            ("stall_timeout_s", 1, 10**9),
            ("drain_timeout_s", 0, 10**9),
            ("fallback_after_s", 0, 10**9),
            ("fallback_hold_s", 0, 10**9),
            ("replay_s", 0, 86_400),
            ("replay_max_mib", 1, 1 << 20),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigError(f"{key}={value} is outside {low}..{high}; give a value in that range")
        if 0 < self.max_gateways < max(1, self.gateways):
            raise ConfigError(
                f"max_gateways={self.max_gateways} is below gateways={self.gateways}; write for example "
                f"--gateways {self.gateways}..{2 * self.gateways}, or leave max_gateways out for a fixed number"
            )
        self._check_pools()
        if self.ep not in (1, self.tp):
            raise ConfigError(
                f"ep={self.ep}: vLLM spreads experts over all tp={self.tp} GPUs; use --ep 1 or --ep {self.tp}"
            )
        if self.nodes_per_replica and self.pp % self.nodes_per_replica:
            raise ConfigError(
                f"nodes_per_replica={self.nodes_per_replica} does not divide pp={self.pp}: a stage is whole on one "
                f"node, because the tp={self.tp} that share its layers talk twice a layer; "
                f"use --pp {self.nodes_per_replica}, or leave --nodes-per-replica out"
            )
        if self.gpus_per_replica not in (0, self.world_size) and not (self.gpus_per_replica < 1 == self.world_size):
            raise ConfigError(
                f"gpus_per_replica={self.gpus_per_replica:g} with tp*pp={self.world_size}: only a replica on one GPU "
                "can take a share of it; give a share below 1 with --tp 1 --pp 1, or leave --gpus-per-replica out"
            )
        if self.engine == "twin" and not self.gpu:
            raise ConfigError("a twin needs to know which GPU it stands for; give for example --gpu H200")
        if self.engine == "vllm" and (self.gpu or self.twin):
            what = "--gpu" if self.gpu else "--twin"
            raise ConfigError(f"{what} is for simulated replicas; add --engine twin, or leave it out")
        if self.shared_port and self.ingress == "serve":
            raise ConfigError("--shared-port is for gateways that listen themselves; use it with --ingress direct")
        if self.replay_s and self.engine_args.get("stream_interval", 1) not in (1, "1"):
            raise ConfigError(
                f"replay_s={self.replay_s:g} with stream_interval={self.engine_args['stream_interval']}: only a stream "
                "that comes token by token can be given again; leave one of both out"
            )
        engine_arguments.check_owned(self.engine_args)

    def _check_pools(self) -> None:
        if not self.pools:
            return
        for pool in self.pools:
            if pool not in MARKETS:
                raise ConfigError(
                    f"pool {pool!r} is not one of {', '.join(MARKETS)}; write for example --pool spot:0..6"
                )
        if ON_DEMAND not in self.pools:
            raise ConfigError(
                "a fleet with pools needs to know its on-demand replicas too; add --pool on-demand:1, or "
                "--pool on-demand:0..1 for one only while spot is missing"
            )
        bounds = self.bounds
        if not any(pool.maximum for pool in bounds.values()):
            raise ConfigError("all pools have room for 0 replicas; give one more, for example --pool on-demand:1")
        least = sum(pool.minimum for pool in bounds.values())
        if self.replicas != least:
            raise ConfigError(
                f"replicas={self.replicas} beside pools, whose least are {least} in all; give only --pool, "
                f"for example --pool on-demand:{self.replicas}"
            )

    @property
    def bounds(self) -> dict[str, PoolBounds]:
        """The least and most replicas of each pool; a fleet without pools has one, of a fixed number."""
        if not self.pools:
            return {ON_DEMAND: PoolBounds(self.replicas, self.replicas)}
        return {pool: parse_bounds(pool, self.pools[pool]) for pool in MARKETS if pool in self.pools}

    @property
    def world_size(self) -> int:
        """Workers of one replica, each on a GPU (or, without GPUs, on CPU cores)."""
        return self.tp * self.pp

    @property
    def gpu_share(self) -> float:
        """The share of a GPU that each worker may use, 0 to 1."""
        return self.gpus_per_replica if 0 < self.gpus_per_replica < 1 else 1.0

    @property
    def engine_argv(self) -> tuple[str, ...]:
        """The fleet's arguments for vLLM's own server parser, the same for gateways and replicas."""
        # A multi-modal sender cache assumes one receiver; a fleet has many (vLLM then sends hashes without data).
        args: dict[str, Any] = {"mm_processor_cache_gb": 0, **self.engine_args}
        args["model"] = self.model
        if self.engine == "twin":  # only gateways read this, and they have no layout
            return tuple(engine_arguments.to_argv(args))
        args |= {"tensor_parallel_size": self.tp, "pipeline_parallel_size": self.pp}
        if self.ep > 1:
            args["enable_expert_parallel"] = True
        if self.world_size > 1:
            args["distributed_executor_backend"] = "mp"
        if self.gpu_share < 1 and not args.keys() & engine_arguments.MEMORY_ARGUMENTS:
            args["gpu_memory_utilization"] = round(engine_arguments.GPU_MEMORY_UTILIZATION * self.gpu_share, 3)
        return tuple(engine_arguments.to_argv(args))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "FleetConfig":
        return from_mapping(json.loads(text), "the stored fleet")


def load_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML or TOML file.

    Raises: ConfigError when it is missing, unreadable, or no mapping.
    """
    try:
        text = path.read_text()
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist; check the path given to --config") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} holds {type(data).__name__}, not settings; write lines such as 'tp: 2'")
    return {str(key): value for key, value in data.items()}


def from_mapping(settings: Mapping[str, Any], source: str) -> FleetConfig:
    """A checked config; `source` names where the settings come from in errors.

    Raises: ConfigError for unknown keys, wrong types and values out of range.
    """
    hints = get_type_hints(FleetConfig)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(sorted(hints))}"
            raise ConfigError(f"{source} has unknown setting {key!r}; {hint}")
        values[key] = _typed(key, value, hints[key], source)
    if values.get("pools") and "replicas" not in values:
        values["replicas"] = sum(parse_bounds(*pool).minimum for pool in values["pools"].items())
    if not values.get("model"):
        raise ConfigError(f"{source} names no model; give MODEL, a Hugging Face id or a local directory")
    return FleetConfig(**values)


def _typed(key: str, value: Any, hint: Any, source: str) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{source}: {key}={value!r} is not one of {', '.join(get_args(hint))}")
    if hint is str and isinstance(value, str):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if origin is Mapping and isinstance(value, Mapping):
        if key == "env":
            return {str(k): str(v) for k, v in value.items()}
        if key == "pools":
            return {str(k).replace("_", "-"): str(v) for k, v in value.items()}
        return {str(k).replace("-", "_"): v for k, v in value.items()}
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        hint, "a list" if origin is tuple else "a mapping"
    )
    raise ConfigError(f"{source}: {key}={value!r} is {type(value).__name__}; give {expected}")
