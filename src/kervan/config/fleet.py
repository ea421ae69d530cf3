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
from urllib.parse import urlsplit

import msgspec
import yaml

from kervan.config import api_keys, autoscale, engine_arguments
from kervan.config.autoscale import Autoscaling, PolicyName
from kervan.config.workload import DEFAULT_SLO, Slo, parse_slo
from kervan.errors import ConfigError
from kervan.facts.markets import MARKETS, ON_DEMAND
from kervan.facts.markup import broken
from kervan.logs import LogFormat
from kervan.units import parse_duration_s
from kervan.vendor.vllm_names import GPU_MEMORY_UTILIZATION

Ingress = Literal["direct", "serve"]
Engine = Literal["vllm", "twin"]
Device = Literal["GPU", "CPU"]
Routing = Literal["prefix", "least-load"]
NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")

MAX_REPLICAS = 4096
MAX_GATEWAYS = 64
SESSIONS_VARIABLE = "SAGEMAKER_ENABLE_STATEFUL_SESSIONS"  # of a package that vLLM's server uses
MAX_S = 10**9
GRPC_PORT = 4317  # of OTLP
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
    match = COUNT_PATTERN.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"pool {pool}: {text!r} is neither a number nor a range MIN..MAX; write for example {example}"
        )
    bounds = PoolBounds(int(match[1]), int(match[2] or match[1]))
    if bounds.maximum < bounds.minimum:
        raise ConfigError(
            f"pool {pool}: {text!r} goes from {bounds.minimum} down to {bounds.maximum}; "
            f"write --pool {pool}:{bounds.maximum}..{bounds.minimum}"
        )
    if bounds.maximum > MAX_REPLICAS:
        raise ConfigError(f"pool {pool}: {bounds.maximum} is above {MAX_REPLICAS}; write for example {example}")
    return bounds


