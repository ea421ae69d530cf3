"""Throughput against latency of all layouts, as one HTML file."""

from pathlib import Path

from kervan.errors import ConfigError
from kervan.plan.explain import LayoutPlan
from kervan.plan.rank import PlannedLayout


def pareto(layouts: list[PlannedLayout]) -> list[PlannedLayout]:
    """Those that no other beats in both tokens/s per GPU and time per token, by time per token."""
    best, front = 0.0, []
    for c in sorted(layouts, key=lambda c: (c.tpot_p50_ms, -c.out_tok_s / c.layout.gpus)):
        if c.out_tok_s / c.layout.gpus > best:
            best = c.out_tok_s / c.layout.gpus
            front.append(c)
    return front


def write(plan: LayoutPlan, path: Path) -> None:
    """Write the plot; it needs no network to be looked at.

    Raises: ConfigError without plotly, or when the file cannot be written.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ConfigError("--plot needs plotly; pip install 'kervan[bench]'") from error
    fitting = [c for c in plan.layouts if c.fits]
    front = pareto(fitting)
    figure = go.Figure()
    for name, mode, rows in (("layouts", "markers+text", fitting), ("Pareto front", "lines", front)):
        figure.add_scatter(
            name=name,
            mode=mode,
            x=[1000 / c.tpot_p50_ms for c in rows],
            y=[c.out_tok_s / c.layout.gpus for c in rows],
            text=[str(c.layout) for c in rows],
            textposition="top center",
        )
    figure.update_layout(
        title=f"{plan.request.spec.architecture} on {plan.request.gpus} x {plan.request.gpu.name}",
        xaxis_title="tokens/s of one stream (1 / TPOT p50)",
        yaxis_title="output tokens/s per GPU",
        template="simple_white",
    )
    try:
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error
