"""What a move does to streams, on this machine's GPUs. `benchmarks/h100_moves.sh` has the environment it wants.

    python benchmarks/gpu_moves.py exact    # 1 GPU: streams moved after each token, on model runners V2 and V1
    python benchmarks/gpu_moves.py interpreted   # no GPU: model runner V2, its kernels in Triton's interpreter
    python benchmarks/gpu_moves.py flips    # 1 GPU: how often bf16 rounding changes an answer, with and without a move
    python benchmarks/gpu_moves.py tp       # 2 GPUs: as exact, with tensor and pipeline parallel engines
    python benchmarks/gpu_moves.py storm    # 2 GPUs: 8B shape, 2 replicas, 64 streams: a kill, then a drain

Rows are printed as they come, the table last. A record (--out DIR) is written anew after each row, so a run that is cut
short keeps what it has. `interpreted` wants Triton, as `make test` puts it into .venv/triton (KERVAN_TRITON), and took
16 minutes on two cores. Without a GPU all parts but storm run as they are, slowly; storm wants --model there.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import exact_moves
import flips
import storm

from kervan.bench import records

Row = dict[str, Any]
# Of one engine of several on a GPU. With the KV cache in bytes, vLLM does not size it by what is free.
GPU_ARGS = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**30}
SETTINGS = {
    "exact": ("only",),
    "interpreted": (),
    "tp": ("only",),
    "flips": ("train_s", "answers"),
    "storm": ("model", "streams", "isl", "osl", "gateways", "engine_arg", "env"),
}
CPU_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # of engines with several workers


class Findings:
    """Rows of one part, in a record."""

    def __init__(self, part: str, settings: Row, out: Path) -> None:
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        self._begin_s = time.monotonic()
        self._record = records.record(f"moves-{part}", {"settings": settings, "rows": self.rows})
        words = [word for before, word in itertools.pairwise(sys.argv) if "--out" not in (before, word)]
        self._record["command"] = shlex.join(["python", "benchmarks/gpu_moves.py", *words])
        if commit := os.environ.get("KERVAN_COMMIT"):
            self._record["versions"]["kervan"] = commit
        self._path: Path = out

    def keep(self, row: Row) -> None:
        """Print a row and write the record; from any thread."""
        with self._lock:
            self.rows.append({"at_s": round(time.monotonic() - self._begin_s, 1), **row})
            print(json.dumps(self.rows[-1]), flush=True)
            self._path = records.write(self._path, self._record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(SETTINGS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="logs and the record")
    parser.add_argument(
        "--limit-s", type=float, help="begin to end after so many seconds; 3600 for interpreted, else 540"
    )
    parser.add_argument("--only", default="", help="of exact and tp: engines whose name has this")
    parser.add_argument("--train-s", type=float, default=60.0, help="of flips: seconds to train the model")
    parser.add_argument("--answers", type=int, default=100, help="of flips")
    parser.add_argument("--model", help="of storm: a model directory in place of the 8B shape")
    parser.add_argument("--streams", type=int, default=64, help="of storm")
    parser.add_argument("--isl", type=int, default=1024, help="of storm")
    parser.add_argument("--osl", default="384..640", help="of storm")
    parser.add_argument("--gateways", type=int, default=4, help="of storm")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V", help="of storm, repeatable")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="of storm's fleet, repeatable")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.limit_s is None:
        args.limit_s = 3600.0 if args.part == "interpreted" else 540.0
    args.deadline_s = time.monotonic() + args.limit_s
    has_gpu = shutil.which("nvidia-smi") is not None
    settings = {key: getattr(args, key) for key in (*SETTINGS[args.part], "limit_s")}
    findings = Findings(args.part, settings, args.out)
    parts: dict[str, Callable[[], Sequence[str]]] = {
        "exact": lambda: engines(args, findings, exact_moves.ENGINES, has_gpu=has_gpu),
        "interpreted": lambda: engines(args, findings, exact_moves.INTERPRETED_ENGINES, has_gpu=False),
        "tp": lambda: engines(args, findings, exact_moves.PARALLEL_ENGINES, has_gpu=has_gpu),
        "flips": lambda: [flips.run(args, findings.keep, GPU_ARGS if has_gpu else {})],
        "storm": lambda: [storm.run(args, findings.keep)],
    }
    status = 0
    try:
        tables = parts[args.part]()
    except Exception as error:  # noqa: BLE001 - the rows that there are must still be seen
        findings.keep({"failed": f"{type(error).__name__}: {error}"[-2000:]})
        tables, status = [f"FAILED {type(error).__name__}: {str(error)[-1500:]}"], 1
    print("\n".join(tables), flush=True)
    os._exit(status)  # a thread may still wait for an engine


def engines(
    args: argparse.Namespace, findings: Findings, which: Sequence[exact_moves.Engine], *, has_gpu: bool
) -> list[str]:
    chosen = [engine for engine in which if args.only in engine.name]
    with tempfile.TemporaryDirectory() as place:
        models = exact_moves.Models.make(Path(place))
        trials = exact_moves.Trials(findings.keep, args.deadline_s, args.out)
        device = GPU_ARGS if has_gpu else {"enforce_eager": True}
        trials.run(chosen, models, device, {} if has_gpu else CPU_ENV)
    order = [engine.name for engine in chosen]
    return [exact_moves.table(sorted(findings.rows, key=lambda row: order.index(row["engine"])))]


if __name__ == "__main__":
    main()
