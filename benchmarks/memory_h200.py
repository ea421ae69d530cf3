"""What training techniques take and cost on one GPU: every row of docs/memory.md, about 10 minutes on an H200.

    python benchmarks/memory_h200.py --out DIR [--only SUBSTRING] [--device cpu --tiny]

In two calls of about 5 minutes, each with the rows of one record:

    python benchmarks/memory_h200.py --out DIR --rows-of benchmarks/records/memory-1xh200-2026-11-30.json
    python benchmarks/memory_h200.py --out DIR --rows-of benchmarks/records/memory-1xh200-2026-11-30-2.json

`--without RECORD`, once or more, runs the rows that these records do not have. `--table RECORD ...` prints the tables
of records and runs nothing; with `--plot FILE.svg` it draws docs/memory-techniques.svg of them, with matplotlib.

Writes one file into DIR, the record with the snapshots' summaries, and prints the table of rows, the estimates' errors,
and the claims that are copied from page to page beside what was measured.
"""

import argparse
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kervan.bench import records
from kervan.cli.memory import print_measured
from kervan.errors import KervanError
from kervan.memory import measure, snapshots
from kervan.memory.estimate import GIB
from kervan.memory.measure import Case, Measured, MeasurePlan
from kervan.memory.shape import NAMED
from kervan.memory.techniques import parse

# (model, sequence, batch): the techniques. The first of a group is what the others are compared with.
GROUPS: dict[tuple[str, int, int], tuple[str, ...]] = {
    ("1b", 2048, 4): (
        "fp32", "tf32", "autocast", "bf16", "bf16-only", "bf16,checkpoint", "bf16,checkpoint-selective",
        "bf16,checkpoint-sequential=2", "bf16,checkpoint-sequential=4", "bf16,checkpoint-sequential=16",
        "bf16,eager", "bf16,sdpa-math", "bf16,sdpa-efficient", "bf16,sdpa-cudnn", "bf16,chunked-loss",
        "bf16,checkpoint,chunked-loss", "bf16,bf16-states", "bf16,8bit-states", "bf16,offload-optimizer",
        "bf16,offload-activations", "bf16,fsdp", "bf16,fsdp,offload-params",
    ),
    ("1b", 512, 16): ("bf16", "bf16,eager", "bf16,checkpoint"),
    ("1b", 4096, 2): ("bf16", "bf16,eager", "bf16,checkpoint"),
    ("1b", 16384, 1): ("bf16", "bf16,eager", "bf16,checkpoint", "bf16,checkpoint,chunked-loss"),
    ("3b", 2048, 2): ("bf16", "bf16,checkpoint", "bf16,offload-optimizer", "bf16,8bit-states"),
    ("8b", 2048, 1): ("bf16-only", "bf16-only,checkpoint", "bf16", "bf16,checkpoint,chunked-loss", "bf16,8bit-states"),
}  # fmt: skip
ZERO: dict[tuple[str, int, int], tuple[str, ...]] = {
    ("1b", 2048, 4): (
        "bf16,zero1", "bf16,zero2", "bf16,zero3", "bf16,zero2,offload-optimizer",
        "bf16,zero3,offload-optimizer,offload-params", "bf16,zero3,checkpoint",
    ),
}  # fmt: skip
SNAPSHOTS: dict[tuple[str, int, int], tuple[str, ...]] = {("1b", 2048, 4): ("bf16", "bf16,checkpoint")}
# What pages say, the row that is compared, and with which.
CLAIMS = (
    ("FP16/BF16: -50% memory, +20-50% speed", ("1b", 2048, 4), "bf16", "fp32"),
    ("the same, against TF32", ("1b", 2048, 4), "bf16", "tf32"),
    ("the same, without master weights", ("1b", 2048, 4), "bf16-only", "fp32"),
    ("checkpointing: -60-80% memory, -20-30% speed", ("1b", 2048, 4), "bf16,checkpoint", "bf16"),
    (
        "gradient and optimizer offload: -30-50% memory, -40-60% speed",
        ("1b", 2048, 4),
        "bf16,offload-optimizer",
        "bf16",
    ),
    ("the same at 3B", ("3b", 2048, 2), "bf16,offload-optimizer", "bf16"),
    ("ZeRO-3: -85% memory, -30-50% speed (one rank)", ("1b", 2048, 4), "bf16,zero3", "bf16"),
    ("FlashAttention-2: -30% memory, +30-60% speed, at 512", ("1b", 512, 16), "bf16", "bf16,eager"),
    ("the same at 2048", ("1b", 2048, 4), "bf16", "bf16,eager"),
    ("the same at 4096", ("1b", 4096, 2), "bf16", "bf16,eager"),
    ("the same at 16384", ("1b", 16384, 1), "bf16", "bf16,eager"),
    ("segments=4: -75% activations", ("1b", 2048, 4), "bf16,checkpoint-sequential=4", "bf16"),
)


