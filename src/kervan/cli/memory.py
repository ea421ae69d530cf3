"""`kervan memory`: what a training step takes of a GPU, on paper and measured."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kervan.cli import option_types, options, outputs, rank_options
from kervan.errors import ConfigError
from kervan.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kervan.memory.estimate import Estimate
    from kervan.memory.finetune import FinetunePlan
    from kervan.memory.measure import Measured
    from kervan.ranks.start import Ranks

MAX_SEQ, MAX_BATCH = 1 << 22, 1 << 16
MODEL_HELP = "MODEL is a directory with a config.json (no weights needed), or one of tiny, small, 1b, 3b, 8b."


@click.group()
def memory() -> None:
    """Estimate and measure what training and serving take of a GPU's memory."""


technique = click.option(
    "--technique", "techniques", multiple=True, default=("fp32",), show_default=True, metavar="NAME,...",
    help="Techniques used together, like bf16,checkpoint; repeatable for several rows. kervan memory techniques lists "
    "the names.",
)  # fmt: skip
seq = click.option(
    "--seq", type=click.IntRange(1, MAX_SEQ), default=2048, show_default=True, help="Tokens of a sequence."
)
batch = click.option(
    "--batch", type=click.IntRange(1, MAX_BATCH), default=1, show_default=True, help="Sequences on each rank."
)
micro_batches = click.option(
    "--micro-batches", type=click.IntRange(1, 1024), default=2, show_default=True,
    help="Backward passes of a step. With 1, gradients are made new while activations go: less memory.",
)  # fmt: skip


@memory.command()
@options.as_json
def techniques(as_json: bool) -> None:
    """List the techniques that --technique takes."""
    from kervan.memory.techniques import NAMES

    if as_json:
        from kervan.cli import render

        render.print_json(NAMES)
        return
    width = max(len(name) for name in NAMES)
    for name, meaning in NAMES.items():
        print(f"{name:{width}}  {meaning}")


@memory.command(epilog=MODEL_HELP)
@click.argument("model")
@technique
@seq
@batch
@micro_batches
@click.option("--ranks", type=click.IntRange(1, rank_options.MAX_RANKS), default=1, show_default=True,
              help="GPUs that fsdp and zero1 to zero3 share states over.")  # fmt: skip
@options.as_json
def estimate(
    model: str, techniques: tuple[str, ...], seq: int, batch: int, micro_batches: int, ranks: int, as_json: bool
) -> None:
    """What a training step takes of each GPU: weights, gradients, optimizer states, activations.

    At the moment of the step when it is most. No GPU and no torch are needed.
    """
    from kervan.cli import render
    from kervan.memory import shape
    from kervan.memory.estimate import estimate as on_paper
    from kervan.memory.techniques import check, parse

    sizes = shape.read(model)
    rows = []
    for text in techniques:
        recipe = parse(text)
        check(recipe, num_layers=sizes.num_layers, ranks=ranks, on_gpu=True)
        rows.append((recipe, on_paper(sizes, recipe, seq=seq, batch=batch, ranks=ranks, micro_batches=micro_batches)))
    if as_json:
        found = [
            {
                "technique": recipe.text,
                "model": sizes.name,
                "parameters": sizes.parameters,
                "seq": seq,
                "batch": batch,
                "micro_batches": micro_batches,
            }
            | row.to_dict(ranks=ranks)
            for recipe, row in rows
        ]
        render.print_json(found[0] if len(found) == 1 else {"rows": found})
        return
    print(
        f"{sizes.name}: {sizes.parameters / 1e9:.2f}B parameters, {batch} x {seq} tokens on each of {ranks} "
        "GPU(s); GiB "
        "on a GPU when the step holds most"
    )
    _print_estimates([(recipe.text, row) for recipe, row in rows])


def _print_estimates(rows: "list[tuple[str, Estimate]]") -> None:
    from rich.console import Console
    from rich.table import Table

    from kervan.memory.estimate import GIB, GROUPS

    table = Table("technique", box=None, pad_edge=False, header_style="dim")
    for column in (*GROUPS, "total"):
        table.add_column(column, justify="right")
    table.add_column("peak in")
    table.add_column("kept by forward", justify="right")
    table.add_column("host", justify="right")
    for name, row in rows:
        cells = [row.at_peak.get(group, 0.0) for group in GROUPS] + [row.total_bytes]
        table.add_row(name, *(f"{size / GIB:.2f}" for size in cells), row.peak_phase, f"{row.kept_bytes / GIB:.2f}",
                      f"{row.host_bytes / GIB:.2f}")  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table)


@memory.command(epilog=MODEL_HELP)
@click.argument("model")
@technique
@seq
@batch
@micro_batches
@rank_options.ranks
@rank_options.device
@click.option("--steps", type=click.IntRange(1, 10_000), default=5, show_default=True, help="Timed steps of each row.")
@click.option("--snapshots", type=option_types.FILE,
              help="Directory for the GPU allocator's history of each row, and who holds the peak.")  # fmt: skip
