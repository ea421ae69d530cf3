"""How `kervan bench` looks: a live line while it runs, tables when it is done."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live as RichLive
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kervan.bench.benchmark import Live, RateSearchResult
from kervan.bench.compare import LOWER_IS_BETTER, Ratio
from kervan.bench.counting import WorkerProgress
from kervan.bench.drive import OnProgress
from kervan.bench.faults import Effect
from kervan.bench.load import Load
from kervan.bench.prefix_reuse import CachedShare
from kervan.bench.result import Result
from kervan.bench.sketch import Sketch
from kervan.units import format_duration, plural

SHOWN = ("p50", "p90", "p99", "p999")
NAMES = {
    "ttft_s": "TTFT from sending",
    "ttft_from_arrival_s": "TTFT from arrival",
    "answer_s": "answer begins after",
    "gap_s": "gap between chunks",
    "token_gap_s": "gap per token",
    "tpot_s": "TPOT",
    "e2e_s": "end to end",
    "late_s": "sent late by",
}
BARS = " ▁▂▃▄▅▆▇█"


@contextmanager
def live(load: Load, *, is_shown: bool) -> Iterator[OnProgress | None]:
    """A function for `on_progress`, and the view it feeds; None where there is no terminal to show it on."""
    if not is_shown:
        yield None
        return
    state = Live()
    recent = [Sketch(), Sketch()]
    with RichLive(console=Console(stderr=True), refresh_per_second=4, transient=True) as shown:

        def update(elapsed_s: float, reports: list[WorkerProgress]) -> None:
            state.update(elapsed_s, reports)
            for report in reports:
                recent[0].merge(report.ttft)
                recent[1].merge(report.gap)
                report.ttft, report.gap = Sketch(), Sketch()
            shown.update(_live_view(load, state, recent))

        yield update


def _live_view(load: Load, state: Live, recent: list[Sketch]) -> Table:
    view = Table.grid(padding=(0, 2))
    end = f"/{load.num_requests}" if load.num_requests else ""
    elapsed = f"{state.elapsed_s:.0f}" + (f"/{load.duration_s:.0f}" if load.duration_s else "") + " s"
    errors = Text(f"{state.errors} errors", style="red" if state.errors else "dim")
    view.add_row(
        elapsed, f"{state.ok}{end} done", f"{state.in_flight} in flight", f"{state.tokens_per_s:,.0f} tok/s", errors
    )
    top = max(state.history, default=0.0)
    if top:
        view.add_row(Text("".join(BARS[round(rate / top * 8)] for rate in state.history[-60:]), style="cyan"))
    quantiles = []
    for name, sketch in zip(("TTFT", "gap"), recent, strict=True):
        p50, p99 = sketch.quantiles((0.5, 0.99))
        if p50 is not None and p99 is not None:
            quantiles.append(f"{name} p50 {format_duration(p50)}, p99 {format_duration(p99)}")
    view.add_row(*quantiles)
    return view


def print_result(result: Result) -> None:
    """The final tables."""
    content = result.to_dict()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    requests = content["requests"]
    load = result.load
    how = f"{load.process} arrivals"
    if load.streams is not None:
        how = plural(load.streams, "stream")
    if load.trace:
        how = f"trace {load.trace}"
    url = result.endpoint.url
    console.print(f"[bold]{escape(result.endpoint.model or url)}[/bold]  {escape(f'{url}  {how}')}", soft_wrap=True)
    served_by = result.probe.served_by
    if str(served_by):
        simulated = "; [yellow]times are computed, not those of a GPU[/]" if served_by.is_simulated else ""
        console.print(f"server: {escape(str(served_by))}{simulated}", soft_wrap=True)
    ok, errors = requests["ok"], requests["errors"]
    line = f"{ok} requests whole, {errors} failed, {content['duration_s']:.1f} s"
    if requests["unfinished"]:
        line += f", {requests['unfinished']} cut off by Ctrl-C"
    console.print(line)
    console.print(
        f"{content['out_tok_s']:,.1f} output tok/s   {content['req_s']:.2f} requests/s   "
        f"{content['streams_achieved']:.1f} streams on average"
        + (f"   goodput {content['goodput_req_s']:.2f} requests/s ({content['slo']})" if content["slo"] else "")
    )
    console.print()
    if ok:
        console.print(_table(content))
        _print_facts(console, result, content)
    for kind, count in requests["by_error"].items():
        message = next(iter(requests["messages"].get(kind, ())), "")
        console.print(f"[red]{count} x {kind}[/red]  {escape(message[:300])}", soft_wrap=True)
    for effect in result.effects():
        _print_effect(console, effect)
    if result.outcome.was_interrupted:
        console.print("[yellow]ended by Ctrl-C: what is above is what was measured until then[/yellow]")
    for note in content["notes"]:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
    for doubt in content["doubts"]:
        console.print(f"[red]not valid:[/red] {escape(doubt)}", soft_wrap=True)


def _table(content: dict[str, Any]) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for column in (*SHOWN, "max"):
        table.add_column(column.replace("p999", "p99.9"), justify="right")
    table.add_column("95% interval of p50, p99", justify="right", style="dim")
    for metric, name in NAMES.items():
        values = content[metric]
        if not values["count"] or (metric == "answer_s" and values["p50"] == content["ttft_s"]["p50"]):
            continue
        if metric in ("late_s", "ttft_from_arrival_s") and content["late_s"]["p999"] < 0.0005:
            continue  # a closed loop is never late
        if metric == "token_gap_s" and values["p50"] == content["gap_s"]["p50"]:
            continue
        cells = [_time(values[q]) for q in (*SHOWN, "max")]
        intervals = []
        for q in ("p50", "p99"):
            interval = values["ci95"][q]
            intervals.append("-" if interval is None else " - ".join(_time(v) for v in interval))
        table.add_row(name, *cells, ",  ".join(intervals))
    return table


def _time(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 5e-9 else "0"


def _print_facts(console: Console, result: Result, content: dict[str, Any]) -> None:
    stalls, client, floor = content["stalls"], content["client"], content["client_floor"]
    console.print()
    console.print(
        f"stalls: {stalls['count']} gaps of {format_duration(stalls['threshold_s'])} or more in {stalls['streams']} "
        f"streams; longest gap {format_duration(stalls['longest_gap_s'])}"
    )
    cache = result.prefix_cache
    if cache.cached_tokens or cache.possible_tokens:
        console.print(_cache_line(cache), soft_wrap=True)
    facts = f"client: {client['processes']} process{'es' if client['processes'] > 1 else ''}"
    if client["cpu_us_per_token"] is not None:
        facts += (
            f", {client['cpu_us_per_token']:.0f} us of CPU per token, {100 * client['busiest_share']:.0f}% of a core"
        )
    facts += f", time stamps by the {client['clock']}"
    if floor is not None:
        facts += f"; its floor: TTFT {format_duration(floor['ttft_s'])}, gap {format_duration(floor['gap_s'])}"
    console.print(facts, soft_wrap=True)
    reconciliation = result.reconciliation
    colour = {"agrees": "green", "disagrees": "red", "unavailable": "dim"}[reconciliation.status]
    console.print(
        f"server's metrics: [{colour}]{reconciliation.status}[/{colour}] {escape(reconciliation.reason)}",
        soft_wrap=True,
    )
    for row in reconciliation.comparisons:
        if not row.agrees:
            console.print(f"  [red]{row.what}: client {row.client:g}, server {row.server:g}[/red]")
    if content["requests"]["wrong_input_tokens"]:
        console.print(
            f"[yellow]{content['requests']['wrong_input_tokens']} prompts have another length for the server[/]"
        )
    if content["requests"]["without_usage"]:
        console.print("[yellow]no usage in the answers: a chunk was counted as a token[/]")


def _cache_line(cache: CachedShare) -> str:
    """What came from the server's prefix cache, beside what could have."""
    if cache.cached_tokens is None:
        return (
            f"prefix cache: the server says nothing of it; {cache.possible_tokens:,} of {cache.prompt_tokens:,.0f} "
            "prompt tokens could come from it"
        )
    line = f"prefix cache: {cache.cached_tokens:,.0f} of {cache.prompt_tokens:,.0f} prompt tokens"
    line += f" ({100 * (cache.share or 0):.0f}%)"
    if cache.of_possible is not None:
        line += f", {100 * cache.of_possible:.0f}% of the possible {cache.possible_tokens:,}"
    return line + (" (by the server's metrics)" if cache.source == "metrics" else "")


