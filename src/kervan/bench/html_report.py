"""The HTML report: one file, nothing to load from elsewhere, for someone who did not run the benchmark."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from kervan.bench.sketch import Sketch
from kervan.bench.tally import METRICS
from kervan.errors import ConfigError
from kervan.units import format_duration

COLOURS = ("#2457c5", "#d1622b", "#1a7f4b", "#8a3ffc", "#b3261e", "#0f8b8d", "#946200", "#5b6472")
FAULT_COLOUR = "#b3261e"
LABELS = {
    "ttft_s": "TTFT from sending",
    "ttft_from_arrival_s": "TTFT from arrival",
    "answer_s": "answer begins",
    "gap_s": "gap between chunks",
    "token_gap_s": "gap per token",
    "tpot_s": "TPOT",
    "e2e_s": "end to end",
    "late_s": "sent late by",
}
CURVES = ("ttft_s", "gap_s", "tpot_s", "e2e_s")
_CURVE_POINTS = 400


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """One run of the report: its record, and the distributions behind its curves."""

    name: str
    record: dict[str, Any]
    sketches: dict[str, Sketch]


def write(path: Path, runs: Sequence[ReportedRun], title: str | None = None) -> None:
    """Write the report of one run, or of a sweep, to `path`.

    Raises: ConfigError when plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ConfigError("--html needs the package plotly: pip install 'kervan[bench]'") from error
    page = Template(resources.files("kervan.bench").joinpath("report.html").read_text())
    figures = _figures(runs)
    text = page.substitute(
        title=html.escape(title or _title(runs)),
        plotly=get_plotlyjs(),
        body=_body(runs, figures, title or _title(runs)),
        # Inside a script element only "</" could end it early.
        figures=json.dumps(figures).replace("</", "<\\/"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _title(runs: Sequence[ReportedRun]) -> str:
    target = runs[0].record["target"]
    return f"{target['model'] or target['url']} under load"


# ---- text


def _body(runs: Sequence[ReportedRun], figures: dict[str, Any], title: str) -> str:
    record = runs[0].record
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="dim">{html.escape(_subtitle(record))}</p>']
    parts.append(_verdict(runs))
    parts.append(_cards(runs[0].record["result"]) if len(runs) == 1 else "")
    if "sweep" in figures:
        parts += ["<h2>Throughput against latency</h2>", '<div class="plot" id="sweep"></div>', _sweep_table(runs)]
    if any(name in figures for name in ("cdf", "timeline")):
        parts += ["<h2>Latency, share of requests or gaps up to a time</h2>", '<div class="plot" id="cdf"></div>']
        parts += ["<h2>Over time</h2>", '<div class="plot tall" id="timeline"></div>']
    for run in runs:
        parts.append(_faults(run))
        parts += [
            f"<h2>{html.escape(_headline('Distributions', run, runs))}</h2>",
            _distributions(run.record["result"]),
        ]
        parts.append(_errors(run.record["result"]))
    parts += ["<h2>What the words mean</h2>", _definitions(), "<h2>How to get this again</h2>", _environment(runs)]
    return "\n".join(part for part in parts if part)


def _headline(text: str, run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    return text if len(runs) == 1 else f"{text}: {run.name}"


def _subtitle(record: dict[str, Any]) -> str:
    target, hardware = record["target"], record["hardware"]
    words = [target["url"], record["date"].replace("T", " ").replace("+00:00", " UTC")]
    if target.get("server_version"):
        words.insert(1, f"server version {target['server_version']}")
    words.append(
        f"client on {hardware['cpu']}, {hardware['cores']} cores" + "".join(f", {g}" for g in hardware["gpus"])
    )
    return " · ".join(words)


def _verdict(runs: Sequence[ReportedRun]) -> str:
    doubts = [(run.name, doubt) for run in runs for doubt in run.record["result"]["doubts"]]
    compared = [run.record["result"]["reconciliation"]["status"] for run in runs]
    checks = []
    floors = [f for run in runs if (f := run.record["result"]["client_floor"]) is not None]
    if floors:
        worst = max(floors, key=lambda floor: float(floor["ttft_s"]))
        checks.append(
            f"The client measured itself first: it adds {format_duration(worst['ttft_s'])} to TTFT and "
            f"{format_duration(worst['gap_s'])} to a gap."
        )
    else:
        checks.append("Nothing tells what the client itself added.")
    if all(status == "agrees" for status in compared):
        checks.append("The server's own counters agree with the client's.")
    elif "disagrees" in compared:
        checks.append("The server's own counters disagree with the client's; see below.")
    else:
        checks.append("The server's own counters could not be read.")
    bad = bool(doubts) or "disagrees" in compared
    head, kind = ("Valid", "verdict") if floors else ("Not calibrated", "verdict open")
    if bad:
        head, kind = "Not valid" if doubts else "Doubtful", "verdict bad"
    listed = "".join(
        f"<li>{html.escape(doubt if len(runs) == 1 else f'{name}: {doubt}')}</li>" for name, doubt in doubts
    )
    text = html.escape(" ".join(checks))
    reasons = f"<ul>{listed}</ul>" if listed else ""
    return f'<div class="{kind}"><b>{head}.</b> {text}{reasons}</div>'


def _cards(result: dict[str, Any]) -> str:
    requests = result["requests"]
    facts = [
        (f"{result['out_tok_s']:,.0f}", "output tokens/s"),
        (f"{result['req_s']:,.2f}", "requests/s"),
        (f"{result['streams_achieved']:,.1f}", "streams on average"),
        (_time(result["ttft_s"]["p50"]), f"TTFT p50, p99 {_time(result['ttft_s']['p99'])}"),
        (_time(result["tpot_s"]["p50"]), f"TPOT p50, p99 {_time(result['tpot_s']['p99'])}"),
        (f"{requests['errors']:,}", f"failed of {requests['ok'] + requests['errors']:,}"),
    ]
    if result["slo"]:
        facts.insert(2, (f"{result['goodput_req_s']:,.2f}", f"good requests/s: {result['slo']}"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>' for b, s in facts)
        + "</div>"
    )


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: tuple[int, ...] = (0,)) -> str:
    def row(cells: Sequence[str]) -> str:
        marked = (
            f'<td class="text">{html.escape(c)}</td>' if i in text_columns else f"<td>{html.escape(c)}</td>"
            for i, c in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    def title(number: int, text: str) -> str:
        style = ' style="text-align:left"' if number in text_columns else ""
        return f"<th{style}>{html.escape(text)}</th>"

    titles = f"<tr>{''.join(title(i, h) for i, h in enumerate(head))}</tr>" if any(head) else ""
    return f'<div class="wide"><table>{titles}{"".join(row(cells) for cells in rows)}</table></div>'


def _distributions(result: dict[str, Any]) -> str:
    rows = []
    for metric in METRICS:
        found = result[metric]
        twin = {"answer_s": "ttft_s", "token_gap_s": "gap_s", "ttft_from_arrival_s": "ttft_s"}.get(metric)
        if not found["count"] or (twin and all(found[q] == result[twin][q] for q in ("p50", "p99", "max"))):
            continue
        interval = found["ci95"]["p99"]
        rows.append(
            [
                LABELS[metric],
                *(_time(found[q]) for q in ("p50", "p90", "p95", "p99", "p999", "max")),
                "-" if interval is None else f"{_time(interval[0])} - {_time(interval[1])}",
                f"{found['count']:,}",
            ]
        )
    return _rows(["", "p50", "p90", "p95", "p99", "p99.9", "max", "p99, 95% interval", "values"], rows)


def _errors(result: dict[str, Any]) -> str:
    requests, parts = result["requests"], []
    if requests["by_error"]:
        rows = [
            [kind, f"{count:,}", next(iter(requests["messages"].get(kind, ())), "")]
            for kind, count in requests["by_error"].items()
        ]
        parts += ["<h2>Failed requests</h2>", _rows(["kind", "requests", "first message"], rows, text_columns=(0, 2))]
    compared = [
        [what, f"{row['client']:g}", f"{row['server']:g}", "agree" if row["agrees"] else "DISAGREE"]
        for what, row in result["reconciliation"]["rows"].items()
    ]
    if compared:
        parts += ["<h2>Client and server</h2>", _rows(["", "client", "server's metrics", ""], compared)]
    return "\n".join(parts)


def _faults(run: ReportedRun) -> str:
    rows = []
    for effect in run.record["result"]["faults"]:
        after = effect["recovered_after_s"]
        rows.append(
            [
                f"{effect['at_s']:.1f} s",
                effect["command"],
                f"{effect['tokens_per_s_before']:,.0f}",
                f"{effect['tokens_per_s_lowest']:,.0f}",
                f"{100 * effect['dip']:.0f}%",
                "not recovered" if after is None else f"{after:.1f} s",
                _time(effect["longest_gap_s"]),
                str(effect["errors"]),
            ]
        )
    if not rows:
        return ""
    head = ["at", "command", "tok/s before", "lowest", "dip", "recovered after", "longest gap", "errors"]
    return "<h2>Faults during the load</h2>\n" + _rows(head, rows, text_columns=(0, 1))


def _sweep_table(runs: Sequence[ReportedRun]) -> str:
    rows = []
    for run in runs:
        r = run.record["result"]
        rows.append(
            [
                run.name,
                f"{r['out_tok_s']:,.1f}",
                f"{r['req_s']:,.2f}",
                *(_time(r["ttft_s"][q]) for q in ("p50", "p99")),
                *(_time(r["tpot_s"][q]) for q in ("p50", "p99")),
                f"{r['goodput_req_s']:,.2f}",
                f"{r['requests']['errors']:,}",
            ]
        )
    head = ["", "tok/s", "requests/s", "TTFT p50", "p99", "TPOT p50", "p99", "good requests/s", "failed"]
    return _rows(head, rows)


def _definitions() -> str:
    more = [
        ("output tokens/s", "output tokens of whole requests, over the time from the first sending to the last end"),
        ("goodput", "requests per second that kept every bound of the SLO, TTFT counted from the intended arrival"),
        ("intended arrival", "when the schedule wanted the request sent; in a closed loop, the moment of sending"),
        ("failed", "all requests that did not end whole; they are in no latency and in no token count"),
        ("95% interval", "by bootstrap over 32 stretches of the run"),
    ]
    rows = [[LABELS[name], text] for name, text in METRICS.items()] + [list(pair) for pair in more]
    return _rows(["", ""], rows, text_columns=(0, 1))


def _environment(runs: Sequence[ReportedRun]) -> str:
    record = runs[0].record
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    loads = "\n".join(json.dumps(run.record["load"]) for run in runs)
    text = f"{record['command']}\n\nclient: {versions}\nload: {loads}"
    return f"<pre>{html.escape(text)}</pre>"


# ---- plots


def _figures(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if any(run.sketches["ttft_s"].count for run in runs):
        figures["cdf"] = _cdf(runs)
    figures["timeline"] = _timeline(runs)
    if "cdf" not in figures:
        figures["cdf"] = {"data": [], "layout": _layout()}
    if len(runs) > 1:
        figures["sweep"] = _sweep(runs)
    return figures


def _layout(**more: Any) -> dict[str, Any]:
    axis = {
        "gridcolor": "#e9ecf0",
        "linecolor": "#c5ccd4",
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "#c5ccd4",
    }
    layout = {
        "font": {"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "size": 13, "color": "#1c2430"},
        "margin": {"l": 66, "r": 66, "t": 14, "b": 54},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }
    for key, value in more.items():
        layout[key] = {**axis, **value} if "axis" in key else value
    return layout


def _cdf(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    starts = []
    for number, run in enumerate(runs):
        for place, metric in enumerate(CURVES if len(runs) == 1 else CURVES[:2]):
            points = run.sketches[metric].cdf()
            if not points:
                continue
            step = max(1, len(points) // _CURVE_POINTS)
            points = [(points[0][0], 0.0), *points[::step], points[-1]]
            if len(runs) == 1 or metric == "ttft_s":
                starts.append(run.sketches[metric].quantile(0.02) or 0.0)
            colour = COLOURS[(place if len(runs) == 1 else number) % len(COLOURS)]
            name = LABELS[metric] if len(runs) == 1 else f"{LABELS[metric]}, {run.name}"
            data.append(
                {
                    "x": [1e3 * max(value, 1e-6) for value, _ in points],
                    "y": [100 * share for _, share in points],
                    "name": name,
                    "mode": "lines",
                    "line": {"color": colour, "width": 2, "shape": "hv"},
                    "visible": True if len(runs) == 1 or metric == "ttft_s" else "legendonly",
                    "hovertemplate": "%{y:.1f}% up to %{x:.4g} ms<extra>" + name + "</extra>",
                }
            )
    longest_s = max((trace["x"][-1] for trace in data), default=1.0) / 1e3
    shortest_s = max(min(starts, default=0.0), longest_s / 2000, 1e-6)  # gaps of nothing would squeeze all else
    edges = [math.log10(1e3 * shortest_s / 1.5), math.log10(1e3 * longest_s * 1.2)]
    layout = _layout(
        xaxis={"type": "log", "title": {"text": "milliseconds (logarithmic)"}, "range": edges},
        yaxis={"title": {"text": "percent"}, "range": [0, 101]},
    )
    return {"data": data, "layout": layout}


def _timeline(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        data += _lines_over_time(run, COLOURS[number % len(COLOURS)], is_alone=len(runs) == 1)
    effects = [effect for run in runs for effect in run.record["result"]["faults"]]
    layout = _layout(
        xaxis={"title": {"text": "seconds since the start"}, "anchor": "y3"},
        yaxis={"title": {"text": "tokens/s"}, "domain": [0.5, 1], "rangemode": "tozero"},
        yaxis2={"title": {"text": "in flight"}, "domain": [0.25, 0.44], "rangemode": "tozero"},
        yaxis3={"title": {"text": "gap, ms"}, "domain": [0, 0.19], "rangemode": "tozero"},
        shapes=[_fault_line(effect["at_s"]) for effect in effects],
        annotations=[_fault_note(effect["at_s"], effect["command"]) for effect in effects],
        hovermode="x unified" if len(runs) == 1 else "closest",
    )
    return {"data": data, "layout": layout}


def _lines_over_time(run: ReportedRun, colour: str, *, is_alone: bool) -> list[dict[str, Any]]:
    """Tokens/s, streams in flight and the longest gap; and crosses where requests failed."""
    lists = run.record["timeline"]
    width_s = lists["bucket_s"]
    times = [(i + 0.5) * width_s for i in range(len(lists["tokens"]))]
    name = "" if is_alone else f", {run.name}"
    in_flight, running = [], 0
    for started, ok, errors in zip(lists["started"], lists["ok"], lists["errors"], strict=True):
        running += started - ok - errors
        in_flight.append(max(0, running))
    rates = [n / width_s for n in lists["tokens"]]
    rows = [
        ("tokens/s", rates, "y", colour),
        ("in flight", in_flight, "y2", COLOURS[2] if is_alone else colour),
        ("longest gap, ms", [1e3 * g for g in lists["gap_max_s"]], "y3", COLOURS[1] if is_alone else colour),
    ]
    data: list[dict[str, Any]] = [
        {
            "x": times,
            "y": values,
            "name": what + name,
            "yaxis": axis,
            "mode": "lines",
            "line": {"color": line, "width": 1.7},
            "showlegend": axis == "y" and not is_alone,
            "legendgroup": run.name,
            "hovertemplate": "%{y:,.4g} at %{x:.1f} s<extra>" + what + name + "</extra>",
        }
        for what, values, axis, line in rows
    ]
    if any(lists["errors"]):
        marked = [(t, v, n) for t, v, n in zip(times, rates, lists["errors"], strict=True) if n]
        data.append(
            {
                "x": [t for t, _, _ in marked],
                "y": [v for _, v, _ in marked],
                "text": [f"{n} failed" for _, _, n in marked],
                "name": "failed requests" + name,
                "mode": "markers",
                "marker": {"color": FAULT_COLOUR, "symbol": "x", "size": 9},
                "hovertemplate": "%{text} at %{x:.1f} s<extra></extra>",
            }
        )
    return data


def _fault_line(at_s: float) -> dict[str, Any]:
    line = {"color": FAULT_COLOUR, "width": 1.5, "dash": "dash"}
    return {"type": "line", "x0": at_s, "x1": at_s, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _fault_note(at_s: float, command: str) -> dict[str, Any]:
    text = {"text": html.escape(command[:48]), "font": {"size": 12, "color": FAULT_COLOUR}}
    return {"x": at_s, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top", "showarrow": False, **text}


def _sweep(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    x = [run.record["result"]["out_tok_s"] for run in runs]
    data: list[dict[str, Any]] = []
    lines = (("ttft_s", "p50"), ("ttft_s", "p99"), ("tpot_s", "p50"), ("tpot_s", "p99"))
    for place, (metric, q) in enumerate(lines):
        name = f"{LABELS[metric]} {q}"
        values = [run.record["result"][metric][q] for run in runs]
        data.append(
            {
                "x": x,
                "y": [None if value is None else 1e3 * value for value in values],
                "text": [run.name for run in runs],
                "name": name,
                "mode": "lines+markers" if len(runs) > 6 else "lines+markers+text",
                "textposition": "top center",
                "textfont": {"size": 11, "color": "#64707f"},
                "line": {"color": COLOURS[place // 2], "width": 2, "dash": "solid" if q == "p50" else "dot"},
                "marker": {"size": 7},
                "hovertemplate": "%{text}: %{y:,.4g} ms at %{x:,.0f} tok/s<extra>" + name + "</extra>",
            }
        )
    for trace in data[1:]:
        trace["mode"] = "lines+markers"
    layout = _layout(
        xaxis={"title": {"text": "output tokens/s"}, "range": [-0.04 * max(x), 1.08 * max(x)]},
        yaxis={"title": {"text": "milliseconds (logarithmic)"}, "type": "log", "dtick": "D2"},
    )
    return {"data": data, "layout": layout}