@click.option("--for", "duration", type=option_types.DURATION, default="10min", show_default=True, help="At most.")
@click.option("--record", type=option_types.FILE, help="File or directory for the record.")
@rank_options.nodes
@options.as_json
def measure(**given: Any) -> None:
    """Run training steps and measure them: the allocator's peak by phase, time, and the estimate beside it."""
    from kervan.bench import records
    from kervan.cli import render
    from kervan.memory import measure as measuring
    from kervan.memory import shape
    from kervan.memory.techniques import check, parse

    device = rank_options.chosen_device(given["device"])
    rank_options.check_torch("memory measure")
    outputs.check_record("--record", given["record"])
    outputs.check_directory("--snapshots", given["snapshots"])
    if given["snapshots"] is not None and device == "cpu":
        raise ConfigError("--snapshots are of the GPU allocator's memory; leave it out on a CPU")
    sizes = shape.read(given["model"])
    nodes = rank_options.chosen_nodes(given)
    cases = []
    for text in given["techniques"]:
        recipe = parse(text)
        check(recipe, num_layers=sizes.num_layers, ranks=given["ranks"] * nodes.count, on_gpu=device == "cuda")
        if recipe.sharding.startswith("zero"):
            rank_options.check_deepspeed(recipe.sharding)
        cases.append(measuring.Case(shape=sizes, recipe=recipe, seq=given["seq"], batch=given["batch"],
                                    micro_batches=given["micro_batches"]))  # fmt: skip
    plan = measuring.MeasurePlan(
        cases=tuple(cases), device=device, steps=given["steps"], snapshots=given["snapshots"]
    )  # fmt: skip
    say = render.progress_lines(is_quiet=given["as_json"] and not sys.stderr.isatty())
    say(f"starting {given['ranks']} rank(s) on the {'GPU' if device == 'cuda' else 'CPU'}")
    rows: list[measuring.Measured] = []
    for row in measuring.run(plan, ranks=given["ranks"], nodes=nodes, for_s=given["duration"]):
        if isinstance(row, measuring.Measured):
            rows.append(row)
        else:
            say(row)
    content: dict[str, Any] = {"device": device, "rows": [row.to_dict() for row in rows]}
    if plan.snapshots is not None:
        content["holders"] = _holders([row.snapshot for row in rows if row.snapshot])
    if given["record"] is not None:
        say(f"record: {records.write(given['record'], records.record('memory', content))}")
    if given["as_json"]:
        render.print_json(content)
        return
    print_measured(rows)
    for snapshot, lines in content.get("holders", {}).items():
        print(snapshot)
        for line in lines:
            print(f"  {line['gib']:8.2f} GiB  {line['where']}")


def _holders(paths: list[str]) -> dict[str, Any]:
    from kervan.memory import snapshots

    return {path: [holder.to_dict() for holder in snapshots.holders(snapshots.read(Path(path)))] for path in paths}


def print_measured(rows: "list[Measured]") -> None:
    """A table of measured rows; a share of the first row's peak and time beside each."""
    from rich.console import Console
    from rich.table import Table

    from kervan.memory.estimate import GIB

    table = Table("technique", "tokens", box=None, pad_edge=False, header_style="dim")
    for column in ("peak GiB", "estimate", "off by", "weights", "gradients", "optimizer", "kept", "host", "step",
                   "tokens/s"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        if row.problem:
            table.add_row(row.technique, f"{row.batch} x {row.seq}", "-", f"{row.estimate_bytes / GIB:.4g}")
            continue
        sizes = (row.weights_bytes, row.gradients_bytes, row.optimizer_bytes, row.kept_bytes, row.host_bytes)
        table.add_row(
            row.technique, f"{row.batch} x {row.seq}", f"{row.peak_bytes / GIB:.3g}", f"{row.estimate_bytes / GIB:.3g}",
            f"{100 * row.error:+.1f}%", *(f"{size / GIB:.3g}" for size in sizes), format_duration(row.step_s),
            f"{row.tokens_s:,.0f}",
        )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 170).print(table)
    for row in rows:
        if row.verdict:
            print(f"{row.technique}, {row.batch} x {row.seq}: {row.verdict}")


@memory.command()
@click.argument("file", type=option_types.FILE)
@click.option("--most", type=click.IntRange(1, 1000), default=15, show_default=True, help="Lines.")
@options.as_json
def snapshot(file: Path, most: int, as_json: bool) -> None:
    """Who holds the peak in a memory snapshot of torch (torch.cuda.memory._dump_snapshot)."""
    from kervan.cli import render
    from kervan.memory import snapshots

    found = snapshots.holders(snapshots.read(file), most=most)
    if as_json:
        render.print_json({"holders": [holder.to_dict() for holder in found]})
        return
    for holder in found:
        print(f"{holder.size_bytes / 2**30:8.3f} GiB in {holder.count:5} blocks  {holder.where}")


