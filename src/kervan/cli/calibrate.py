"""`kervan calibrate`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kervan.cli import option_types, options, outputs
from kervan.units import format_duration

if TYPE_CHECKING:
    from kervan.calibrate.measurements import Measurements
    from kervan.plan.calibration import Calibration


@click.command()
@click.option("--gpus", type=option_types.GPUS, help="Of this host, the first ones; without it, all.")
@click.option("--quick", is_flag=True, help="Fewer sizes, one model, two loads.")
@click.option("--no-serving", is_flag=True, help="Kernels and collectives only; no vLLM needed.")
@click.option(
    "--model", "models", multiple=True, type=click.Path(path_type=Path),
    help="Directory with a config.json, served with random weights instead of the usual shapes; repeatable.",
)  # fmt: skip
@click.option(
    "--for", "duration", type=option_types.DURATION, default="10min", show_default=True,
    help="In all; what it is too short for is noted.",
)  # fmt: skip
@click.option("--output", type=option_types.FILE,
              help="[default: calibrations/GPUS.json in ~/.kervan or $KERVAN_HOME]")  # fmt: skip
@click.option("--calibration", "fitted", type=option_types.FILE,
              help="Where the fit goes. [default: beside the measurements, .calibration.json]")  # fmt: skip
@click.option("--measurements", "stored", type=option_types.FILE,
              help="Measure nothing; take what this file of an earlier run has.")  # fmt: skip
@click.option("--bench", "bench", multiple=True, metavar="RECORD[:tp=2,pp=1]",
              help="A record of kervan bench on one replica of a measured model, to fit to as well.")  # fmt: skip
@click.option("--log-dir", type=option_types.FILE, help="Keep the servers' logs here.")
@options.as_json
def calibrate(**given: Any) -> None:
    """Measure this host's GPUs, and fit the planner's constants to them: kervan plan --calibration FILE.

    Copies, matrix products, attention, all-reduce and send/recv, and a few short runs of vLLM's own server with random
    weights. The file is written anew as results come, so Ctrl-C keeps them. Use the GPUs for nothing else meanwhile.
    """
    from kervan.calibrate import measure_host, measurements
    from kervan.cli import render
    from kervan.errors import ConfigError
    from kervan.serve import cluster

    for_s = given["duration"]
    outputs.check_file("--output", given["output"])
    outputs.check_file("--calibration", given["fitted"])
    outputs.check_directory("--log-dir", given["log_dir"])
    output: Path | None = given["output"]
    say = render.progress_lines()
    if given["stored"] is not None:
        measured = measurements.read(given["stored"])
    else:
        if for_s < 30:
            raise ConfigError(f"--for {format_duration(for_s)} is below 30 s, which one server alone takes to start")
        settings = measure_host.Settings(
            num_gpus=given["gpus"],
            is_quick=given["quick"],
            has_serving=not given["no_serving"],
            models=given["models"],
            for_s=for_s,
            log_dir=given["log_dir"],
            shapes_dir=cluster.home() / "calibrations" / "shapes",
        )

        def keep(newest: "Measurements") -> None:
            nonlocal output
            output = output or cluster.home() / "calibrations" / f"{measurements.slug(newest)}.json"
            measurements.write(output, newest)

        measured = measure_host.measure(settings, say=say, on_change=keep)
        say(f"measurements: {output}")
    source = given["stored"] or output or Path("calibration.json")
    fitted, path = None, None
    if measured.serving or given["bench"]:
        from kervan.calibrate import fitting
        from kervan.plan import calibration

        more = [point for text in given["bench"] for point in fitting.points_of_record(text)]
        say(f"fitting the planner's constants to {len(measured.serving) + len(more)} points")
        fitted = fitting.fit(measured, more=more)
        path = given["fitted"] or source.with_suffix(".calibration.json")
        calibration.save(fitted, path)
        say(f"calibration: {path}")
    if given["as_json"]:
        render.print_json(measurements.to_dict(measured) | ({"calibration": str(path)} if path else {}))
        return
    _print(measured)
    if fitted is not None:
        _print_fit(fitted)
        print(f"kervan plan MODEL --gpu {fitted.gpu} --calibration {path}")


def _print(measured: "Measurements") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"[bold]{measured.num_gpus} x {measured.gpu}[/bold], {measured.date}")
    for line in _kernel_lines(measured):
        print(line)
    if measured.serving:
        table = Table("model", "tp", "pp", "streams", "in/out", box=None, pad_edge=False, header_style="dim")
        for column in ("tok/s", "TTFT p50", "TPOT p50"):
            table.add_column(column, justify="right")
        for row in measured.serving:
            table.add_row(
                row.model, str(row.tp), str(row.pp), str(row.concurrency), f"{row.isl}/{row.osl}",
                f"{row.out_tok_s:,.0f}", _time(row.ttft_p50_s), _time(row.tpot_p50_s),
            )  # fmt: skip
        console.print(table)
    for memory in measured.memory:
        print(
            f"{memory.model} tp {memory.tp} pp {memory.pp}: weights {memory.weights_gib_per_gpu:.1f} GiB a GPU, "
            f"KV cache {memory.kv_cache_gib_per_gpu:.1f} GiB a GPU, {memory.kv_cache_tokens:,} tokens"
        )
    for note in measured.notes:
        console.print(f"not complete: {note}", style="yellow", markup=False, soft_wrap=True)


def _print_fit(fitted: "Calibration") -> None:
    """How far the fitted planner is off at each point."""
    from rich.console import Console
    from rich.table import Table

    table = Table("point", box=None, pad_edge=False, header_style="dim")
    names = {"out_tok_s": "tok/s", "tpot_p50_s": "TPOT p50", "ttft_p50_s": "TTFT p50", "ttft_p99_s": "TTFT p99"}
    for name in names.values():
        table.add_column(f"{name} off by", justify="right")
    for residual in fitted.residuals:
        table.add_row(
            residual.point, *(f"{100 * residual.errors[key]:+.1f}%" if key in residual.errors else "" for key in names)
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _kernel_lines(measured: "Measurements") -> Iterator[str]:
    if measured.copy:
        yield f"copy {max(c.bytes / c.seconds for c in measured.copy) / 1e12:.2f} TB/s read and written"
    if measured.matmul:
        fast = max(measured.matmul, key=lambda p: p.m * p.n * p.k / p.seconds)
        slim = max((p for p in measured.matmul if p.m <= 16), key=lambda p: p.n * p.k / p.seconds, default=None)
        yield f"matrix products up to {2 * fast.m * fast.n * fast.k / fast.seconds / 1e12:.0f} TFLOP/s (m {fast.m})" + (
            f"; weights read at up to {2 * slim.n * slim.k / slim.seconds / 1e12:.2f} TB/s (m {slim.m})" if slim else ""
        )
    for floor in measured.floors:
        yield f"{floor.name} {_time(floor.seconds)}"
    for ranks in sorted({c.ranks for c in measured.collectives}):
        for backend, in_graph in (("nccl", False), ("nccl", True), ("symm_mem", True)):
            sums = [c for c in measured.collectives
                    if (c.op, c.ranks, c.backend, c.in_graph) == ("all_reduce", ranks, backend, in_graph)]  # fmt: skip
            if sums:
                small, large = min(sums, key=lambda c: c.bytes), max(sums, key=lambda c: c.bytes)
                bus = 2 * (ranks - 1) / ranks * large.bytes / large.seconds / 1e9
                yield (
                    f"all-reduce over {ranks}, {backend}, {'in a graph' if in_graph else 'eager'}: "
                    f"{_time(small.seconds)} for {small.bytes // 1024} KiB, {bus:.0f} GB/s (bus) for "
                    f"{large.bytes // 2**20} MiB"
                )


def _time(seconds: float) -> str:
    from kervan.units import format_duration

    return format_duration(seconds)