def _setting(default: Any, description: str, low: float | None = None, high: float | None = None) -> Any:
    """A field of `FleetConfig` with its description in one line of plain text, and the least and most of a number."""
    metadata = {"description": description, "bounds": None if low is None else (low, high)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """One fleet; the words of `kervan up`, of its config file, and of recipes.

    `SETTINGS` has each field with its description, which the command line's help and docs/serving.md show too.

    Raises: ConfigError for values that are out of range or contradict each other.
    """

    model: str = field(
        metadata={"description": "A Hugging Face id or a local directory; required, here or as MODEL", "bounds": None}
    )
    name: str = _setting("default", "The fleet's name: lower-case letters, digits, hyphens; at most 40")
    # What a replica runs on, and how many there are.
    tp: int = _setting(1, "GPUs that share each layer (tensor parallel)", 1, 64)
    pp: int = _setting(1, "Groups of GPUs that hold consecutive layers (pipeline parallel)", 1, 64)
    ep: int = _setting(1, "GPUs that each layer's experts are spread over: 1 or tp", 1, 64)
    nodes_per_replica: int = _setting(
        0, "Nodes to spread a replica's pp stages over, a divisor of pp; 0: as few as possible", 0, 64
    )
    gpus_per_replica: float = _setting(
        0.0, "Fraction of one GPU for a small model, such as 0.5; 0: tp*pp whole GPUs", 0, 64 * 64
    )
    device: Literal["", "GPU", "CPU"] = _setting(
        "", "GPU or CPU; by default what the cluster has when the fleet first starts, fixed from then on"
    )
    adds_nodes: bool = _setting(
        False, "The cluster adds nodes (Ray's autoscaler): replicas without room are asked for, and wait"
    )
    replicas: int = _setting(
        1,
        "Engine replicas, each on tp*pp GPUs; with pools, the sum of their minimums. Also MIN..MAX, where MAX sets "
        "max_replicas",
        0,
        MAX_REPLICAS,
    )
    max_replicas: int = _setting(0, "Above 0: scale from replicas up to this number by load", 0, MAX_REPLICAS)
    pools: Mapping[str, str] = _setting({}, "Replicas by market type: a number or MIN..MAX")
    # How many of them, where there is a choice.
    policy: Literal["", PolicyName] = _setting(
        "",
        "slo: as few as keep the SLO; ray: by ongoing requests, as Ray Serve; fill: the least on-demand, all spot "
        "that get a node. By default ray if autoscaling has target_ongoing_requests, else slo",
    )
    slo: str = _setting(
        "", f"What the slo policy keeps and metrics count as good, like ttft=1s,tpot=40ms; by default {DEFAULT_SLO}"
    )
    schedule: tuple[str, ...] = _setting((), "Replicas that are there at certain hours, such as mon-fri 08:00 min=4")
    time_zone: str = _setting("UTC", "Of the schedule, such as Europe/Berlin")
    autoscaling: Mapping[str, Any] = _setting({}, "Ray Serve's parameters, such as target_ongoing_requests")
    # The HTTP front.
    gateways: int = _setting(
        0,
        "HTTP gateways; 0: one per 8 cores, 1 to 4. Also MIN..MAX, where MAX sets max_gateways",
        0,
        MAX_GATEWAYS,
    )
    max_gateways: int = _setting(0, "Above 0: scale from gateways up to this number by load", 0, MAX_GATEWAYS)
    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces")
    port: int = _setting(8000, "Port to listen on", 1, 65535)
    shared_port: bool = _setting(False, "Share the port with other fleets of the cluster that set this too")
    ingress: Ingress = _setting(  # noqa: RUF009
        "direct", "direct: clients connect to the gateways; serve: through HAProxy"
    )
    api_keys: tuple[str, ...] = _setting((), "Clients must send one of these keys; none: open to all")
    api_keys_file: str = _setting(
        "", "File of API keys with limits, which kervan keys writes; its changes are followed"
    )
    tls_certificate: str = _setting(
        "", "PEM file on each node with a gateway, the server's certificate first; clients come over HTTPS then"
    )
    tls_key: str = _setting("", "PEM file with its private key")
    tls_client_ca: str = _setting("", "PEM file; clients must show a certificate that one of these issued")
    encrypts: bool = _setting(
        True, "Encrypt what gateways and replicas send each other, and let nobody else connect; false is for measuring"
    )
    key_generation: int = _setting(
        0, "Each number is a secret of its own for gateways and replicas; kervan rotate-keys raises it", 0, 10**9
    )
    routing: Routing = _setting(  # noqa: RUF009
        "prefix",
        "prefix: to a replica that has the prompt in its cache, within bounds of load; or least-load",
    )
    # The engines.
    engine: Engine = _setting("vllm", "vllm, or twin for simulated replicas, without a GPU")  # noqa: RUF009
    gpu: str = _setting("", "The GPU that a twin simulates, such as H200")
    twin: Mapping[str, Any] = _setting({}, "Settings of twins that override what the model and GPU imply")
    engine_args: Mapping[str, Any] = _setting({}, "vLLM's own arguments, named with _ or -")
    env: Mapping[str, str] = _setting({}, "Environment variables of engines and gateways")
    # Bounds and times.
    max_queued_streams: int = _setting(1024, "Streams that may queue beyond what the replicas run at once", 0, 10**9)
    hold_timeout_s: float = _setting(300.0, "How long a stream waits for a replica before it fails", 0, MAX_S)
    stall_timeout_s: float = _setting(
        60.0, "A replica that sends no report, or has work but makes no step, for this long is killed", 1, MAX_S
    )
    drain_timeout_s: float = _setting(
        60.0, "How long a leaving replica or gateway waits until its streams have left", 0, MAX_S
    )
    fallback_after_s: float = _setting(
        15.0, "Start on-demand replicas for spot replicas that are missing for this long", 0, MAX_S
    )
    fallback_hold_s: float = _setting(
        300.0,
        "Stop them again when no spot replica has been missing for this long (following the load: for as long as a "
        "start takes, if that is less)",
        0,
        MAX_S,
    )
    replay_s: float = _setting(
        0.0, "Above 0: clients can reconnect to a stream for this long after it ended or broke", 0, 86_400
    )
    replay_max_mib: int = _setting(256, "Memory that each gateway may use for replay_s, in MiB", 1, 1 << 20)
    # What is told of it.
    log_format: LogFormat = _setting("text", "How gateways, replicas and the directory write logs: text or json")  # noqa: RUF009
    otlp: str = _setting("", "OTLP/HTTP endpoint that gets traces, such as http://collector:4318; empty: none")
    remembered_requests: int = _setting(
        1000, "The last requests of each gateway that kervan explain can tell of, at about 1.1 kB each", 0, 1_000_000
    )
    # How they start.
    preflight: bool = _setting(
        True, "Before a replica on several GPUs starts, check that they reach each other, and refuse a host that fails"
    )
    warm_start: bool = _setting(
        True, "Fork engines and gateways from a process on the node that has already imported vLLM"
    )

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ConfigError(
                f"name {self.name!r} is not valid; use 1 to 40 lower-case letters, digits and hyphens, such as 'chat'"
            )
        for setting in SETTINGS.values():
            if setting.bounds is not None:
                low, high = setting.bounds
                value = getattr(self, setting.name)
                if not low <= value <= high:
                    raise ConfigError(f"{setting.name}={value} is outside {low}..{high}; give a value in that range")
        api_keys.check_keys(self.api_keys, "api_keys")
        self._check_environment()
        self._check_pools()
        self._check_scaling()
        self._check_layout()
        self._check_gateways()
        self._check_engine()
        self._check_otlp()
        self._check_tls()

    def _check_layout(self) -> None:
        if self.ep not in (1, self.tp):
            fix = f"--ep 1 or --ep {self.tp}" if self.tp > 1 else f"--ep 1, or --tp {self.ep} --ep {self.ep}"
            raise ConfigError(f"ep={self.ep}: vLLM spreads experts over all tp={self.tp} GPUs; use {fix}")
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

    def _check_environment(self) -> None:
        for name, value in self.env.items():
            if not name or "=" in name or not name.isprintable() or " " in name:
                raise ConfigError(f"env: {name!r} is no name of an environment variable; write for example HF_HOME")
            if "\0" in value:
                raise ConfigError(f"env: the value of {name} has a null character, which no variable can; leave it out")

    def _check_gateways(self) -> None:
        if 0 < self.max_gateways < max(1, self.gateways):
            raise ConfigError(
                f"max_gateways={self.max_gateways} is below gateways={self.gateways}; write for example "
                f"--gateways {self.gateways}..{2 * self.gateways}, or leave max_gateways out for a fixed number"
            )
        if self.shared_port and self.ingress == "serve":
            raise ConfigError("--shared-port is for gateways that listen themselves; use it with --ingress direct")
        is_kept = self.env.get(SESSIONS_VARIABLE, "").lower() in ("true", "1")
        if is_kept and max(self.gateways or MAX_GATEWAYS, self.max_gateways) > 1:
            num = f"{self.gateways}..{self.max_gateways}" if self.max_gateways else f"{self.gateways}"
            raise ConfigError(
                f"{SESSIONS_VARIABLE}={self.env[SESSIONS_VARIABLE]} keeps sessions in one gateway, and "
                f"--gateways {num} may start several; add --gateways 1, or leave it out"
            )

    def _check_engine(self) -> None:
        if self.engine == "twin" and not self.gpu:
            raise ConfigError("a twin needs to know which GPU it stands for; give for example --gpu H200")
        if self.engine == "vllm" and (self.gpu or self.twin):
            option = "--gpu" if self.gpu else "--twin"
            raise ConfigError(f"{option} is for simulated replicas; add --engine twin, or leave it out")
        if self.replay_s and self.engine_args.get("stream_interval", 1) not in (1, "1"):
            raise ConfigError(
                f"replay_s={self.replay_s:g} with stream_interval={self.engine_args['stream_interval']}: only a stream "
                "that comes token by token can be given again; leave one of both out"
            )
        engine_arguments.check_owned(self.engine_args)

    def _check_tls(self) -> None:
        if not self.tls_certificate and not self.tls_key and not self.tls_client_ca:
            return
        if not (self.tls_certificate and self.tls_key):
            given, missing = ("tls_certificate", "tls_key") if self.tls_certificate else (
                "tls_key" if self.tls_key else "tls_client_ca", "tls_certificate"
            )  # fmt: skip
            option = f"--{missing.replace('_', '-')} FILE"
            raise ConfigError(f"{given}={getattr(self, given)} without {missing}: TLS needs both; add {option}")
        if self.ingress == "serve":
            raise ConfigError(
                "tls_certificate with ingress=serve: Serve's HAProxy brings requests in plain text; "
                "use --ingress direct, or end TLS in front of it"
            )

    def _check_otlp(self) -> None:
        if not self.otlp:
            return
        parts = urlsplit(self.otlp)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"otlp={self.otlp!r} is no URL of OTLP over HTTP; write for example --otlp http://collector:4318"
            )
        if parts.port == GRPC_PORT:
            raise ConfigError(
                f"otlp={self.otlp!r} has OTLP's port for gRPC, and kervan speaks HTTP; "
                f"write --otlp {self.otlp.replace(str(GRPC_PORT), '4318')}"
            )

    def _check_scaling(self) -> None:
        if 0 < self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is below replicas={self.replicas}; write for example "
                f"--replicas {self.max_replicas}..{self.replicas}, or leave max_replicas out for a fixed number"
            )
        if self.policy == "fill" and not self.pools:
            raise ConfigError("policy fill is about spot replicas; give pools, like --pool spot:0..6, or leave it out")
        self._resolve_scaling()

    def _resolve_scaling(self) -> Autoscaling:
        return autoscale.resolve(
            policy=self.policy, slo=self.slo, schedule=self.schedule, time_zone=self.time_zone,
            autoscaling=self.autoscaling, maximum=sum(pool.maximum for pool in self.bounds.values()),
        )  # fmt: skip

    def _check_pools(self) -> None:
        if not self.pools:
            return
        if self.max_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} beside pools, which have a most of their own; give only --pool, "
                f"for example --pool on-demand:1..{self.max_replicas}"
            )
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
        """The least and most replicas of each pool; a fleet without pools has one."""
        if not self.pools:
            return {ON_DEMAND: PoolBounds(self.replicas, self.max_replicas or self.replicas)}
        return {pool: parse_bounds(pool, self.pools[pool]) for pool in MARKETS if pool in self.pools}

    @property
    def autoscaler(self) -> Autoscaling | None:
        """How the number of replicas is chosen; None where no pool leaves a choice."""
        if all(pool.minimum == pool.maximum for pool in self.bounds.values()):
            return None
        return self._resolve_scaling()

    @property
    def has_keys(self) -> bool:
        """Whether clients need an API key."""
        return bool(self.api_keys or self.api_keys_file)

    @property
    def kept_slo(self) -> Slo:
        """What counts as good in the fleet's metrics, whether or not a policy keeps it."""
        return parse_slo(self.slo or DEFAULT_SLO, "slo")

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
        if self.traces_url:
            args.setdefault("otlp_traces_endpoint", self.traces_url)
        if self.engine == "twin":  # only gateways read this, and they have no layout
            return tuple(engine_arguments.to_argv(args))
        args |= {"tensor_parallel_size": self.tp, "pipeline_parallel_size": self.pp}
        if self.ep > 1:
            args["enable_expert_parallel"] = True
        if self.world_size > 1:
            args["distributed_executor_backend"] = "mp"
        if self.gpu_share < 1:  # with kv_cache_memory_bytes too: vLLM starts only if so much is free
            args.setdefault("gpu_memory_utilization", round(GPU_MEMORY_UTILIZATION * self.gpu_share, 3))
        return tuple(engine_arguments.to_argv(args))

    @property
    def traces_url(self) -> str:
        """Where spans are posted: `otlp`, with OTLP's path if it has none. Empty without."""
        has_path = urlsplit(self.otlp).path not in ("", "/")
        return self.otlp if has_path or not self.otlp else f"{self.otlp.rstrip('/')}/v1/traces"

    @property
    def weights_format(self) -> str | None:
        """vLLM's `load_format`, by which files must be in the model's directory; `dummy` where none must be."""
        is_elsewhere = self.engine == "twin" or self.engine_args.get("model_weights")
        return "dummy" if is_elsewhere else self.engine_args.get("load_format")

    def to_json(self) -> str:
        """All settings, as `from_json` reads them."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "FleetConfig":
        """The config that `to_json` wrote.

        Raises: ConfigError for settings that this version does not take.
        """
        return from_mapping(json.loads(text), "the stored fleet")


def load_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML or TOML file, in the words of the command line: `drain-timeout-s`, `gateways: 1..4`.

    Raises: ConfigError when it is missing, unreadable, or no mapping, and for a setting that is given twice.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist; check the path given to --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: TOML, and a day that does not exist
        raise ConfigError(
            f"config file {path} {broken(error, text, is_secret='api_key' in text.replace('-', '_'))}"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} holds {type(data).__name__}, not settings; write lines such as 'tp: 2'")
    settings: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in settings:
            raise ConfigError(f"config file {path} gives {name} twice, with - and with _; give it once")
        settings[name] = value
    return _ranges(settings, f"config file {path}")


def _ranges(settings: dict[str, Any], source: str) -> dict[str, Any]:
    return _range(_range(settings, "gateways", "2 or 1..4", source), "replicas", "2 or 1..8", source)


def _range(settings: dict[str, Any], name: str, example: str, source: str) -> dict[str, Any]:
    """MIN..MAX of `gateways` or `replicas` as the two settings that they are."""
    value, most = settings.get(name), f"max_{name}"
    if not isinstance(value, str):
        return settings
    match = COUNT_PATTERN.fullmatch(value.strip())
    if match is None or (match[2] and int(match[2]) < max(1, int(match[1]))):
        raise ConfigError(f"{source}: {name}={value!r} is neither a number nor a range MIN..MAX; write {example}")
    if match[2] and most in settings:
        raise ConfigError(f"{source} gives {most} twice, with {name}={value}; give it once")
    return {**settings, name: int(match[1]), **({most: int(match[2])} if match[2] else {})}


def from_mapping(settings: Mapping[str, Any], source: str) -> FleetConfig:
    """A checked config; `source` names where the settings come from in errors.

    Raises: ConfigError for unknown keys, wrong types and values out of range.
    """
    values: dict[str, Any] = {}
    for key, value in _ranges(dict(settings), source).items():
        if key not in SETTINGS:
            near = difflib.get_close_matches(key, SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(sorted(SETTINGS))}"
            raise ConfigError(f"{source} has unknown setting {key!r}; {hint}")
        values[key] = _convert(SETTINGS[key], value, source)
    if values.get("pools") and "replicas" not in values:
        values["replicas"] = sum(parse_bounds(*pool).minimum for pool in values["pools"].items())
    if not values.get("model"):
        raise ConfigError(f"{source} names no model; give MODEL, a Hugging Face id or a local directory")
    config = FleetConfig(**values)
    return dataclasses.replace(config, api_keys=api_keys.hashed(config.api_keys))  # the keys themselves go no further


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of `FleetConfig`. `bounds`: the least and the most of a number. `description`: one line of plain text."""

    name: str
    type: Any
    default: Any
    description: str
    bounds: tuple[float, float] | None


