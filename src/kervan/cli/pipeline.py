"""`kervan pipeline`: a decoder in stages, measured."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kervan.cli import option_types, options, outputs, rank_options
from kervan.errors import ConfigError

if TYPE_CHECKING:
    from kervan.pipeline.bench import Result
    from kervan.pipeline.plan import PipelinePlan

MAX_MICRO_BATCHES = 4096


@click.group()
def pipeline() -> None:
    """Cut a decoder into pipeline stages, and measure schedules of micro-batches and their bubble."""


def _micro_batches(text: str, option: str) -> int:
    from kervan.units import parse_count

    return parse_count(text, option, most=MAX_MICRO_BATCHES)


COUNTS = option_types.Sweep(option_types.Parsed("count", _micro_batches))


@pipeline.command()
@click.argument("model", default="small")
@click.option("--stages", type=click.IntRange(1, rank_options.MAX_RANKS), default=2, show_default=True,
              help="Ranks of the pipeline on this host, one GPU each; more than its GPUs share them.")  # fmt: skip
@click.option("--schedule", default="1f1b", show_default=True,
              metavar="NAME", help="gpipe, 1f1b, interleaved, zero-bubble, zbv or dualpipev.")  # fmt: skip
@click.option("--micro-batches", type=COUNTS, default="8", show_default=True, help="Of a step; several are compared.")
@click.option("--chunks", type=int, help="Stages of each rank. [default: 1, or 2 where the schedule has several]")
@click.option("--batch", type=click.IntRange(1, 1 << 20),
              help="Sequences of a step. [default: the largest number of micro-batches]")  # fmt: skip
@click.option("--seq", type=click.IntRange(1, 1 << 20), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="[default: bf16 on GPUs, fp32 on a CPU]")
@click.option("--cut", help="Layers of each stage, like 7,8,8,5; or modelled, or measured. [default: modelled]")
@click.option("--forward-only", is_flag=True, help="As in inference: no backward passes.")
@click.option("--no-check", is_flag=True, help="Do not compare with the unsplit model, which each rank has to hold.")
@rank_options.device
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Measured steps.")
@click.option("--timeline", type=option_types.FILE,
              help="Directory for timelines, as SVG and for ui.perfetto.dev.")  # fmt: skip
@click.option("--for", "duration", type=option_types.DURATION, default="10min", show_default=True, help="At most.")
@click.option("--record", type=option_types.FILE, help="File or directory for the record.")
@rank_options.nodes
@options.as_json
def bench(**given: Any) -> None:
    """Run a schedule: outputs and gradients against the unsplit model, and the bubble against theory.

    MODEL is a directory with a config.json (no weights needed), or one of tiny, small, 1b, 3b, 8b; weights are random.
    """
    from kervan.bench import records
    from kervan.cli import render
    from kervan.pipeline import bench as benching

    nodes = rank_options.chosen_nodes(given)
    outputs.check_record("--record", given["record"])
    outputs.check_directory("--timeline", given["timeline"])
    plan = _plan(given, given["stages"] * nodes.count)
    rank_options.check_torch("pipeline bench")
    say = render.progress_lines(is_quiet=given["as_json"] and not sys.stderr.isatty())
    say(f"starting {given['stages']} rank(s), {plan.schedule.name}, {plan.batch} x {plan.seq} tokens")
    result = next(benching.bench((plan,), ranks=given["stages"], nodes=nodes, for_s=given["duration"], say=say))
    ranks = given["stages"] * nodes.count
    content = content_of(result, ranks)
    if given["timeline"] is not None:
        content["timelines"] = write_timelines(given["timeline"], result, ranks)
    if given["record"] is not None:
        say(f"record: {records.write(given['record'], records.record('pipeline', content))}")
    if given["as_json"]:
        render.print_json(content)
    else:
        print_result(result, ranks)
    if any(row.equal_to_unsplit is False for row in result.rows):
        from kervan.errors import EngineError

        worst = max(result.rows, key=lambda row: max(row.output_error, row.gradient_error))
        raise EngineError(
            f"the pipeline's results are not the unsplit model's: outputs differ by {worst.output_error:.1e} "
            "and gradients "
            f"by {worst.gradient_error:.1e} of the largest; {benching.TOLERANCES[plan.dtype]:g} is rounding"
        )


def _plan(given: dict[str, Any], ranks: int) -> "PipelinePlan":
    """What the options ask for. Raises: ConfigError."""
    from kervan.memory import shape
    from kervan.pipeline import cut as cutting
    from kervan.pipeline import schedules
    from kervan.pipeline.plan import PipelinePlan

    device = rank_options.chosen_device(given["device"])
    schedule = schedules.find(given["schedule"])
    chunks = schedule.chunks[1] if given["chunks"] is None else given["chunks"]
    sizes = shape.read(given["model"])
    numbers = tuple(sorted(set(given["micro_batches"])))
    for number in numbers:
        schedules.check(
            schedule, ranks=ranks, chunks=chunks, micro_batches=number, is_forward_only=given["forward_only"]
        )
    batch = given["batch"] or numbers[-1]
    for number in numbers:
        if batch % number:
            below = max(n for n in range(1, number + 1) if batch % n == 0)
            raise ConfigError(
                f"--micro-batches {number} does not divide --batch {batch} (remainder {batch % number}); give --batch "
                f"{batch - batch % number + number}, or --micro-batches {below}"
            )
    stages = ranks * chunks
    cutting.check_stages(stages, sizes.num_layers)
    cut = None
    if given["cut"] in {None, "modelled"}:
        cut = cutting.balanced(cutting.modelled(sizes, given["seq"]), stages)
    elif given["cut"] != "measured":
        cut = cutting.given(given["cut"], sizes.num_layers, stages)
    return PipelinePlan(
        shape=sizes, schedule=schedule, chunks=chunks, micro_batches=numbers, batch=batch, seq=given["seq"],
        device=device, dtype=given["dtype"] or ("bf16" if device == "cuda" else "fp32"),
        is_forward_only=given["forward_only"], cut=cut, repeats=given["repeats"], is_checked=not given["no_check"],
    )  # fmt: skip


def content_of(result: "Result", ranks: int) -> dict[str, Any]:
    """As --json and records have it; the figures of the fastest number of micro-batches at the top as well."""
    plan = result.plan
    rows = [row.to_dict() for row in result.rows]
    top = rows[[row.micro_batches for row in result.rows].index(result.best)]
    return {
        "schedule": plan.schedule.name, "stages": ranks, "chunks": plan.chunks, "model": plan.shape.name,
        "batch": plan.batch, "seq": plan.seq, "dtype": plan.dtype, "device": plan.device,
        "forward_only": plan.is_forward_only, "layers": [len(part) for part in result.prepared.cut],
        "imbalance": round(result.imbalance, 4), "gpu_shared": result.prepared.is_gpu_shared,
        "parameters": list(result.prepared.parameters), "bubble": top["bubble"], "theory": top["theory"],
        "predicted": top["predicted"], "equal_to_unsplit": _all_equal(result), "best_micro_batches": result.best,
        "best_predicted": result.best_predicted, "reasons": list(result.reasons), "rows": rows,
    }  # fmt: skip


def _all_equal(result: "Result") -> bool | None:
    each = [row.equal_to_unsplit for row in result.rows]
    return None if None in each else all(each)


def write_timelines(directory: Path, result: "Result", ranks: int) -> list[str]:
    """Two files for each number of micro-batches; their paths."""
    from kervan.pipeline import timeline

    plan, written = result.plan, []
    for row in result.rows:
        stem = f"{plan.schedule.name}-{ranks}x{plan.chunks}-{row.micro_batches}"
        stem += "-forward" if plan.is_forward_only else ""
        title = (
            f"{plan.schedule.name}, {ranks} ranks, {row.micro_batches} micro-batches, {plan.shape.name} {plan.dtype}"
        )
        drawing, trace = directory / f"{stem}.svg", directory / f"{stem}.perfetto.json"
        drawing.write_text(timeline.svg(row.spans, ranks, title))
        trace.write_text(json.dumps(timeline.perfetto(row.spans, ranks)))
        written += [str(drawing), str(trace)]
    return written


def print_result(result: "Result", ranks: int) -> None:
    """A table, and what is to be said of it."""
    from rich.console import Console
    from rich.table import Table

    from kervan.units import format_duration

    plan = result.plan
    layers = ", ".join(str(len(part)) for part in result.prepared.cut)
    print(
        f"{plan.shape.name} on {ranks} ranks, {plan.schedule.name}, layers of stages {layers}, "
        f"{plan.batch} x {plan.seq} tokens, {plan.dtype}{', forward only' if plan.is_forward_only else ''}"
    )
    table = Table("micro-batches", box=None, pad_edge=False, header_style="dim")
    for column in ("bubble", "from", "to", "order and times", "theory", "step", "tokens/s", "equal to unsplit"):
        table.add_column(column, justify="right")
    for row in result.rows:
        equal = {True: "yes", False: "NO", None: "not checked"}[row.equal_to_unsplit]
        shares = (row.bubble, row.bubble_min, row.bubble_max, row.predicted, row.theory)
        table.add_row(str(row.micro_batches), *(f"{100 * share:.1f}%" for share in shares), format_duration(row.step_s),
                      f"{row.tokens_s:,.0f}", equal)  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    if len(result.rows) > 1:
        between = (
            f"; between those measured, {result.best_predicted} may be faster"
            if result.best_predicted not in {None, result.best}
            else ""
        )
        print(f"fastest: {result.best} micro-batches{between}")
        for reason in result.reasons:
            print(f"  {reason}")
    if result.prepared.is_gpu_shared:
        print("ranks share a GPU: this shows that the results are right, and nothing about speed")
    if plan.is_forward_only and plan.schedule.name == "zero-bubble":
        print("zero-bubble fills the bubble with gradients of weights: forward only, it is the interleaved schedule")
