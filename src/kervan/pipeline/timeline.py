"""What each rank did when: as SVG for a page, and as JSON for ui.perfetto.dev or chrome://tracing."""

from collections.abc import Sequence
from html import escape
from typing import Any

from kervan.pipeline.bubble import Span, bubble

COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#e45756", "W": "#72b7b2"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
WIDTH, ROW, LEFT, TOP = 1000, 26, 70, 46


def svg(spans: Sequence[Span], ranks: int, title: str) -> str:
    """A row for each rank; a box for each piece of work, with its micro-batch, and below it its stage's shade."""
    begin_s = min((span.begin_s for span in spans), default=0.0)
    whole_s = max((span.end_s for span in spans), default=1.0) - begin_s or 1.0
    scale = WIDTH / whole_s
    height = TOP + ranks * (ROW + 4) + 34
    kinds = [kind for kind in COLOURS if any(span.work.kind == kind for span in spans)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
        f'<text x="{LEFT}" y="32" fill="#555">{1e3 * whole_s:.3g} ms, bubble {100 * bubble(spans, ranks):.1f}%</text>',
    ]
    for rank in range(ranks):
        y = TOP + rank * (ROW + 4)
        parts.append(f'<text x="8" y="{y + 17}">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}" fill="#eee"/>')
    most_stages = max((span.work.stage for span in spans), default=0) + 1
    for span in spans:
        y = TOP + span.rank * (ROW + 4)
        x, width = LEFT + (span.begin_s - begin_s) * scale, (span.end_s - span.begin_s) * scale
        shade = 0.65 + 0.35 * (1 - span.work.stage // max(1, ranks) / max(1, -(-most_stages // max(1, ranks))))
        said = f"{NAMES[span.work.kind]} of micro-batch {span.work.micro_batch}, stage {span.work.stage}: "
        said += f"{1e3 * (span.end_s - span.begin_s):.3g} ms"
        label = f'<text x="{x + width / 2:.2f}" y="{y + 17}" text-anchor="middle" fill="#fff">'
        label += f"{span.work.micro_batch}</text>"
        parts.append(
            f'<g><title>{said}</title><rect x="{x:.2f}" y="{y}" width="{max(width, 0.5):.2f}" height="{ROW}" '
            f'fill="{COLOURS[span.work.kind]}" fill-opacity="{shade:.2f}" stroke="#fff" stroke-width="0.5"/>'
            + (label if width > 14 else "")
            + "</g>"
        )  # fmt: skip
    for index, kind in enumerate(kinds):
        x = LEFT + index * 150
        parts.append(f'<rect x="{x}" y="{height - 24}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 18}" y="{height - 14}">{NAMES[kind]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def perfetto(spans: Sequence[Span], ranks: int) -> dict[str, Any]:
    """Chrome's trace format: a process for the pipeline, a thread for each rank, times in microseconds."""
    begin_s = min((span.begin_s for span in spans), default=0.0)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(ranks)
    ]
    events += [
        {
            "ph": "X", "pid": 0, "tid": span.rank, "cat": NAMES[span.work.kind],
            "name": f"{span.work.kind}{span.work.micro_batch}", "ts": 1e6 * (span.begin_s - begin_s),
            "dur": 1e6 * (span.end_s - span.begin_s),
            "args": {"stage": span.work.stage, "micro_batch": span.work.micro_batch},
        }
        for span in spans
    ]  # fmt: skip
    return {"displayTimeUnit": "ms", "traceEvents": events}