@memory.command()
@click.argument("model", default="tiny")
@click.option("--technique", "techniques", multiple=True, default=("fp32",), show_default=True, metavar="NAME,...",
              help="As for estimate; several are trained one after the other, and their losses compared.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1, 10_000_000), default=100, show_default=True)
@click.option("--batch", type=click.IntRange(1, MAX_BATCH), default=8, show_default=True,
              help="Sequences of a step, shared by all ranks.")  # fmt: skip
@click.option("--seq", type=click.IntRange(1, MAX_SEQ), default=256, show_default=True, help="Bytes of a sequence.")
@click.option("--lr", type=option_types.NumberRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option("--text", "files", multiple=True, type=option_types.FILE,
              help="File to train on; repeatable. [default: Python's language reference]")  # fmt: skip
@click.option("--checkpoint", type=option_types.FILE,
              help="Directory to save in, and to resume from, on any number of ranks.")  # fmt: skip
@click.option("--save-every", type=click.IntRange(0), default=0, help="Steps between checkpoints; the last is always.")
@click.option("--seed", type=int, default=0, show_default=True)
@rank_options.ranks
@rank_options.device
@click.option("--for", "duration", type=option_types.DURATION, default="1h", show_default=True, help="At most.")
@click.option("--record", type=option_types.FILE, help="File or directory for the record.")
@rank_options.nodes
@options.as_json
def finetune(**given: Any) -> None:
    """Train a small model on text with these techniques, and compare their losses.

    SIGTERM, Ctrl-C and a cloud's preemption notice end it after the present step, with a checkpoint if --checkpoint is
    given; the same command goes on from there, also with another --ranks.
    """
    from kervan.bench import records
    from kervan.cli import render
    from kervan.memory import finetune as tuning
    from kervan.memory import shape
    from kervan.memory.techniques import check, parse

    device = rank_options.chosen_device(given["device"])
    rank_options.check_torch("memory finetune")
    outputs.check_record("--record", given["record"])
    outputs.check_directory("--checkpoint", given["checkpoint"])
    nodes = rank_options.chosen_nodes(given)
    if given["checkpoint"] is not None and len(given["techniques"]) > 1:
        raise ConfigError(
            f"--checkpoint is for one run, and {len(given['techniques'])} techniques are given; give one --technique"
        )
    sizes = shape.read(given["model"])
    plans = []
    for text in given["techniques"]:
        recipe = parse(text)
        check(recipe, num_layers=sizes.num_layers, ranks=given["ranks"] * nodes.count, on_gpu=device == "cuda")
        if recipe.sharding.startswith("zero"):
            rank_options.check_deepspeed(recipe.sharding)
        plans.append(
            tuning.FinetunePlan(
                shape=sizes,
                recipe=recipe,
                steps=given["steps"],
                batch=given["batch"],
                seq=given["seq"],
                lr=given["lr"],
                device=device,
                files=given["files"],
                checkpoint=given["checkpoint"],
                save_every=given["save_every"],
                seed=given["seed"],
            )
        )
        tuning.check(plans[-1], given["ranks"] * nodes.count)
    say = render.progress_lines(is_quiet=given["as_json"] and not sys.stderr.isatty())
    runs = _train(tuple(plans), given["ranks"], nodes, given["duration"], say)
    first = runs[0]["losses"]
    for run in runs:
        run["furthest_from_first"] = round(tuning.furthest(run["losses"], first), 5)
    content = {"model": sizes.name, "ranks": given["ranks"] * nodes.count, "device": device, "runs": runs}
    if given["record"] is not None:
        say(f"record: {records.write(given['record'], records.record('finetune', content))}")
    if given["as_json"]:
        render.print_json(content)
        return
    for run in runs:
        early = f" ({run['ended_by'] or 'another rank was told'}: told to end)" if run["stopped_early"] else ""
        print(
            f"{run['technique']}: {run['steps']} steps{early}, loss {run['losses'][0]:.3f} to "
            f"{run['loss']:.3f} nats a byte, "
            f"at most {run['furthest_from_first']:.3f} from {runs[0]['technique']}"
        )


def _train(plans: "tuple[FinetunePlan, ...]", ranks: int, nodes: Any, for_s: float, say: Any) -> list[dict[str, Any]]:
    """Run the plans, until all have ended or they are told to end."""
    import time

    from kervan.errors import EngineError
    from kervan.memory import finetune as tuning
    from kervan.ranks import start

    runs: list[dict[str, Any]] = []
    checkpoint, said_s, said = "", time.monotonic(), 0
    with (
        start.Ranks(tuning.work, plans, ranks=ranks, nodes=nodes, for_s=for_s) as started,
        _told_to_end(started) as told,
    ):
        for row in started:
            for why in told[said:]:
                say(f"{why}: ending after this step")
            said = len(told)
            if isinstance(row, tuning.StepDone):
                plan = plans[len(runs)]
                if time.monotonic() - said_s > 2 or row.step in {1, plan.steps}:
                    said_s = time.monotonic()
                    say(f"{plan.recipe.text} step {row.step}: loss {row.loss:.3f}, {row.tokens_s:,.0f} bytes/s")
            elif isinstance(row, tuning.Saved):
                checkpoint = row.where
                say(f"saved {row.where} in {row.took_s:.1f} s, of which training waited {row.blocked_s:.1f} s")
            elif isinstance(row, tuning.Ended):
                runs.append({
                    "technique": plans[len(runs)].recipe.text, "steps": row.steps, "resumed_from": row.resumed_from,
                    "stopped_early": row.is_told, "ended_by": ", ".join(told) if row.is_told else "",
                    "checkpoint": checkpoint, "loss": tuning.smoothed(row.losses), "losses": list(row.losses),
                })  # fmt: skip
    if not runs:
        raise EngineError("the ranks ended before a step was done; with several nodes, node 0 has the losses")
    return runs


@contextmanager
def _told_to_end(started: "Ranks") -> "Iterator[list[str]]":
    """Inside, SIGTERM, Ctrl-C and a notice of this node's end reach the ranks, which save and end; the list says why.

    Nothing is printed here: a signal may come while the command prints.
    """
    import signal

    from kervan.cli.node_notice import watching_notices

    told: list[str] = []

    def tell(why: str) -> None:
        if why not in told:
            told.append(why)
        started.terminate()

    before = {
        number: signal.signal(number, lambda number, _: tell(signal.Signals(number).name))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with watching_notices(lambda notice: tell(f"{notice.kind} notice of {notice.source}")):
            yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@memory.command()
@click.argument("model")
@click.option("--gpu", type=option_types.GPU, default="H200", show_default=True, help="By its name; see kervan plan.")
@click.option("--tp", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--pp", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--engine-arg", "arguments", multiple=True, metavar="KEY=VALUE",
              help="vLLM's, like gpu_memory_utilization=0.95; repeatable.")  # fmt: skip
@click.option("--log", type=option_types.FILE, help="A vLLM log of this model, to compare with.")
@options.as_json
def serving(
    model: str, gpu: str, tp: int, pp: int, arguments: tuple[str, ...], log: Path | None, as_json: bool
) -> None:
    """How vLLM divides a GPU: weights, workspace, KV cache, and what gpu_memory_utilization leaves."""
    from kervan.cli import render
    from kervan.facts import hardware
    from kervan.facts.architecture import parse
    from kervan.facts.layout import Layout
    from kervan.facts.model import read_config
    from kervan.memory import serving as serving_memory
    from kervan.sim import limits as engine_limits
    from kervan.sim import memory as memory_model

    if gpu == "local":
        raise ConfigError("--gpu local: name the GPU, like --gpu H200; kervan memory serving looks at none")
    given = options.engine_arguments(arguments)
    config = read_config(model)
    if config is None:
        raise ConfigError(f"{model} has no config.json here; give a directory that has one")
    spec = parse(config, model)
    engine_limits.check_counted(spec, given)
    chip = hardware.gpu(gpu)
    limits = engine_limits.limits(spec, chip, given)
    spec = engine_limits.as_served(spec, given)
    found = serving_memory.share(
        memory_model.estimate(spec, Layout(tp=tp, pp=pp), chip, limits), chip, limits
    )  # fmt: skip
    reported = serving_memory.read_log(log) if log is not None else None
    errors = serving_memory.off_by(found, reported) if reported is not None else {}
    if as_json:
        render.print_json(found.to_dict() | {"off_by": {name: round(error, 4) for name, error in errors.items()}})
        return
    print(f"{chip.name}, {found.total_gib:.1f} GiB; gpu_memory_utilization {limits.gpu_memory_utilization:g}")
    rows = [
        ("weights", found.weights_gib, errors.get("weights")), ("workspace", found.workspace_gib, None),
        ("context, graphs", found.context_gib, None), ("KV cache", found.kv_gib, errors.get("kv_cache")),
        ("left", found.left_gib, None),
    ]  # fmt: skip
    for name, size, error in rows:
        print(
            f"{name:16} {size:8.2f} GiB" + (f"  {100 * error:+.1f}% of what vLLM reported" if error is not None else "")
        )
    print(f"{found.kv_tokens:,} tokens fit the KV cache; {found.verdict}")
