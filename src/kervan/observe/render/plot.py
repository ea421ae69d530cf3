"""A dashboard drawn from a Prometheus, where there is no Grafana."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.observe.render import queries, svg
from kervan.observe.render.dashboards import DASHBOARDS, Dashboard, Panel
from kervan.observe.render.prometheus import Prometheus

POINTS = 200  # of a line, at most
LEAST_STEP_S = 1.0


@dataclass(frozen=True, slots=True)
class Drawing:
    """A dashboard with what its queries found. `empty`: titles of the panels of which a query found nothing."""

    svg: str
    num_panels: int
    empty: tuple[str, ...]


def dashboard(name: str) -> Dashboard:
    """The dashboard `kervan-fleet`, or `fleet`. Raises: ConfigError for another name."""
    by_name = {board.uid: board for board in DASHBOARDS}
    if (found := by_name.get(name) or by_name.get(f"kervan-{name}")) is not None:
        return found
    names = ", ".join(uid.removeprefix("kervan-") for uid in by_name)
    raise ConfigError(f"--dashboard {name!r} is none of {names}; write for example --dashboard fleet")


def draw(
    board: Dashboard,
    server: Prometheus,
    *,
    begin_s: float,
    end_s: float,
    fleet: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Drawing:
    """Ask all queries of all panels, as Grafana does for this time, and draw what they give.

    Raises: PrometheusError when Prometheus does not answer, or refuses a query.
    """
    step_s = max(LEAST_STEP_S, (end_s - begin_s) / POINTS)
    # As Grafana's $__rate_interval: four scrapes, or one step and one scrape.
    interval_s = server.scrape_interval_s()
    window = f"{round(1000 * max(4 * interval_s, step_s + interval_s))}ms"
    variables = {"fleet": fleet} if fleet else {}
    found: dict[Panel, list[svg.Line]] = {}
    empty = []
    panels = list(board.panels)
    for number, panel in enumerate(panels, 1):
        progress(f"panel {number} of {len(panels)}: {panel.title}")
        found[panel] = []
        for query in panel.queries:
            asked = queries.for_fleet(query.expr, window, **variables)
            lines = svg.lines_of(query.legend, server.query_range(asked, begin_s, end_s, step_s))
            found[panel] += lines
            if not any(line.points for line in lines) and panel.title not in empty:
                empty.append(panel.title)
    about = f"{fleet or 'all fleets'}, the {end_s - begin_s:.0f} s before {_at(end_s)}; drawn by kervan observe plot"
    return Drawing(svg.page(board, found, begin_s, end_s, about), len(panels), tuple(empty))


def _at(unix_s: float) -> str:

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
