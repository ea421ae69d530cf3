"""The HTML report: policies over the same load, in one file with nothing to load from elsewhere."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kervan.bench.report_plots import COLOURS
from kervan.report import page
from kervan.simulate.compare import Compared
from kervan.simulate.setup import FleetSetup
from kervan.simulate.tally import Outcome
from kervan.units import format_duration

MAX_POINTS = 1200  # of a line
MAX_DECISIONS = 200  # listed of a policy
_DEFINITIONS = (
    ("in SLO", "requests that ended within all bounds of the SLO, of all that came, those that were refused too"),
    ("mean replicas", "from the decision to start one until it was gone, over the time until the pools were back at "
     "their least after the last request"),
    ("moves", "streams that went on at another replica, because theirs was drained or lost"),
    ("broken", "streams that ended with an error"),
    ("TTFT", "from the arrival of a request to its first token at the client"),
)  # fmt: skip


def write(path: Path, setup: FleetSetup, compared: Sequence[Compared], notes: Sequence[str] = ()) -> None:
    """Write the report to `path`. Raises: ConfigError when jinja2 or plotly is not installed."""
    page.check("--html", "bench")
    first = compared[0].outcomes[0]
    text = page.render(
        "simulate",
        title=f"{', '.join(one.name for one in compared)} under {first.requests:,} requests",
        subtitle=_subtitle(setup, first),
        notes=list(notes),
        rows=[table_row(one) for one in compared],
        of_seed="" if len(compared[0].outcomes) == 1 else f", seed {first.seed}",
        changes=[(one.name, _decisions(one.outcomes[0])) for one in compared if one.outcomes[0].decisions],
        definitions=_DEFINITIONS,
        figures={"timeline": timeline([one.outcomes[0] for one in compared])},
        plotly=page.plotly_source(),
    )
    path.write_text(text)


def _subtitle(setup: FleetSetup, first: Outcome) -> str:
    pools = ", ".join(f"{pool.name} {pool.minimum}..{pool.maximum}" for pool in setup.pools)
    return (
        f"{setup.engine.layout} on {setup.engine.gpu.name}; {pools}; SLO {setup.slo}; "
        f"{setup.pools[0].start.text} from a decision to a ready replica; "
        f"{format_duration(first.duration_s)} of load; times are computed, not those of a GPU"
    )


def table_row(one: Compared) -> tuple[str, ...]:
    """What the table says of a policy, as text."""
    attained, replicas = one.mean(lambda o: o.attained) or 0.0, one.mean(lambda o: o.mean_replicas) or 0.0
    of_attained, of_replicas = one.interval(lambda o: o.attained), one.interval(lambda o: o.mean_replicas)
    usd, per_mtok = one.mean(lambda o: o.usd), one.mean(lambda o: o.usd_per_mtok)
    return (
        one.name,
        f"{attained:.2%}" + (f" ({of_attained[0]:.1%}..{of_attained[1]:.1%})" if of_attained else ""),
        f"{replicas:.2f}" + (f" ({of_replicas[0]:.2f}..{of_replicas[1]:.2f})" if of_replicas else ""),
        f"{one.mean(lambda o: sum(o.replica_hours.values())) or 0:,.2f}",
        "" if usd is None else f"{usd:,.2f}",
        "" if per_mtok is None else f"{per_mtok:.2f}",
        *(_duration(one.entry("ttft_s", q)) for q in ("p50", "p95", "p99")),
        _duration(one.entry("tpot_s", "p95")),
        f"{one.mean(lambda o: o.shed):,.0f}",
        f"{one.mean(lambda o: o.moves):,.0f}",
        f"{one.mean(lambda o: o.broken):,.0f}",
    )


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def _decisions(outcome: Outcome) -> list[tuple[str, str]]:
    shown = [(f"{at_s:.0f} s", text) for at_s, text in outcome.decisions[:MAX_DECISIONS]]
    more = len(outcome.decisions) - len(shown)
    return [*shown, ("", f"and {more} more")] if more else shown


def timeline(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Plotly's figure: the load, replicas by policy, and the 95th percentile of TTFT."""
    data: list[dict[str, Any]] = []
    length = max(len(outcome.timeline["arrived"]) for outcome in outcomes)
    width = max(1, -(-length // MAX_POINTS))
    longest = max(outcomes, key=lambda outcome: len(outcome.timeline["arrived"]))
    every_s = outcomes[0].every_s
    smooth = max(width, min(30, max(1, length // 60)))
    data.append(
        _line(_means(longest.timeline["arrived"], smooth), smooth * every_s, "requests/s", "y", "#5b6472", "load")
    )
    for number, outcome in enumerate(outcomes):
        colour, lines = COLOURS[number % len(COLOURS)], outcome.timeline
        there = [sum(column) for column in zip(lines["ready"], lines["starting"], lines["draining"], strict=True)]
        name = outcome.policy
        data += [
            _line(_lasts(there, width), width * every_s, f"{name}: all", "y2", colour, name, shape="hv"),
            _line(
                _lasts(lines["ready"], width),
                width * every_s,
                f"{name}: ready",
                "y2",
                colour,
                name,
                shape="hv",
                dash="dot",
            ),
            _line(_worst(lines["ttft_p95_s"], width), width * every_s, f"{name}: TTFT p95", "y3", colour, name),
        ]
    axis = {"gridcolor": "#e9ecf0", "linecolor": "#c5ccd4", "zeroline": False, "rangemode": "tozero"}
    layout = {
        "font": {"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "size": 13, "color": "#1c2430"},
        "margin": {"l": 66, "r": 24, "t": 14, "b": 54},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {**axis, "title": {"text": "seconds"}, "anchor": "y3", "range": [0, 1.02 * shown_s(outcomes)]},
        "yaxis": {**axis, "title": {"text": "requests/s"}, "domain": [0.78, 1]},
        "yaxis2": {**axis, "title": {"text": "replicas"}, "domain": [0.36, 0.72]},
        "yaxis3": {**axis, "title": {"text": "TTFT p95, s"}, "domain": [0, 0.3], "type": "log", "rangemode": "normal"},
    }
    return {"data": data, "layout": layout}


def shown_s(outcomes: Sequence[Outcome]) -> float:
    """Seconds until the last request came and the replicas last changed: fixed ones stay on for half an hour."""
    last = 1
    for outcome in outcomes:
        lines = outcome.timeline
        there = list(zip(lines["ready"], lines["starting"], lines["draining"], strict=True))
        changes = [place for place, (before, after) in enumerate(pairwise(there), 1) if before != after]
        last = max(last, *changes, *(place for place, count in enumerate(lines["arrived"], 1) if count))
    return last * outcomes[0].every_s


def _line(
    values: list[float | None], width_s: float, name: str, axis: str, colour: str, group: str, *, shape: str = "linear",
    dash: str = "solid",
) -> dict[str, Any]:  # fmt: skip
    return {
        "x": [width_s * (place + 1) for place in range(len(values))],
        "y": values,
        "name": name,
        "yaxis": axis,
        "mode": "lines",
        "connectgaps": False,
        "legendgroup": group,
        "line": {"color": colour, "width": 1.7, "shape": shape, "dash": dash},
    }


def _chunks(values: Sequence[float], width: int) -> list[Sequence[float]]:
    return [values[place : place + width] for place in range(0, len(values), width)]


def _means(values: Sequence[float], width: int) -> list[float | None]:
    return [round(sum(part) / len(part), 3) for part in _chunks(values, width)]


def _lasts(values: Sequence[float], width: int) -> list[float | None]:
    return [part[-1] for part in _chunks(values, width)]


def _worst(values: Sequence[float], width: int) -> list[float | None]:
    """Of each chunk the highest; None where no first token came (-1)."""
    highest = (max(part) for part in _chunks(values, width))
    return [None if value < 0 else round(value, 4) for value in highest]
