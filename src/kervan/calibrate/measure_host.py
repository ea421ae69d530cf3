"""A whole calibration: kernels on one GPU, collectives over all, servers. What was measured is kept at each step."""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kervan.bench import records
from kervan.calibrate import choose, kernels
from kervan.calibrate.choose import Shape
from kervan.calibrate.kernels import HostGpus
from kervan.calibrate.measurements import (
    Attention,
    Collective,
    Copy,
    Floor,
    Matmul,
    Measurements,
    Memory,
    Serving,
)
from kervan.calibrate.serving import MIN_PHASE_S, ServingRuns
from kervan.calibrate.shapes import write_model
from kervan.comm import collectives
from kervan.comm.collectives import Timing
from kervan.errors import ConfigError, EngineError
from kervan.facts.markup import json_value
from kervan.ranks import start

INSTALL = "pip install 'kervan[gpu]'"
LOOK_S = 120.0
KERNELS_S = 150.0
COLLECTIVES_S = 120.0
QUICK_BYTES = tuple(8 * 1024 * 8**i for i in range(6))  # 8 KiB to 256 MiB

Say = Callable[[str], None]
_FIELDS: Mapping[type[Any], str] = {
    Copy: "copy",
    Matmul: "matmul",
    Attention: "attention",
    Collective: "collectives",
    Floor: "floors",
    Serving: "serving",
    Memory: "memory",
    str: "notes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure. `num_gpus` None: all. `models`: directories with a `config.json`; none: shapes that fit.

    `shapes_dir`: where the model directories without weights go. vLLM finds what it compiled for a model by the model's
    path, so with the same directory a second run starts faster.
    """

    num_gpus: int | None = None
    is_quick: bool = False
    has_serving: bool = True
    models: tuple[Path, ...] = ()
    for_s: float = 600.0
    log_dir: Path | None = None
    shapes_dir: Path | None = None


@dataclass
class MeasurementLog:
    """The measurements so far; each row goes to `on_change` as part of all."""

    value: Measurements
    on_change: Callable[[Measurements], None] = field(default=lambda _: None)

    def keep(self, row: Any) -> None:
        """Add a row of a kind in `_FIELDS`, or a note (a string). Raises: KeyError for anything else."""
        name = _FIELDS[type(row)]
        longer: dict[str, Any] = {name: (*getattr(self.value, name), row)}
        self.value = replace(self.value, **longer)
        self.on_change(self.value)

    def keep_all(self, rows: Iterable[Any], what: str, say: Say) -> None:
        """Keep each row; a note that begins with `what`, also given to `say`, if they end with an EngineError."""
        try:
            for row in rows:
                self.keep(row)
        except EngineError as error:
            say(f"{what}: {error}")
            self.keep(f"{what}: {error}")


def check(settings: Settings) -> None:
    """Check that torch, vLLM and the models that `settings` needs are here. Loads none of them.

    Raises: ConfigError when something is not installed, or a model's config.json cannot be read.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"kervan calibrate needs torch to measure, and it is not installed; run {INSTALL}")
    if settings.has_serving and importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"serving points need vLLM, and it is not installed; run {INSTALL}, or give --no-serving")
    for directory in settings.models:
        shape_of(directory)


def shape_of(directory: Path) -> Shape:
    """The model in `directory`, as its config.json describes it; its name is the directory's.

    Raises: ConfigError when the file cannot be read, or is not that of a language model.
    """
    path = directory / "config.json"
    try:
        config = json_value(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); give a model's directory (--model)") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a JSON {type(config).__name__}, not an object; give a model's directory")
    shape = Shape(directory.resolve().name, config)
    choose.weights_bytes(shape)  # raises for what is no language model's
    return shape


def _shapes(settings: Settings, gpus: HostGpus) -> list[Shape]:
    """What servers run. Raises: ConfigError for one that does not fit."""
    if not settings.has_serving:
        return []
    shapes = [shape_of(directory) for directory in settings.models]
    shapes = shapes or choose.default_shapes(gpus.memory_bytes)[: 1 if settings.is_quick else 2]
    if len({shape.name for shape in shapes}) < len(shapes):
        names = ", ".join(shape.name for shape in shapes)
        raise ConfigError(f"--model: the directories {names} have the same name, which the rows go by; rename one")
    for shape in shapes:
        choose.smallest_tp(shape, gpus.count, gpus.memory_bytes)
    return shapes


def find_gpus(num_gpus: int | None) -> HostGpus:
    """This host's GPUs, as many as asked for. Takes seconds: a process of its own loads torch.

    Raises: ConfigError without a GPU, or with fewer than asked for.
    """
    gpus = next(start.run(kernels.look, None, for_s=LOOK_S), None)
    if gpus is None:
        raise ConfigError(
            "torch sees no GPU here, and a calibration measures GPUs; run it on a host that has them, or plan with the "
            "numbers that kervan comes with"
        )
    assert isinstance(gpus, HostGpus)
    if num_gpus is not None and num_gpus > gpus.count:
        raise ConfigError(f"--gpus {num_gpus} is more than the {gpus.count} that torch sees here")
    return replace(gpus, count=num_gpus or gpus.count)


