"""How the command line looks: progress lines, tables, JSON."""

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kervan import logs
from kervan.cli import options
from kervan.errors import FleetError
from kervan.facts.markets import ON_DEMAND
from kervan.fleet.directory import GatewayEntry, ReplicaState, Snapshot
from kervan.serve.status import FleetStatus
from kervan.serve.why import notice_lines, scaling_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STATE_STYLE = {"ready": "green", "starting": "yellow", "draining": "cyan", "unhealthy": "red"}


def progress_lines(*, is_quiet: bool = False, log_format: str | None = None) -> Callable[[str], None]:
    """A function that prints a message to stderr with the seconds since now.

    `log_format`: by default what `kervan --log-format` or the environment says; with json, each line is an object.
    """
    begin_s = time.monotonic()
    if (log_format or logs.format_of()) == "json" and not is_quiet:
        return _logged

    def show(message: str) -> None:
        if not is_quiet:
            print(f"[{time.monotonic() - begin_s:5.1f} s] {message}", file=sys.stderr, flush=True)

    return show


def _logged(message: str) -> None:
    record = logging.LogRecord("kervan.cli", logging.INFO, "", 0, message, None, None)
    print(logs.JsonFormatter().format(record), file=sys.stderr, flush=True)


def state_text(state: ReplicaState, reason: str, lateness: str) -> "Text":
    """A replica's state and what is to be said of it, in colour."""
    from rich.text import Text

    said = f" {reason}" if reason else ""
    if lateness:
        return Text.assemble((lateness, "red"), f", before that {state}{said}")
    return Text.assemble((state, STATE_STYLE[state]), said)


def gateway_state_text(gateway: GatewayEntry) -> "Text":
    """The same of a gateway."""
    from rich.text import Text

    if gateway.is_ready:
        return state_text("ready", gateway.reason, gateway.lateness)
    return Text(", ".join(filter(None, (gateway.lateness, gateway.reason or "starting"))), "yellow")


def print_json(value: Any) -> None:
    """Print `value` to stdout as indented JSON, for `--json`. Raises: TypeError for what is not JSON."""
    print(json.dumps(value, indent=2))


def print_partial_status(name: str, problem: FleetError, *, as_json: bool) -> None:
    """What is known of a fleet beside the `problem`, if anything is, and what is not."""
    from kervan.serve.partial_status import partial_status

    status = partial_status(name, problem, options.client_key(None))
    if status.is_empty:
        return
    if as_json:
        print_json(status.to_dict())
        return
    from rich.text import Text

    console = open_console()
    config = status.config
    settings = f"{config.model}  tp {config.tp}, pp {config.pp}" if config else "(settings not known)"
    console.print(Text.assemble((name, "bold"), f"  {status.url or '(no address known)'}  {settings}"))
    for deployment in status.deployments or ():
        states = ", ".join(f"{count} {state}" for state, count in deployment.replicas.items()) or "none"
        message = f": {deployment.message}" if deployment.message else ""
        console.print(f"Serve: {deployment.name} {deployment.status}, {states}{message}", markup=False)
    if status.snapshot is not None:
        ago = (
            "has heard nothing of the directory" if status.heard_s is None else f"heard this {status.heard_s:.0f} s ago"
        )
        console.print(
            f"gateway {status.gateway} {ago}; it has {status.streams} streams, {status.held} held", style="yellow"
        )
        _print_tables(console, status.snapshot)
    for line in status.unknown:
        console.print(f"not known: {line}", style="yellow", markup=False, soft_wrap=True)


def open_console() -> "Console":
    """What tables are printed to: as wide as the terminal, and 160 columns elsewhere."""
    from rich.console import Console  # not with this module: most commands of scripts print JSON

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_status(status: FleetStatus) -> None:
    """A fleet as a head line and two tables."""
    from rich.text import Text

    console = open_console()
    config = status.config
    if config.pools:
        replicas = ", ".join(f"{pool} {bounds}" for pool, bounds in config.bounds.items())
    else:
        replicas = f"{config.bounds[ON_DEMAND]} replicas"
    head = f"  {status.url or '(no gateway yet)'}  {config.model}  tp {config.tp}, pp {config.pp}, {replicas}"
    if config.nodes_per_replica > 1:
        head += f" on {config.nodes_per_replica} nodes each"
    console.print(Text.assemble((status.name, "bold"), head))
    _print_tables(console, status.snapshot)
    if status.snapshot.scaling is not None and config.autoscaler is not None:
        console.print(scaling_lines(status.snapshot.scaling)[0], markup=False, soft_wrap=True)
    for line in notice_lines(status.snapshot, time.time()):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    for failure in status.snapshot.failures[-3:]:  # a log's last line may be in it, with brackets
        console.print(Text.assemble((f"{failure.who} failed", "red"), f": {failure.message}"), soft_wrap=True)


def _print_tables(console: "Console", snapshot: Snapshot) -> None:
    from rich.table import Table

    replicas = Table("replica", "pool", "node", "pid", "state", box=None, pad_edge=False, header_style="dim")
    for column in ("running", "waiting", "KV use"):
        replicas.add_column(column, justify="right")
    for r in snapshot.replicas:
        state = state_text(r.state, r.reason, r.lateness)
        replicas.add_row(
            r.id,
            r.pool,
            " ".join(r.nodes or [r.node]),
            str(r.pid),
            state,
            str(r.running),
            str(r.waiting),
            f"{100 * r.kv_cache_usage:.1f}%",
        )
    console.print(replicas)
    gateways = Table("gateway", "node", "pid", "state", box=None, pad_edge=False, header_style="dim")
    for g in snapshot.gateways:
        gateways.add_row(g.id, g.node, str(g.pid), gateway_state_text(g))
    console.print(gateways)
