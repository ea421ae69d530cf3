"""Two states of kervan's code on the same machine, in turn: does a change cost anything on the way of a token?

    git worktree add --detach ../before REVISION
    python benchmarks/before_after.py ../before --model DIR

Each side runs its own `kervan`: a fleet of one vLLM CPU replica and one of four twins. Pairs (A B, B A, ...) load the
first with closed loops, and kill twins of the second under load. Both sides' fleets are up all the time; an idle one
costs next to nothing. `kervan bench` of this checkout loads both.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from servers import HERE

from kervan.bench import records
from kervan.ports import free_port

Row = dict[str, Any]
CPU_ENGINE = ("dtype=float32", "enforce_eager=true", "max_model_len=1024", "enable_prefix_caching=false")
CPU_ENV = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1")
NUM_TWINS = 4
CHAOS = (
    "streams",
    "broken",
    "tokens_lost",
    "tokens_doubled",
    "tokens_wrong",
    "disruptions",
    "moves",
    "gap_s",
    "recover_s",
)
FIGURES = ("tok_s", "ttft_ms", "tpot_ms", "gateway_us_per_token")


class Side:
    """One checkout, with fleets of its own."""

    def __init__(self, name: str, checkout: Path, place: Path):
        self.name = name
        self.checkout = checkout
        self.commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()
        place.mkdir()
        self._env = {
            **os.environ,
            "PYTHONPATH": str(checkout / "src"),
            "KERVAN_HOME": str(place / "home"),
            "TMPDIR": str(place),
        }

    def kervan(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kervan", *words], env=self._env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: kervan {' '.join(words)}: {done.stderr[-2000:]}{done.stdout[-500:]}")
        return done.stdout

    def up(self, kind: str, model: str, *words: str) -> str:
        """The URL of a new fleet with one gateway."""
        more = ("--name", f"{self.name}-{kind}", "--detach", "--json", "--gateways", "1", "--port", str(free_port()))
        url: str = json.loads(self.kervan("up", model, *more, *words))["url"]
        return url

    def down(self, kind: str) -> None:
        """End the fleet, if it is there."""
        with contextlib.suppress(RuntimeError):
            self.kervan("down", "--name", f"{self.name}-{kind}")

    def gateway_cpu_s(self) -> float:
        """CPU that the engine fleet's gateway has used so far, its process and its actor."""
        fleet = f"{self.name}-engine"
        gateways = json.loads(self.kervan("status", "--name", fleet, "--json"))["gateways"]
        pids = {gateway["pid"] for gateway in gateways}
        for process in psutil.process_iter(["pid", "cmdline"]):
            if f"ServeReplica:kervan-{fleet}:gateway" in " ".join(process.info["cmdline"] or ()):
                pids.add(process.pid)
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def bench(url: str, streams: int, requests: int) -> Row:
    """What `kervan bench` measured of one closed loop."""
    words = ("bench", url, "--streams", str(streams), "--num-requests", str(requests), "--isl", "64", "--osl", "64")
    done = subprocess.run(
        [sys.executable, "-m", "kervan", *words, "--no-calibration", "--json"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: Row = json.loads(done.stdout)
    return found


def pairs(sides: list[Side], count: int) -> list[Side]:
    """A B, B A, ..."""
    return [side for n in range(count) for side in (sides if n % 2 == 0 else sides[::-1])]


def medians(rows: list[Row], side: str, figures: tuple[str, ...]) -> Row:
    """Of one side: figure -> [median, least, most]."""
    found = {}
    for figure in figures:
        values = [row[figure] for row in rows if row["side"] == side]
        found[figure] = [statistics.median(values), min(values), max(values)]
    return found


def ratios(rows: list[Row], figure: str) -> list[float]:
    """After over before of each pair, smallest first; the host's speed drifts, and both of a pair share it."""
    by_pair = zip(rows[::2], rows[1::2], strict=True)
    ordered = [sorted(pair, key=lambda row: row["side"]) for pair in by_pair]  # "after" is before "before"
    return sorted(after[figure] / before[figure] for after, before in ordered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the code before")
    parser.add_argument("--model", required=True, help="a small model's directory")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of each run")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--chaos-pairs", type=int, default=2)
    parser.add_argument("--chaos-for", default="60s")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    model = str(Path(args.model).resolve())
    with tempfile.TemporaryDirectory(prefix="kv-") as place:
        sides = [
            Side("before", args.before.resolve(), Path(place) / "a"),
            Side("after", HERE.parent, Path(place) / "b"),
        ]
        record = records.record(
            "before_after", {"streams": args.streams, "commits": {side.name: side.commit for side in sides}}
        )
        record["command"] = " ".join(["python", "benchmarks/before_after.py", "BEFORE", *sys.argv[2:]])
        try:
            run(sides, model, args, record, lambda: args.record and records.write(args.record, record))
        finally:
            for side in sides:
                side.down("engine")
                side.down("twins")


def run(sides: list[Side], model: str, args: argparse.Namespace, record: Row, save: Callable[[], object]) -> None:
    """All pairs; prints a table last."""
    engine = [word for argument in CPU_ENGINE for word in ("--engine-arg", argument)]
    env = [word for pair in CPU_ENV for word in ("--env", pair)]
    urls = {side.name: side.up("engine", model, *engine, *env) for side in sides}
    for side in sides:  # what is done for the first time is not measured
        bench(urls[side.name], args.streams, args.streams)
    loads: list[Row] = []
    record["loads"] = loads
    for side in pairs(sides, args.pairs):
        before_s = side.gateway_cpu_s()
        measured = bench(urls[side.name], args.streams, args.requests)
        cpu_s = side.gateway_cpu_s() - before_s
        loads.append({
            "side": side.name,
            "failed": measured["requests"]["errors"],
            "tok_s": measured["out_tok_s"],
            "ttft_ms": measured["ttft_s"]["p50"] * 1e3,
            "tpot_ms": measured["tpot_s"]["p50"] * 1e3,
            "gateway_us_per_token": cpu_s / measured["output_tokens"] * 1e6,
        })  # fmt: skip
        print(json.dumps(loads[-1]), flush=True)
        save()
    for side in sides:
        side.down("engine")
    chaos: list[Row] = []
    record["chaos"] = chaos
    for side in pairs(sides, args.chaos_pairs):
        words = ("--engine", "twin", "--gpu", "H200", "--twin", "base_s=0.05", "--engine-arg", "max_model_len=2048")
        url = side.up("twins", model, *words, "--replicas", str(NUM_TWINS))
        kills = ("--kill-every", "10s", "--for", args.chaos_for, "--streams", str(args.streams))
        told = json.loads(side.kervan("chaos", url, *kills, "--json"))
        side.down("twins")
        chaos.append({"side": side.name} | {name: told[name] for name in CHAOS})
        print(json.dumps(chaos[-1]), flush=True)
        save()
    for figure in FIGURES:
        least, *_, most = of_pairs = ratios(loads, figure)
        print(f"{figure}: after/before {statistics.median(of_pairs):.2f} [{least:.2f}, {most:.2f}]")
    for side in sides:
        print(side.name, side.commit, json.dumps(medians(loads, side.name, FIGURES)))
        mine = [row for row in chaos if row["side"] == side.name]
        whole = f"{sum(row['streams'] for row in mine)} streams, {sum(row['broken'] for row in mine)} broken"
        gaps = ", ".join(f"{row['gap_s']['p50']:.3f}/{row['gap_s']['p99']:.3f}" for row in mine)
        recovered = ", ".join(f"{row['recover_s']['p50']:.1f}" for row in mine)
        print(f"  chaos: {whole}; gap p50/p99 {gaps} s; recovered after {recovered} s")


if __name__ == "__main__":
    main()