def measure(settings: Settings, *, say: Say, on_change: Callable[[Measurements], None]) -> Measurements:
    """Everything, within about `settings.for_s`; the newest state goes to `on_change` after each row.

    Raises: ConfigError; EngineError when nothing at all could be measured.
    """
    end_s = time.monotonic() + settings.for_s
    check(settings)
    say("looking at the GPUs")
    gpus = find_gpus(settings.num_gpus)
    memory_gib = gpus.memory_bytes / choose.GIB
    say(f"{gpus.count} x {gpus.name}, {memory_gib:.0f} GiB")
    shapes = _shapes(settings, gpus)
    log = MeasurementLog(_blank(gpus), on_change)
    parts = Parts(settings, log, say, end_s)
    parts.kernels("cuda:0", kernels.QUICK if settings.is_quick else kernels.Sizes())
    for num_ranks in group_sizes(gpus.count):
        plan = collectives.CollectivesPlan(on_gpu=True)
        parts.collectives(num_ranks, replace(plan, bytes=QUICK_BYTES) if settings.is_quick else plan)
    if settings.has_serving:
        parts.serving(gpus, shapes)
    if not (log.value.copy or log.value.collectives or log.value.serving):
        raise EngineError(f"nothing could be measured: {'; '.join(log.value.notes)[:500]}")
    return log.value


def group_sizes(num_gpus: int) -> list[int]:
    """Ranks that collectives are measured over: powers of two, and all."""
    return sorted({n for n in (2, 4, 8, 16) if n <= num_gpus} | ({num_gpus} if num_gpus > 1 else set()))


@dataclass
class Parts:
    """The parts of a calibration, which keep what they find and note what they could not do."""

    settings: Settings
    log: MeasurementLog
    say: Say
    end_s: float

    def _left_s(self) -> float:
        return self.end_s - time.monotonic()

    def kernels(self, device: str, sizes: kernels.Sizes) -> None:
        """Copy, matrix products, attention and floors."""
        self.say("measuring kernels on one GPU")
        for_s = max(1.0, min(KERNELS_S, self._left_s()))
        self.log.keep_all(start.run(kernels.work, (device, sizes), for_s=for_s), "kernels", self.say)

    def collectives(self, num_ranks: int, plan: collectives.CollectivesPlan) -> None:
        """All-reduce, and between two ranks also send/recv."""
        what = f"collectives over {num_ranks} ranks"
        self.say(f"measuring {what}")
        for_s = max(1.0, min(COLLECTIVES_S, self._left_s()))
        rows = start.run(collectives.work, plan, ranks=num_ranks, for_s=for_s)
        self.log.keep_all(map(_row, rows), what, self.say)

    def serving(self, gpus: HostGpus, shapes: Sequence[Shape]) -> None:
        """vLLM's server on a few layouts."""
        if self._left_s() < MIN_PHASE_S:
            self.log.keep(f"serving: not measured, {max(0.0, self._left_s()):.0f} s were left")
            return
        with tempfile.TemporaryDirectory(prefix="kervan-calibrate-") as place:
            logs = self.settings.log_dir or Path(place) / "logs"
            home = self.settings.shapes_dir or Path(place)
            models = [(shape, write_model(shape.config, home / shape.name)) for shape in shapes]
            servers = choose.servers(models, gpus.count, gpus.memory_bytes, is_quick=self.settings.is_quick)
            self.log.value = replace(self.log.value, models={shape.name: shape.config for shape in shapes})
            runs = ServingRuns(
                log_dir=logs, for_s=self._left_s(), on_row=self.log.keep, on_note=self._note, say=self.say
            )
            runs.measure(servers)

    def _note(self, text: str) -> None:
        self.say(text)
        self.log.keep(text)


def _row(timing: Timing | str) -> Collective | str:
    """A timing as the file has it, whose `send_recv` is one way. Raises: EngineError for a result that is wrong."""
    if isinstance(timing, str):
        return timing
    if not timing.is_correct:
        raise EngineError(
            f"{timing.op} of {timing.bytes} bytes over {timing.ranks} ranks has {timing.num_wrong} wrong entries"
        )
    op: Literal["all_reduce", "send_recv"] = "send_recv" if timing.op == "one_way" else "all_reduce"
    return Collective(op, timing.ranks, timing.bytes, timing.mode == "graph", timing.backend, timing.seconds)


def _blank(gpus: HostGpus) -> Measurements:
    environment = records.environment()
    return Measurements(
        gpu=gpus.name,
        num_gpus=gpus.count,
        hardware={**environment["hardware"], "gpu_memory_bytes": gpus.memory_bytes, "environment": _nccl()},
        versions={**environment["versions"], **dict(gpus.versions)},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _nccl() -> dict[str, str]:
    """NCCL's settings, which collectives depend on."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}