def main() -> int:
    """Exit status: 0, or 1 when an estimate is off by more than 10%, or a row failed that was predicted to fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path)
    to.add_argument("--table", type=_record, nargs="+", metavar="RECORD", help="print their tables, and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="with --table: peak and speed of the first case")
    parser.add_argument("--only", default="", help="rows whose text has this")
    parser.add_argument("--rows-of", type=_record, metavar="RECORD", help="only rows that this record has")
    parser.add_argument(
        "--without", type=_record, action="append", default=[], metavar="RECORD", help="only rows that it does not have"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same rows on a tiny model, to try the script")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--for", dest="for_s", type=float, default=720.0, help="seconds for all rows")
    options = parser.parse_args()
    if options.table is not None:
        print(*map(table, options.table), sep="\n\n")
        if options.plot is not None:
            plot(options.table, options.plot)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + options.for_s
    rows: list[Measured] = []
    holders: dict[str, Any] = {}
    notes: list[str] = []
    for groups, recorded in ((SNAPSHOTS, True), (GROUPS, False), (ZERO, False)):
        if recorded and options.device == "cpu":
            continue
        cases = tuple(_cases(groups, options, recorded=recorded))
        if not cases:
            continue
        if groups is ZERO and importlib.util.find_spec("deepspeed") is None:
            notes.append("ZeRO rows left out: deepspeed is not installed")
            continue
        plan = MeasurePlan(
            cases=cases, device=options.device, steps=options.steps, snapshots=options.out if recorded else None
        )  # fmt: skip
        try:
            for row in measure.run(plan, for_s=max(20.0, end_s - time.monotonic())):
                if isinstance(row, str):
                    print(f"[{options.for_s - (end_s - time.monotonic()):5.0f} s] {row}", file=sys.stderr, flush=True)
                elif recorded and row.snapshot:
                    found = snapshots.holders(snapshots.read(Path(row.snapshot)))
                    holders[f"{row.model} {row.technique}"] = [one.to_dict() for one in found]
                    Path(row.snapshot).unlink()  # hundreds of MB; the summary stays
                elif not recorded:
                    rows.append(row)
        except KervanError as error:
            notes.append(str(error))
    content: dict[str, Any] = {
        "rows": [row.to_dict() for row in rows],
        "holders": holders,
        "notes": notes,
        "claims": list(_claims(rows)),
    }
    command = shlex.join(["python", "benchmarks/memory_h200.py", *_arguments(options)])
    path = records.write(options.out, {**records.record("memory", content), "command": command})
    for name, lines in holders.items():
        print(name)
        for line in lines[:8]:
            print(f"  {line['gib']:8.2f} GiB  {line['where']}")
    print_measured(rows)
    for claim in content["claims"]:
        print(
            f"{claim['claim']}: {claim['with']} against {claim['without']}, {claim['batch']} x {claim['seq']}: "
            f"memory {100 * claim['memory']:+.0f}%, kept activations {100 * claim['kept']:+.0f}%, "
            f"speed {100 * claim['speed']:+.0f}%"
        )
    good = [row for row in rows if not row.problem and row.has_clean_base]
    far = [row for row in good if abs(row.error) > 0.10]
    for note in notes:
        print(f"not complete: {note}")
    for row in far:
        print(f"estimate off by {100 * row.error:+.1f}%: {row.model} {row.technique}, {row.batch} x {row.seq}")
    unlike = [row for row in rows if row not in good and not (row.is_out_of_memory and not row.is_predicted_to_fit)]
    for row in unlike:
        print(f"not measured: {row.model} {row.technique}, {row.batch} x {row.seq}: {row.verdict}")
    too_large = len(rows) - len(good) - len(unlike)
    print(
        f"{len(good)} of {len(rows)} rows measured, {len(good) - len(far)} estimates within 10%, {too_large} did not "
        f"fit, as predicted; record: {path}"
    )
    return 1 if far or notes or unlike else 0


def table(record: dict[str, Any]) -> str:
    """As in docs/memory.md; with a first column for the case where there are several."""
    cases = [f"{row['model'].upper()}, {row['batch']} x {row['seq']:,}" for row in record["rows"]]
    has_cases = len(set(cases)) > 1
    columns = ("technique", "peak, GiB", "estimate", "kept by forward", "on the host", "step, ms", "tokens/s")
    heads = (("shape, sequences x tokens",) if has_cases else ()) + columns
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, row in zip(cases, record["rows"], strict=True):
        estimate = f"{row['estimate_bytes'] / GIB:.2f}"
        sizes = [
            f"{row['peak_bytes'] / GIB:.2f}", estimate, f"{row['kept_bytes'] / GIB:.2f}",
            f"{row['host_bytes'] / GIB:.1f}", f"{1e3 * row['step_s']:,.0f}", f"{row['tokens_s']:,.0f}",
        ]  # fmt: skip
        cells = ["does not fit", estimate, "-", "-", "-", "-"] if row["problem"] else sizes
        lines.append("| " + " | ".join(([case] if has_cases else []) + [f"`{row['technique']}`", *cells]) + " |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Peaks of the first record's case in all records, the speed beside each; of rows measured twice, the first."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kervan"
    from matplotlib import pyplot

    case = ("model", "seq", "batch")
    first = found[0]["rows"][0]
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for record in found for row in record["rows"]):
        if not row["problem"] and all(row[key] == first[key] for key in case):
            rows.setdefault(row["technique"], row)
    ordered = sorted(rows.values(), key=lambda row: -row["peak_bytes"])
    peaks = [row["peak_bytes"] / GIB for row in ordered]
    kept = [row["kept_bytes"] / GIB for row in ordered]
    figure, axis = pyplot.subplots(figsize=(9, 7))
    names = [row["technique"] for row in ordered]
    axis.barh(names, peaks, color="#c9d3df", label="peak")
    axis.barh(names, kept, color="#4477aa", label="of it, kept by the forward pass")
    for place, row in enumerate(ordered):
        axis.text(peaks[place] + 0.6, place, f"{row['tokens_s']:,.0f} tokens/s", va="center", fontsize=8)
    axis.set(
        xlabel="GiB", xlim=(0, 1.2 * max(peaks)),
        title=f"{first['model'].upper()}, {first['batch']} x {first['seq']:,} tokens, one H200",
    )  # fmt: skip
    axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _record(path: str) -> dict[str, Any]:
    """Of an option. Raises: argparse's error for a file that is no record of memory."""
    try:
        record: dict[str, Any] = json.loads(Path(path).read_text())
        if record["what"] != "memory":
            raise KeyError("what")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path} is no record of this script: {error}") from error
    return record


