"""`kervan chaos`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kervan.cli import options, sigterm
from kervan.errors import ConfigError

if TYPE_CHECKING:
    from kervan.chaos.report import Report
    from kervan.chaos.schedule import Kind


SECTIONS = {
    "Disruptions of the fleet at URL": "--kill-every --drain-every --hang-every --min-ready",
    "Load on it": "--streams --isl --osl",
    "Where it is": "--api-key --name --address",
    "Replay": "--replay --trace --speed --trace-speed --max-nodes",
    "Both": "--for --deadline --seed --record --json --help",
}
# By the names of their parameters: without a meaning with --replay, and only with it.
NOT_WITH_REPLAY = (
    "kill_every", "drain_every", "hang_every", "min_ready", "streams", "isl", "osl", "api_key", "name", "address",
)  # fmt: skip
ONLY_WITH_REPLAY = ("trace", "speed", "trace_speed", "max_nodes")
DURATION = "1min"


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("where", metavar="URL|MODEL")
@click.option("--kill-every", metavar="10s", help="SIGKILL an engine's process once in so long.")
@click.option("--drain-every", metavar="30s", help="Drain a replica once in so long.")
@click.option("--hang-every", metavar="2min", help="SIGSTOP an engine's process once in so long.")
@click.option("--for", "duration", help=f"How long in all. [default: {DURATION}, or the trace of --replay]")
@click.option("--streams", type=click.IntRange(1, 10_000), default=64, show_default=True, help="At the same time.")
@click.option("--isl", default="16..64", show_default=True, help="Prompt tokens, as for kervan bench.")
@click.option("--osl", default="20..200", show_default=True, help="Output tokens, in the same forms.")
@click.option("--min-ready", type=click.IntRange(min=0), default=1, show_default=True,
              help="Disturb nothing unless so many other replicas are ready.")  # fmt: skip
@click.option("--deadline", default="30s", show_default=True,
              help="Of each drain, or of a node's notice; 0s with --replay: nodes are killed.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same prompts and order of victims.")
@click.option("--api-key", help="Sent as a bearer token; or KERVAN_API_KEY.")
@click.option("--name", help="The fleet's name; without it, that of the gateway that answers.")
@options.address
@click.option("--replay", metavar="FILE", help="Trace of nodes, played on a Ray and with twins of its own.")
@click.option("--trace", metavar="FILE", help="Azure CSV or Mooncake JSONL: the requests meanwhile.")
@click.option("--speed", type=float, default=1.0, show_default=True, help="Of the nodes: 10 plays 20 minutes in 2.")
@click.option("--trace-speed", type=float, default=1.0, show_default=True, help="Of the requests.")
@click.option("--max-nodes", type=int, default=2, show_default=True, help="Spot nodes at a time; the rest is left out.")
@click.option("--record", type=click.Path(path_type=Path), help="Write a record to this file or directory.")
@options.as_json
@click.pass_context
def chaos(context: click.Context, /, where: str, **given: Any) -> None:
    """Disturb the fleet at URL under load, and check every token that its clients get.

    With --replay: twins of MODEL, a directory, on a Ray cluster whose spot nodes come and go as in a trace.

    Exit status 1 if a stream broke, a token was lost, came twice or was wrong, or the fleet did not become whole again.
    Ctrl-C ends it early, with the report.
    """
    from kervan.bench import records
    from kervan.cli import render

    _check_mode(context, given)
    report = _replay(where, given) if given["replay"] is not None else _strike(where, given)
    if given["as_json"]:
        render.print_json(report.to_dict())
    else:
        _print(report)
    if given["record"] is not None:
        path = records.write(given["record"], records.record("chaos", {"result": report.to_dict()}))
        print(f"record: {path}", file=sys.stderr)
    sys.exit(0 if report.is_good else 1)


def _check_mode(context: click.Context, given: dict[str, Any]) -> None:
    """Raises: ConfigError for options that would do nothing."""
    is_replay = given["replay"] is not None
    for name in NOT_WITH_REPLAY if is_replay else ONLY_WITH_REPLAY:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} has no meaning with --replay, which has a fleet, a load and disruptions of its own; "
                f"leave one of the two out"
                if is_replay
                else f"{option} is for --replay; add --replay FILE, or leave it out"
            )
    if is_replay and given["trace"] is None:
        raise ConfigError("--replay needs requests meanwhile; add --trace FILE, of Azure's or Mooncake's form")


def _replay(model: str, given: dict[str, Any]) -> "Report":
    from kervan.chaos import node_replay as replay
    from kervan.cli import render
    from kervan.units import parse_duration_s

    plan = replay.ReplayPlan(
        nodes=given["replay"],
        trace=given["trace"],
        speed=given["speed"],
        trace_speed=given["trace_speed"],
        max_nodes=given["max_nodes"],
        deadline_s=parse_duration_s(given["deadline"], "--deadline"),
        duration_s=None if given["duration"] is None else parse_duration_s(given["duration"], "--for"),
        seed=given["seed"],
    )
    with sigterm.interrupting():  # its Ray and its fleet end with it
        return replay.run(model, plan, render.progress_lines())


def _strike(url: str, given: dict[str, Any]) -> "Report":
    from kervan.bench.endpoint import parse_url
    from kervan.bench.load import Endpoint
    from kervan.chaos import checked_run, fleet_under_test
    from kervan.cli import render
    from kervan.units import parse_duration_s

    kinds: tuple[Kind, ...] = ("kill", "drain", "hang")
    plan = checked_run.DisruptionPlan(
        periods_s={
            kind: parse_duration_s(given[f"{kind}_every"], f"--{kind}-every")
            for kind in kinds
            if given[f"{kind}_every"] is not None
        },
        duration_s=parse_duration_s(given["duration"] or DURATION, "--for"),
        streams=given["streams"],
        min_ready=given["min_ready"],
        deadline_s=parse_duration_s(given["deadline"], "--deadline"),
        isl=given["isl"],
        osl=given["osl"],
        seed=given["seed"],
    )
    key = given["api_key"] or os.environ.get("KERVAN_API_KEY")
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    url = parse_url(url)
    found = fleet_under_test.find(url, headers=headers, name=given["name"], address=given["address"])
    model = found.models[0] if found.models else ""
    return checked_run.run(
        found, found.config, plan, Endpoint(url=url, model=model, headers=headers), render.progress_lines()
    )


def _print(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    found = report.to_dict()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table("", "disruptions", "skipped", "whole again, p50", "max", box=None, pad_edge=False, header_style="dim")
    for kind, row in found["kinds"].items():
        recover_s = row["recover_s"]
        table.add_row(
            kind, str(row["disruptions"]), str(row["skipped"]), _time(recover_s["p50"]), _time(recover_s["max"])
        )
    console.print(table)
    gap_s = found["gap_s"]
    print(
        f"\n{found['streams']} streams with {found['tokens']} tokens in {found['wall_s']:.0f} s: "
        f"{found['broken']} broken, {found['tokens_lost']} tokens lost, {found['tokens_doubled']} doubled, "
        f"{found['tokens_wrong']} wrong\n"
        f"{found['moves']} moves; longest wait of a moved stream for a token: p50 {_time(gap_s['p50'])}, "
        f"p99 {_time(gap_s['p99'])}, max {_time(gap_s['max'])}"
    )
    if "over_time" in found:
        _print_nodes(found)
    for kind, error in found["errors"].items():
        print(f"broken by {kind}: {error['count']}, the first: {error['first']}")
    if not found["streams"]:
        print("no stream has ended, so nothing was checked")
    if report.unrecovered:
        late = ", ".join(f"the {one.kind} of {one.replica}" for one in report.unrecovered)
        print(f"the fleet was not whole again after {late}")


def _print_nodes(found: dict[str, Any]) -> None:
    print(f"{found['nodes_added']} spot nodes added, {found['nodes_removed']} removed; ready replicas over time:")
    print("     at  nodes  on-demand  spot")
    for at_s, row in {row["at_s"]: row for row in found["over_time"]}.items():  # the last one of each moment
        print(f"{at_s:5.1f} s  {row['nodes']:5d}  {row['on-demand']:9d}  {row['spot']:4d}")
    if found["requests_cut"]:
        print(f"{found['requests_cut']} requests were cut to what the model takes")


def _time(seconds: float | None) -> str:
    from kervan.units import format_duration

    return "-" if seconds is None else format_duration(seconds)
