"""Dashboards that Grafana imports: nothing overlaps, ids are unique, the data source is a variable, names exist."""

import itertools
import json
import re

import pytest

from kervan import metrics
from kervan.observe.render import queries, rules
from kervan.observe.render.dashboards import DASHBOARDS, GRID, Dashboard, Panel, Query, Row, to_json

VLLM_OR_CLIENT = re.compile(r"(vllm:|process_)\w+|DCGM_FI_\w+|up|ALERTS")
NAME = re.compile(r"(?<![\w:\"$.])((?:kervan_|vllm:|process_|DCGM_FI_)\w+)")
each = pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)


@each
def test_panels_do_not_overlap_and_stay_within_the_grid(board: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in to_json(board)["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert cells
        assert place["x"] + place["w"] <= GRID
        assert not cells & taken, panel["title"]
        taken |= cells


@each
def test_ids_and_letters_are_unique_and_every_source_is_the_variable(board: Dashboard) -> None:
    content = to_json(board)
    ids = [panel["id"] for panel in content["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in content["panels"] if panel["type"] != "row"]
    assert len(titles) == len(set(titles))
    variables = {variable["name"]: variable for variable in content["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in content["panels"]:
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(letters) == len(set(letters))
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
            used = {name for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])}
            assert used <= {*variables, "__rate_interval"}
    assert json.loads(json.dumps(content)) == content


def test_dashboards_are_known_by_different_names() -> None:
    assert len({board.uid for board in DASHBOARDS}) == len({board.title for board in DASHBOARDS}) == len(DASHBOARDS)


def names_in(expr: str) -> set[str]:
    return set(NAME.findall(expr))


def test_every_name_in_a_query_is_exported() -> None:
    """Of vLLM and dcgm-exporter, tests with the real thing know (tests/integration/test_prometheus.py)."""
    parts = {f"{name}{part}" for name, metric in metrics.ALL.items() if metric.kind == "histogram"
             for part in ("_bucket", "_sum", "_count")}  # fmt: skip
    known = {name for name, metric in metrics.ALL.items() if metric.kind != "histogram"} | parts
    asked = {
        name
        for board in DASHBOARDS
        for panel in board.panels
        for query in panel.queries
        for name in names_in(query.expr)
    }
    asked |= {name for one in (*rules.RECORDINGS, *rules.alerts()) for name in names_in(one.expr)}
    own = {name for name in asked if name.startswith("kervan_") and not VLLM_OR_CLIENT.fullmatch(name)}
    recorded = {record.record.split(":")[1] for record in rules.RECORDINGS}
    assert own - known - recorded == set()


def test_what_the_directory_tells_is_never_added_up_over_pages() -> None:
    """Two nodes that are scraped tell it twice: `sum` of it is allowed only over a `max` of each."""
    for board in DASHBOARDS:
        for panel in board.panels:
            for query in panel.queries:
                for name in names_in(query.expr):
                    metric = metrics.ALL.get(re.sub(r"_(bucket|sum|count)$", "", name)) or metrics.ALL.get(name)
                    if metric is not None and metric.scope == "fleet":
                        assert re.search(rf"max by \([^)]*\) \((?:\w+\()?{name}\b", query.expr), query.expr


def test_almost_every_metric_is_on_a_dashboard() -> None:
    asked = " ".join(query.expr for board in DASHBOARDS for panel in board.panels for query in panel.queries)
    unseen = {name for name in metrics.ALL if name not in asked}
    assert unseen == {
        "kervan_streams_fetched_total", "kervan_replay_bytes", "kervan_replay_is_copied", "kervan_replay_late_total",
        "kervan_replay_dropped_total", "kervan_autoscaling_problem", "kervan_autoscaling_changed_timestamp_seconds",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "panel", "rule", "asked"),
    [
        ("sum by (fleet) (a{$F})", 'sum by (fleet) (a{fleet=~"$fleet"})', "sum by (fleet) (a)", 'sum by (fleet) (a{fleet=~"x"})'),
        ('rate(a{b="c",$F}[$W])', 'rate(a{b="c",fleet=~"$fleet"}[$__rate_interval])', 'rate(a{b="c"}[2m])',
         'rate(a{b="c",fleet=~"x"}[9s])'),
    ],
)  # fmt: skip
def test_a_query_is_asked_by_panels_rules_and_plots(query: str, panel: str, rule: str, asked: str) -> None:
    assert queries.in_grafana(query) == panel
    assert queries.in_rules(query, "2m") == rule
    assert queries.for_fleet(query, "9s", fleet="x") == asked


def test_panels_fill_lines_from_the_left() -> None:
    panels = tuple(Panel(f"p{n}", (Query("up", "x"),), width=10) for n in range(3))
    placed = to_json(Dashboard("u", "t", (Row("r", panels), Row("s", panels[:1])), ()))["panels"]
    assert [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in placed] == [
        (0, 0),
        (0, 1),
        (10, 1),
        (0, 9),
        (0, 17),
        (0, 18),
    ]
