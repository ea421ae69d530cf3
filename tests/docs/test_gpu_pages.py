"""docs/profiling.md and docs/gpus.md quote their records of one H200."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from harness.places import REPOSITORY

from kervan.observe.dcgm import COUNTERS

RECORDS = REPOSITORY / "benchmarks" / "records"
PROFILING, GPUS = ((REPOSITORY / "docs" / name).read_text() for name in ("profiling.md", "gpus.md"))
LOADS = {
    str(load["streams"]): load for load in json.loads((RECORDS / "profile-1xh200-2026-11-30.json").read_text())["loads"]
}
Load = dict[str, Any]


def rows_of(page: str, marker: str) -> tuple[list[str], list[list[str]]]:
    match = re.search(rf"^<!-- {marker} -->\n((?:\|.*\n)+)", page, re.M)
    assert match is not None, marker
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[1].splitlines()]
    return heads, rows


def share(key: str, name: str) -> Callable[[Load], float]:
    return lambda load: 100 * load["read_again"][key].get(name, 0.0)


COLUMNS: dict[str, dict[str, Callable[[Load], float]]] = {
    "gpu": {
        **{name: share("shares", name) for name in ("memory", "compute", "host", "copies")},
        "of it, reading the KV cache": lambda load: 100 * load["read_again"]["cache_reading"],
        "a step, ms": lambda load: 1e3 * load["profile"]["steps"]["step_s"],
        "prompts, % of the tokens": lambda load: 100 * load["profile"]["steps"]["prefill_share"],
    },
    "loop": {
        name: share("host_shares", name)
        for name in (
            "waiting for the GPU", "rest of the model runner", "sampling", "prepare inputs", "schedule",
            "update requests", "other",
        )
    },
    "cost": {
        "before": lambda load: load["tok_s_before"],
        "during": lambda load: load["tok_s_profiled"],
        "after": lambda load: load["tok_s_after"],
        "stood still, s": lambda load: load["profile"]["steps"]["standstill_s"],
    },
}  # fmt: skip


@pytest.mark.parametrize("table", COLUMNS)
def test_shares_and_speeds_are_those_of_the_record(table: str) -> None:
    heads, rows = rows_of(PROFILING, f"profile: {table}")
    assert [row[0] for row in rows] == list(LOADS)
    for streams, *cells in rows:
        for head, cell in zip(heads[1:], cells, strict=True):
            digits = len(cell.partition(".")[2])
            assert cell == f"{COLUMNS[table][head](LOADS[streams]):,.{digits}f}", (streams, head)


def test_the_top_kernels_are_those_of_the_record() -> None:
    _, rows = rows_of(PROFILING, "profile: kernels")
    for streams, *cells in rows:
        kernels = LOADS[streams]["read_again"]["kernels"][: len(cells)]
        assert cells == [f"{kernel['name']} {100 * kernel['share']:.1f}" for kernel in kernels]


def test_the_gateways_parts_are_those_of_the_record() -> None:
    heads, rows = rows_of(PROFILING, "profile: gateway")
    gateways = [LOADS[head.split()[0]]["profile"]["gateways"][0] for head in heads[1:]]
    for part, *cells in rows:
        found = [
            gateway["us_per_token"] if part == "all" else gateway["us_per_token_by_part"].get(part, 0.0)
            for gateway in gateways
        ]
        assert cells == [f"{us:.1f}" for us in found], part


def test_the_counters_are_those_of_the_record() -> None:
    name = "gpu-counters-1xh200-2026-11-30"
    heads, rows = rows_of(GPUS, f"counters: {name}")
    loads = json.loads((RECORDS / f"{name}.json").read_text())["loads"]
    assert [row[0] for row in rows] == list(loads)
    by_short = {counter.short: counter.name for counter in COUNTERS}
    for load, *cells in rows:
        for head, cell in zip(heads[1:], cells, strict=True):
            short, _, unit = head.partition(", ")
            value = loads[load][by_short[short]] / (1e9 if unit else 1)
            assert cell == f"{value:.{len(cell.partition('.')[2])}f}", (load, head)
