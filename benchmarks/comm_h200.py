"""kervan comm on this host's GPUs in one call: bench, doctor (healthy and with planted faults), preflight.

    python benchmarks/comm_h200.py --out DIR            # all GPUs here, under 10 minutes
    python benchmarks/comm_h200.py --out DIR --device cpu   # the same steps on two CPU ranks, to check the script

Each step's record goes to DIR. A table comes last, and exit status 1 if a planted fault was not found, a healthy host
failed, a result was wrong, or the large all-reduce is below 80% of what was measured before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
# busbw in GB/s of eager all-reduces of 256 MiB by GPUs: benchmarks/records/collectives-h200-2026-11-22.jsonl
BEFORE = {2: 298.5, 4: 335.7}
MIN_SHARE = 0.8
OPS = "all_reduce,all_gather,reduce_scatter,all_to_all,broadcast,send_recv,one_way"
SIZES = {"gpu": "8..1GiB", "cpu": "8..64KiB"}


@dataclass(frozen=True)
class Fault:
    """Settings that are wrong, and the checks that must fail for them: always, and with several GPUs also others."""

    name: str
    env: Mapping[str, str]
    always: tuple[str, ...]
    with_peers: tuple[str, ...] = ()


FAULTS = (
    Fault("peer access off", {"NCCL_P2P_DISABLE": "1"}, ("transports-off",), ("transport",)),
    Fault("shared memory off", {"NCCL_SHM_DISABLE": "1"}, ("transports-off",)),
    Fault(
        "both off", {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}, ("transports-off",), ("transport", "bandwidth")
    ),
    Fault("a wrong interface", {"NCCL_SOCKET_IFNAME": "=absent0"}, ("interface",), ("measurement",)),
)


def kervan(arguments: Sequence[str], env: Mapping[str, str], for_s: float) -> tuple[int, dict[str, Any], float, str]:
    """Exit status, JSON, seconds and what was said. Multicast over NVLink stays off whatever a step sets."""
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "kervan", *arguments, "--json"],
        capture_output=True, text=True, timeout=for_s, check=False,
        env={**os.environ, "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", **env},
    )  # fmt: skip
    try:
        content: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        content = {}
    return done.returncode, content, time.monotonic() - begin_s, done.stderr.strip()


def verdicts(report: Mapping[str, Any]) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in report.get("checks", ())}


def bench_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a size, a pair of columns an operation: time and busbw, eager and in a graph."""
    lines = [
        f"{'op':15} {'backend':9} {'bytes':>11} {'eager us':>10} {'busbw':>7} {'graph us':>10} {'busbw':>7}  correct"
    ]
    keys = dict.fromkeys((row["op"], row["backend"], row["bytes"]) for row in rows)
    for op, backend, size in keys:
        modes = {row["mode"]: row for row in rows if (row["op"], row["backend"], row["bytes"]) == (op, backend, size)}
        cells = []
        for mode in ("eager", "graph"):
            row = modes.get(mode)
            cells.append(f"{row['time_us']:10.1f} {row['busbw_gb_s']:7.1f}" if row else f"{'-':>10} {'-':>7}")
        correct = all(row["correct"] for row in modes.values())
        lines.append(f"{op:15} {backend:9} {size:11} {' '.join(cells)}  {'yes' if correct else 'NO'}")
    return lines


def preflight_line(ranks: int, *, on_gpu: bool) -> tuple[bool, str]:
    """The preflight of a replica on so many ranks, and a rank that sleeps in an all-reduce: is it named?"""
    from kervan.comm import examine, preflight
    from kervan.errors import EngineError

    begin_s = time.monotonic()
    try:
        preflight.run(num_ranks=ranks, on_gpu=on_gpu)
        passed, told = True, f"preflight of {ranks} ranks passed in {time.monotonic() - begin_s:.1f} s"
    except EngineError as error:
        passed, told = False, f"preflight refused: {error}"
    plan = examine.ExaminePlan(on_gpu=on_gpu, bytes=(8192,), sleeping_rank=ranks - 1)
    measured = examine.run(plan, num_ranks=ranks, for_s=120, say=print)
    is_named = f"rank {ranks - 1} (pid" in measured.problem
    return passed and is_named, f"{told}\na rank that sleeps in an all-reduce: {measured.problem}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--skip-bench", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    where = ["--device", options.device, "--record", str(options.out)]
    problems: list[str] = []
    lines: list[str] = []
    num_ranks = 0
    if not options.skip_bench:
        status, bench, took_s, said = kervan(
            ["comm", "bench", "--bytes", SIZES[options.device], "--op", OPS, "--for", "240s", *where], {}, 300
        )  # fmt: skip
        rows = bench.get("rows", [])
        num_ranks = bench.get("ranks", 0)
        print(f"comm bench: exit status {status}, {len(rows)} rows in {took_s:.0f} s")
        lines += bench_table(rows) + list(bench.get("notes", []))
        if status or not rows:
            problems.append(f"comm bench failed: {said[-400:]}")
        large = [
            r
            for r in rows
            if (r["op"], r["mode"], r["backend"], r["bytes"]) == ("all_reduce", "eager", "nccl", 256 * MIB)
        ]
        if large and num_ranks in BEFORE:
            share = large[0]["busbw_gb_s"] / BEFORE[num_ranks]
            lines.append(f"all-reduce of 256 MiB, eager: {large[0]['busbw_gb_s']:.1f} GB/s, {share:.0%} of before")
            if share < MIN_SHARE:
                problems.append(f"the large all-reduce has {share:.0%} of the busbw of before")
    status, report, took_s, said = kervan(["comm", "doctor", "--for", "90s", *where], {}, 150)
    found = verdicts(report)
    num_ranks = num_ranks or len((report.get("measured") or {}).get("ranks", ()))
    print(f"comm doctor: exit status {status} in {took_s:.0f} s")
    lines.append(f"doctor, healthy: {', '.join(f'{n} {v}' for n, v in found.items() if v != 'pass')}")
    lines += [
        f"  {c['verdict']} {c['name']}: {c['cause']}" for c in report.get("checks", ()) if c["verdict"] != "skipped"
    ]
    if status or not found:
        problems.append(f"the healthy host fails: {[n for n, v in found.items() if v == 'fail']} {said[-300:]}")
    for fault in FAULTS:
        _, report, took_s, said = kervan(["comm", "doctor", "--for", "60s", *where], fault.env, 120)
        failed = sorted(name for name, verdict in verdicts(report).items() if verdict == "fail")
        expected = {*fault.always, *(fault.with_peers if num_ranks > 1 and options.device == "gpu" else ())}
        is_found = expected <= set(failed)
        print(f"doctor, {fault.name}: {failed} in {took_s:.0f} s")
        lines.append(f"doctor, {fault.name}: {'found' if is_found else 'NOT FOUND'}: {', '.join(failed)}")
        if not is_found:
            problems.append(f"{fault.name}: {sorted(expected - set(failed))} did not fail {said[-200:]}")
    if num_ranks > 1:
        is_good, told = preflight_line(num_ranks, on_gpu=options.device == "gpu")
        lines += told.splitlines()
        if not is_good:
            problems.append(told)
    (options.out / "table.txt").write_text("\n".join([*lines, *problems]) + "\n")
    print("\n".join(lines))
    print("\n".join(f"PROBLEM {problem}" for problem in problems) or "all as expected")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
