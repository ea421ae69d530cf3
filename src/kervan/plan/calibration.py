"""The model's constants fitted to measurements, stored with what is left of the errors."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kervan.config.workload import ClosedLoop
from kervan.errors import ConfigError
from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout
from kervan.plan import serving
from kervan.sim import limits as engine
from kervan.sim import memory
from kervan.sim.constants import Constants
from kervan.sim.step_time import StepTime

FORMAT = 1
# How far a prediction may be off before it counts (one standard deviation), by what is predicted. The time to the
# first token of a burst jumps with who comes first, so it says less.
TOLERANCE = {"out_tok_s": 0.03, "tpot_p50_s": 0.03, "ttft_p50_s": 0.20, "ttft_p99_s": 0.10}
PRIOR_SPREAD = 0.35  # of a constant around its prior, in its logarithm
ROUNDS = 6
SEEDS = 3  # runs of a load whose mean is the prediction
NAMES = tuple(f.name for f in dataclasses.fields(Constants))
# A size, and what only models in FP8 say something of, which no calibration runs.
FIXED = ("expert_tile_tokens", "fp8_flops_factor", "fp8_bandwidth_factor", "fp8_layer_s")
FREE = tuple(name for name in NAMES if name not in FIXED)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint(ClosedLoop):
    """A measured closed loop of one replica. `dp`: its ranks with an attention of their own. `frontends`: API server
    processes or gateways.
    """

    model: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    frontends: int = 1

    def __str__(self) -> str:
        more = "".join(f" {key} {size}" for key, size in (("dp", self.dp), ("ep", self.ep)) if size > 1)
        return f"{self.model} tp {self.tp} pp {self.pp}{more}, {self.concurrency} streams, {self.isl}/{self.osl}"


@dataclass(frozen=True, slots=True)
class Residual:
    """What is left of one point: predicted over measured, less one, by what is predicted."""

    point: str
    errors: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Constants of one kind of GPU. `spread`: standard deviation of log(predicted / measured), by what is predicted.

    `other_gpus`: kinds that were measured for it too.
    """

    name: str
    gpu: str
    date: str
    constants: Constants
    spread: Mapping[str, float]
    residuals: Sequence[Residual] = ()
    source: str = ""
    other_gpus: Sequence[str] = ()
    format: int = FORMAT

    def is_of(self, gpu: Gpu) -> bool:
        """Whether this kind of GPU was measured."""
        return gpu.name == self.gpu or gpu.name in self.other_gpus


# Fitted to 20 points on H200 and 32 on H100, vLLM 0.24, in 16 bit, and for FP8 to steps of one more run on H200:
# `python benchmarks/planner_errors.py` predicts them all. The spreads are about what is left there, and at points that
# were held back (docs/planner.md).
PRIOR = Calibration(
    name="prior-h200-2026-11-30",
    gpu="H200",
    date="2026-11-30",
    constants=Constants(),
    spread={"out_tok_s": 0.05, "tpot_p50_s": 0.04, "ttft_p50_s": 0.18, "ttft_p99_s": 0.15},
    source="vLLM 0.24.0 on H200 and H100",
    other_gpus=("H100",),
)


def predict(point: MeasuredPoint, spec: ModelSpec, gpu: Gpu, constants: Constants) -> dict[str, float]:
    """What the model says of a point, by the names of its fields."""
    layout = Layout(point.tp, point.pp, 1, point.ep, attention_dp=point.dp)
    limits = engine.limits(spec, gpu, {}, needed_tokens=point.isl + point.osl)
    step_time = StepTime(spec, layout, gpu, limits, constants)
    kv_tokens = memory.estimate(spec, layout, gpu, limits, context_tokens=point.isl + point.osl / 2).kv_tokens
    requests = serving.fixed(point.num_requests, point.isl, point.osl)
    return serving.mean_of(
        [
            serving.closed_loop(
                step_time,
                requests,
                streams=point.concurrency,
                kv_tokens=kv_tokens,
                frontends=point.frontends,
                seed=seed,
            )
            for seed in range(SEEDS)
        ]
    )


def residual(point: MeasuredPoint, spec: ModelSpec, gpu: Gpu, constants: Constants) -> Residual:
    """How far the prediction of one point is off: predicted over measured, less one, by figure."""
    predicted = predict(point, spec, gpu, constants)
    return Residual(
        str(point), {key: predicted[key] / getattr(point, key) - 1 for key in predicted if getattr(point, key) > 0}
    )


