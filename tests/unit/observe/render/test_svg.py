from xml.etree import ElementTree

import pytest

from kervan.errors import ConfigError
from kervan.observe.render import svg
from kervan.observe.render.dashboards import Dashboard, Panel, Query, Row
from kervan.observe.render.plot import dashboard
from kervan.observe.render.prometheus import Series

LATENCY = Panel("Latency <s>", (Query("x", "{{pool}} p50"),), "s")
NOW = Panel("Streams", (Query("y", "y"),), shape="stat", width=3)
BOARD = Dashboard("u", "t & u", (Row("r", (LATENCY, NOW)),), ())


def drawn(**lines: list[svg.Line]) -> ElementTree.Element:
    found = {LATENCY: lines.get("latency", []), NOW: lines.get("now", [])}
    return ElementTree.fromstring(svg.page(BOARD, found, 0.0, 10.0, "about"))


def texts(page: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in page.iter("{http://www.w3.org/2000/svg}text")]


def polylines(page: ElementTree.Element) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]  # type: ignore[misc]
        for line in page.iter("{http://www.w3.org/2000/svg}polyline")
    ]


def test_a_line_is_named_by_its_labels_and_its_gap_is_not_bridged() -> None:
    (line,) = svg.lines_of(
        "{{pool}} p50", [Series({"pool": "spot"}, ((0, 1.0), (1, 2.0), (2, 2.0), (8, 2.0), (9, 0.0)))]
    )
    assert line.name == "spot p50"
    page = drawn(latency=[line])
    assert [len(points) for points in polylines(page)] == [3, 2]
    (first, *_), (*_, last) = polylines(page)
    assert first[0] < last[0]
    assert first[1] < last[1]  # 1 s is above 0 s
    assert "spot p50" in texts(page)
    assert "2 s" in texts(page)  # an axis from 0 in steps of 1, 2 or 5


def test_a_panel_without_data_says_so_and_a_number_is_the_last_one() -> None:
    page = drawn(now=[svg.Line("y", [(1, 5.0), (2, 1234.0)])])
    assert "1.23k" in texts(page)
    assert "no data" in texts(page)
    assert polylines(page) == []


def test_more_lines_than_the_legend_has_room_for_are_counted() -> None:
    page = drawn(latency=[svg.Line(f"line {n}", [(0, 1.0), (1, 1.0)]) for n in range(12)])
    assert len(polylines(page)) == 12
    assert "and 5 more" in texts(page)


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [("s", 0.0123, "12.3 ms"), ("s", 2.5, "2.5 s"), ("percentunit", 0.995, "99.5%"), ("currencyUSD", 7.2, "$7.20"), ("short", 15200, "15.2k"), ("short", 0.5, "0.5"), ("bytes", 3.1e9, "3.1GB")],
)  # fmt: skip
def test_numbers_have_their_units(unit: str, value: float, text: str) -> None:
    assert svg.FORMATS.get(unit, svg._short)(value) == text


def test_dashboards_are_found_by_short_and_whole_names() -> None:
    assert dashboard("fleet") is dashboard("kervan-fleet")
    with pytest.raises(ConfigError, match="none of fleet, replica, gateway, gpu"):
        dashboard("flet")
