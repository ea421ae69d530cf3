from collections import Counter as Count
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kervan import metrics
from kervan.gateway.merged_page import FLEET_GAUGES, merge_pages

NONE: frozenset[str] = frozenset()


def page(value: float, text: str = "x", *, waiting: float = 0) -> str:
    registry = CollectorRegistry()
    Counter("vllm:tokens", "tokens made\nso far", ["model"], registry=registry).labels(text).inc(value)
    Gauge("vllm:num_requests_waiting", "waiting", ["engine"], registry=registry).labels("0").set(waiting)
    Gauge("plain", "no label", registry=registry).set(value)
    Histogram("ttft_seconds", "TTFT", ["model"], registry=registry, buckets=[0.1, 1]).labels(text).observe(value)
    Summary("took", "a summary", registry=registry).observe(value)
    Info("build", "version", registry=registry).info({"version": "1"})
    return generate_latest(registry).decode()


def samples(text: str, **extra: str) -> Count[tuple[str, frozenset[tuple[str, str]], float]]:
    return Count(
        (sample.name, frozenset((sample.labels | extra).items()), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    )


def comments(text: str) -> list[tuple[str, ...]]:
    return [tuple(line.split()[1:3]) for line in text.splitlines() if line.startswith("#")]


def test_two_pages_are_one_valid_page() -> None:
    merged = merge_pages({"a": page(1), "b": page(2)}, fleet_gauges=NONE)
    assert samples(merged) == samples(page(1), gateway="a") + samples(page(2), gateway="b")
    assert len(comments(merged)) == len(set(comments(merged)))
    names = [family.name for family in text_string_to_metric_families(merged)]
    assert len(names) == len(set(names))  # all samples of a family stand together
    assert 'vllm:tokens_total{gateway="b",model="x"} 2.0\n' in merged
    assert "# TYPE vllm:tokens_total counter\n" in merged
    assert "# HELP vllm:tokens_total tokens made\\nso far\n" in merged
    assert "_created" not in merged


def test_one_page_has_the_label_too() -> None:
    assert 'plain{gateway="a"} 1.0\n' in merge_pages({"a": page(1)})


def test_fleet_gauges_come_once() -> None:
    merged = merge_pages({"a": page(1, waiting=7), "b": page(2, waiting=8)})
    assert [line for line in merged.splitlines() if line.startswith("vllm:num_requests_waiting")] == [
        'vllm:num_requests_waiting{engine="0"} 7.0'
    ]


def test_what_the_directory_tells_comes_from_the_first_page_that_has_it() -> None:
    pages = {
        "a": "kervan_links 1\n",
        "b": 'kervan_replica_running{replica="r"} 1\n',
        "c": 'kervan_replica_running{replica="r"} 0',
    }
    assert merge_pages(pages) == 'kervan_links{gateway="a"} 1\nkervan_replica_running{replica="r"} 1\n'
    assert {name for name, metric in metrics.ALL.items() if metric.scope == "fleet"} < FLEET_GAUGES


@pytest.mark.parametrize(
    ("line", "merged"),
    [
        ("up 1", 'up{gateway="g"} 1'),
        ("up\t1 1700000000000", 'up{gateway="g"} 1 1700000000000'),
        ("up{} NaN", 'up{gateway="g"} NaN'),
        ('up{a="b",} +Inf', 'up{gateway="g",a="b"} +Inf'),
        ('up { a = "}\\"{," , b="" } -1.5e-07', 'up{gateway="g",a = "}\\"{," , b=""} -1.5e-07'),
        ('up{gateway="x"} 1', 'up{gateway="g",exported_gateway="x"} 1'),
        ('up{a="gateway=1",my_gateway="2"} 1', 'up{gateway="g",a="gateway=1",my_gateway="2"} 1'),
        ('up{gateway="gateway=\\"1"} 1', 'up{gateway="g",exported_gateway="gateway=\\"1"} 1'),
        ("# a comment", ""),
        ("#", ""),
    ],
)
def test_lines(line: str, merged: str) -> None:
    assert merge_pages({"g": line}).rstrip("\n") == merged


def test_counter_whose_name_has_no_total_keeps_its_name() -> None:
    text = "# TYPE requests counter\nrequests 5\n"
    assert merge_pages({"g": text}) == '# TYPE requests counter\nrequests{gateway="g"} 5\n'


@pytest.mark.parametrize("line", ["up", "up1", "up one", 'up{a="b} 1', "up{a=b} 1", '{"a.b"} 1', "up 1 2 3"])
def test_malformed_lines_are_named(line: str) -> None:
    with pytest.raises(ValueError, match=r"gateway g: .* is not a sample"):
        merge_pages({"g": line})


def test_types_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match="gateway b: up is a counter, and a gauge on the pages before it"):
        merge_pages({"a": "# TYPE up gauge\nup 1\n", "b": "# TYPE up counter\nup 1\n"})


def test_no_pages() -> None:
    assert merge_pages({}) == ""


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(TEXT, st.tuples(st.floats(0, allow_infinity=False), TEXT), max_size=3))
def test_every_sample_of_every_page_survives(gateways: dict[str, tuple[float, str]]) -> None:
    pages = {name: page(value, text) for name, (value, text) in gateways.items()}
    expected: Count[tuple[str, frozenset[tuple[str, str]], float]] = Count()
    for name, text in pages.items():
        expected += samples(text, gateway=name)
    assert samples(merge_pages(pages, fleet_gauges=NONE)) == expected


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4, unique=True))
def test_merging_is_stable_under_reparsing(rows: Iterable[tuple[str, str]]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("g", "any label values", ["x", "gateway"], registry=registry)
    for x, y in rows:
        gauge.labels(x, y).set(1)
    merged = merge_pages({"me": generate_latest(registry).decode()})
    (family,) = text_string_to_metric_families(merged)
    assert [(s.labels["x"], s.labels["exported_gateway"], s.labels["gateway"]) for s in family.samples] == [
        (x, y, "me") for x, y in rows
    ]
