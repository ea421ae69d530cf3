"""Tables of the docs are those of the records that they name."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encryption
import prefix_chats
import prefix_policies
import pytest
from harness.places import REPOSITORY

LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
Getter = Callable[[dict[str, Any]], list[float]]


def _milliseconds(level: dict[str, Any]) -> list[float]:
    values = level["added_ttft_p50_s"]
    return [1e3 * value for value in (level["added_ttft_p50_median_s"], min(values), max(values))]


def _ratio(level: dict[str, Any]) -> list[float]:
    return [level["ratio_median"], level["ratio_min"], level["ratio_max"]]


def _speed(side: str) -> Getter:
    return lambda level: [level[side]["out_tok_s"]]


def _cpu(side: str, part: str) -> Getter:
    return lambda level: [level[side]["cpu_us_per_token"][part]]


def _memory(side: str, part: str) -> Getter:
    def values(level: dict[str, Any]) -> list[float]:
        largest = max(level[side][f"{part}_memory"], key=lambda process: process["rss_bytes"])
        return [largest["rss_bytes"] / 1e9, largest["uss_bytes"] / 1e9]

    return values


def _of(side: str, key: str) -> Getter:
    return lambda level: [1e3 * level[side][key]]


def _against(name: str) -> dict[str, Getter]:
    """Columns that compare kervan with one of several servers."""
    return {
        "its tok/s": _speed(name),
        **{f"its {key[:4].upper()}, ms": _of(name, key) for key in ("ttft_p50_s", "tpot_p50_s")},
        **{f"kervan {key[:4].upper()}, ms": _of("kervan", key) for key in ("ttft_p50_s", "tpot_p50_s")},
        "kervan CPU": _cpu("kervan", "front"),
        "its CPU": _cpu(name, "front"),
    }


OPPONENTS = {"vLLM": "bare", "Ray Serve LLM": "ray-llm", "the same, direct": "ray-llm-direct"}

# Head of a column in docs/performance.md -> the values of its cell, in their order.
COLUMNS: dict[str, Getter] = {
    "streams": lambda level: [level["concurrency"]],
    "pairs": lambda level: [level["pairs"]],
    "kervan tok/s": _speed("kervan"),
    "vLLM tok/s": _speed("bare"),
    "naive tok/s": _speed("naive"),
    "ratio": _ratio,
    "factor": _ratio,
    "added TTFT p50, ms": _milliseconds,
    "kervan gateways": _cpu("kervan", "front"),
    "vLLM API server": _cpu("bare", "front"),
    "kervan engine": _cpu("kervan", "engine"),
    "vLLM engine": _cpu("bare", "engine"),
    "Ray": _cpu("kervan", "control"),
}
MEMORY_COLUMNS: dict[str, Getter] = {
    "each kervan gateway": _memory("kervan", "front"),
    "vLLM API server": _memory("bare", "front"),
    "kervan engine": _memory("kervan", "engine"),
    "vLLM engine": _memory("bare", "engine"),
}
TABLE = re.compile(r"^<!-- numbers: (\S+) -->\n((?:\|.*\n)+)", re.M)


def measured() -> list[Any]:
    """(record, heads, cells) of each row in a marked table."""
    found = []
    for record, table in TABLE.findall((REPOSITORY / "docs/performance.md").read_text()):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found += [pytest.param(record, lines[0], row, id=f"{Path(record).stem} {row[0]}") for row in lines[2:]]
    return found


def test_the_performance_page_has_numbers() -> None:
    assert len(measured()) >= 8


@pytest.mark.parametrize(("record", "heads", "cells"), measured())
def test_numbers_are_those_of_the_record(record: str, heads: list[str], cells: list[str]) -> None:
    summary = json.loads((REPOSITORY / record).read_text())["summary"]
    named = OPPONENTS[cells[heads.index("against")]] if "against" in heads else summary[0]["against"]
    level = next(row for row in summary if (row["concurrency"], row["against"]) == (int(cells[0]), named))
    assert level["pairs_with_errors"] == 0
    columns = COLUMNS | (MEMORY_COLUMNS if "each kervan gateway" in heads else {})
    if "against" in heads:
        columns |= _against(named)
    for head, cell in zip(heads, cells, strict=True):
        if head == "against":
            continue
        written = re.findall(r"-?\d+(?:\.\d+)?", cell)
        real = columns[head](level)
        rounded = [f"{v:.{len(w.partition('.')[2])}f}" for v, w in zip(real, written, strict=True)]
        assert written == rounded, head


def test_the_table_of_tools_is_that_of_the_record() -> None:
    text = (REPOSITORY / "docs/bench.md").read_text()
    match = re.search(r"^<!-- truth: (\S+) -->\n((?:\|.*\n)+)", text, re.M)
    assert match is not None
    found = json.loads((REPOSITORY / match[1]).read_text())["rows"]
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    for streams, *cells in lines:
        for tool, cell in zip(heads[1:], cells, strict=True):
            name = tool.removesuffix(" bench") if tool == "kervan bench" else tool
            seen = [
                row["seen"]["ttft_p50_ms"] for row in found if (row["tool"], row["streams"]) == (name, int(streams))
            ]
            assert cell == f"{min(seen):.1f} - {max(seen):.1f}", (tool, streams)


# What docs/twins.md says in a row -> the values in the parts of the record.
TWIN_ROWS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "fleet client, 16 replicas, 1,024 streams": lambda parts: _spread(parts["client"], 1024),
    "fleet client, 16 replicas, 256 streams": lambda parts: _spread(parts["client-by-streams"], 256),
    "gateway as a whole, 1,024 streams": lambda parts: _spread(parts["fleet-16"], 1024, "gateway_us_per_token"),
    "shell around vLLM's app, per request": lambda parts: [parts["shell"]["shell_us_per_request"]],
    "routing decision, 256 replicas": lambda parts: [parts["routing"]["runs"][-1]["us"]],
    "a twin": lambda parts: [parts["fleet-64"]["memory"]["twin"]["pss_mib"]],
    "its Ray actor": lambda parts: [parts["fleet-64"]["memory"]["replica actor"]["pss_mib"]],
    "a gateway, 64 streams": lambda parts: [parts["fleet-64"]["memory"]["gateway"]["pss_mib"]],
    "a gateway, 1,024 streams": lambda parts: [parts["fleet-16"]["memory"]["gateway"]["pss_mib"]],
    "64 twins and one gateway, with Ray": lambda parts: [parts["fleet-64"]["memory"]["total_mib"]],
    "16 twins and one gateway come up": lambda parts: [parts["fleet-16"]["start_s"]],
    "64 twins and one gateway come up": lambda parts: [parts["fleet-64"]["start_s"]],
}


def _spread(part: dict[str, Any], streams: int, name: str = "client_us_per_token") -> list[float]:
    found = sorted(run[name] for run in part["runs"] if run["streams"] == streams)
    return [statistics.median(found), found[0], found[-1]]


def test_the_costs_of_twins_are_those_of_the_record() -> None:
    match = re.search(r"^<!-- twins: (\S+) -->\n((?:\|.*\n)+)", (REPOSITORY / "docs/twins.md").read_text(), re.M)
    assert match is not None
    parts = json.loads((REPOSITORY / match[1]).read_text())["parts"]
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    assert {what for what, _ in lines} == TWIN_ROWS.keys()
    for what, cell in lines:
        written = re.findall(r"\d+(?:\.\d+)?", cell.replace(",", ""))
        real = [f"{v:.{len(w.partition('.')[2])}f}" for v, w in zip(TWIN_ROWS[what](parts), written, strict=True)]
        assert written == real, what


def _table(page: str, marker: str) -> tuple[list[Any], list[list[str]]]:
    """The records that the marker above a table names, and its rows."""
    match = re.search(rf"^<!-- {marker}: (.+?) -->\n((?:\|.*\n)+)", (REPOSITORY / "docs" / page).read_text(), re.M)
    assert match is not None
    found = [json.loads((REPOSITORY / f"benchmarks/records/{name}.json").read_text()) for name in match[1].split()]
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    return found, lines


def test_the_gateways_on_a_large_host_are_those_of_the_record() -> None:
    (record,), lines = _table("twins.md", "gateways")
    scaling = record["parts"]["scaling"]
    alone = {run["streams"]: run["client_us_per_token"] for run in scaling["client"]}
    runs = {(str(run["gateways"]), f"{run['streams']:,}"): run for run in scaling["runs"]}
    assert {(gateways, streams) for gateways, streams, *_ in lines} == runs.keys()
    for gateways, streams, *cells in lines:
        run = runs[gateways, streams]
        assert not run["errors"]
        assert cells == [
            f"{run['tok_s']:,.0f}",
            f"{run['tok_s'] / run['twins_offer_tok_s']:.0%}",
            f"{run['tokens_per_chunk']:.1f}",
            f"{run['tok_s_per_gateway_core']:,.0f}",
            f"{run['gateway_us_per_token']:.0f}, {alone[run['streams'] // run['gateways']]:.1f}",
        ], (gateways, streams)


def test_ways_of_routing_are_those_of_the_records() -> None:
    page = (REPOSITORY / "docs/performance.md").read_text()
    match = re.search(r"^<!-- policies: (.+?) -->\n((?:\|.*\n)+)", page, re.M)
    assert match is not None
    rows = [
        row
        for name in match[1].split()
        for row in json.loads((REPOSITORY / f"benchmarks/records/{name}.json").read_text())["rows"]
    ]
    assert match[2].strip() == prefix_policies.by_load(rows)


def test_chats_on_a_fleet_are_those_of_the_record() -> None:
    page = (REPOSITORY / "docs/performance.md").read_text()
    tables = re.findall(r"^<!-- chats: (.+?) -->\n((?:\|.*\n)+)", page, re.M)
    assert len(tables) == 2
    for name, table in tables:
        rows = json.loads((REPOSITORY / f"benchmarks/records/{name}.json").read_text())["rows"]
        assert table.strip() == prefix_chats.table(rows)


COMPARED = {
    "ttft_p50_s": "{:.0f} ms", "ttft_p95_s": "{:.0f} ms", "tpot_p50_s": "{:.1f} ms", "tpot_p95_s": "{:.1f} ms",
    "goodput_per_s": "{:.1f}/s", "mean_replicas": "{:.2f}",
}  # fmt: skip


@pytest.mark.parametrize("table", ["simulator", "scaling"])
def test_the_simulator_beside_a_live_fleet_is_that_of_the_record(table: str) -> None:
    (record,), lines = _table("simulator.md", table)
    rows = []
    for key, form in COMPARED.items():
        cells = [load["compared"][key] for load in record["loads"] if key in load["compared"]]
        factor = 1000 if form.endswith(" ms") else 1
        rows.append(
            [
                cell
                for one in cells
                for cell in (
                    form.format(one["live"] * factor),
                    form.format(one["simulated"] * factor),
                    f"{100 * one['apart']:+.0f}%",
                )
            ]
        )
    assert [cells for _, *cells in lines] == [row for row in rows if row]


def test_moves_on_gpus_are_those_of_the_records() -> None:
    found, lines = _table("migration.md", "moves")
    sums: dict[str, list[int]] = {}
    for row in (row for record in found for row in record["rows"] if "same" in row and "naive" not in row["case"]):
        control = row.get("control", {"same": 0, "asked": 0})
        counts = row["same"], row["moved"], control["same"], control["asked"]
        sums[row["engine"]] = [a + b for a, b in zip(sums.get(row["engine"], [0] * 4), counts, strict=True)]
    real = {name: [f"{a:,} of {b:,}", f"{c:,} of {d:,}"] for name, (a, b, c, d) in sums.items()}
    assert {name: cells for name, *cells in lines} == real


def test_how_often_bf16_changes_an_answer_is_that_of_the_record() -> None:
    (record,), lines = _table("migration.md", "flips")
    rows = {(row["engine"], row["sampling"], row["what"]): row for row in record["rows"] if "differ" in row}
    assert lines
    for engine, sampling, *cells in lines:
        both = [rows[engine, sampling, what] for what in ("in batches of 10", "moved at a random token")]
        counts = [f"{row['differ']} of {row['asked']}" for row in both]
        assert cells == [*counts, ", ".join(f"{row['per_1000_tokens']:.1f}" for row in both)]


def test_the_planners_errors_are_those_of_its_records() -> None:
    page = (REPOSITORY / "docs/planner.md").read_text()
    tables = re.findall(r"^<!-- planner errors(?:, open loops|, published)? -->\n((?:\|.*\n)+)", page, re.M)
    command = [sys.executable, str(REPOSITORY / "benchmarks/planner_errors.py"), "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(tables) == 3
    assert "\n".join(tables) == printed


CHAOS_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "disruptions": lambda found: str(found["disruptions"]),
    "streams": lambda found: f"{found['streams']:,}",
    "tokens": lambda found: f"{found['tokens']:,}",
    "broken": lambda found: str(found["broken"]),
    "lost": lambda found: str(found["tokens_lost"]),
    "doubled": lambda found: str(found["tokens_doubled"]),
    "wrong": lambda found: str(found["tokens_wrong"]),
    "moves": lambda found: str(found["moves"]),
    "gap p50": lambda found: f"{1e3 * found['gap_s']['p50']:.0f}",
    "gap p99": lambda found: f"{1e3 * found['gap_s']['p99']:.0f}",
}


def test_the_table_of_chaos_is_that_of_its_records() -> None:
    text = (REPOSITORY / "docs/chaos.md").read_text()
    match = re.search(r"^<!-- chaos records -->\n((?:\|.*\n)+)", text, re.M)
    assert match is not None
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[1].splitlines()]
    assert lines
    for cells in lines:
        link = LINK.fullmatch(cells[0])
        assert link is not None, cells[0]
        found = json.loads((REPOSITORY / "docs" / link[1]).read_text())["result"]
        assert cells[1:] == [CHAOS_COLUMNS[head](found) for head in heads[1:]], cells[0]


def test_what_autogroups_cost_is_that_of_the_records() -> None:
    text = (REPOSITORY / "docs/serving.md").read_text()
    match = re.search(r"^<!-- autogroups -->\n((?:\|.*\n)+)", text, re.M)
    assert match is not None
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[1].splitlines()]
    assert [cells[0].partition("]")[0] for cells in lines] == ["[on", "[off", "[off", "[on"]
    for first, *cells in lines:
        link = LINK.fullmatch(first)
        assert link is not None, first
        record = json.loads((REPOSITORY / "docs" / link[1]).read_text())
        assert record["hardware"]["sched_autogroup"] is first.startswith("[on"), first
        found = record["result"]
        assert cells == [
            f"{found['out_tok_s']:,.0f}",
            f"{1e3 * found['ttft_s']['p50']:,.0f}",
            f"{1e3 * found['ttft_s']['p99']:,.0f}",
            str(found["stalls"]["count"]),
            f"{1e3 * found['stalls']['longest_gap_s']:,.0f}",
            str(found["requests"]["errors"]),
        ], first


def test_what_keys_cost_is_that_of_the_record() -> None:
    ((record,), rows) = _table("keys.md", "keys")
    told = {name: part for name, part in record.items() if isinstance(part, dict) and "cpu_us" in part}
    assert rows == [
        [name, f"{part['cpu_us']:.0f}", "{:.0f} to {:.0f}".format(*part["cpu_us_range"])] for name, part in told.items()
    ]


def test_versions_and_hardware_are_those_of_the_records() -> None:
    text = (REPOSITORY / "docs/performance.md").read_text()
    match = re.search(r"^<!-- versions: (.+?) -->\n(.+?)\n\n", text, re.M | re.S)
    assert match is not None
    section = text[text.index("\n## One H200, compared with vLLM") :]
    for path in match[1].split():
        record = json.loads((REPOSITORY / path).read_text())
        versions, hardware, settings = record["versions"], record["hardware"], record["settings"]
        words = match[2].replace("\n", " ")
        for name, key in (
            ("vLLM", "vllm"),
            ("torch", "torch"),
            ("Ray", "ray"),
            ("Python", "python"),
            ("kervan", "kervan"),
        ):
            assert f"{name} {versions[key]}" in words
        gpu, _, driver = hardware["gpu"].split(", ")
        assert f"driver {driver}" in words
        assert f"One {gpu}, {hardware['cores']} CPU cores" in section
        assert f"{settings['isl']} tokens in and {settings['osl']} out" in section
        assert {len(level["kervan"]["front_memory"]) for level in record["summary"]} == {2}  # "two gateways"


def test_the_cost_of_traces_is_that_of_the_record() -> None:
    words = " ".join((REPOSITORY / "docs/troubleshooting.md").read_text().split())
    cpu = json.loads((REPOSITORY / "benchmarks/records/tracing-cpu-2core-2026-11-30.json").read_text())["cpu"]
    plain, traced = cpu["plain"], cpu["traced"]
    request_ms = [side["cpu_us_per_request"]["median"] / 1e3 for side in (plain, traced)]
    assert f"cost {request_ms[1] - request_ms[0]:.1f} ms of CPU" in words
    assert f"{request_ms[0]:.1f} ms without, {request_ms[1]:.1f} ms with" in words
    told = [[round(side["cpu_us_per_token"][name]) for name in ("median", "min", "max")] for side in (plain, traced)]
    assert "{} us without, {} to {} in four rounds; {} us with, {} to {}".format(*told[0], *told[1]) in words


def test_the_restarts_are_those_of_the_record() -> None:
    text = (REPOSITORY / "docs/serving.md").read_text()
    match = re.search(r"^<!-- restarts: (\S+) -->\n((?:\|.*\n)+)", text, re.M)
    assert match is not None
    of_side = {row["side"]: row for row in json.loads((REPOSITORY / match[1]).read_text())["rows"]}
    _, _, *lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in match[2].splitlines()]
    assert [cells[0] for cells in lines] == ["warm", "`warm_start: false`"]
    for row, cells in zip((of_side["warm"], of_side["cold"]), lines, strict=True):
        assert cells[1] == ", ".join(f"{kill['to_ready_s']:.1f}" for kill in row["kills"])
        assert cells[2] == f"{row['scale']['to_ready_s']:.1f}"
        assert cells[3] == f"{max(kill['longest_gap_s'] for kill in row['kills']):.2f}"
        assert int(cells[4]) == len(row["streams"]["broken"])


def test_what_encryption_costs_is_what_the_record_says() -> None:
    page = (REPOSITORY / "docs/security.md").read_text()
    record = json.loads((REPOSITORY / "benchmarks/records/encryption-cpu-2core-2026-11-30.json").read_text())
    assert encryption.table(record["levels"]) in page
