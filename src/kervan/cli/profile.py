"""`kervan profile`."""

import json
import shlex
import sys
import time
from pathlib import Path

import click

from kervan.cli import options
from kervan.cli.option_types import DURATION, FILE

DEFAULT_FOR_S = 10.0
MIN_FOR_S, MAX_FOR_S = 2.0, 600.0
DEFAULT_STEPS = 100
MAX_STEPS = 10_000
NSYS_ROWS = 12
PERFETTO, PAGE, SUMMARY, ANSWER = "profile.perfetto.json.gz", "index.html", "summary.json", "answer.txt"


@click.command()
@click.argument("replica", required=False)
@click.option(
    "--for", "for_s", type=DURATION, default="10s", show_default=True,
    help="How long: half of it with torch's profiler, half with py-spy.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(1, MAX_STEPS), default=DEFAULT_STEPS, show_default=True,
    help="Most engine steps in torch's trace; each adds some hundred events.",
)  # fmt: skip
@click.option("--out", type=FILE, help="Directory for the files. [default: kervan-profile-REPLICA-TIME here]")
@click.option("--no-ranges", is_flag=True, help="Do not name the parts of steps and of the gateways' work.")
@click.option("--no-py-spy", is_flag=True, help="Do not sample Python stacks; torch's profiler has all of the time.")
@click.option("--nsys", type=FILE, help="Read a report of Nsight Systems (FILE.nsys-rep) instead of a fleet.")
@options.name
@options.address
@options.as_json
def profile(
    replica: str | None,
    for_s: float,
    steps: int,
    out: Path | None,
    no_ranges: bool,
    no_py_spy: bool,
    nsys: Path | None,
    name: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Show where the time of a running REPLICA and of the gateways goes, and what the GPU waits for.

    Without REPLICA, of the one with most running requests. Streams go on; the replica stands still for about a second
    while its trace is written. Written are a timeline for ui.perfetto.dev, a page and the numbers.
    """
    if nsys is not None:
        if replica is not None or out is not None:
            raise click.UsageError("--nsys reads a report; leave REPLICA and --out out")
        _print_nsys(nsys, as_json=as_json)
        return
    from kervan.cli import outputs, render
    from kervan.errors import ConfigError
    from kervan.profile import html_report, perfetto, summary, text
    from kervan.profile import trace as traces

    if not MIN_FOR_S <= for_s <= MAX_FOR_S:
        raise ConfigError(
            f"--for {for_s:g} s is outside {MIN_FOR_S:g}..{MAX_FOR_S:g} s; write for example --for {DEFAULT_FOR_S:g}s"
        )
    if out is not None and not out.exists():
        outputs.check_directory("--out", out.parent)
    else:
        outputs.check_directory("--out", out)
    html_report.check()
    progress = render.progress_lines()
    from kervan.serve import profiling

    recording = profiling.record(
        name, replica, for_s=for_s, max_steps=steps, has_ranges=not no_ranges, has_samples=not no_py_spy,
        address=address, progress=progress,
    )  # fmt: skip
    progress("reading the trace")
    config = recording.config
    summed = summary.summarise(
        recording.replica,
        window_s=for_s,
        engine=recording.engine,
        trace=traces.read(recording.trace) if recording.trace else None,
        gateways=recording.gateways,
        stacks=recording.samples,
        sampled_s=for_s / 2,
        sampled_gateways=recording.sampled_gateways,
        left_out=recording.left_out,
        max_streams=int(config.engine_args.get("max_num_seqs") or 0),
        tp=config.tp,
        is_eager=bool(config.engine_args.get("enforce_eager")),
    )
    if out is None:
        out = Path(f"kervan-profile-{recording.replica}-{time.strftime('%Y%m%dT%H%M%S')}")
    out.mkdir(exist_ok=True)
    (out / PERFETTO).write_bytes(
        perfetto.merged(recording.trace, recording.engine, recording.gateways, replica=recording.replica)
    )
    for who, raw in recording.samples.items():  # for flame graphs: speedscope.app reads them
        (out / f"{who.replace(' ', '-')}.folded").write_text(raw)
    told = summed.to_dict()
    (out / SUMMARY).write_text(json.dumps(told, indent=2) + "\n")
    html_report.write(
        out / PAGE, summed, subtitle=f"{config.model}, tp {config.tp}, pp {config.pp}, {for_s:g} s, fleet {name}",
        command=shlex.join(["kervan", *sys.argv[1:]]), perfetto=PERFETTO, summary_file=SUMMARY,
    )  # fmt: skip
    answer = "\n".join(text.lines(summed))
    (out / ANSWER).write_text(answer + "\n")
    if as_json:
        render.print_json({**told, "out": str(out)})
        return
    click.echo(answer)
    click.echo(
        f"written: {out}/{PAGE}, {PERFETTO} (for ui.perfetto.dev), {SUMMARY}; *.folded (stacks, for speedscope.app)"
    )


def _print_nsys(report: Path, *, as_json: bool) -> None:
    """Kernels and NVTX ranges of a report of Nsight Systems."""
    from kervan.cli import render
    from kervan.profile import nsys, text

    nsys.check(report)
    render.progress_lines()(f"nsys stats reads {report}; the first time it exports the whole report")
    found = {"kernels": nsys.kernels(report), "ranges": nsys.ranges(report)}
    if as_json:
        render.print_json(
            {
                what: [{"name": k.name, "share": round(k.share, 4), "calls": k.calls, "bound": k.bound} for k in rows]
                for what, rows in found.items()
            }
        )
        return
    for what, rows in found.items():
        if rows:
            click.echo(f"{what}:")
        for line in text.kernel_lines(rows, most=NSYS_ROWS):
            click.echo(line)
