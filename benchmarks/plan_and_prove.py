"""What `kervan plan` says of this machine's GPUs, started as it says, and loaded around the highest rate that it names.

    python benchmarks/plan_and_prove.py --out DIR
    python benchmarks/plan_and_prove.py --out DIR --gpu H200 --gpus 2 --up '--engine twin --gpu H200'   # no GPU here

The plan's own `kervan up` line is what is run. At each of --shares of the highest rate within --slo (Poisson, for
--seconds) the fleet is measured; the record has it beside the plan's figures. Then `kervan up --auto`, whose layout has
to be that of the plan. Random weights.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from planner_points import model_directory

from kervan.bench import records
from kervan.ports import free_port

KERVAN = [sys.executable, "-m", "kervan"]
UP_TIMEOUT_S = 300.0
FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


def kervan(*words: str, timeout_s: float = 120.0, check: bool = True) -> str:
    """Its standard output; messages go to this terminal."""
    print("$ kervan", shlex.join(words), file=sys.stderr, flush=True)
    done = subprocess.run([*KERVAN, *words], stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=check)
    return done.stdout


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Of a bench, as the plan names them."""
    found = {}
    for name in FIGURES:
        kind, quantile, _ = name.split("_")
        found[name] = round(1000 * result[f"{kind}_s"][quantile], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", help="of models/, or a directory")
    parser.add_argument("--gpu", default="local")
    parser.add_argument("--gpus", help="[default: all]")
    parser.add_argument("--slo", default="ttft=2s,tpot=50ms")
    parser.add_argument("--isl", default="1024")
    parser.add_argument("--osl", default="256")
    parser.add_argument("--shares", default="0.85,0.95,1.05")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--up", default="", help="more words for kervan up")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shapes-") as place:
        model = str(model_directory(args.model, Path(place)))
        record = prove(args, model)
    print(json.dumps(record["rows"], indent=1))
    print(f"record: {records.write(args.out, record)}")


def prove(args: argparse.Namespace, model: str) -> dict[str, Any]:
    dummy = ["--engine-arg", "load_format=dummy"]
    asked = ["--gpu", args.gpu, *(["--gpus", args.gpus] if args.gpus else []), "--slo", args.slo, *dummy]
    asked += ["--isl", args.isl, "--osl", args.osl]
    best = json.loads(kervan("plan", model, *asked, "--json"))["candidates"][0]
    line = kervan("plan", model, *asked).splitlines()[-1]
    port = str(free_port())
    more = ["--port", port, "--name", "proof", *shlex.split(args.up), "--detach"]
    began_s = time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        kervan(*shlex.split(line)[1:], *more, timeout_s=UP_TIMEOUT_S)
        up_s = time.monotonic() - began_s
        for number, share in enumerate(map(float, args.shares.split(","))):
            rate = share * best["requests_s"]
            words = ["--rate", f"{rate:.3f}", "--duration", f"{args.seconds:g}s", "--slo", args.slo, "--json"]
            words += ["--seed", str(number)]  # the same prompts again would be found in the prefix cache
            measured = json.loads(
                kervan("bench", f"http://127.0.0.1:{port}", *words, "--isl", args.isl, "--osl", args.osl)
            )
            rows.append({
                "share": share, "rate": round(rate, 2), "out_tok_s": measured["out_tok_s"], **figures(measured),
                "requests": measured["requests"], "goodput_share": measured.get("goodput_share"),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        kervan("down", "--name", "proof", check=False)
        auto = ["--auto", "--port", port, "--name", "proof", *dummy, "--detach"]
        kervan("up", model, *auto, *shlex.split(args.up), timeout_s=UP_TIMEOUT_S)
        status = json.loads(kervan("status", "--name", "proof", "--json"))
    finally:
        kervan("down", "--name", "proof", check=False)
    content = {
        "model": args.model, "slo": args.slo, "isl": args.isl, "osl": args.osl, "line": line.replace(model, args.model),
        "up_s": round(up_s, 1), "plan": best, "rows": rows, "auto": status,
    }  # fmt: skip
    record = records.record("plan-and-prove", content)
    record["command"] = shlex.join(["python", "benchmarks/plan_and_prove.py", *sys.argv[1:]])
    return record


if __name__ == "__main__":
    main()
