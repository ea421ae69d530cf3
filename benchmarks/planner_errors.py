"""The planner against measurements: every stored point predicted, errors by set, and a plot.

    python benchmarks/planner_errors.py [--plot FILE.svg] [--markdown] [--refit] [--leave-out-layouts]

Closed loops first, then what others published of DeepSeek-R1 with other engines (records/published-*.json), then open
loops (records/open-loop-*.json), whose arrivals are those that were measured.

Sets: `fit` are the points that the shipped constants were fitted to, `taught` those of which a rule came, `held back`
the others. --refit fits again and prints the constants; with --leave-out-layouts it does so without the points of
`layouts.py` on H200 (tp 2, pp 2, experts with tp 2), which then count as held back. --plot needs matplotlib.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.bench.arrivals import Stage, offsets_s
from kervan.config.workload import parse_lengths
from kervan.facts import architecture, hardware
from kervan.facts.architecture import ModelSpec
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout
from kervan.plan import calibration, serving
from kervan.plan.calibration import PRIOR, MeasuredPoint
from kervan.plan.load import load
from kervan.plan.request import PlanRequest
from kervan.plan.screen import screen
from kervan.plan.serving import LoadRequest, LoadResult
from kervan.sim import limits as engine
from kervan.sim import memory
from kervan.sim.step_time import StepTime

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
KEYS = ("out_tok_s", "tpot_p50_s", "ttft_p50_s", "ttft_p99_s")
NAMES = {"out_tok_s": "tokens/s", "tpot_p50_s": "TPOT p50", "ttft_p50_s": "TTFT p50", "ttft_p99_s": "TTFT p99"}
# A kernel was compiled in the middle of this run (a gap of 1.86 s, seen in its longest gap): its rate is not one.
STALLED = ("qwen3-30b-a3b", 2, 64)
# Held back when they were measured. Then the two constants of expert kernels were fitted with the first; the second
# showed that the stages of model runner V1 take turns (and that no wait between them is to be added).
LATER = {("mixtral-8x7b", 1): "fit", ("qwen25-32b", 2): "taught"}  # by model and pp
FP8 = ", FP8"  # after the name of a model whose weights are quantised so at the start
# Of runs with 8 output tokens only the time to the first token says something.
SHORT_TOKENS = 8


@dataclass(frozen=True)
class Measured:
    """A point, its GPU, and which set it is in."""

    point: MeasuredPoint
    gpu: str
    group: str

    def figures(self) -> tuple[str, ...]:
        if self.point.osl <= SHORT_TOKENS:
            return ("ttft_p50_s",)
        if (self.point.model, self.point.tp, self.point.concurrency) == STALLED and self.gpu == "H200":
            return ("tpot_p50_s", "ttft_p50_s")
        return KEYS


def specs() -> dict[str, ModelSpec]:
    """The shapes of `models/`, and those that a calibration made."""
    configs = {
        path.parent.name: json.loads(path.read_text()) for path in sorted((HERE / "models").glob("*/config.json"))
    }
    for path in sorted(RECORDS.glob("calibrate-*.json")):
        configs |= json.loads(path.read_text())["models"]
    found = {name: architecture.parse(config, f"{name}/config.json") for name, config in configs.items()}
    return found | {f"llama3-70b{FP8}": architecture.in_fp8(found["llama3-70b"])}


def measured(*, leaves_out_layouts: bool = False) -> Iterator[Measured]:
    """All stored points."""
    layouts = "held back" if leaves_out_layouts else "fit"
    for line in (RECORDS / "bare-h200-2026-11-22.jsonl").read_text().splitlines():
        yield Measured(_point(json.loads(line)), "H200", "fit")
    for run in _record("overhead-1xh200-2026-11-22-2")["summary"]:
        if run["concurrency"] == 256:
            row = {"model": "llama3-8b", "concurrency": 256, "num_requests": 512, "isl": 1024, "osl": 256}
            yield Measured(_point(row | run["bare"]), "H200", "fit")
    for name, model in (("tensor", "llama3-70b"), ("stages", "llama3-70b"), ("experts", "qwen3-30b-a3b")):
        for row in _record(f"layouts-{name}-2xh200-2026-11-23")["rows"]:
            if "out_tok_s" in row:
                yield Measured(_layout_point(row, model), "H200", layouts)
    service = _record("service-70b-1xh200-2026-11-30")["service"]
    for row in service["loops"]:
        yield Measured(_service_point(row, service), "H200", "fit")
    for row in _record("planner-points-2xh100-2026-11-25")["serving"]:
        yield Measured(_point(row), "H100", "fit")
    for name in ("", "-2"):
        for row in _record(f"planner-points-2xh100-2026-11-27{name}")["serving"]:
            yield Measured(_point(row), "H100", LATER.get((row["model"], row["pp"]), "held back"))
    for row in _record("planner-points-mla-2xh200-2026-11-29")["serving"]:
        yield Measured(_point(row | {"frontends": row["dp"]}), "H200", "held back")  # vLLM: an API server for each rank
    for path in sorted(RECORDS.glob("calibrate-*.json")):
        content = json.loads(path.read_text())
        for row in content["serving"]:
            yield Measured(_point(row), hardware.gpu(content["gpu"]).name, "held back")


def _record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


def _point(row: dict[str, Any]) -> MeasuredPoint:
    names = {f.name for f in dataclasses.fields(MeasuredPoint)}
    return MeasuredPoint(**{key: value for key, value in row.items() if key in names})


def _layout_point(row: dict[str, Any], model: str) -> MeasuredPoint:
    """A row of layouts.py: bare vLLM, or kervan with four gateways."""
    words = row["what"].removeprefix("bare ").split()
    pp = int(words[words.index("pp") + 1]) if "pp" in words else 1
    sizes = {"model": model, "tp": int(words[words.index("tp") + 1]), "pp": pp, "isl": 1024, "osl": 256}
    counts = {"concurrency": row["streams"], "num_requests": max(4, min(3 * row["streams"], 512))}
    return _point(row | sizes | counts | {"frontends": 1 if row["what"].startswith("bare") else 4})


def _service_point(row: dict[str, Any], service: dict[str, Any]) -> MeasuredPoint:
    """A closed loop of service_70b_h200.py: kervan with two gateways."""
    figures = {f"{name}_{q}_s": row[f"{name}_s"][q] for name in ("ttft", "tpot") for q in ("p50", "p99")}
    counts = {"concurrency": row["streams"], "num_requests": row["ok"], "frontends": 2}
    lengths = {"isl": service["isl"], "osl": service["osl"]}
    return _point({"model": f"llama3-70b{FP8}", "out_tok_s": row["out_tok_s"], **figures, **counts, **lengths})


@dataclass(frozen=True)
class OpenError:
    """A measured open loop, and predicted over measured, less one, by figure; of the same arrivals."""

    name: str
    row: dict[str, Any]
    errors: dict[str, float]


def open_loops() -> Iterator[OpenError]:
    """All measured open loops. No figure of them was fitted to; in FP8 the times of their steps were."""
    known = specs()
    for path in sorted(RECORDS.glob("open-loop-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            yield open_error(row, known)
    for row in service_rates():
        yield open_error(row, known)


def service_rates() -> list[dict[str, Any]]:
    """The open loops of service_70b_h200.py, with the keys of open_loop_points.py."""
    service = _record("service-70b-1xh200-2026-11-30")["service"]
    same = {"model": f"llama3-70b{FP8}", "isl": service["isl"], "osl": service["osl"], "frontends": 2}
    return [same | row | {key: row[f"{key}_s"] for key in ("tpot", "ttft_from_arrival")} for row in service["rates"]]


def open_error(row: dict[str, Any], known: Mapping[str, ModelSpec]) -> OpenError:
    """Of one open loop; `known` as `specs`."""
    sent_s = offsets_s([Stage(row["rate"], row["rate"], row["seconds"])], "poisson", seed=row["seed"])
    arrivals = [LoadRequest(at_s, row["isl"], row["osl"]) for at_s in sent_s]
    isl, osl = parse_lengths(str(row["isl"])), parse_lengths(str(row["osl"]))
    gpu = hardware.gpu("H200")
    request = PlanRequest(spec=known[row["model"]], gpu=gpu, gpus=1, rate=row["rate"], isl=isl, osl=osl)
    one = screen(load(request))[0]
    kv_tokens, frontends = one.memory.kv_tokens, row.get("frontends", 1)
    said = serving.open_loop(one.step_time, arrivals, kv_tokens=kv_tokens, frontends=frontends)
    errors = {
        f"{name}_{word}": figure(said, q) / row[key][word] - 1
        for name, key, figure in (
            ("tpot", "tpot", LoadResult.tpot_s), ("ttft", "ttft_from_arrival", LoadResult.ttft_s)
        )
        for word, q in (("p50", 0.5), ("p99", 0.99))
    }  # fmt: skip
    return OpenError(f"{row['model']}, {row['isl']}/{row['osl']}", row, errors)


def print_open_loops() -> None:
    names = {"tpot_p50": "TPOT p50", "tpot_p99": "TPOT p99", "ttft_p50": "TTFT p50", "ttft_p99": "TTFT p99"}
    heads = ["model, in/out", "requests/s", "measured TPOT p50, p99, ms", "TTFT p50, p99, ms", *names.values()]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for found in open_loops():
        tpot, ttft = found.row["tpot"], found.row["ttft_from_arrival"]
        cells = [found.name, f"{found.row['rate']:g}"]
        cells += [f"{1000 * times['p50']:.1f}, {1000 * times['p99']:.1f}" for times in (tpot, ttft)]
        print("| " + " | ".join([*cells, *(f"{100 * found.errors[name]:+.0f}%" for name in names)]) + " |")


def print_published() -> None:
    """Each row with data-parallel attention, and beside it what TP8 is predicted to do; of the others with one date
    each group's mean absolute errors.
    """
    rows = _record("published-deepseek-r1-8xh200-2026-04-06")["rows"]
    heads = ["layout, engine", "in/out", "streams", "published tokens/s", "TPOT, ms", "predicted tokens/s", "TPOT"]
    print(f"| {' | '.join([*heads, 'TP8 predicted tokens/s'])} |\n|{'---|' * (len(heads) + 1)}")
    config = json.loads((HERE / "models/deepseek-v3/config.json").read_text())
    spec, gpu = architecture.parse(config, "deepseek-v3"), hardware.gpu("H200")
    for row in (row for row in rows if row["attention_dp"] > 1):
        published, tpot_ms = _published(row)
        said, tp8 = (_said(spec, gpu, row, layout) for layout in (Layout(ep=8, attention_dp=8), Layout(8)))
        cells = [f"ADP8xEP8, {row['engine']}, {row['measured']}", f"{row['isl']}/{row['osl']}", str(row["concurrency"])]
        cells += [
            f"{published:,.0f}",
            f"{tpot_ms:.1f}",
            f"{said.out_tok_s:,.0f} ({said.out_tok_s / published - 1:+.0%})",
        ]
        cells += [f"{1000 * _mean_tpot_s(said) / tpot_ms - 1:+.0%}", f"{tp8.out_tok_s:,.0f}"]
        print(f"| {' | '.join(cells)} |")
    for layout, date in (("TP8xEP8", "2026-01-28"), ("TP8", "2026-03-25")):
        size = Layout(8, ep=8) if layout == "TP8xEP8" else Layout(8)
        chosen = [r for r in rows if (r["attention_dp"], r["ep"], r["measured"]) == (1, size.ep, date)]
        errors = []
        for row in chosen:
            published, tpot_ms = _published(row)
            said = _said(spec, gpu, row, size)
            errors.append((said.out_tok_s / published - 1, 1000 * _mean_tpot_s(said) / tpot_ms - 1))
        means = [f"{statistics.fmean(abs(each) for each in found):.0%}" for found in zip(*errors, strict=True)]
        streams = sorted({row["concurrency"] for row in chosen})
        counts = f"{streams[0]} to {streams[-1]}" if len(streams) > 1 else str(streams[0])
        words = f"{layout}, {chosen[0]['engine']}, {date}: {len(chosen)}, mean absolute"
        print(f"| {words} | | {counts} | | | {means[0]} | {means[1]} | |")


def _published(row: dict[str, Any]) -> tuple[float, float]:
    """(tokens per second, mean TPOT in ms); the first from the means of TTFT and TPOT, all streams always busy."""
    whole_ms = row["ttft_mean_ms"] + (row["osl"] - 1) * row["tpot_mean_ms"]
    return 1000 * row["concurrency"] * row["osl"] / whole_ms, row["tpot_mean_ms"]


def _said(spec: ModelSpec, gpu: Gpu, row: dict[str, Any], layout: Layout) -> LoadResult:
    limits = engine.limits(spec, gpu, {}, needed_tokens=row["isl"] + row["osl"])
    room = memory.estimate(spec, layout, gpu, limits, context_tokens=row["isl"] + row["osl"] / 2)
    return serving.closed_loop(
        StepTime(spec, layout, gpu, limits, PRIOR.constants),
        serving.fixed(4 * row["concurrency"], row["isl"], row["osl"]),
        streams=row["concurrency"],
        kv_tokens=room.kv_tokens,
        frontends=layout.attention_dp,
    )


def _mean_tpot_s(result: LoadResult) -> float:
    return statistics.fmean(response.tpot_s for response in result.responses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--markdown", action="store_true", help="only the table of docs/planner.md")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--leave-out-layouts", action="store_true")
    args = parser.parse_args()
    known = specs()
    points = list(measured(leaves_out_layouts=args.leave_out_layouts))
    constants = PRIOR.constants
    if args.refit or args.leave_out_layouts:
        constants = calibration.fit_many(
            [(m.point, known[m.point.model], hardware.gpu(m.gpu), m.figures()) for m in points if m.group == "fit"],
            free=[name for name in calibration.NAMES if name != "expert_tile_tokens"],
        )
        for field in dataclasses.fields(constants):
            print(f"{field.name}: {getattr(PRIOR.constants, field.name):.4g} -> {getattr(constants, field.name):.4g}")
    rows = []
    for m in points:
        said = calibration.predict(m.point, known[m.point.model], hardware.gpu(m.gpu), constants)
        rows.append((m, said))
        if not args.markdown:
            cells = "  ".join(
                f"{NAMES[k]} {said[k]:.4g}/{getattr(m.point, k):.4g} {100 * (said[k] / getattr(m.point, k) - 1):+.0f}%"
                for k in m.figures()
            )
            print(f"{m.group:9} {m.gpu} {m.point}: {cells}")
    print("| set | points | " + " | ".join(NAMES.values()) + " |\n|---|---|" + "---|" * len(KEYS))
    for name, chosen in groups(rows).items():
        errors = [[abs(said[k] / getattr(m.point, k) - 1) for m, said in chosen if k in m.figures()] for k in KEYS]
        shares = (f"{100 * statistics.fmean(found):.1f}% ({len(found)})" if found else "" for found in errors)
        print(f"| {name} | {len(chosen)} | " + " | ".join(shares) + " |")
    print()
    print_published()
    print()
    print_open_loops()
    if args.plot:
        plot(rows, args.plot)


def groups(rows: list[tuple[Measured, dict[str, float]]]) -> dict[str, list[tuple[Measured, dict[str, float]]]]:
    """The rows of the table."""
    found: dict[str, list[tuple[Measured, dict[str, float]]]] = {}
    for m, said in rows:
        kind = "experts" if any(name in m.point.model for name in ("a3b", "mixtral", "deepseek")) else "dense"
        kind += FP8 if m.point.model.endswith(FP8) else ""
        kind += ", data-parallel attention" if m.point.dp > 1 else ""
        kind += ", stages" if m.point.pp > 1 else ""
        found.setdefault(f"{m.group}: {m.gpu}, {kind}", []).append((m, said))
    return found


def plot(rows: list[tuple[Measured, dict[str, float]]], path: Path) -> None:
    """Predicted against measured on two logarithmic axes, a panel per figure."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kervan"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4))
    for axis, key in zip(axes, KEYS[:3], strict=True):
        for name, chosen in groups(rows).items():
            pairs = [(getattr(m.point, key), said[key]) for m, said in chosen if key in m.figures()]
            if pairs:
                axis.scatter(*zip(*pairs, strict=True), s=16, label=name)
        low, high = (math.exp(f(math.log(v) for v in axis.get_xlim() if v > 0)) for f in (min, max))
        axis.plot([low, high], [low, high], color="black", linewidth=0.7)
        axis.set(xscale="log", yscale="log", xlabel=f"measured {NAMES[key]}", ylabel="predicted")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
