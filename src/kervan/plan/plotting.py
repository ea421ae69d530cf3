"""Throughput against latency of all layouts: an HTML file with an SVG in it, which needs nothing else to be seen."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from kervan.errors import ConfigError
from kervan.plan.curves import LoadPoint, curve
from kervan.plan.explain import LayoutPlan
from kervan.plan.rank import PlannedLayout

MAX_LAYOUTS = 12  # drawn, the best ones
WIDTH, HEIGHT = 1000, 620
LEFT, RIGHT, TOP, BOTTOM = 90, 230, 60, 60
COLORS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#994455", "#004488", "#997700",
    "#6699cc", "#bb5566",
)  # fmt: skip
TICKS = 6


def pareto(layouts: Iterable[PlannedLayout]) -> list[PlannedLayout]:
    """Those that no other beats in both tokens/s per GPU and time per token, by time per token."""
    best, front = 0.0, []
    for c in sorted(layouts, key=lambda c: (c.tpot_p50_ms, -c.out_tok_s / c.layout.gpus)):
        if c.out_tok_s / c.layout.gpus > best:
            best = c.out_tok_s / c.layout.gpus
            front.append(c)
    return front


def write(plan: LayoutPlan, path: Path) -> None:
    """Write the plot. Raises: ConfigError when the file cannot be written."""
    text = page(plan)
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}; give another path") from error


def page(plan: LayoutPlan) -> str:
    """The HTML: a line for each layout through its loads, the Pareto front of the planned ones, and the SLO."""
    request = plan.request
    drawn = [c for c in plan.layouts if c.fits][:MAX_LAYOUTS]
    curves = {c.layout: curve(request, c) for c in drawn}
    points = [point for found in curves.values() for point in found]
    axes = _Axes(
        max((1000 / p.tpot_p50_ms for p in points), default=1.0), max((p.tok_s_per_gpu for p in points), default=1.0)
    )
    name = html.escape(request.spec.source.removesuffix("/config.json"))
    gpus = plan.best.layout.gpus if request.counts_gpus else request.gpus
    parts = [f'<text x="{LEFT}" y="28" font-size="18">{name} on {gpus} x {html.escape(request.gpu.name)}</text>']
    parts += axes.drawn()
    for color, (layout, found) in zip(COLORS, curves.items(), strict=False):
        parts += _line(axes, str(layout), found, color)
    front = [(1000 / c.tpot_p50_ms, c.out_tok_s / c.layout.gpus) for c in pareto(drawn)]
    corners = " ".join(axes.place(*corner) for corner in front)
    parts.append(f'<polyline points="{corners}" fill="none" stroke="black" stroke-dasharray="2 4"/>')
    if request.slo.tpot_s is not None and 1 / request.slo.tpot_s <= axes.x_most:
        x, _ = axes.place(1 / request.slo.tpot_s, 0).split(",")
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="red" stroke-dasharray="6 4"/>')
        parts.append(f'<text x="{x}" y="{TOP - 6}" fill="red">SLO {html.escape(str(request.slo))}</text>')
    legend = [(str(layout), color) for color, layout in zip(COLORS, curves, strict=False)]
    for row, (text, color) in enumerate([*legend, ("Pareto front (dotted)", "black")]):
        parts.append(f'<text x="{WIDTH - RIGHT + 20}" y="{TOP + 14 + 20 * row}" fill="{color}">{text}</text>')
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title></head><body>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13">\n{body}\n</svg>\n</body></html>\n'
    )


class _Axes:
    """Tokens per second of one stream to the right, tokens per second and GPU upwards; both from 0."""

    def __init__(self, x_most: float, y_most: float) -> None:
        self.x_step, self.y_step = (_nice(most / TICKS) for most in (x_most, y_most))
        self.x_most = self.x_step * math.ceil(1.02 * x_most / self.x_step)
        self.y_most = self.y_step * math.ceil(1.02 * y_most / self.y_step)

    def place(self, x: float, y: float) -> str:
        """A point of the SVG, as in `points`."""
        across, up = (WIDTH - LEFT - RIGHT) * x / self.x_most, (HEIGHT - TOP - BOTTOM) * y / self.y_most
        return f"{LEFT + across:.1f},{HEIGHT - BOTTOM - up:.1f}"

    def drawn(self) -> list[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [f'<path d="M{LEFT},{TOP} V{bottom} H{right}" fill="none" stroke="black"/>']
        for step in range(round(self.x_most / self.x_step) + 1):
            x, _ = self.place(step * self.x_step, 0).split(",")
            parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{step * self.x_step:g}</text>')
        for step in range(round(self.y_most / self.y_step) + 1):
            _, y = self.place(0, step * self.y_step).split(",")
            parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{step * self.y_step:,g}</text>')
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#eeeeee"/>')
        middle = (TOP + bottom) / 2
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 14}">tokens/s of one stream (1 / TPOT p50)</text>')
        parts.append(
            f'<text transform="translate(22 {middle}) rotate(-90)" text-anchor="middle">output tokens/s per GPU</text>'
        )
        return parts


def _line(axes: _Axes, name: str, found: Sequence[LoadPoint], color: str) -> list[str]:
    places = [axes.place(1000 / point.tpot_p50_ms, point.tok_s_per_gpu) for point in found]
    parts = [f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="2"/>']
    for place, point in zip(places, found, strict=True):
        x, y = place.split(",")
        figures = f"{point.tok_s_per_gpu:,.0f} tokens/s per GPU, TPOT {point.tpot_p50_ms:.1f} ms"
        told = f"{name}: {point.requests_s:.3g} requests/s, {figures}"
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"><title>{told}</title></circle>')
    return parts


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least so large."""
    unit = 10.0 ** math.floor(math.log10(max(1e-9, step)))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= step)
