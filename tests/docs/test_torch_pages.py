"""docs/memory.md and docs/pipeline.md: measured numbers are those of the records that they name."""

import json
import math
import re

import memory_h200
import pipeline_h200
from harness.places import REPOSITORY

MEMORY = (REPOSITORY / "docs/memory.md").read_text()
PIPELINE = (REPOSITORY / "docs/pipeline.md").read_text()


RECORDS = {
    name: json.loads((REPOSITORY / f"benchmarks/records/{name}.json").read_text())
    for name in re.findall(r"^<!-- measured: (\S+) -->$", MEMORY, re.M)
}
ROWS = [row for record in RECORDS.values() for row in record["rows"]]


def test_the_measured_techniques_are_those_of_the_records() -> None:
    stored = {path.stem for path in (REPOSITORY / "benchmarks/records").glob("memory-1xh200-*.json")}
    assert set(RECORDS) == stored
    for name, record in RECORDS.items():
        match = re.search(rf"^<!-- measured: {name} -->\n((?:\|.*\n)+)", MEMORY, re.M)
        assert match is not None
        assert match[1].strip() == memory_h200.table(record)
    measured = [row for row in ROWS if not row["problem"]]
    worst = max(abs(row["error"]) for row in measured)
    assert f"within {100 * worst:.1f}% of the caching allocator's peak in all {len(measured)} rows" in MEMORY
    others = math.ceil(max(1e3 * abs(row["error"]) for row in measured if "zero3" not in row["technique"]))
    assert f"within {others / 10:.1f}% in those without ZeRO-3; the two that ran out of memory" in MEMORY
    assert [row["predicted_to_fit"] for row in ROWS if row["problem"]] == [False, False]
    assert {row["ranks"] for row in ROWS} == {1}
    assert max(row["before_bytes"] for row in ROWS) < 128 << 20


def _change(key: str, case: tuple[str, int, int], technique: str, base: str) -> str:
    """In percent, as the docs write it; both rows of one record, since speeds of two runs differ."""
    for record in RECORDS.values():
        rows = {r["technique"]: r for r in record["rows"] if (r["model"], r["batch"], r["seq"]) == case}
        if technique in rows and base in rows:
            return f"{100 * (rows[technique][key] / rows[base][key] - 1):+.0f}%"
    raise AssertionError(f"{technique} and {base} of {case} are in no record together")


def test_what_is_said_is_held_against_the_rows() -> None:
    peak, kept, speed = "peak_bytes", "kept_bytes", "tokens_s"
    one_b = ("1b", 4, 2048)
    checkpoint, offload, states = "bf16,checkpoint", "bf16,offload-optimizer", "bf16,8bit-states"
    for begin, found in (
        ("| FP16/BF16", [_change(peak, one_b, "bf16", "fp32"), _change(peak, one_b, "bf16-only", "fp32")]),
        ("| checkpointing", [_change(key, one_b, checkpoint, "bf16") for key in (peak, kept, speed)]),
        ("| checkpointing", [_change(peak, case, checkpoint, "bf16") for case in (("1b", 1, 16384), ("3b", 2, 2048))]),
        ("| `segments=4`", [_change(key, one_b, "bf16,checkpoint-sequential=4", "bf16") for key in (peak, kept)]),
        (
            "| gradient",
            [_change(key, case, offload, "bf16") for case in (one_b, ("3b", 2, 2048)) for key in (peak, speed)],
        ),
        ("| FlashAttention-2", [_change(key, ("1b", 16, 512), "bf16", "bf16,eager") for key in (peak, speed)]),
        ("| FlashAttention-2", [_change(peak, one_b, "bf16", "bf16,eager")]),
        ("Two that are", [_change(key, one_b, "bf16,chunked-loss", "bf16") for key in (peak, speed)]),
        (
            "Two that are",
            [
                _change(key, ("1b", 1, 16384), "bf16,checkpoint,chunked-loss", checkpoint).replace("+", "")
                for key in (peak, speed)
            ],
        ),
        (
            "Two that are",
            [
                _change(key, case, states, "bf16")
                for case in (("3b", 2, 2048), ("8b", 1, 2048))
                for key in (peak, speed)
            ],
        ),
    ):
        (text,) = re.findall(rf"^{re.escape(begin)}(?:.+\n?)+?(?=\||\n)", MEMORY, re.M)
        right = text.split("|")[2] if begin.startswith("|") else text
        assert [one for one in found if one not in right] == [], text
    zero3 = _change(speed, one_b, "bf16,zero3", "bf16").strip("-")
    assert f"costs {zero3} of the speed" in MEMORY


def test_the_shared_runs_results_are_those_of_its_record() -> None:
    record = json.loads((REPOSITORY / "benchmarks/records/pipeline-shared-1xh200-2026-11-30.json").read_text())
    (text,) = re.findall(r"^## Four ranks on one H200\n+(.*?)^## ", PIPELINE, re.M | re.S)
    rows = {run["schedule"]: run["rows"][0] for run in record["runs"]}
    assert list(rows) == re.findall(r"`([a-z0-9-]+)`", text)[: len(rows)]
    assert all(row["equal_to_unsplit"] and row["output_error"] == 0 for row in rows.values())
    assert f"within {max(row['gradient_error'] for row in rows.values()):.1e}".replace("e-06", "e-6") in text


def test_the_table_of_bubbles_is_that_of_its_record_or_is_said_to_have_none() -> None:
    match = re.search(r"^<!-- bubbles: (\S+) -->\n((?:\|.*\n)+)", PIPELINE, re.M)
    if match is None:
        assert "Times and bubbles have no record yet" in PIPELINE
        return
    assert "no record yet" not in PIPELINE
    record = json.loads((REPOSITORY / f"benchmarks/records/{match[1]}.json").read_text())
    assert match[2].strip() == pipeline_h200.table(record)
