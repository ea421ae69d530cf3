"""Traces of nodes: what is read, what is refused, and what is left of one on a small machine."""

from pathlib import Path

import pytest
from harness.places import TRACES
from hypothesis import given
from hypothesis import strategies as st

from kervan.config import node_trace
from kervan.config.node_trace import NodeChange, NodeTrace
from kervan.errors import ConfigError

STORED = TRACES / "spotserve_0304.txt"


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_the_stored_trace() -> None:
    trace = node_trace.read(STORED)
    assert [(change.at_s, change.word, len(change.nodes)) for change in trace.changes] == [
        (0.0, "add", 7), (240.0, "add", 1), (360.0, "add", 2), (600.0, "remove", 1), (900.0, "add", 1),
        (1200.0, "remove", 2),
    ]  # fmt: skip
    assert trace.end_s == 1320.0


def test_a_trace_without_an_end_ends_with_its_last_change(tmp_path: Path) -> None:
    path = written(tmp_path / "t", '[0, "add", {"nodes": ["a"]}]', "", '[1500, "remove", {"nodes": ["a"]}]')
    assert node_trace.read(path) == NodeTrace((NodeChange(0.0, "add", ("a",)), NodeChange(1.5, "remove", ("a",))), 1.5)


FIRST = '[1000, "add", {"nodes": ["a"]}]'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("add a", r"line 2: 'add a' is not valid JSON \(Expecting value\); write \[240000"),
        ("[" * 100_000, r"line 2: '\[.*' is not valid JSON \(it is nested too deeply\)"),
        ('{"t": 1}', "line 2: .* is not of time, word and nodes"),
        ('[2000, "add"]', "line 2: .* is not of time, word and nodes"),
        ('[2000, "add", ["b"]]', "line 2: .* is not of time, word and nodes"),
        ('["soon", "add", {"nodes": ["b"]}]', "line 2: time 'soon' is not a number of milliseconds"),
        ('[-1, "add", {"nodes": ["b"]}]', "line 2: time -1 is not a number"),
        ('[NaN, "add", {"nodes": ["b"]}]', "line 2: time nan is not a number"),
        ('[true, "add", {"nodes": ["b"]}]', "line 2: time True is not a number"),
        ('[2000, "grow", {"nodes": ["b"]}]', "line 2: 'grow' is none of add, remove and DONE"),
        ('[2000, ["add"], {"nodes": ["b"]}]', r"line 2: \['add'\] is none of"),
        ('[2000, "add", {"nodes": "b"}]', "line 2: nodes 'b' is not a list of names"),
        ('[2000, "add", {"nodes": [7]}]', r"line 2: nodes \[7\] is not a list of names"),
        ('[2000, "add", {"nodes": []}]', r"line 2: nodes \[\] names none"),
        ('[2000, "add", {"nodes": ["b", "b"]}]', "line 2: nodes .* names one twice"),
        ('[2000, "add", {"nodes": ["a"]}]', "line 2: a is there already; remove it first"),
        ('[2000, "remove", {"nodes": ["b"]}]', "line 2: b is not there; add it first"),
        ('[500, "add", {"nodes": ["b"]}]', "line 2: 0.5 s before the line above; sort the lines"),
    ],
)
def test_a_bad_line_is_told(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"node trace .*/t, {why}"):
        node_trace.read(written(tmp_path / "t", FIRST, line))


def test_what_is_no_trace_is_told(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path, "cannot be read"),
        (written(tmp_path / "empty"), "has no changes; it needs lines like"),
        (written(tmp_path / "late", FIRST, '[2000, "DONE", {}]'), "nodes None is not a list"),
        (written(tmp_path / "after", FIRST, '[2000, "DONE", {"nodes": []}]', FIRST), "line 3: there is more after"),
    ):
        with pytest.raises(ConfigError, match=why):
            node_trace.read(path)


def test_the_stored_trace_on_two_nodes_ten_times_as_fast() -> None:
    """node-8, -10 and -3 are all that ever go. -3 is there all the time, beside it -8, then -10."""
    assert node_trace.scaled(node_trace.read(STORED), max_nodes=2, speed=10.0) == NodeTrace(
        (
            NodeChange(0.0, "add", ("node-3",)),
            NodeChange(36.0, "add", ("node-8",)),
            NodeChange(60.0, "remove", ("node-8",)),
            NodeChange(90.0, "add", ("node-10",)),
            NodeChange(120.0, "remove", ("node-10", "node-3")),
        ),
        132.0,
    )


def test_a_place_that_is_left_is_taken_at_the_same_time(tmp_path: Path) -> None:
    path = written(tmp_path / "t", FIRST, '[2000, "add", {"nodes": ["b"]}]', '[2000, "remove", {"nodes": ["a"]}]')
    assert node_trace.scaled(node_trace.read(path), max_nodes=1, speed=1.0).changes == (
        NodeChange(1.0, "add", ("a",)),
        NodeChange(2.0, "remove", ("a",)),
        NodeChange(2.0, "add", ("b",)),
    )


def test_a_bound_or_a_speed_that_cannot_be() -> None:
    trace = node_trace.read(STORED)
    for max_nodes, speed in ((0, 1.0), (1, 0.0), (1, float("inf"))):
        with pytest.raises(ValueError, match="max_nodes="):
            node_trace.scaled(trace, max_nodes=max_nodes, speed=speed)


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.sampled_from("abcdef"), min_size=1))), st.integers(1, 6))
def test_what_is_left_happened_so_and_is_never_too_much(steps: list[tuple[int, set[str]]], max_nodes: int) -> None:
    """Each step turns nodes on or off some seconds after the one before."""
    present: set[str] = set()
    changes, at_s = [], 0.0
    for wait_s, nodes in steps:
        at_s += wait_s
        for word, some in (("remove", nodes & present), ("add", nodes - present)):
            if some:
                changes.append(NodeChange(at_s, "add" if word == "add" else "remove", tuple(sorted(some))))
        present ^= nodes
    left = node_trace.scaled(NodeTrace(tuple(changes), at_s), max_nodes=max_nodes, speed=1.0)
    happened = {(change.at_s, change.word, node) for change in changes for node in change.nodes}
    there: set[str] = set()
    for change in left.changes:
        assert {(change.at_s, change.word, node) for node in change.nodes} <= happened
        nodes = set(change.nodes)
        assert nodes.isdisjoint(there) if change.word == "add" else nodes <= there
        there ^= nodes
        assert len(there) <= max_nodes
    assert [change.at_s for change in left.changes] == sorted(change.at_s for change in left.changes)
    if max_nodes == 6:  # all fit, so only those are missing that came and went at once
        assert there == present