def _settings() -> dict[str, Setting]:
    types = get_type_hints(FleetConfig)
    settings = {}
    for item in dataclasses.fields(FleetConfig):
        default = item.default_factory() if callable(item.default_factory) else item.default
        settings[item.name] = Setting(item.name, types[item.name], default, **item.metadata)
    return settings


# By name, in the order of the fields. MISSING is the default of `model`.
SETTINGS: Mapping[str, Setting] = _settings()
SECRETS = ("api_keys",)
"""Settings whose values no message shows."""
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
    Mapping: "a mapping",
}


def _convert(setting: Setting, value: Any, source: str) -> Any:
    """Raises: ConfigError that names the setting, the value and what is expected."""
    if setting.type is float and setting.name.endswith("_s") and isinstance(value, str):
        return parse_duration_s(value, f"{source}: {setting.name}")
    try:
        return msgspec.convert(_mapping(setting.name, value) if isinstance(value, Mapping) else value, setting.type)
    except msgspec.ValidationError as error:
        kind = get_origin(setting.type) or setting.type
        if kind is Literal:
            choices = ", ".join(filter(None, get_args(setting.type)))
            raise ConfigError(f"{source}: {setting.name}={value!r} is not one of {choices}") from error
        shown = setting.name if setting.name in SECRETS else f"{setting.name}={value!r}"
        what = type(value).__name__
        if kind is tuple and isinstance(value, list):
            what = f"a list with {next((type(item).__name__ for item in value if not isinstance(item, str)), 'more')}"
        raise ConfigError(f"{source}: {shown} is {what}; give {_EXPECTED[kind]}") from error


def _mapping(name: str, value: Mapping[Any, Any]) -> dict[str, Any]:
    """A mapping with its keys as kervan and vLLM write them; YAML reads some keys and values as numbers."""
    if name == "env":
        return {str(key): str(text) for key, text in value.items()}
    if name == "pools":
        return {str(key).replace("_", "-"): str(count) for key, count in value.items()}
    return {str(key).replace("-", "_"): item for key, item in value.items()}
