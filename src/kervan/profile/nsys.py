"""Kernels of a report of Nsight Systems, by `nsys stats`, whose reports have other names since 2022.5.

nsys cannot attach to a process that runs, so the report comes from a run that was started under it.
"""

import csv
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kervan.errors import ConfigError, EngineError
from kervan.profile import device
from kervan.profile.device import KernelTotal
from kervan.profile.trace import Event

# What is looked up: the name of the report today, and before.
KERNELS = ("cuda_gpu_kern_sum", "gpukernsum")
COPIES = ("cuda_gpu_mem_time_sum", "gpumemtimesum")
RANGES = ("nvtx_sum", "nvtxsum")
TIMEOUT_S = 600.0  # the first time, nsys exports the whole report into a database
_SHARE, _TIME = "Time (%)", "Total Time (ns)"
_CALLS = ("Instances", "Count", "Num Calls")
_NAMES = ("Name", "Operation", "Range")


def find() -> str:
    """The program. Raises: ConfigError where it is not installed."""
    program = shutil.which("nsys")
    if program is None:
        raise ConfigError("nsys is not on the PATH; install Nsight Systems (nsight-systems-cli), or leave --nsys out")
    return program


def check(report: Path) -> None:
    """Raises: ConfigError where there is no such file, or no program to read it."""
    if not report.is_file():
        what = "is no regular file" if report.exists() else "does not exist"
        raise ConfigError(f"--nsys {report} {what}; nsys profile -o NAME COMMAND writes NAME.nsys-rep")
    find()


def kernels(report: Path) -> tuple[KernelTotal, ...]:
    """Kernels and copies of a report, those with most time first. Raises: ConfigError, EngineError."""
    check(report)
    program = find()
    return totals(stats(program, report, KERNELS), stats(program, report, COPIES))


def ranges(report: Path) -> tuple[KernelTotal, ...]:
    """NVTX ranges of a report; none if nothing named any. Raises: as `kernels`."""
    return tuple(replace(total, bound="unknown") for total in totals(stats(find(), report, RANGES)))


def stats(program: str, report: Path, names: Sequence[str]) -> list[tuple[str, float, int]]:
    """(name, seconds, calls) of each row of the first of these reports that this nsys knows.

    Raises: EngineError with nsys's words when it knows none of them.
    """
    said = ""
    for name in names:
        command = [program, "stats", "--report", name, "--format", "csv", str(report)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"nsys stats did not read {report}: {error}") from error
        found = list(read(done.stdout))
        if found or "SKIPPED" in done.stdout:  # it knows the report, and there is nothing of the kind
            return found
        said = said or next((line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line), "")
    raise EngineError(f"nsys stats gives none of {', '.join(names)} of {report}: {said.strip() or 'it says no reason'}")


def read(text: str) -> Iterator[tuple[str, float, int]]:
    """The rows of a report as CSV, below whatever nsys says first."""
    lines = text.splitlines()
    head = next((at for at, line in enumerate(lines) if line.startswith(_SHARE) and _TIME in line), None)
    if head is None:
        return
    for row in csv.DictReader(lines[head:]):
        name = next((row[key] for key in _NAMES if row.get(key)), None)
        calls = next((row[key] for key in _CALLS if row.get(key)), None)
        if name and calls and row.get(_TIME):
            yield name, float(row[_TIME]) / 1e9, int(calls)


def totals(
    rows: Sequence[tuple[str, float, int]], copies: Sequence[tuple[str, float, int]] = ()
) -> tuple[KernelTotal, ...]:
    """By short name. Without batches, products and attention have no side of the roofline."""
    summed: dict[str, list[float]] = {}
    bounds: dict[str, device.Bound] = {}
    for name, seconds, calls, category in (*((*r, "kernel") for r in rows), *((*c, "gpu_memcpy") for c in copies)):
        short = device.short_name(name)
        so_far = summed.setdefault(short, [0.0, 0])
        so_far[0] += seconds
        so_far[1] += calls
        bounds[short] = device.bound_of(Event(name, cat=category), None, None)
    whole_s = sum(seconds for seconds, _ in summed.values()) or 1.0
    found = [KernelTotal(n, s / whole_s, int(calls), s, bounds[n]) for n, (s, calls) in summed.items()]
    return tuple(sorted(found, key=lambda total: (-total.seconds, total.name)))
