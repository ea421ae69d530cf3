"""When nodes of a spot market came and went: a recorded trace, cut down to a few nodes and sped up. Pure."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kervan.errors import ConfigError
from kervan.facts.markup import json_value

Word = Literal["add", "remove"]
END = "DONE"
FORM = '[240000, "add", {"nodes": ["node-7"]}]'


@dataclass(frozen=True, slots=True)
class NodeChange:
    """Nodes that come or go `at_s` seconds after the start."""

    at_s: float
    word: Word
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeTrace:
    """Changes in order of time; the trace ends at `end_s`."""

    changes: tuple[NodeChange, ...]
    end_s: float


@dataclass(frozen=True, slots=True)
class _Life:
    """One stay of a node: it is there in [begin_s, end_s), to infinity if it is never removed."""

    node: str
    begin_s: float
    end_s: float


def read(path: Path) -> NodeTrace:
    """A trace with lines like `[240000, "add", {"nodes": ["node-7"]}]`: milliseconds, add or remove, nodes.

    A line `[1320000, "DONE", {"nodes": []}]` says when it ends; without one, it ends with the last change.

    Raises: ConfigError, with the line, for a missing file or a line that is not so, or not possible.
    Source: the format of https://github.com/Hsword/SpotServe.
    """
    changes: list[NodeChange] = []
    present: set[str] = set()
    end_s, is_over = 0.0, False
    for number, line in _lines(path):
        try:
            at_s, word, nodes = _parsed(line)
            if is_over:
                raise ValueError(f"there is more after {END}")
            if at_s < end_s:
                raise ValueError(f"{end_s - at_s:g} s before the line above; sort the lines by time")
            end_s, is_over = at_s, word == END
            if word == END:
                continue
            if word == "add" and (twice := present.intersection(nodes)):
                raise ValueError(f"{', '.join(sorted(twice))} is there already; remove it first")
            if word == "remove" and (unknown := set(nodes) - present):
                raise ValueError(f"{', '.join(sorted(unknown))} is not there; add it first")
        except ValueError as error:
            raise ConfigError(f"node trace {path}, line {number}: {error}") from error
        present = present.union(nodes) if word == "add" else present.difference(nodes)
        changes.append(NodeChange(at_s, "add" if word == "add" else "remove", nodes))
    if not changes:
        raise ConfigError(f"node trace {path} has no changes; it needs lines like {FORM}")
    return NodeTrace(tuple(changes), end_s)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"node trace {path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _parsed(line: str) -> tuple[float, str, tuple[str, ...]]:
    """Raises: ValueError."""
    try:
        row: Any = json_value(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{line[:40]!r} is not valid JSON ({reason}); write {FORM}") from error
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[2], dict):
        raise ValueError(f"{line[:40]!r} is not of time, word and nodes; write {FORM}")
    at_ms, word, nodes = row[0], row[1], row[2].get("nodes")
    if isinstance(at_ms, bool) or not isinstance(at_ms, int | float) or not 0 <= at_ms < math.inf:
        raise ValueError(f"time {at_ms!r} is not a number of milliseconds, 0 or more")
    if word not in (*get_args(Word), END):
        raise ValueError(f"{word!r} is none of add, remove and {END}")
    if not isinstance(nodes, list) or not all(isinstance(node, str) and node for node in nodes):
        raise ValueError(f"nodes {nodes!r} is not a list of names")
    if len(set(nodes)) != len(nodes) or (not nodes and word != END):
        raise ValueError(f"nodes {nodes!r} names {'one twice' if nodes else 'none'}")
    return at_ms / 1000, word, tuple(nodes)


def scaled(trace: NodeTrace, *, max_nodes: int, speed: float) -> NodeTrace:
    """The trace with at most `max_nodes` nodes at a time, in a `speed`th of the time.

    All that is left happened so. Nodes that were removed come first, those that were removed earliest before others,
    because they are what is to be tried; then those that came last.

    Raises: ValueError for a bound or a speed that is not above 0.
    """
    if max_nodes < 1 or not 0 < speed < math.inf:
        raise ValueError(f"max_nodes={max_nodes}, speed={speed}")
    chosen: list[_Life] = []
    for life in sorted(_lives(trace), key=lambda life: (life.end_s, -life.begin_s, life.node)):
        if _most([*chosen, life]) <= max_nodes:
            chosen.append(life)
    kept: dict[tuple[float, Word], list[str]] = {}
    for life in chosen:
        kept.setdefault((life.begin_s, "add"), []).append(life.node)
        if life.end_s < math.inf:
            kept.setdefault((life.end_s, "remove"), []).append(life.node)
    # What goes goes first, so that its place is free for what comes at the same time.
    order = sorted(kept, key=lambda change: (change[0], change[1] == "add"))
    changes = tuple(NodeChange(at_s / speed, word, tuple(sorted(kept[at_s, word]))) for at_s, word in order)
    return NodeTrace(changes, trace.end_s / speed)


def _lives(trace: NodeTrace) -> list[_Life]:
    begun: dict[str, float] = {}
    lives = []
    for change in trace.changes:
        for node in change.nodes:
            if change.word == "add":
                begun[node] = change.at_s
            elif (begin_s := begun.pop(node)) < change.at_s:
                lives.append(_Life(node, begin_s, change.at_s))
    return [*lives, *(_Life(node, begin_s, math.inf) for node, begin_s in begun.items())]


def _most(lives: Sequence[_Life]) -> int:
    """The most that are there at once: some life's begin is such a time."""
    return max(sum(other.begin_s <= life.begin_s < other.end_s for other in lives) for life in lives)
