"""The plots of the HTML report: Plotly's figures, as plain values."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the colours are wanted where numpy is not installed
    from kervan.bench.sketch import Sketch

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
    record: Mapping[str, Any]
    sketches: "Mapping[str, Sketch]"


def figures(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """By the id of the element that each is drawn into: `cdf`, `timeline`, and of several runs `sweep`."""
    has_tokens = any(run.sketches["ttft_s"].count for run in runs)
    drawn = {
        "cdf": _cdf(runs) if has_tokens else {"data": [], "layout": _layout()},
        "timeline": _timeline(runs),
    }
    return drawn if len(runs) == 1 else {**drawn, "sweep": _sweep(runs)}


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
