"""Pages of `kervan top` that are no tables: help, details, scaling, events."""

import textwrap
import time
from collections.abc import Iterable, Sequence

from rich.text import Text

from kervan.cli.live.columns import GpuRow, duration, gateway_rate, plain
from kervan.cli.live.history import History, Series, traffic
from kervan.cli.live.spark import spark
from kervan.cli.live.table import Column, printable, table
from kervan.cli.render import gateway_state_text, state_text
from kervan.fleet.directory import GatewayEntry, ReplicaEntry, Snapshot
from kervan.observe.dcgm import BY_NAME
from kervan.serve.status import FleetStatus
from kervan.serve.why import notice_lines

LABEL = 14  # columns of the names in front of values


def wrapped(text: str, width: int, *, indent: str = "") -> list[str]:
    """The text on lines of at most `width`, all but the first one indented."""
    return textwrap.wrap(printable(text), max(20, width), subsequent_indent=indent) or [""]


def labelled(pairs: Iterable[tuple[str, str | Text]], width: int) -> list[Text]:
    """A line for each name and its value; values that do not fit go on below themselves."""
    lines = []
    for name, value in pairs:
        head = Text(f"{name:<{LABEL}}", "dim")
        if isinstance(value, Text):
            lines.append(Text.assemble(head, value))
            continue
        first, *rest = wrapped(value, width - LABEL)
        lines.append(Text.assemble(head, first))
        lines += [Text(" " * LABEL + line) for line in rest]
    return lines


