"""`kervan comm bench`: what is measured over which ranks, and its result."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from kervan.comm import collectives, nccl_tests
from kervan.comm.collectives import CollectivesPlan, Dtype, Mode, Op, Timing
from kervan.errors import CapacityError, ConfigError
from kervan.observe import machine, nvidia_smi, nvml
from kervan.observe.reading import GpuDevice
from kervan.ranks import start
from kervan.ranks.rank import Nodes
from kervan.units import format_bytes

INSTALL = "pip install 'kervan[gpu]'"
MAX_RANKS = 64  # on CPU
CPU_RANKS = 2
BUFFERS = 2.5  # of the largest size that a rank has at once: what it sends, what it receives, some to compare with

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure. `device` and `ranks` (of this node) None: all GPUs here, or two ranks where there is none."""

    ops: tuple[Op, ...] = tuple(op for op in collectives.OPS if op != "one_way")
    bytes: tuple[int, ...] | None = None
    modes: tuple[Mode, ...] = collectives.MODES
    dtype: Dtype = "bfloat16"
    device: str | None = None
    ranks: int | None = None
    nodes: Nodes = Nodes()  # noqa: RUF009 - frozen
    for_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the ranks of this node run."""

    on_gpu: bool
    ranks: int
    memory_bytes: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """`beside`: rows of `all_reduce_perf` by size. `notes`: what was not measured, and why."""

    place: Place
    nodes: Nodes
    rows: tuple[Timing, ...]
    beside: Mapping[int, nccl_tests.NcclTestsRow]
    notes: tuple[str, ...]

    @property
    def is_correct(self) -> bool:
        return all(row.is_correct for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Bandwidths are GB/s of 1e9 bytes."""
        return {
            "device": "gpu" if self.place.on_gpu else "cpu",
            "name": self.place.name,
            "ranks": self.place.ranks * self.nodes.count,
            "nodes": self.nodes.count,
            "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
            "rows": [self._row(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def _row(self, row: Timing) -> dict[str, Any]:
        beside = self.beside.get(row.bytes) if row.op == "all_reduce" and row.mode == "eager" else None
        return {
            "op": row.op,
            "bytes": row.bytes,
            "mode": row.mode,
            "backend": row.backend,
            "dtype": row.dtype,
            "ranks": row.ranks,
            "time_us": round(row.time_us, 3),
            "min_us": round(row.min_us, 3),
            "max_us": round(row.max_us, 3),
            "algbw_gb_s": _figures(row.algbw_gb_s),
            "busbw_gb_s": _figures(row.busbw_gb_s),
            "correct": row.is_correct,
            "num_wrong": row.num_wrong,
            "slowest_rank": row.slowest_rank,
            "slowest_host": row.slowest_host,
            **({"all_reduce_perf_busbw_gb_s": beside.busbw_gb_s} if beside else {}),
        }


def _figures(value: float) -> float:
    return float(f"{value:.4g}")


def devices() -> list[GpuDevice]:
    """The GPUs that CUDA would show to a rank; none where there is no driver. Raises: ConfigError, as `machine`."""
    reading = nvml.read() or nvidia_smi.read()
    return [] if reading is None else machine.visible_devices(reading.devices, os.environ.get("CUDA_VISIBLE_DEVICES"))


def place(settings: BenchSettings) -> Place:
    """Where the ranks run. Raises: ConfigError for more ranks than there are GPUs, or than make sense on CPU."""
    gpus = [] if settings.device == "cpu" else devices()
    if settings.device == "gpu" and not gpus:
        raise ConfigError("--device gpu, and no NVIDIA GPU is visible here; use --device cpu, or run it on a GPU host")
    if gpus:
        if (settings.ranks or 1) > len(gpus):
            raise ConfigError(
                f"--ranks {settings.ranks} is more than the {len(gpus)} GPUs of this node, and NCCL takes one rank a "
                f"GPU; use --ranks {len(gpus)}, or --nodes for several"
            )
        memory = min(gpu.memory_mib for gpu in gpus) << 20
        return Place(True, settings.ranks or len(gpus), memory, gpus[0].name)
    number = settings.ranks or CPU_RANKS
    if number > MAX_RANKS:
        raise ConfigError(f"--ranks {number} is more than {MAX_RANKS}, as many as are started on CPU; use --ranks 4")
    return Place(False, number, psutil.virtual_memory().available // number, "CPU")


def check(settings: BenchSettings, where: Place) -> None:
    """Raises: ConfigError without torch; CapacityError for sizes that do not fit."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"kervan comm measures with torch, and it is not installed; run {INSTALL}")
    largest = max(settings.bytes or sizes(where))
    if largest * BUFFERS > where.memory_bytes:
        raise CapacityError(
            f"--bytes up to {format_bytes(largest)} need {BUFFERS:g} times as much on each rank, more than its "
            f"{where.memory_bytes / 2**30:.1f} GiB; give at most {format_bytes(int(where.memory_bytes / BUFFERS))}"
        )


def sizes(where: Place) -> tuple[int, ...]:
    """Without --bytes: 8 B to 1 GiB on GPUs, to 4 MiB on CPU, each the eightfold of the one before."""
    return tuple(8**i for i in range(1, 11 if where.on_gpu else 8))


def run(settings: BenchSettings, *, say: Say) -> BenchResult:
    """Measure. Raises: ConfigError, CapacityError; EngineError when ranks fail or hang."""
    where = place(settings)
    check(settings, where)
    of = where.ranks * settings.nodes.count
    say(f"{of} ranks on {settings.nodes.count} nodes, {where.name}" if settings.nodes.count > 1 else
        f"{of} ranks, {where.name}")  # fmt: skip
    plan = CollectivesPlan(
        on_gpu=where.on_gpu,
        ops=settings.ops,
        bytes=settings.bytes or sizes(where),
        modes=settings.modes,
        dtype=settings.dtype,
    )
    rows: list[Timing] = []
    notes: list[str] = []
    said = ""
    for row in start.run(collectives.work, plan, ranks=where.ranks, for_s=settings.for_s, nodes=settings.nodes):
        if isinstance(row, str):
            notes.append(row)
            continue
        rows.append(row)
        if (what := f"{row.op}, {row.backend}") != said:
            said = what
            say(what)
    if of < 2:
        notes.append("one rank sends nothing to another, so busbw is 0; times are those of a local copy")
    beside: Mapping[int, nccl_tests.NcclTestsRow] = {}
    if where.on_gpu and settings.nodes.count == 1 and "all_reduce" in settings.ops:
        found, problem = nccl_tests.run(plan.bytes, where.ranks, settings.dtype, for_s=settings.for_s)
        beside = {row.bytes: row for row in found}
        notes += [problem] if problem else []
    return BenchResult(place=where, nodes=settings.nodes, rows=tuple(rows), beside=beside, notes=tuple(notes))
