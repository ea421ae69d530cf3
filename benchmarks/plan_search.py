"""What a plan costs: seconds of `kervan plan`, from a cold process to the table, and its memory.

    python benchmarks/plan_search.py --record DIR

Every question is asked several times, in turns, each time by a process of its own. None of them needs a GPU.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from meters import MIB, spread

from kervan.bench import records

MODELS = "benchmarks/models"
QUESTIONS = {
    "8B on 1 GPU": f"{MODELS}/llama3-8b --gpu H200 --gpus 1",
    "8B on 8 GPUs": f"{MODELS}/llama3-8b --gpu H200 --gpus 8",
    "70B on 8 GPUs": f"{MODELS}/llama3-70b --gpu H200 --gpus 8",
    "70B on 64 GPUs": f"{MODELS}/llama3-70b --gpu H200 --gpus 64",
    "70B on 64 GPUs, 256 streams": f"{MODELS}/llama3-70b --gpu H200 --gpus 64 --concurrency 256",
    "70B on 64 GPUs, 20 requests/s": f"{MODELS}/llama3-70b --gpu H200 --gpus 64 --rate 20/s",
    "experts (8x7B) on 64 GPUs": f"{MODELS}/mixtral-8x7b --gpu H200 --gpus 64",
}


# The kernel's own peak for a child begins with what the parent held when it started it; this one is of the plan alone.
PLAN = """
import atexit, pathlib, runpy, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr))
runpy.run_module("kervan", run_name="__main__")
"""


def timed_plan(arguments: str) -> dict[str, float]:
    """One plan by a process of its own: seconds on the clock and of CPU, and the most memory that it held."""
    begin_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", PLAN, "plan", *arguments.split()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begin_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"kervan plan {arguments} ended with {process.returncode}: {errors}")
    peak_mib = int(errors.split()[-1]) * 1024 / MIB
    return {"wall_s": wall_s, "cpu_s": used.ru_utime + used.ru_stime, "peak_mib": peak_mib}


def table(rows: dict[str, Any]) -> str:
    lines = [f"{'question':34}{'seconds':>9}{'min':>8}{'max':>8}{'CPU s':>8}{'MiB':>8}"]
    for name, one in rows.items():
        wall = one["wall_s"]
        lines.append(
            f"{name:34}{wall['median']:9.2f}{wall['min']:8.2f}{wall['max']:8.2f}{one['cpu_s']['median']:8.2f}"
            f"{one['peak_mib']['max']:8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in QUESTIONS}
    for number in range(args.repeat + 1):
        for name, arguments in QUESTIONS.items():
            measured = timed_plan(arguments)
            if number:  # the first reads files that no one has read
                runs[name].append(measured)
    rows = {name: {key: spread([run[key] for run in plans]) for key in plans[0]} for name, plans in runs.items()}
    print(table(rows))
    if args.record is not None:
        command = shlex.join(["python", "benchmarks/plan_search.py", *sys.argv[1:]])
        settings = {"repeat": args.repeat, "questions": QUESTIONS}
        made = records.record("plan-search", {"questions": rows, "load_average": os.getloadavg()})
        print(records.write(args.record, {**made, "command": command, "settings": settings}))


if __name__ == "__main__":
    main()
