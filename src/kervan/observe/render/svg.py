"""Draws dashboards as SVG, with the queries, places and legends that Grafana gets. No library draws this small."""

import html
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kervan.observe.render.dashboards import GRID, Dashboard, Panel
from kervan.observe.render.prometheus import Series

COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#994455", "#004488", "#997700",
    "#6699cc", "#bb5566",
)  # fmt: skip
WIDTH = 1320
HEADING, TITLE, LEGEND_LINE = 34, 26, 15
PLOT_HEIGHT, STAT_HEIGHT = 150, 84
LEFT, RIGHT, GAP = 58, 12, 10
MAX_LEGEND = 8
TICKS = 4
EXPECTED_LABEL = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, slots=True)
class Line:
    """A named series of a panel."""

    name: str
    points: Sequence[tuple[float, float]]


def lines_of(legend: str, found: Sequence[Series]) -> list[Line]:
    """What a query found, named by its legend."""
    return [
        Line(EXPECTED_LABEL.sub(lambda match: one.labels.get(match[1], ""), legend).strip() or legend, one.points)  # noqa: B023
        for one in found
    ]


def page(dashboard: Dashboard, found: Mapping[Panel, Sequence[Line]], begin_s: float, end_s: float, about: str) -> str:
    """The dashboard as one SVG. `found`: the lines of each panel; `about`: below its title."""
    parts, y = [_text(16, 30, dashboard.title, 20, "bold"), _text(16, 50, about, 12, colour="#666")], 64.0
    for row in dashboard.rows:
        parts.append(_text(16, y + 22, row.title, 15, "bold"))
        y += HEADING
        x, tallest = 0, 0.0
        for panel in row.panels:
            lines = found.get(panel, ())
            height = _height(panel, lines)
            if x + panel.width > GRID:
                x, y, tallest = 0, y + tallest + GAP, 0.0
            unit = (WIDTH - 2 * GAP) / GRID
            box = _Box(GAP + x * unit, y, panel.width * unit - GAP, height)
            draw = _stat if panel.shape == "stat" else _plot
            parts += draw(panel, lines, box, begin_s, end_s)
            x, tallest = x + panel.width, max(tallest, height)
        y += tallest + GAP
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def as_html(svg: str, title: str) -> str:
    """The same as a page."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body style="margin:0">\n{svg}</body></html>\n'


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def _height(panel: Panel, lines: Sequence[Line]) -> float:
    if panel.shape == "stat":
        return STAT_HEIGHT
    return TITLE + PLOT_HEIGHT + 20 + LEGEND_LINE * math.ceil(min(len(lines), MAX_LEGEND) / 2) + 12


def _frame(panel: Panel, box: _Box) -> list[str]:
    rectangle = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    return [f'<rect {rectangle} fill="#fafafa" stroke="#ddd" rx="3"/>',
            _text(box.x + 10, box.y + 18, panel.title, 12, "bold")]  # fmt: skip


def _stat(panel: Panel, lines: Sequence[Line], box: _Box, begin_s: float, end_s: float) -> list[str]:
    last = [line.points[-1][1] for line in lines if line.points]
    told = FORMATS.get(panel.unit, _short)(last[0]) if last else "no data"
    return [*_frame(panel, box), _text(box.x + 10, box.y + 60, told, 26 if last else 14, colour="#4477aa")]


def _plot(panel: Panel, lines: Sequence[Line], box: _Box, begin_s: float, end_s: float) -> list[str]:
    told = FORMATS.get(panel.unit, _short)
    most = max((value for line in lines for _, value in line.points), default=0.0)
    step = _nice(1.05 * most / TICKS) if most > 0 else 1 / TICKS
    top = step * TICKS
    left, right, head = box.x + LEFT, box.x + box.width - RIGHT, box.y + TITLE + 4
    foot = head + PLOT_HEIGHT

    def place(at_s: float, value: float) -> tuple[float, float]:
        share = (at_s - begin_s) / max(1e-9, end_s - begin_s)
        return left + share * (right - left), foot - min(1.0, max(0.0, value / top)) * PLOT_HEIGHT

    parts = _frame(panel, box)
    for tick in range(TICKS + 1):
        _, y = place(begin_s, tick * step)
        parts.append(f'<path d="M{left:.1f},{y:.1f} H{right:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(left - 6, y + 4, told(tick * step), 10, colour="#666", anchor="end"))
    for tick in range(4):
        at_s = begin_s + (end_s - begin_s) * tick / 3
        anchor = ("start", "middle", "middle", "end")[tick]
        label = time.strftime("%H:%M:%S", time.localtime(at_s))
        parts.append(_text(place(at_s, 0)[0], foot + 14, label, 10, colour="#666", anchor=anchor))
    if not any(line.points for line in lines):
        parts.append(_text((left + right) / 2, (head + foot) / 2, "no data", 12, colour="#999", anchor="middle"))
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        parts += _drawn(line, place, colour)
        if number < MAX_LEGEND:
            x = box.x + 10 + (number % 2) * (box.width - 20) / 2
            y = foot + 34 + (number // 2) * LEGEND_LINE
            name = (
                line.name if number < MAX_LEGEND - 1 or len(lines) <= MAX_LEGEND else f"and {len(lines) - number} more"
            )
            parts.append(f'<rect x="{x:.1f}" y="{y - 8:.1f}" width="10" height="3" fill="{colour}"/>')
            parts.append(_text(x + 15, y - 3, name, 10, colour="#444"))
    return parts


def _drawn(line: Line, place: Callable[[float, float], tuple[float, float]], colour: str) -> list[str]:
    """Broken where points are missing for over three steps."""
    gaps = [after - before for (before, _), (after, _) in zip(line.points, line.points[1:], strict=False)]
    usual = min(gaps, default=0.0)
    pieces: list[list[str]] = [[]]
    for number, point in enumerate(line.points):
        if number and gaps[number - 1] > 3 * usual:
            pieces.append([])
        x, y = place(*point)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
    return [
        f'<polyline points="{" ".join(piece)}" fill="none" stroke="{colour}" stroke-width="1.4"/>'
        if len(piece) > 1
        else f'<circle cx="{piece[0].split(",")[0]}" cy="{piece[0].split(",")[1]}" r="1.5" fill="{colour}"/>'
        for piece in pieces
        if piece
    ]


def _text(
    x: float, y: float, text: str, size: int, weight: str = "normal", *, colour: str = "#222", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{html.escape(text)}</text>'
    )


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1e3 * value:.3g} ms"


FORMATS: dict[str, Callable[[float], str]] = {
    "s": _seconds,
    "percentunit": lambda value: f"{100 * value:.3g}%",
    "percent": lambda value: f"{value:.3g}%",
    "currencyUSD": lambda value: f"${value:.2f}",
    "bytes": lambda value: f"{_short(value)}B",
    "Bps": lambda value: f"{_short(value)}B/s",
    "reqps": lambda value: f"{_short(value)}/s",
    "ops": lambda value: f"{_short(value)}/s",
    "hertz": lambda value: f"{_short(value)}Hz",
    "celsius": lambda value: f"{value:.3g} C",
    "watt": lambda value: f"{_short(value)}W",
}


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least so large."""
    unit = 10.0 ** math.floor(math.log10(step))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= step * 0.9999)
