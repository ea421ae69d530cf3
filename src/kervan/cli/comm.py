"""`kervan comm`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kervan.cli import option_types, options, outputs, rank_options, sigterm
from kervan.comm.collectives import DTYPES, MODES, OPS

if TYPE_CHECKING:
    from kervan.comm.bench import BenchResult
    from kervan.comm.doctor import Report

RECORD = click.option(
    "--record", type=option_types.FILE,
    help="File (.json) or directory for the result. [default: comm in ~/.kervan or $KERVAN_HOME]",
)  # fmt: skip
DEVICE = click.option(
    "--device", type=click.Choice(["gpu", "cpu"], case_sensitive=False), help="[default: gpu where there is one]"
)


@click.group()
def comm() -> None:
    """Measure how GPUs reach each other, and find what slows or breaks it."""


@comm.command(short_help="Time collectives, and check their results.")
@click.option("--op", type=option_types.choices(OPS), help=f"Of {', '.join(OPS)}. [default: all but one_way]")
@click.option("--bytes", "sizes", type=option_types.SIZES,
              help="8..1GiB (doubling) or 8,1MiB. [default: 8 B to 1 GiB by eights; to 2 MiB on CPU]")  # fmt: skip
@click.option("--mode", type=option_types.choices(MODES), help="Eager calls, or calls in a CUDA graph. [default: both]")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@DEVICE
@click.option("--ranks", type=click.IntRange(1, 4096), help="On this node. [default: one a GPU; 2 on CPU]")
@rank_options.nodes
@click.option("--for", "duration", type=option_types.DURATION, default="5min", show_default=True, help="In all.")
@RECORD
@options.as_json
@sigterm.interrupting()
def bench(**given: Any) -> None:
    """Time collectives over all GPUs of this node, or of several, and check their results.

    algbw and busbw are those of nccl-tests. Exit status 1 if a result is wrong. Where all_reduce_perf is installed, it
    is run as well and its busbw shown beside.
    """
    from kervan.bench import records
    from kervan.cli import render
    from kervan.comm import bench as benches

    outputs.check_record("--record", given["record"])
    say = render.progress_lines()
    defaults = benches.BenchSettings()
    settings = benches.BenchSettings(
        ops=given["op"] or defaults.ops,
        bytes=given["sizes"],
        modes=given["mode"] or defaults.modes,
        dtype=given["dtype"],
        device=given["device"],
        ranks=given["ranks"],
        nodes=rank_options.chosen_nodes(given),
        for_s=given["duration"],
    )
    result = benches.run(settings, say=say)
    content = result.to_dict()
    say(f"record: {records.write(_record_place(given['record']), records.record('comm-bench', content))}")
    if given["as_json"]:
        render.print_json(content)
    else:
        _print_bench(result)
    if not result.is_correct:
        sys.exit(1)


@comm.command(short_help="Find what is wrong with a host, and its fix.")
@DEVICE
@click.option("--ranks", type=click.IntRange(1, 4096), help="On this node. [default: one a GPU; 2 on CPU]")
@click.option("--no-bench", is_flag=True, help="Look only; start no ranks.")
@rank_options.nodes
@click.option("--for", "duration", type=option_types.DURATION, default="2min", show_default=True, help="In all.")
@RECORD
@options.as_json
@sigterm.interrupting()
def doctor(**given: Any) -> None:
    """Examine this host's GPUs, links, network, limits and NCCL settings; measure, and say what is wrong and its fix.

    Exit status 1 if a check fails; a warning does not.
    """
    from kervan.bench import records
    from kervan.cli import render
    from kervan.comm import doctor as doctors

    outputs.check_record("--record", given["record"])
    say = render.progress_lines()
    settings = doctors.DoctorSettings(
        device=given["device"],
        ranks=given["ranks"],
        has_bench=not given["no_bench"],
        nodes=rank_options.chosen_nodes(given),
        for_s=given["duration"],
    )
    report = doctors.run(settings, say=say)
    content = report.to_dict()
    say(f"record: {records.write(_record_place(given['record']), records.record('comm-doctor', content))}")
    if given["as_json"]:
        render.print_json(content)
    else:
        _print_report(report)
    if report.has_failed:
        sys.exit(1)


def _record_place(given: Path | None) -> Path:
    from kervan.serve import cluster

    return cluster.home() / "comm" if given is None else given


def _print_bench(result: "BenchResult") -> None:
    from rich.console import Console
    from rich.table import Table

    from kervan.units import format_bytes, format_duration

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table("op", "mode", "backend", box=None, pad_edge=False, header_style="dim")
    for column in ("bytes", "time", "min..max", "algbw GB/s", "busbw GB/s", "wrong", "slowest rank"):
        table.add_column(column, justify="right")
    if result.beside:
        table.add_column("all_reduce_perf", justify="right")
    for row in result.rows:
        beside = result.beside.get(row.bytes) if row.op == "all_reduce" and row.mode == "eager" else None
        table.add_row(
            row.op, row.mode, row.backend, format_bytes(row.bytes), format_duration(row.seconds),
            f"{format_duration(row.min_us / 1e6)}..{format_duration(row.max_us / 1e6)}", f"{row.algbw_gb_s:.3g}",
            f"{row.busbw_gb_s:.3g}", str(row.num_wrong), f"{row.slowest_rank} {row.slowest_host}",
            *([f"{beside.busbw_gb_s:.3g}"] if beside else []), style=None if row.is_correct else "red",
        )  # fmt: skip
    console.print(table)
    for note in result.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)


def _print_report(report: "Report") -> None:
    from kervan.cli import check_view

    check_view.print_checks(report.checks, advice=report.environment, notes=report.notes)
