"""NVIDIA's own `all_reduce_perf`, where it is installed, beside what torch reaches."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

PROGRAM = "all_reduce_perf"
TYPES = {"bfloat16": "bfloat16", "float16": "half", "float32": "float"}


@dataclass(frozen=True, slots=True)
class NcclTestsRow:
    """In place, as torch reduces. `num_wrong` None: not checked."""

    bytes: int
    time_us: float
    algbw_gb_s: float
    busbw_gb_s: float
    num_wrong: int | None


def run(sizes: Sequence[int], gpus: int, dtype: str, *, for_s: float) -> tuple[list[NcclTestsRow], str]:
    """Its rows, and why there are none; both empty where it is not installed. One process drives all GPUs."""
    program = shutil.which(PROGRAM)
    if program is None:
        return [], ""
    command = [program, "-b", str(min(sizes)), "-e", str(max(sizes)), "-f", "2", "-g", str(gpus), "-d", TYPES[dtype]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=for_s, check=False)
    except subprocess.TimeoutExpired:
        return [], f"{PROGRAM} had not ended after {for_s:.0f} s"
    rows = parse(done.stdout)
    if done.returncode or not rows:
        last = next((line for line in reversed((done.stderr or done.stdout).splitlines()) if line.strip()), "")
        return rows, f"{PROGRAM} exited with status {done.returncode}: {last.strip()[:200]}"
    return rows, ""


def parse(text: str) -> list[NcclTestsRow]:
    """Lines of size, count, type, redop, root, then time, algbw, busbw and #wrong, out of place and in place."""
    rows = []
    for line in text.splitlines():
        cells = line.split()
        if len(cells) < 13 or not cells[0].isdecimal() or not cells[1].isdecimal():
            continue
        time_us, algbw, busbw, wrong = cells[9:13]
        try:
            rows.append(
                NcclTestsRow(
                    int(cells[0]), float(time_us), float(algbw), float(busbw), None if wrong == "N/A" else int(wrong)
                )
            )
        except ValueError:
            continue
    return rows
