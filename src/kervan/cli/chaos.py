"""`kervan chaos`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kervan.chaos.plans import DisruptionPlan, ReplayPlan
from kervan.chaos.schedule import DisruptionKind
from kervan.cli import option_types, options, outputs, sigterm
from kervan.config.workload import Lengths
from kervan.errors import ConfigError
from kervan.units import format_duration

if TYPE_CHECKING:
    from kervan.chaos.report import ChaosReport


SECTIONS = {
    "Faults in the fleet at URL": "--kill-every --drain-every --hang-every --min-ready",
    "Load": "--streams --isl --osl",
    "Fleet": "--api-key --name --address",
    "Replay": "--replay --trace --speed --trace-speed --max-nodes",
    "General": "--for --deadline --seed --record --json --help",
}
# By the names of their parameters: without a meaning with --replay, and only with it.
NOT_WITH_REPLAY = (
    "kill_every", "drain_every", "hang_every", "min_ready", "streams", "isl", "osl", "api_key", "name", "address",
)  # fmt: skip
ONLY_WITH_REPLAY = ("trace", "speed", "trace_speed", "max_nodes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosOptions:
    """The command's arguments by the names of click's parameters."""

    where: str
    kill_every: float | None
    drain_every: float | None
    hang_every: float | None
    duration: float | None
    streams: int
    isl: Lengths
    osl: Lengths
    min_ready: int
    deadline: float
    seed: int
    api_key: str | None
    name: str | None
    address: str | None
    replay: str | None
    trace: Path | None
    speed: float
    trace_speed: float
    max_nodes: int
    record: Path | None
    as_json: bool

    def disruption_plan(self) -> DisruptionPlan:
        """Without --replay. Raises: ConfigError."""
        every: dict[DisruptionKind, float | None] = {
            "kill": self.kill_every,
            "drain": self.drain_every,
            "hang": self.hang_every,
        }
        return DisruptionPlan(
            periods_s={kind: period_s for kind, period_s in every.items() if period_s is not None},
            duration_s=DisruptionPlan.duration_s if self.duration is None else self.duration,
            streams=self.streams,
            min_ready=self.min_ready,
            deadline_s=self.deadline,
            isl=self.isl.text,
            osl=self.osl.text,
            seed=self.seed,
        )

    def replay_plan(self) -> ReplayPlan:
        """With --replay. Raises: ConfigError."""
        if self.replay is None or self.trace is None:
            raise ConfigError("--replay needs requests meanwhile; add --trace FILE, of Azure's or Mooncake's form")
        return ReplayPlan(
            nodes=self.replay,
            trace=str(self.trace),
            speed=self.speed,
            trace_speed=self.trace_speed,
            max_nodes=self.max_nodes,
            deadline_s=self.deadline,
            duration_s=self.duration,
            seed=self.seed,
        )


@click.command(cls=options.sectioned(SECTIONS))
@click.argument("where", metavar="URL|MODEL")
@click.option(
    "--kill-every",
    type=option_types.DURATION,
    metavar="10s",
    help="Send SIGKILL to an engine process at this interval.",
)
@click.option("--drain-every", type=option_types.DURATION, metavar="30s", help="Drain a replica at this interval.")
@click.option(
    "--hang-every",
    type=option_types.DURATION,
    metavar="2min",
    help="Send SIGSTOP to an engine process at this interval.",
)
@click.option(
    "--for", "duration", type=option_types.DURATION, help="Total duration. [default: 1min, or the trace of --replay]"
)
@click.option(
    "--streams",
    type=option_types.STREAMS,
    default=DisruptionPlan.streams,
    show_default=True,
    help="Concurrent streams.",
)
@click.option(
    "--isl",
    type=option_types.LENGTHS,
    default=DisruptionPlan.isl,
    show_default=True,
    help="Prompt tokens, as for kervan bench.",
)
@click.option(
    "--osl",
    type=option_types.LENGTHS,
    default=DisruptionPlan.osl,
    show_default=True,
    help="Output tokens, in the same forms.",
)
@click.option("--min-ready", type=click.IntRange(min=0), default=DisruptionPlan.min_ready, show_default=True,
              help="Skip a fault unless this many other replicas are ready.")  # fmt: skip
@click.option("--deadline", type=option_types.DURATION, default=f"{DisruptionPlan.deadline_s:g}s", show_default=True,
              help="For each drain, or each node's notice with --replay (0s: killed without notice).")  # fmt: skip
@click.option(
    "--seed",
    type=int,
    default=DisruptionPlan.seed,
    show_default=True,
    help="Fixes the prompts and the order of victims.",
)
@click.option("--api-key", help="Sent as a bearer token; or KERVAN_API_KEY.")
@click.option(
    "--name", type=option_types.FLEET_NAME, help="The fleet's name; without it, that of the gateway that answers."
)
@options.address
@click.option("--replay", metavar="FILE", help="Node trace to replay, on a separate Ray cluster of twins.")
@click.option("--trace", type=option_types.FILE, metavar="FILE", help="Request trace: Azure CSV or Mooncake JSONL.")
@click.option(
    "--speed",
    type=option_types.FACTOR,
    default=ReplayPlan.speed,
    show_default=True,
    help="Speed of the node trace: 10 plays 20 minutes in 2.",
)
@click.option(
    "--trace-speed",
    type=option_types.FACTOR,
    default=ReplayPlan.trace_speed,
    show_default=True,
    help="Speed of the request trace.",
)
@click.option(
    "--max-nodes",
    type=int,
    default=ReplayPlan.max_nodes,
    show_default=True,
    help="Most spot nodes at a time; others in the trace are left out.",
)
@click.option("--record", type=option_types.FILE, help="Write a record to this file or directory.")
@options.as_json
@click.pass_context
def chaos(context: click.Context, /, **arguments: Any) -> None:
    """Inject faults into the fleet at URL under load, and check every token that its clients get.

    With --replay: run twins of MODEL, a directory, on a Ray cluster whose spot nodes join and leave as in a trace.

    Exit status 1 if a stream broke, a token was lost, duplicated or wrong, or the fleet did not recover. Ctrl-C stops
    it early and prints the report.
    """
    from kervan.bench import records
    from kervan.cli import render

    given = ChaosOptions(**arguments)
    _check_mode(context, is_replay=given.replay is not None)
    outputs.check_record("--record", given.record)
    report = _disturb(given) if given.replay is None else _replay(given)
    if given.as_json:
        render.print_json(report.to_dict())
    else:
        _print(report)
    if given.record is not None:
        path = records.write(given.record, records.record("chaos", {"result": report.to_dict()}))
        print(f"record: {path}", file=sys.stderr)
    sys.exit(0 if report.is_good else 1)


def _check_mode(context: click.Context, *, is_replay: bool) -> None:
    """Raises: ConfigError for options that would do nothing."""
    for name in NOT_WITH_REPLAY if is_replay else ONLY_WITH_REPLAY:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} has no meaning with --replay, which has a fleet, a load and disruptions of its own; "
                f"leave one of the two out"
                if is_replay
                else f"{option} is for --replay; add --replay FILE, or leave it out"
            )


def _replay(given: ChaosOptions) -> "ChaosReport":
    plan = given.replay_plan()
    from kervan.chaos import node_replay
    from kervan.cli import render

    with sigterm.interrupting():  # its Ray and its fleet end with it
        return node_replay.run(given.where, plan, render.progress_lines())


def _disturb(given: ChaosOptions) -> "ChaosReport":
    plan = given.disruption_plan()
    from kervan.bench.load import Endpoint
    from kervan.chaos import fleet_under_test, periodic_run
    from kervan.cli import render
    from kervan.direct_http import parse_url

    key = options.client_key(given.api_key)
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    url = parse_url(given.where)
    fleet = fleet_under_test.find(url, headers=headers, name=given.name, address=given.address)
    endpoint = Endpoint(url=url, model=fleet.models[0] if fleet.models else "", headers=headers)
    return periodic_run.run(fleet, fleet.config, plan, endpoint, render.progress_lines())


def _print(report: "ChaosReport") -> None:
    from rich.console import Console
    from rich.table import Table

    result = report.to_dict()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table("", "disruptions", "skipped", "recovery, p50", "max", box=None, pad_edge=False, header_style="dim")
    for kind, row in result["kinds"].items():
        recover_s = row["recover_s"]
        table.add_row(
            kind, str(row["disruptions"]), str(row["skipped"]), _time(recover_s["p50"]), _time(recover_s["max"])
        )
    console.print(table)
    gap_s = result["gap_s"]
    print(
        f"\n{result['streams']} streams with {result['tokens']} tokens in {result['wall_s']:.0f} s: "
        f"{result['broken']} broken, {result['tokens_lost']} tokens lost, {result['tokens_doubled']} duplicated, "
        f"{result['tokens_wrong']} wrong\n"
        f"{result['moves']} moves; longest wait of a moved stream for a token: p50 {_time(gap_s['p50'])}, "
        f"p99 {_time(gap_s['p99'])}, max {_time(gap_s['max'])}"
    )
    if "over_time" in result:
        _print_nodes(result)
    for kind, error in result["errors"].items():
        print(f"broken by {kind}: {error['count']}, the first: {error['first']}")
    if not result["streams"]:
        print("no stream has ended, so nothing was checked")
    if report.unrecovered:
        late = ", ".join(f"the {disruption.kind} of {disruption.replica}" for disruption in report.unrecovered)
        print(f"the fleet did not recover after {late}")


def _print_nodes(result: dict[str, Any]) -> None:
    print(f"{result['nodes_added']} spot nodes added, {result['nodes_removed']} removed; ready replicas over time:")
    print("     at  nodes  on-demand  spot")
    for at_s, row in {row["at_s"]: row for row in result["over_time"]}.items():  # the last one of each moment
        print(f"{at_s:5.1f} s  {row['nodes']:5d}  {row['on-demand']:9d}  {row['spot']:4d}")
    if result["requests_cut"]:
        print(f"{result['requests_cut']} requests were cut to the model's maximum length")


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)
