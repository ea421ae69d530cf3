"""`kervan top`: a fleet, live in the terminal."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kervan.cli import option_types, options
from kervan.cli.render import gateway_state_text, print_json, print_partial_status, state_text
from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import Snapshot
from kervan.serve.status import FleetStatus, FleetWatch
from kervan.serve.why import decided_line, notice_lines, scaling_lines
from kervan.units import format_duration

MAX_EVENTS = 200
MIN_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class ReplicaTraffic:
    """Of one replica, over all gateways. `ttft_s`: mean of the gateways' medians, weighted by nothing."""

    tokens_per_s: float
    ttft_s: float | None


def traffic(snapshot: Snapshot, replica_id: str) -> ReplicaTraffic:
    """What the gateways report of a replica."""
    shares = [gateway.traffic[replica_id] for gateway in snapshot.gateways if replica_id in gateway.traffic]
    ttfts_s = [share.ttft_s for share in shares if share.ttft_s is not None]
    return ReplicaTraffic(sum(share.tokens_per_s for share in shares), sum(ttfts_s) / len(ttfts_s) if ttfts_s else None)


def _replica_states(snapshot: Snapshot) -> dict[str, str]:
    return {r.id: "late" if r.lateness else r.state for r in snapshot.replicas}


def _gateway_states(snapshot: Snapshot) -> dict[str, str]:
    return {g.id: "late" if g.lateness else "ready" if g.is_ready else "starting" for g in snapshot.gateways}


def events(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """What happened between two snapshots, one line each."""
    for kind, states in (("replica", _replica_states), ("gateway", _gateway_states)):
        old, new = states(before), states(after)
        for name in sorted({*old, *new}):
            if name not in new:
                yield f"{kind} {name} is gone (was {old[name]})"
            elif name not in old:
                yield f"{kind} {name} appeared: {new[name]}"
            elif old[name] != new[name]:
                yield f"{kind} {name}: {old[name]} -> {new[name]}"
    moved = {g.id: g.moved for g in before.gateways}
    for gateway in after.gateways:
        if gateway.id in moved and gateway.moved > moved[gateway.id]:
            count = gateway.moved - moved[gateway.id]
            yield f"gateway {gateway.id} moved {count} stream{'s' if count > 1 else ''}"
    listed = {(node.node, notice.kind, notice.source) for node in before.nodes for notice in node.notices}
    for node in after.nodes:
        for notice in node.notices:
            if (node.node, notice.kind, notice.source) not in listed:
                yield f"node {node.node}: {notice.describe(notice.seen_s)}"
    decided = {entry.at_s for entry in before.scaling.history} if before.scaling is not None else set()
    for entry in after.scaling.history if after.scaling is not None else ():
        if entry.at_s not in decided:
            yield f"autoscaling: {decided_line(entry)}"
    reported = {failure.number for failure in before.failures}
    for failure in after.failures:
        if failure.number not in reported:
            yield f"{failure.who} failed: {failure.message}"


def view(status: FleetStatus, lines: list[str]) -> RenderableType:
    """The screen: head, replicas, gateways, latest events."""
    snapshot, config = status.snapshot, status.config
    total = sum(replica.tokens_per_s for gateway in snapshot.gateways for replica in gateway.traffic.values())
    streams, held = sum(g.streams for g in snapshot.gateways), sum(g.held for g in snapshot.gateways)
    head = Text.assemble(
        (status.name, "bold"),
        f"  {status.url or '(no gateway yet)'}  {config.model}  tp {config.tp}, pp {config.pp}   "
        f"{streams} streams, {held} held, {total:,.0f} tok/s",
    )
    replicas = Table("replica", "pool", "node", "state", box=None, pad_edge=False, header_style="dim")
    for column in ("running", "waiting", "KV use", "tok/s", "TTFT"):
        replicas.add_column(column, justify="right")
    for r in snapshot.replicas:
        rates = traffic(snapshot, r.id)
        replicas.add_row(
            r.id, r.pool, r.node, state_text(r.state, r.reason, r.lateness),
            str(r.running), str(r.waiting), f"{100 * r.kv_cache_usage:.1f}%", f"{rates.tokens_per_s:,.0f}",
            "-" if rates.ttft_s is None else format_duration(rates.ttft_s),
        )  # fmt: skip
    gateways = Table("gateway", "node", "pid", "state", box=None, pad_edge=False, header_style="dim")
    for column in ("streams", "held", "moved", "busy", "tok/s"):
        gateways.add_column(column, justify="right")
    for g in snapshot.gateways:
        rate = sum(replica.tokens_per_s for replica in g.traffic.values())
        counts = (str(count) for count in (g.streams, g.held, g.moved))
        gateways.add_row(g.id, g.node, str(g.pid), gateway_state_text(g), *counts, f"{g.busy:.0%}", f"{rate:,.0f}")
    scaling = []
    if snapshot.scaling is not None and config.autoscaler is not None:
        scaling = [Text(line) for line in scaling_lines(snapshot.scaling, last=0)]
        scaling += [Text(line, "yellow") for line in (snapshot.scaling.problem,) if line] + [Text()]
    notices = [Text(line, "yellow") for line in notice_lines(snapshot, time.time())]
    return Group(
        head, Text(), *scaling, replicas, Text(), gateways, Text(), *notices, *(Text(line, "dim") for line in lines)
    )


def to_dict(status: FleetStatus) -> dict[str, object]:
    """`kervan status --json` with traffic."""
    content = status.to_dict()
    for replica in content["replicas"]:
        rates = traffic(status.snapshot, replica["id"])
        replica |= {"tokens_per_s": round(rates.tokens_per_s, 1), "ttft_s": rates.ttft_s}
    for shown, gateway in zip(content["gateways"], status.snapshot.gateways, strict=True):
        shown |= {"streams": gateway.streams, "held": gateway.held, "moved": gateway.moved}
    return content


@click.command()
@options.name
@options.address
@click.option(
    "--every", "every_s", type=option_types.DURATION, default="1s", show_default=True, help="At least 0.2s.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one screen and exit; the default without a terminal.")
@options.as_json
def top(name: str, address: str | None, every_s: float, once: bool, as_json: bool) -> None:
    """Watch a fleet: load, tokens/s and TTFT of each replica, gateways, events. Ctrl-C stops it.

    Numbers are of the last second. TTFT is from the moment a gateway placed a request on the replica.
    """
    if every_s < MIN_EVERY_S:
        raise ConfigError(f"--every {every_s:g} s is below {MIN_EVERY_S:g} s; write for example --every 1s")
    try:
        watch = FleetWatch(name, address)
        status = watch.look()
    except FleetError as error:
        print_partial_status(name, error, as_json=as_json)
        raise
    if as_json:
        print_json(to_dict(status))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if once or not console.is_terminal:
        console.print(view(status, []))
        return
    history: deque[str] = deque(maxlen=MAX_EVENTS)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            room = max(0, console.height - len(status.snapshot.replicas) - len(status.snapshot.gateways) - 10)
            live.update(view(status, list(history)[-room:] if room else []), refresh=True)
            time.sleep(every_s)
            try:
                before, status = status, watch.look()
            except FleetError as error:  # what was seen last stays on the screen
                history.append(f"{time.strftime('%X')} {error}")
                continue
            history += [f"{time.strftime('%X')} {line}" for line in events(before.snapshot, status.snapshot)]