def help_page(keys: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """What each key does."""
    column = min(max(len(key) for key, _ in keys) + 2, width // 2)
    lines: list[Text] = []
    for key, meaning in keys:
        told = textwrap.wrap(key, max(1, column - 2))
        words = textwrap.wrap(meaning, max(10, width - column))
        for number in range(max(len(told), len(words))):
            left = told[number] if number < len(told) else ""
            right = words[number] if number < len(words) else ""
            lines.append(Text.assemble((f"{left:<{column}}", "bold"), right))
    return lines


def _graphs(series: Series, names: Sequence[tuple[str, str]], width: int, *, is_unicode: bool) -> list[Text]:
    """A line with the past of each number. `names`: (attribute of the series, its name)."""
    length = max(8, min(200, width - LABEL - 14))
    lines = []
    for attribute, name in names:
        values = list(getattr(series, attribute))
        most = max((value for value in values if value is not None), default=0.0)
        top = 1.0 if attribute == "load" else 0.0
        told = f"{most:.0%}" if attribute == "load" else duration(most) if attribute == "ttft_s" else f"{most:,.0f}"
        graph = spark(values, length, is_unicode=is_unicode, top=top)
        lines.append(Text.assemble((f"{name:<{LABEL}}", "dim"), (graph, "cyan"), f" most {told}"))
    return lines


def replica_page(
    replica: ReplicaEntry, snapshot: Snapshot, history: History, width: int, *, is_unicode: bool
) -> list[Text]:
    """All that is known of one replica."""
    rates = traffic(snapshot, replica.id)
    shares = {g.id: g.traffic[replica.id] for g in snapshot.gateways if replica.id in g.traffic}
    prefix = [share.prefix for share in shares.values()]
    possible, hits = sum(p.possible for p in prefix), sum(p.hits for p in prefix)
    state = state_text(replica.state, replica.reason, replica.lateness)
    load = f"{replica.running} running, {replica.waiting} waiting, KV cache {replica.kv_cache_usage:.1%}"
    pairs: list[tuple[str, str | Text]] = [
        ("replica", Text(replica.id, "bold")),
        ("state", plain(state)),
        ("load", load),
        ("speed", f"{rates.tokens_per_s:,.1f} tokens/s, TTFT {duration(rates.ttft_s)}"),
    ]
    graphs = [("tokens_per_s", "tokens/s"), ("streams", "running"), ("held", "waiting"), ("load", "KV cache")]
    graphs.append(("ttft_s", "TTFT"))
    served, moved = sum(s.num_served for s in shares.values()), sum(s.num_moved for s in shares.values())
    gateways = ", ".join(f"{name} {share.tokens_per_s:,.0f} tok/s" for name, share in shares.items())
    cached = f"{hits:,} of {possible:,} possible tokens hit" if possible else "no prompt had a known prefix"
    more: list[tuple[str, str | Text]] = [
        ("pool, node", f"{replica.pool}, {' '.join(replica.nodes or [replica.node])}, pid {replica.pid}"),
        ("streams", f"{served:,} served, {moved:,} moved off"),
        ("prefix cache", cached),
        ("from", gateways or "no gateway"),
    ]
    if replica.leaves_in_s is not None:
        more.append(("leaves in", duration(replica.leaves_in_s)))
    if replica.ready_for_s:
        more.append(("ready for", duration(replica.ready_for_s)))
    if replica.start_s:
        more.append(("start", ", ".join(f"{part} {seconds:.1f} s" for part, seconds in replica.start_s.items())))
    more += [("engine", replica.engine_version or "not known"), ("log", replica.log_path or "not known")]
    series = history.parts.get(replica.id, Series())
    return [
        *labelled(pairs, width),
        *_graphs(series, graphs, width, is_unicode=is_unicode),
        *labelled(more, width),
    ]


def gateway_page(gateway: GatewayEntry, history: History, width: int, *, is_unicode: bool) -> list[Text]:
    """All that is known of one gateway."""
    pairs: list[tuple[str, str | Text]] = [
        ("gateway", Text(gateway.id, "bold")),
        ("state", plain(gateway_state_text(gateway))),
        ("load", f"{gateway.streams} streams, {gateway.held} held, loop {gateway.busy:.0%} busy"),
        ("speed", f"{gateway_rate(gateway):,.1f} tokens/s"),
    ]
    graphs = [("tokens_per_s", "tokens/s"), ("streams", "streams"), ("held", "held"), ("load", "busy")]
    more: list[tuple[str, str | Text]] = [
        ("moved", f"{gateway.moved:,} streams since it started"),
        ("address", f"{gateway.url}, node {gateway.node}, pid {gateway.pid}"),
        ("models", ", ".join(gateway.models) or "not known yet"),
        ("to", ", ".join(f"{name} {s.tokens_per_s:,.0f} tok/s" for name, s in gateway.traffic.items()) or "no replica"),
        ("log", gateway.log_path or "not known"),
    ]
    series = history.parts.get(gateway.id, Series())
    return [
        *labelled(pairs, width),
        *_graphs(series, graphs, width, is_unicode=is_unicode),
        *labelled(more, width),
    ]


def gpu_page(row: GpuRow, width: int) -> list[Text]:
    """Every counter of a GPU, with what it means."""
    lines = labelled([("GPU", Text(f"{row.gpu.index} of {row.node}: {printable(row.gpu.name)}", "bold"))], width)
    lines += labelled([("UUID", row.gpu.uuid)], width)
    for name, value in row.gpu.values.items():
        counter = BY_NAME.get(name)
        if counter is None:
            continue
        unit = "" if counter.unit in ("", "bits") else f" {counter.unit}"
        told = f"{value:,.0f}{unit}" if unit or value == int(value) else f"{value:.1%}"
        lines.append(Text.assemble((f"{counter.short:<18}", "dim"), f"{told:>20}  ", (counter.text, "dim")))
    return lines


def scaling_page(status: FleetStatus, width: int, now_s: float) -> list[Text]:
    """How many replicas there are to be and why, what nodes were told, and what failed."""
    snapshot, config = status.snapshot, status.config
    pools = list(config.bounds)

    def ready(pool: str) -> str:
        return str(sum(r.pool == pool and r.state == "ready" and not r.lateness for r in snapshot.replicas))

    def target(pool: str) -> str:
        return str(snapshot.targets.get(pool, config.bounds[pool].minimum))

    def price(pool: str) -> str:
        return f"{snapshot.usd_per_h[pool]:.2f}" if pool in snapshot.usd_per_h else "-"

    lines = table(
        [
            Column("pool", lambda pool: pool, 0, is_right=False, grows=True, least=6),
            Column("ready", ready, 0),
            Column("target", target, 0),
            Column("bounds", lambda pool: f"{config.bounds[pool].minimum}..{config.bounds[pool].maximum}", 1),
            Column("$/h", price, 2),
        ],
        pools,
        min(width, 60),
    )
    lines.append(Text())
    scaling = snapshot.scaling
    if scaling is None or config.autoscaler is None:
        fixed = "the number of replicas is fixed; kervan scale 1..4 lets a policy choose it"
        lines += [Text(line) for line in wrapped(fixed, width)]
    else:
        numbers = ", ".join(f"{name} {value:g}" for name, value in scaling.numbers.items())
        lines += labelled(
            [
                ("policy", scaling.policy),
                ("reason", scaling.reason or "nothing is decided yet"),
                *([("numbers", numbers)] if numbers else []),
                *([("problem", Text(printable(scaling.problem), "yellow"))] if scaling.problem else []),
                *([("unchanged for", duration(max(0.0, now_s - scaling.since_s)))] if scaling.since_s else []),
            ],
            width,
        )
    notices = notice_lines(snapshot, now_s)
    if notices:
        lines += [Text(), Text("nodes", "dim")]
        lines += [Text(line, "yellow") for notice in notices for line in wrapped(notice, width, indent="  ")]
    if scaling is not None and scaling.history:
        lines += [Text(), Text("decisions, the latest first", "dim")]
        for decided in reversed(scaling.history):
            changes = [
                f"{pool} {decided.before.get(pool, 0)} -> {number}"
                for pool, number in decided.targets.items()
                if decided.before.get(pool, 0) != number
            ]
            at = time.strftime("%X", time.localtime(decided.at_s))
            first, *rest = wrapped(f"{', '.join(changes) or 'no change'}: {decided.reason}", width - 10)
            lines += [Text.assemble((f"{at}  ", "dim"), first), *(Text(" " * 10 + line) for line in rest)]
    if snapshot.failures:
        lines += [Text(), Text("failed starts, the latest first", "dim")]
        for failure in reversed(snapshot.failures):
            lines += [Text(line, "red") for line in wrapped(f"{failure.who}: {failure.message}", width, indent="  ")]
    return lines


def event_line(event: tuple[str, str], width: int) -> Text:
    """An event on one line, cut where it is too long."""
    at, what = event
    line = Text.assemble((f"{at}  ", "dim"), (printable(what), _style(what)))
    line.truncate(width, overflow="crop")
    return line


def wrapped_event(event: tuple[str, str], width: int) -> list[Text]:
    """An event on as many lines as it takes."""
    at, what = event
    first, *rest = wrapped(what, width - 10)
    style = _style(what)
    return [Text.assemble((f"{at}  ", "dim"), (first, style)), *(Text(" " * 10 + line, style) for line in rest)]


def _style(what: str) -> str:
    if " failed" in what or "-> unhealthy" in what or "is gone" in what or "-> late" in what:
        return "red"
    if what.startswith(("node ", "autoscaling")) or "moved" in what:
        return "yellow"
    return ""
