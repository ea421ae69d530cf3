"""docs/memory.md and docs/pipeline.md: measured numbers are those of the records that they name."""

import json
import re

import pipeline_h200
from harness.places import REPOSITORY

MEMORY = (REPOSITORY / "docs/memory.md").read_text()
PIPELINE = (REPOSITORY / "docs/pipeline.md").read_text()
GIB = 2**30


def test_the_measured_techniques_are_those_of_the_record() -> None:
    match = re.search(r"^<!-- measured: (\S+) -->\n((?:\|.*\n)+)", MEMORY, re.M)
    assert match is not None
    record = json.loads((REPOSITORY / f"benchmarks/records/{match[1]}.json").read_text())
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in match[2].splitlines()[2:]]
    assert lines == [
        [
            f"`{row['technique']}`",
            *(f"{row[key] / GIB:.2f}" for key in ("peak_bytes", "estimate_bytes", "kept_bytes")),
            f"{row['host_bytes'] / GIB:.1f}",
            f"{1e3 * row['step_s']:,.0f}",
            f"{row['tokens_s']:,.0f}",
        ]
        for row in record["rows"]
    ]
    assert {(row["model"], row["batch"], row["seq"], row["ranks"]) for row in record["rows"]} == {("1b", 4, 2048, 1)}
    worst = max(abs(row["error"]) for row in record["rows"])
    assert f"within {100 * worst:.1f}% of the caching allocator's peak in all {len(record['rows'])} rows" in MEMORY
    assert max(row["before_bytes"] for row in record["rows"]) < 128 << 20

    claims = {claim["claim"]: claim for claim in record["claims"]}
    for said, claim, keys in (
        ("FP16/BF16", "FP16/BF16: -50% memory, +20-50% speed", ("memory",)),
        ("FP16/BF16", "the same, without master weights", ("memory",)),
        ("checkpointing", "checkpointing: -60-80% memory, -20-30% speed", ("memory", "kept", "speed")),
        ("`segments=4`", "segments=4: -75% activations", ("memory", "kept")),
        ("gradient", "gradient and optimizer offload: -30-50% memory, -40-60% speed", ("memory", "speed")),
        ("FlashAttention-2", "the same at 2048", ("memory",)),
    ):
        (line,) = re.findall(rf"^\| {re.escape(said)}.*$", MEMORY, re.M)
        right = line.split("|")[2]
        assert all(f"{100 * claims[claim][key]:.0f}%" in right for key in keys), line


def test_the_table_of_bubbles_is_that_of_its_record_or_is_said_to_have_none() -> None:
    match = re.search(r"^<!-- bubbles: (\S+) -->\n((?:\|.*\n)+)", PIPELINE, re.M)
    if match is None:
        assert "Times and bubbles have no record yet" in PIPELINE
        return
    assert "no record yet" not in PIPELINE
    record = json.loads((REPOSITORY / f"benchmarks/records/{match[1]}.json").read_text())
    assert match[2].strip() == pipeline_h200.table(record)
