"""Pipelines on GPUs: every schedule's results against the unsplit model's, and its bubble, in one call.

    python benchmarks/pipeline_h200.py --out DIR                    # a rank on each of two GPUs: speed and bubble
    CUDA_VISIBLE_DEVICES=0 python benchmarks/pipeline_h200.py --out DIR --stages 4 --shared   # four ranks on one GPU
    python benchmarks/pipeline_h200.py --out DIR --device cpu --shared                        # to try the script

`--shared` runs a small model: it shows that results are right, and nothing about speed. DIR gets two files: the record,
and timelines.tar.gz with an SVG and a trace for each row of 1F1B and ZBV.
"""

import argparse
import json
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kervan.bench import records
from kervan.cli.pipeline import content_of, print_result, write_timelines
from kervan.errors import KervanError
from kervan.memory.shape import NAMED, DecoderShape
from kervan.pipeline import bench, cut, schedules
from kervan.pipeline.plan import PipelinePlan

COUNTS = (2, 4, 8, 16, 32)
BATCH, SEQ = 32, 1024


def plan(
    name: str, shape: DecoderShape, ranks: int, options: argparse.Namespace, *, counts: tuple[int, ...], batch: int,
    seq: int, is_forward_only: bool = False, is_checked: bool = False, is_measured: bool = False,
) -> PipelinePlan:  # fmt: skip
    """One schedule, with the numbers of micro-batches that it allows."""
    schedule = schedules.SCHEDULES[name]
    chunks = schedule.chunks[1]
    least = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(name, 1)
    return PipelinePlan(
        shape=shape, schedule=schedule, chunks=chunks, micro_batches=tuple(m for m in counts if m >= least),
        batch=batch, seq=seq, device=options.device, dtype="fp32" if options.shared else "bf16",
        is_forward_only=is_forward_only, repeats=options.repeats, is_checked=is_checked,
        cut=None if is_measured else cut.balanced(cut.modelled(shape, seq), ranks * chunks),
    )  # fmt: skip


def main() -> int:
    """Exit status: 0, or 1 when a result differs from the unsplit model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path)
    to.add_argument("--table", type=Path, metavar="RECORD", help="print the table of a record, and run nothing")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--for", dest="for_s", type=float, default=420.0)
    options = parser.parse_args()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    ranks, begin_s = options.stages, time.monotonic()
    if options.shared:
        plans = tuple(
            plan(name, NAMED["small"], ranks, options, counts=(2 * ranks,), batch=2 * ranks, seq=128, is_checked=True)
            for name in schedules.SCHEDULES
        )
    else:
        one_b = NAMED["1b"]
        # Right first, with few rows: each rank holds the whole model for it.
        plans = tuple(
            plan(name, one_b, ranks, options, counts=(4 * ranks,), batch=4 * ranks, seq=512, is_checked=True)
            for name in schedules.SCHEDULES
        )
        plans += tuple(
            plan(name, one_b, ranks, options, counts=COUNTS, batch=BATCH, seq=SEQ) for name in schedules.SCHEDULES
        )
        plans += (
            plan("gpipe", one_b, ranks, options, counts=COUNTS, batch=BATCH, seq=SEQ, is_forward_only=True),
            plan("1f1b", one_b, ranks, options, counts=(16,), batch=BATCH, seq=SEQ, is_measured=True),
        )
    found: list[bench.Result] = []
    notes: list[str] = []
    try:
        for result in bench.bench(
            plans, ranks=ranks, for_s=options.for_s,
            say=lambda text: print(f"[{time.monotonic() - begin_s:5.0f} s] {text}", file=sys.stderr, flush=True),
        ):  # fmt: skip
            found.append(result)
    except KervanError as error:
        notes.append(str(error))
    content = {"runs": [content_of(result, ranks) for result in found], "notes": notes}
    command = shlex.join(["python", "benchmarks/pipeline_h200.py", *_arguments(options)])
    path = records.write(options.out, {**records.record("pipeline", content), "command": command})
    _pack_timelines(options.out / "timelines.tar.gz", found, ranks)
    for result in found:
        print_result(result, ranks)
    for note in notes:
        print(f"not complete: {note}")
    wrong = [r.plan.schedule.name for r in found if any(row.equal_to_unsplit is False for row in r.rows)]
    print(
        f"{len(found)} of {len(plans)} plans ran; results that differ from the unsplit model's: {wrong or 'none'}; "
        f"record: {path}"
    )
    return 1 if wrong or len(found) < len(plans) else 0


def table(record: Mapping[str, Any]) -> str:
    """A row for each schedule that was run with several numbers of micro-batches: bubble, theory's, and the step."""
    runs = [run for run in record["runs"] if len(run["rows"]) > 1]
    counts = sorted({row["micro_batches"] for run in runs for row in run["rows"]})
    lines = [
        "| schedule | " + " | ".join(f"{count} micro-batches" for count in counts) + " | fastest |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for run in runs:
        rows = {row["micro_batches"]: row for row in run["rows"]}
        cells = [
            f"{100 * rows[m]['bubble']:.1f}% ({100 * rows[m]['theory']:.1f}%), {1e3 * rows[m]['step_s']:.0f} ms"
            if m in rows
            else "-"
            for m in counts
        ]
        name = f"`{run['schedule']}`" + (", forward only" if run["forward_only"] else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {run['best_micro_batches']} |")
    return "\n".join(lines)


def _pack_timelines(path: Path, found: list[bench.Result], ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for result in found:
            if result.plan.schedule.name in {"1f1b", "zbv"} and not result.plan.is_checked:
                write_timelines(Path(folder), result, ranks)
        if not any(Path(folder).iterdir()):
            return
        with tarfile.open(path, "w:gz") as archive:
            for one in sorted(Path(folder).iterdir()):
                archive.add(one, one.name)


def _arguments(options: argparse.Namespace) -> list[str]:
    """As given, without where the result goes."""
    return ["DIR" if one == str(options.out) else one for one in sys.argv[1:]]


if __name__ == "__main__":
    sys.exit(main())