def _has(record: dict[str, Any], model: str, seq: int, batch: int, technique: str, *, recorded: bool) -> bool:
    """Whether a record has a row; `recorded`: whose memory it was at the row's peak."""
    if recorded:
        return f"{model} {technique}" in record["holders"]
    keys = ("model", "seq", "batch", "technique")
    return any([row[key] for key in keys] == [model, seq, batch, technique] for row in record["rows"])


def _cases(
    groups: dict[tuple[str, int, int], tuple[str, ...]], options: argparse.Namespace, *, recorded: bool
) -> Iterator[Case]:
    for (model, seq, batch), techniques in groups.items():
        for text in techniques:
            if options.only not in f"{model} {text}":
                continue
            row = (model, seq, batch, parse(text).text)
            if options.rows_of is not None and not _has(options.rows_of, *row, recorded=recorded):
                continue
            if any(_has(one, *row, recorded=recorded) for one in options.without):
                continue
            if options.device == "cpu" and any(word in text for word in ("tf32", "efficient", "cudnn")):
                continue
            shape, recipe = NAMED["tiny" if options.tiny else model], parse(text)
            if recipe.segments > shape.num_layers:
                continue
            shrunk = 16 if options.tiny else 1
            yield Case(shape=shape, recipe=recipe, seq=seq // shrunk, batch=batch)


def _claims(rows: list[Measured]) -> Iterator[dict[str, Any]]:
    found = {(row.model, row.seq, row.batch, row.technique): row for row in rows if not row.problem}
    for claim, (model, seq, batch), with_it, without in CLAIMS:
        a, b = found.get((model, seq, batch, with_it)), found.get((model, seq, batch, without))
        if a is None or b is None:
            continue
        yield {
            "claim": claim, "model": model, "seq": seq, "batch": batch, "with": with_it, "without": without,
            "memory": a.peak_bytes / b.peak_bytes - 1, "kept": a.kept_bytes / b.kept_bytes - 1,
            "speed": a.tokens_s / b.tokens_s - 1,
        }  # fmt: skip


def _arguments(options: argparse.Namespace) -> list[str]:
    """As given, without where the result goes."""
    return ["DIR" if one == str(options.out) else one for one in sys.argv[1:]]


if __name__ == "__main__":
    sys.exit(main())
