"""The HTML report of a stored sweep and of its runs: what it says, and that no text of a run can be markup in it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from harness.places import BENCHMARKS

from kervan.bench import html_report
from kervan.bench.prefix_reuse import CachedShare
from kervan.bench.report_plots import ReportedRun
from kervan.bench.sketch import Sketch
from kervan.bench.tally import METRICS

RECORD = json.loads((BENCHMARKS / "records/bench-sweep-1xh200-2026-11-23.json").read_text())
NASTY = "</script><b>&'\""


def runs(count: int) -> list[ReportedRun]:
    """The first runs of the sweep, with made-up distributions behind the curves."""
    shared = {key: value for key, value in RECORD.items() if key != "sweep"}
    sketches = {metric: Sketch() for metric in METRICS}
    for sketch in sketches.values():
        sketch.extend([0.1, 0.2, 0.4])
    contents = copy.deepcopy(RECORD["sweep"][:count])
    return [ReportedRun(f"{c['load']['streams']} streams", {**shared, **c}, sketches) for c in contents]


def write(place: Path, *reported: ReportedRun) -> str:
    path = place / "report.html"
    html_report.write(path, reported)
    return path.read_text()


def figures(page: str) -> Any:
    return json.JSONDecoder().raw_decode(page.rpartition("const figures = ")[2])[0]


def test_one_run(tmp_path: Path) -> None:
    page = write(tmp_path, *runs(1))
    assert figures(page).keys() == {"cdf", "timeline"}
    result = RECORD["sweep"][0]["result"]
    assert f"<b>{result['out_tok_s']:,.0f}</b><span>output tokens/s</span>" in page
    assert "<h2>Distributions</h2>" in page
    assert not any(title in page for title in ("Throughput against latency", "Failed requests", "Faults during"))


def test_the_share_of_the_prefix_cache(tmp_path: Path) -> None:
    (run,) = runs(1)
    assert "prefix cache" not in write(tmp_path, run)
    run.record["result"]["prefix_cache"] = CachedShare("usage", 1340, 4000, 2000).to_dict()
    assert "<b>34%</b><span>of prompt tokens from the prefix cache, 67% of the possible</span>" in write(tmp_path, run)
    run.record["result"]["prefix_cache"] = CachedShare("metrics", 1340, 4000, None).to_dict()
    assert "<span>of prompt tokens from the prefix cache</span>" in write(tmp_path, run)


def test_a_sweep(tmp_path: Path) -> None:
    reported = runs(3)
    page = write(tmp_path, *reported)
    assert figures(page).keys() == {"cdf", "timeline", "sweep"}
    for run in reported:
        assert f'<td class="text">{run.name}</td>' in page
        assert f"<h2>Distributions: {run.name}</h2>" in page


def test_no_text_of_a_run_is_markup(tmp_path: Path) -> None:
    clean = write(tmp_path, *runs(1))
    (run,) = runs(1)
    record: Any = run.record
    record["command"] = record["target"]["model"] = NASTY
    result = record["result"]
    result["doubts"] = [NASTY]
    result["requests"] |= {"by_error": {NASTY: 1, "empty": 2}, "messages": {NASTY: [NASTY], "empty": []}}
    result["reconciliation"]["rows"] = {NASTY: {"client": 1, "server": 2, "agrees": False}}
    effect = {"at_s": 1.0, "tokens_per_s_before": 9.0, "tokens_per_s_lowest": 1.0, "dip": 0.9, "longest_gap_s": 0.1}
    result["faults"] = [{**effect, "command": NASTY, "recovered_after_s": None, "errors": 1}]
    page = write(tmp_path, ReportedRun(NASTY, record, run.sketches))
    for element in ("</script>", "<b>&"):
        assert page.count(element) == clean.count(element)
    # In the title, the headline, the doubt, the fault, the error and its message, the comparison and the command.
    assert page.count("&lt;/script&gt;&lt;b&gt;&amp;&#39;&#34;") == 8
    assert figures(page)["timeline"]["layout"]["annotations"][0]["text"] == "&lt;/script&gt;&lt;b&gt;&amp;&#x27;&quot;"


@pytest.mark.parametrize(
    ("model", "server", "title"),
    [
        ("/models/Qwen3-8B", None, "Load test of Qwen3-8B: 1 streams"),
        ("Qwen/Qwen3-8B", {"gpu": None, "simulated": None}, "Load test of Qwen3-8B: 1 streams"),
        ("m", {"gpu": "H200", "simulated": True}, "Load test of m: 1 streams on simulated H200"),
        ("m", {"gpu": None, "simulated": True}, "Load test of m: 1 streams on simulated GPUs"),
        ("", None, "Load test of http://127.0.0.1:8801: 1 streams"),
    ],
)
def test_the_title(model: str, server: Any, title: str) -> None:
    (run,) = runs(1)
    target: Any = run.record["target"]
    target |= {"model": model, "url": "http://127.0.0.1:8801"}
    result: Any = run.record["result"]
    result["server"] = server
    assert html_report._title([run]) == title


def test_what_the_server_is_and_what_became_of_commands(tmp_path: Path) -> None:
    (run,) = runs(1)
    record: Any = run.record
    record["result"]["server"] = {"words": "kervan 1.0, 2 simulated replicas", "simulated": True}
    record["result"]["notes"] = ["several tokens at once"]
    effect: dict[str, Any] = {
        "at_s": 1.0,
        "tokens_per_s_before": 9.0,
        "tokens_per_s_lowest": 1.0,
        "dip": 0.9,
        "longest_gap_s": 0.1,
    }
    effect |= {"recovered_after_s": None, "errors": 1, "duration_s": 7.0}
    record["result"]["faults"] = [
        {**effect, "command": "true", "exit_code": 0},
        {**effect, "command": "false", "exit_code": 1},
        {**effect, "command": "sleep 1000", "exit_code": None},
    ]
    page = write(tmp_path, run)
    assert "kervan 1.0, 2 simulated replicas \u00b7 times are computed, not those of a GPU" in page
    assert "<li>several tokens at once</li>" in page
    assert "false (exit 1)" in page
    assert "sleep 1000 (did not finish: killed after 7.0 s)" in page
    assert '<td class="text">true</td>' in page


@pytest.mark.parametrize(
    ("doubts", "floor", "status", "expected"),
    [
        ([], {"ttft_s": 0.001, "gap_s": 0.0001}, "agrees", ("Valid", "")),
        ([], None, "unavailable", ("Not calibrated", "open")),
        ([], {"ttft_s": 0.001, "gap_s": 0.0001}, "disagrees", ("Doubtful", "bad")),
        (["late"], None, "agrees", ("Not valid", "bad")),
    ],
)
def test_the_verdict(doubts: list[str], floor: Any, status: str, expected: tuple[str, str]) -> None:
    (run,) = runs(1)
    result = run.record["result"]
    result["doubts"], result["client_floor"], result["reconciliation"]["status"] = doubts, floor, status
    verdict = html_report._verdict([run])
    assert (verdict.word, verdict.kind) == expected
    assert verdict.doubts == tuple(doubts)
