"""Figures of docs/70b.md: predictions are what the planner says today, measurements what the records have."""

import json
import re
import shlex
import subprocess
import sys
from typing import Any

import planner_errors
import pytest
from click.testing import CliRunner
from harness.places import DOCS, MODELS, REPOSITORY

from kervan.cli.plan import plan

PAGE = (DOCS / "70b.md").read_text()
RECORDS = REPOSITORY / "benchmarks/records"
MODEL = str(MODELS / "llama3-70b")


def rows(marker: str) -> list[list[str]]:
    """Cells of all tables under a marker."""
    tables = re.findall(rf"<!-- {marker} -->\n((?:\|.*\n)+)", PAGE)
    assert tables
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()[2:]
    ]


def predicted(gpus: str, layout: str, streams: str) -> dict[str, Any]:
    number, gpu, *fp8 = gpus.split()
    words = ["--gpu", gpu, "--gpus", number, "--layout", layout, "--concurrency", streams, "--json"]
    words += ["--engine-arg", "quantization=fp8"] if fp8 else []
    done = CliRunner().invoke(plan, [MODEL, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (candidate,) = json.loads(done.stdout)["candidates"]
    found: dict[str, Any] = candidate
    return found


def shown(value: float, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}"


@pytest.mark.sweep(3)
@pytest.mark.parametrize("row", rows("predicted"), ids=" ".join)
def test_a_prediction_is_the_planners(row: list[str]) -> None:
    best = predicted(*row[:3])
    times = [shown(best[key]) for key in ("out_tok_s", "ttft_p50_ms", "ttft_p99_ms")]
    assert row[3:] == [*times, shown(best["tpot_p50_ms"], 1)]


def measured(gpus: str, layout: str, streams: str) -> dict[str, Any]:
    """The record's row."""
    if gpus == "4 H200":
        lines = map(json.loads, (RECORDS / "bare-h200-2026-11-22.jsonl").read_text().splitlines())
        wanted = {"model": "llama3-70b", "tp": 4, "isl": 1024, "osl": 256, "concurrency": int(streams)}
        (found,) = [line for line in lines if wanted.items() <= line.items()]
    else:
        name, what = {"tp=2": ("tensor", "tp 2"), "pp=2": ("stages", "tp 1 x pp 2 on 2 nodes")}[layout]
        record = json.loads((RECORDS / f"layouts-{name}-2xh200-2026-11-23.json").read_text())
        assert (record["settings"]["isl"], record["settings"]["osl"]) == (1024, 256)
        (found,) = [row for row in record["rows"] if row["what"] == what and row.get("streams") == int(streams)]
    row: dict[str, Any] = found
    return row


@pytest.mark.parametrize("row", rows("measured"), ids=lambda row: " ".join(row[:3]))
def test_a_measurement_is_the_records(row: list[str]) -> None:
    found = measured(*row[:3])
    assert row[3::2] == [
        shown(found["out_tok_s"]), shown(1e3 * found["ttft_p50_s"]), shown(1e3 * found["tpot_p50_s"], 1)
    ]  # fmt: skip


@pytest.mark.sweep(2)
@pytest.mark.parametrize("row", rows("measured"), ids=lambda row: " ".join(row[:3]))
def test_a_measurement_stands_beside_the_planners_figure(row: list[str]) -> None:
    best = predicted(*row[:3])
    assert row[4::2] == [shown(best["out_tok_s"]), shown(best["ttft_p50_ms"]), shown(best["tpot_p50_ms"], 1)]


def quantiles(times_s: dict[str, float], decimals: int, *names: str) -> str:
    return ", ".join(shown(1e3 * times_s[name], decimals) for name in names)


SERVICE = json.loads((RECORDS / "service-70b-1xh200-2026-11-30.json").read_text())["service"]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("row", rows("fp8 loops"), ids=lambda row: row[0])
def test_a_loop_in_fp8_is_the_records_beside_the_planners_figure(row: list[str]) -> None:
    (found,) = [one for one in SERVICE["loops"] if one["streams"] == int(row[0])]
    assert row[1::2] == [
        shown(found["out_tok_s"]), quantiles(found["ttft_s"], 0, "p50", "p95", "p99"),
        quantiles(found["tpot_s"], 1, "p50", "p99"),
    ]  # fmt: skip
    best = predicted("1 H200 FP8", "tp=1", row[0])
    times = [
        ", ".join(shown(best[f"{name}_{q}_ms"], n) for q in ("p50", "p99")) for name, n in (("ttft", 0), ("tpot", 1))
    ]
    assert row[2::2] == [shown(best["out_tok_s"]), *times]


@pytest.mark.parametrize("row", rows("fp8 rates"), ids=lambda row: row[0])
def test_a_rate_in_fp8_is_the_records_beside_what_is_predicted_of_its_arrivals(row: list[str]) -> None:
    (found,) = [one for one in planner_errors.service_rates() if one["rate"] == float(row[0])]
    errors = planner_errors.open_error(found, planner_errors.specs()).errors
    said = {
        name: {q: found[key][q] * (1 + errors[f"{name}_{q}"]) for q in ("p50", "p99")}
        for name, key in (("ttft", "ttft_from_arrival"), ("tpot", "tpot"))
    }
    assert row[1:] == [
        shown(found["ok"] / found["seconds"], 1), shown(found["req_s"], 1), shown(found["out_tok_s"]),
        f"{found['slo_share']:.0%}", quantiles(found["ttft_from_arrival"], 0, "p50", "p95", "p99"),
        quantiles(said["ttft"], 0, "p50", "p99"), quantiles(found["tpot"], 1, "p50", "p99"),
        quantiles(said["tpot"], 1, "p50", "p99"),
    ]  # fmt: skip


def test_what_a_kill_and_a_drain_cost_is_the_records() -> None:
    runs = json.loads((RECORDS / "service-70b-moves-1xh200-2026-11-30.json").read_text())["moves"]["runs"]
    assert rows("fp8 moves") == [
        [
            one["what"], shown(one["out_tok_s"]), str(one["ok"]), str(one["errors"]),
            *(shown(1e3 * one["gap_s"][q], 1) for q in ("p50", "p99")), shown(one["gap_s"]["max"], 2),
        ]
        for one in runs
    ]  # fmt: skip
    before = [shown(fault["tokens_per_s_before"]) for one in runs for fault in one["faults"]]
    assert f"had {' and '.join(before)} tokens/s too" in " ".join(PAGE.split())


def test_the_simulation_has_its_load_and_policies_and_fewer_replicas_cost_less() -> None:
    """Figures of policies change whenever one of them learns something."""
    found = re.search(r"<!-- simulated -->\n```text\n\$ kervan (simulate .*)\n(.*\n)(.*\n)((?:.*\n)+?)```", PAGE)
    assert found is not None
    words = [sys.executable, "-m", "kervan", *shlex.split(found[1]), "--processes", "1"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True)
    load, head, *lines = done.stdout.splitlines()
    assert [load, head.rstrip()] == [found[2].strip(), found[3].strip()]
    told = {line.split()[0]: line.split() for line in found[4].splitlines()}
    now = {line.split()[0]: line.split() for line in lines if line.split()[0] in told}
    assert list(now) == list(told)
    assert now["fixed:4"] == told["fixed:4"]  # no policy in it
    assert float(now["slo"][4]) < float(now["fixed:4"][4])
    assert float(now["slo"][1].rstrip("%")) > 99


def test_prices_of_the_page_are_the_plans() -> None:
    dollars = re.search(
        r"price file\]\(hardware.md#prices\) ([\d.]+) USD for the layout above on H200, ([\d.]+) for TP4", PAGE
    )
    assert dollars is not None
    done = CliRunner().invoke(plan, [MODEL, "--gpu", "H200", "--gpus", "8", "--json"], catch_exceptions=False)
    candidates = json.loads(done.stdout)["candidates"]
    by_layout = {(one["tp"], one["pp"], one["dp"]): one["usd_per_mtok"] for one in candidates if one["fits"]}
    assert [f"{by_layout[key]:.2f}" for key in ((2, 1, 4), (4, 2, 1))] == list(dollars.groups())