def spread(residuals: Iterable[Residual]) -> dict[str, float]:
    """Root mean square of log(predicted / measured), by what is predicted; at least 0.01."""
    logs: dict[str, list[float]] = {}
    for residual in residuals:
        for key, error in residual.errors.items():
            logs.setdefault(key, []).append(math.log(1 + error))
    return {key: max(0.01, math.sqrt(sum(x * x for x in values) / len(values))) for key, values in logs.items()}


def fit(
    points: Sequence[MeasuredPoint],
    specs: Mapping[str, ModelSpec],
    gpu: Gpu,
    *,
    start: Constants = PRIOR.constants,
    free: Sequence[str] = FREE,
    rounds: int = ROUNDS,
) -> Constants:
    """Constants under which the predictions come nearest to the points, without going far from `start`.

    Gauss-Newton on logarithms: each error counts in units of its tolerance, and each constant is held at its prior with
    a spread of `PRIOR_SPREAD`, so that a few points move only what they speak of. Takes about a second per round and
    ten points. Needs numpy.

    Raises: ConfigError without points, or without numpy.
    """
    return fit_many(
        [(point, specs[point.model], gpu, tuple(TOLERANCE)) for point in points], start=start, free=free, rounds=rounds
    )


def fit_many(
    points: Sequence[tuple[MeasuredPoint, ModelSpec, Gpu, Sequence[str]]],
    *,
    start: Constants = PRIOR.constants,
    free: Sequence[str] = FREE,
    rounds: int = ROUNDS,
) -> Constants:
    """As `fit`, for points of several kinds of GPU; of each only the named figures count.

    Raises: ConfigError without points, or without numpy.
    """
    if not points:
        raise ConfigError("a fit needs measured points, and there are none; run kervan calibrate on a GPU")
    try:
        import numpy as np
    except ImportError as error:
        raise ConfigError("a fit needs numpy; pip install 'kervan[bench]'") from error

    def moved(logs: Any) -> Constants:
        changes = {n: getattr(start, n) * math.exp(float(x)) for n, x in zip(free, logs, strict=True)}
        return dataclasses.replace(start, **changes)

    def errors(logs: Any) -> Any:
        constants = moved(logs)
        scaled = []
        for point, spec, gpu, keys in points:
            predicted = predict(point, spec, gpu, constants)
            # One point that went wrong must not pull the others: beyond five tolerances an error counts no more.
            scaled += [
                max(-5.0, min(5.0, math.log(predicted[key] / getattr(point, key)) / TOLERANCE[key]))
                for key in keys
                if getattr(point, key) > 0
            ]
        return np.array([*scaled, *(x / PRIOR_SPREAD for x in logs)])

    logs = np.zeros(len(free))
    base = errors(logs)
    step = 0.05  # wide enough to look over the jumps of a scheduler
    for _ in range(rounds):
        slopes = np.empty((len(base), len(free)))
        for i in range(len(free)):
            tried = logs.copy()
            tried[i] += step
            slopes[:, i] = (errors(tried) - base) / step
        change = np.linalg.lstsq(slopes, -base, rcond=None)[0].clip(-0.5, 0.5)
        for share in (1.0, 0.5, 0.25):
            now = errors(logs + share * change)
            if now @ now < base @ base:
                logs, base = logs + share * change, now
                break
        else:
            break
    return moved(logs)


def calibrate(
    name: str,
    date: str,
    points: Sequence[MeasuredPoint],
    specs: Mapping[str, ModelSpec],
    gpu: Gpu,
    *,
    start: Constants = PRIOR.constants,
    source: str = "",
) -> Calibration:
    """A calibration from points of one kind of GPU, with its residuals.

    Raises: ConfigError, as `fit`.
    """
    constants = fit(points, specs, gpu, start=start)
    left = [residual(point, specs[point.model], gpu, constants) for point in points]
    return Calibration(
        name=name, gpu=gpu.name, date=date, constants=constants, spread=spread(left), residuals=left, source=source
    )


def save(calibration: Calibration, path: Path) -> None:
    """Write it as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")


def load(path: Path) -> Calibration:
    """Raises: ConfigError for a file that is missing, no calibration, or of another format."""
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"calibration {path} cannot be read: {error}") from error
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"calibration {path} is none ({error}); make one with kervan calibrate") from error
    if calibration.format != FORMAT:
        raise ConfigError(
            f"calibration {path} has format {calibration.format}, this kervan reads {FORMAT}; calibrate again"
        )
    bad = [n for n in NAMES if not 0 < getattr(calibration.constants, n) < math.inf]
    if bad:
        raise ConfigError(
            f"calibration {path}: {bad[0]}={getattr(calibration.constants, bad[0])} is not above 0; calibrate again"
        )
    return calibration
