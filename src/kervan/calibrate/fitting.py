"""From what was measured to the planner's constants.

Kernels say where to begin: the shares of bandwidth and arithmetic that matrix products reach, and the time of a small
all-reduce inside a CUDA graph. Serving points then move all constants to where the whole fits.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from kervan.bench import records
from kervan.calibrate.measurements import Measurements, Serving
from kervan.errors import ConfigError
from kervan.facts import architecture, hardware
from kervan.facts.hardware import Gpu
from kervan.facts.layout import parse_layout
from kervan.plan import calibration
from kervan.plan.calibration import PRIOR, Calibration, MeasuredPoint
from kervan.sim.constants import Constants

LARGE_ROWS = 2048  # matrix products of so many rows are bound by arithmetic
SMALL_ROWS = 16  # and of so few by memory
SMALL_BYTES = 64 * 1024
# What whole layers reach of the rates of single products: other kernels take their time, and clocks fall under load.
WITHIN_A_MODEL = 0.95


def constants_of_kernels(measured: Measurements, gpu: Gpu) -> Constants:
    """The prior with what single kernels say; each is believed within a factor of two."""
    start = PRIOR.constants
    changes: dict[str, float] = {}
    small = [m for m in measured.matmul if m.m <= SMALL_ROWS]
    if small:
        share = sorted(2 * m.n * m.k / m.seconds / gpu.bandwidth_bytes_s for m in small)[len(small) // 2]
        changes["bandwidth_share"] = _near(share, start.bandwidth_share)
    large = [m for m in measured.matmul if m.m >= LARGE_ROWS]
    if large:
        rates = sorted(2 * m.m * m.n * m.k / m.seconds / gpu.bf16_flops for m in large)
        changes["flops_share"] = _near(WITHIN_A_MODEL * rates[len(rates) // 2], start.flops_share)
    sums = [
        c.seconds
        for c in measured.collectives
        if c.op == "all_reduce" and c.in_graph and c.bytes <= SMALL_BYTES and c.backend in ("nccl", "symm_mem")
    ]
    if sums:
        changes["all_reduce_s"] = _near(min(sums), start.all_reduce_s)
    return dataclasses.replace(start, **changes)


def _near(figure: float, prior: float) -> float:
    return min(2 * prior, max(prior / 2, figure))


def gpu_of(measured: Measurements) -> Gpu:
    """The row of the GPU that was measured.

    Raises: ConfigError for one that is not in the table.
    """
    return hardware.gpu(re.sub(r",.*", "", measured.gpu))


def points_of(rows: Sequence[Serving]) -> list[MeasuredPoint]:
    """Serving rows as the fit's points; bare vLLM has one frontend."""
    names = {f.name for f in dataclasses.fields(MeasuredPoint)}
    return [MeasuredPoint(**{k: v for k, v in dataclasses.asdict(row).items() if k in names}) for row in rows]


def fit(measured: Measurements, *, more: Sequence[MeasuredPoint] = ()) -> Calibration:
    """The calibration of one host; `more`: points of other runs on the same kind of GPU and the same models.

    Raises: ConfigError for an unknown GPU, or when no serving point was measured.
    """
    gpu = gpu_of(measured)
    points = [*points_of(measured.serving), *more]
    if not points:
        raise ConfigError(
            "the measurements have no serving point, so there is nothing to fit the constants to; run kervan "
            "calibrate without --no-serving"
        )
    specs = {name: architecture.parse(config, f"{name}/config.json") for name, config in measured.models.items()}
    if missing := sorted({point.model for point in points} - specs.keys()):
        raise ConfigError(f"the measurements lack the config.json of {', '.join(missing)}; calibrate again")
    versions = ", ".join(f"{name} {measured.versions[name]}" for name in ("vllm", "torch") if name in measured.versions)
    return calibration.calibrate(
        f"{gpu.name.lower()}-{measured.date[:10]}", measured.date[:10], points, specs, gpu,
        start=constants_of_kernels(measured, gpu), source=f"{measured.num_gpus} x {measured.gpu}, {versions}",
    )  # fmt: skip


def points_of_record(text: str) -> list[MeasuredPoint]:
    """The closed loops of a `kervan bench` record, from `FILE` or `FILE:tp=2,pp=1`: the layout of the one replica that
    was loaded.

    Raises: ConfigError for a file that is no such record, or has no closed loop of fixed lengths.
    """
    file, _, sizes = text.partition(":")
    layout = {"tp": 1, "pp": 1, "ep": 1} | (parse_layout(sizes) if sizes else {})
    if layout.pop("dp", 1) != 1:
        raise ConfigError(f"--bench {text!r}: a record of several replicas says nothing of one; load one replica")
    return [
        MeasuredPoint(model=Path(loop.model).name, **layout, **dataclasses.asdict(loop.figures))
        for loop in records.closed_loops(Path(file))
    ]
