"""What it costs that clients can come back (`replay_s`): CPU of the gateways per token, and times that clients see.

    python benchmarks/replay.py --model DIR --record DIR

Two fleets of simulated replicas, each with two gateways, run side by side: one keeps no streams, the other does, so
that each of its gateways sends its journals to the other. `kervan bench` loads one of them at a time, in turn first.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from meters import cpu_s, spread
from twins import show

from kervan.bench import records

SIDES = {"off": 0.0, "on": 60.0}  # replay_s
PORTS = {"off": 18441, "on": 18442}


def kervan(*words: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kervan", *words],
        env={**os.environ, "KERVAN_HOME": str(home)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def memory_mib(pids: list[int]) -> float:
    """Mean proportional set size."""
    return statistics.mean(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20


def start(side: str, model: str, step_s: float, home: Path) -> dict[str, Any]:
    config = home / f"{side}.json"
    config.write_text(json.dumps({"replay_s": SIDES[side]}))
    up: dict[str, Any] = json.loads(
        kervan(
            "up", model, "--config", str(config), "--name", side, "--engine", "twin", "--gpu", "H200",
            "--twin", f"base_s={step_s}", "--engine-arg", "max_model_len=2048", "--replicas", "1", "--gateways", "2",
            "--port", str(PORTS[side]), "--detach", "--json", home=home,
        )
    )  # fmt: skip
    return up


def load(side: str, fleet: dict[str, Any], streams: int, duration_s: float, home: Path) -> dict[str, Any]:
    pids = [gateway["pid"] for gateway in fleet["gateways"]]
    before_s = cpu_s(pids)
    result = json.loads(
        kervan(
            "bench", fleet["url"], "--streams", str(streams), "--isl", "64", "--osl", "128",
            "--duration", f"{duration_s:g}s", "--json", home=home,
        )
    )  # fmt: skip
    told = {
        "side": side,
        "gateway_us_per_token": (cpu_s(pids) - before_s) / result["output_tokens"] * 1e6,
        "tok_s": result["out_tok_s"],
        "tpot_ms": result["tpot_s"]["p50"] * 1e3,
        "ttft_ms": result["ttft_s"]["p50"] * 1e3,
        "failed": result["requests"]["errors"],
        "gateway_mib": memory_mib(pids),
    }
    show(told)
    return told


def summary(pairs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Each side, and the difference within the pairs."""
    told: dict[str, Any] = {}
    for name in ("gateway_us_per_token", "tok_s", "tpot_ms", "ttft_ms"):
        told[name] = {side: spread([pair[side][name] for pair in pairs]) for side in SIDES}
        told[name]["added"] = spread([pair["on"][name] - pair["off"][name] for pair in pairs])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with a tokenizer")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step", type=float, default=0.04, help="seconds of a twin's step")
    parser.add_argument("--duration", type=float, default=8.0, help="seconds of a run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory(prefix="kr-") as directory:
        home = Path(directory)
        fleets: dict[str, dict[str, Any]] = {}
        try:
            for side in SIDES:
                fleets[side] = start(side, args.model, args.step, home)
            for side in SIDES:  # uncounted
                load(side, fleets[side], args.streams, 2.0, home)
            for number in range(args.pairs):
                order = list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]
                pairs.append({side: load(side, fleets[side], args.streams, args.duration, home) for side in order})
        finally:
            for side in fleets:
                kervan("down", "--name", side, home=home)
    found = {"summary": summary(pairs), "pairs": pairs, "load_average": os.getloadavg()}
    print(json.dumps(found["summary"], indent=1))
    if args.record is not None:
        command = shlex.join(["python", "benchmarks/replay.py", *sys.argv[1:]])
        settings = {"streams": args.streams, "isl": 64, "osl": 128, "step_s": args.step, "gateways": 2}
        made = {**records.record("replay", found), "command": command, "settings": settings}
        print(records.write(args.record, made))


if __name__ == "__main__":
    main()
