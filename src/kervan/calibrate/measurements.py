"""What a calibration measured, as plain values, and the file that holds them.

Times are seconds of one call, the median of several. Bytes are those of the whole operation on one GPU, named below.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kervan.config.workload import ClosedLoop
from kervan.errors import ConfigError
from kervan.facts.markup import json_value

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy within one GPU's memory. `bytes`: read plus written, so twice the size of the buffer."""

    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Matmul:
    """`[m, k] x [n, k]^T`, bf16: a linear layer of n outputs over m tokens."""

    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer, bf16, causal.

    Prefill: `batch` prompts of `tokens` each. Decode: one new token of each of `batch` sequences that hold `tokens`.
    `kernel`: which of torch's was the fastest.
    """

    phase: Literal["prefill", "decode"]
    batch: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kernel: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Collective:
    """One call over `ranks` GPUs of this host. `bytes`: the buffer of one rank. `send_recv`: rank 0 to rank 1, one way.

    Eager calls (`in_graph` false) have the host's time in them; those inside a CUDA graph do not. `backend`: nccl; gloo
    (CPU); or symm_mem, torch's kernels over memory that all GPUs map, as vLLM's own all-reduce of small messages is.
    """

    op: Literal["all_reduce", "send_recv"]
    ranks: int
    bytes: int
    in_graph: bool
    backend: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The shortest time that something can take.

    `graph_kernel`: one tiny kernel of a chain inside a CUDA graph. `eager_kernel`: the same chain, launched one by one.
    `graph_launch`: one replay of a graph of one kernel, its end awaited.
    """

    name: Literal["graph_kernel", "eager_kernel", "graph_launch"]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving(ClosedLoop):
    """vLLM's own server, default settings, prefix caching off. Prompts are random tokens, and no answer is shorter."""

    model: str
    tp: int
    pp: int
    ep: int
    dp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What vLLM logged of one server's GPU memory, per GPU (of the first one), and how long it took to start.

    `kv_cache_tokens`: of one of its `dp` engines. `cuda_graph_gib` None: no graphs were captured.
    """

    model: str
    tp: int
    pp: int
    ep: int
    gpu_memory_utilization: float
    weights_gib_per_gpu: float
    kv_cache_gib_per_gpu: float
    kv_cache_tokens: int
    cuda_graph_gib: float | None = None
    start_s: float | None = None
    dp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Everything one calibration measured. `gpu`: its name as the driver has it. `date`: ISO 8601, UTC.

    `models`: name of each model in `serving` and `memory` -> its `config.json`. `notes`: what was left out, and why.
    """

    gpu: str
    num_gpus: int
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    copy: tuple[Copy, ...] = ()
    matmul: tuple[Matmul, ...] = ()
    attention: tuple[Attention, ...] = ()
    collectives: tuple[Collective, ...] = ()
    floors: tuple[Floor, ...] = ()
    serving: tuple[Serving, ...] = ()
    memory: tuple[Memory, ...] = ()
    models: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


_ROWS: dict[str, type[Any]] = {
    "copy": Copy,
    "matmul": Matmul,
    "attention": Attention,
    "collectives": Collective,
    "floors": Floor,
    "serving": Serving,
    "memory": Memory,
}


def to_dict(measurements: Measurements) -> dict[str, Any]:
    """For JSON; `from_dict` gives an equal value back."""
    return {"format": FORMAT, **dataclasses.asdict(measurements)}


def from_dict(content: Mapping[str, Any], subject: str = "measurements") -> Measurements:
    """Raises: ConfigError, which names `subject`, for another format, an unknown key or a missing one."""
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        version = content.get("format") if isinstance(content, Mapping) else None
        raise ConfigError(f"{subject} has format {version!r}, this kervan reads {FORMAT}; run kervan calibrate again")
    values: dict[str, Any] = {key: value for key, value in content.items() if key != "format"}
    try:
        for name, kind in _ROWS.items():
            values[name] = tuple(kind(**row) for row in values.get(name, ()))
        values["notes"] = tuple(values.get("notes", ()))
        return Measurements(**values)
    except TypeError as error:
        raise ConfigError(f"{subject} is not what kervan calibrate wrote ({error}); run it again") from error


def write(path: Path, measurements: Measurements) -> None:
    """Write JSON to `path`; its directory is made.

    Raises: ConfigError when that is impossible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_dict(measurements), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file") from error


def read(path: Path) -> Measurements:
    """The measurements that `write` put there.

    Raises: ConfigError.
    """
    try:
        content = json_value(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); give a file of kervan calibrate") from error
    return from_dict(content, str(path))


def slug(measurements: Measurements) -> str:
    """A short name for files: `2xh100-80gb-hbm3` of two "NVIDIA H100 80GB HBM3"."""
    parts = re.findall(r"[a-z0-9]+", measurements.gpu.lower())
    return f"{measurements.num_gpus}x{'-'.join(word for word in parts if word != 'nvidia') or 'gpu'}"