def _print_effect(console: Console, effect: Effect) -> None:
    after = "not recovered" if effect.recovered_after_s is None else f"recovered after {effect.recovered_after_s:.1f} s"
    console.print(
        f"at {effect.at_s:.1f} s: {escape(effect.command)}  ({_ending(effect)})\n"
        f"  {effect.tokens_per_s_before:,.0f} tok/s before, lowest {effect.tokens_per_s_lowest:,.0f} "
        f"({100 * effect.dip:.0f}% down), {after}, longest gap {format_duration(effect.longest_gap_s)}, "
        f"{effect.errors} errors",
        soft_wrap=True,
    )


def _ending(effect: Effect) -> str:
    """How the command of an action ended, and what it said last if that was no success."""
    if effect.exit_code is None:
        return f"[red]did not finish: killed {effect.duration_s:.1f} s after it began, when the load had ended[/]"
    if not effect.exit_code:
        return "exit 0"
    last = escape(effect.output.strip().rpartition("\n")[2][:200])
    return f"[red]exit {effect.exit_code}[/]" + (f": {last}" if last else "")


def print_rate(search: RateSearchResult) -> None:
    """The trials of a search, and its result."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table("requests/s", box=None, pad_edge=False, header_style="dim")
    for column in ("SLO", "good", "of", "95% interval", "TTFT p99 from arrival", "TPOT p99", "tok/s"):
        table.add_column(column, justify="right")
    for trial, result in zip(search.trials, search.results, strict=True):
        low, high = trial.interval
        times = (result.quantile("ttft_from_arrival_s", 0.99), result.quantile("tpot_s", 0.99))
        table.add_row(
            f"{trial.rate:.3g}",
            "[green]kept[/]" if trial.keeps else "[red]broken[/]",
            str(trial.good),
            str(trial.ended),
            f"{100 * low:.0f}% - {100 * high:.0f}%",
            *("-" if t is None else format_duration(t) for t in times),
            f"{result.out_tok_s:,.0f}",
        )
    console.print(table)
    console.print()
    share = f"{100 * search.attain:g}% of requests within {search.slo}"
    if not search.keeps_up_to:
        console.print(f"[red]no rate that was tried keeps {share}[/]")
    elif search.breaks_from is None:
        console.print(f"{search.keeps_up_to:.3g} requests/s keep {share}; nothing that was tried breaks it")
    else:
        console.print(f"[bold]{search.keeps_up_to:.3g} requests/s[/bold] keep {share}; {search.breaks_from:.3g} do not")
    for doubt in search.doubts():
        console.print(f"[red]not valid:[/red] {escape(doubt)}", soft_wrap=True)


def print_ratios(name: str, ratios: list[Ratio], num_pairs: int, failed: int) -> None:
    """A against B."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(
        f"[bold]{name}[/bold], {num_pairs} pairs" + (f", {failed} with failed requests left out" if failed else "")
    )
    table = Table("", "A", "B", "A / B", "95% interval", box=None, pad_edge=False, header_style="dim")
    for ratio in ratios:
        low, high = ratio.interval
        is_time = ratio.name in LOWER_IS_BETTER
        values = (ratio.a_median, ratio.b_median)
        medians = [format_duration(v) if is_time else f"{v:,.1f}" for v in values]
        table.add_row(ratio.name, *medians, f"{ratio.median:.3f}", f"{low:.3f} - {high:.3f}")
    console.print(table)
