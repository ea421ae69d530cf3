"""A 70B service on one H200, with random weights: predicted, then measured; and what a kill and a drain cost.

    python benchmarks/service_70b_h200.py --out DIR --part service     # 70B shape in FP8, one replica: under 10 minutes
    python benchmarks/service_70b_h200.py --out DIR --part moves       # two replicas of the 8B shape: under 5
    python benchmarks/service_70b_h200.py --out DIR --for 900          # both
    python benchmarks/service_70b_h200.py --out DIR --tiny DIR2        # the same steps on the CPU, to check this script

Only public commands are used: `kervan plan`, `up`, `bench`, `status`, `down`. Predictions come first, and are
made whatever the time; a later step is skipped when there is no time for it. The record, the output of each command
and the logs are in DIR and in DIR/service-70b.tar.gz; a table comes last. Exit status 1: a step failed, a stream broke,
or there was no time for a step.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))  # of this checkout, also where kervan is not installed

from kervan.bench import records  # noqa: E402
from kervan.calibrate.shapes import write_model  # noqa: E402
from kervan.ports import free_port  # noqa: E402

Row = dict[str, Any]
ISL, OSL = 1024, 256
SLO = "ttft=2s,tpot=50ms"
STREAMS = (1, 16, 64, 256)
ROUNDS = {1: 3, 16: 3, 64: 3}  # requests for each stream; 2 for more streams
RATES = (1.5, 3.0, 4.0)  # around the 2.5 requests/s that `kervan plan` names
RATE_S = 30
# What a step takes: a load that has not so much time left is not begun.
LOADS_S = {1: 25, 16: 35, 64: 60, 256: 145}
DEFAULT_S = 570  # on one H200: start 160, loops 233, rates 3 x 41, predictions 15, end 12
TIMES = ("ttft_s", "ttft_from_arrival_s", "tpot_s", "gap_s")
MOVES_STREAMS, MOVES_OSL, FAULT_AT_S, MOVES_S = 32, 512, 10, 30
SERVICE_ARGS = ("quantization=fp8", "max_model_len=8192", "max_num_batched_tokens=8192", "max_num_seqs=256")
DUMMY = ("load_format=dummy", "enable_prefix_caching=false")
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": f"{HERE.parent / 'src'}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
}  # fmt: skip
# A tiny model with vLLM on the CPU: what `--tiny` serves, and how.
TINY_ARGS = ("dtype=float32", "enforce_eager=true", "max_model_len=2048", "enable_prefix_caching=false")
TINY_ENV = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1")


@dataclass
class Steps:
    """Commands with a common end, their outputs and what went wrong."""

    out: Path
    ends_s: float
    problems: list[str] = field(default_factory=list)

    def kervan(self, name: str, *words: str, at_most_s: float = 540, needs_s: float = 10) -> Row | None:
        """The JSON of a command, or None where it failed or there was no time; its output is kept as `name`. What
        needs no time (0) has as much as it may take.
        """
        left_s = min(at_most_s, self.ends_s - time.monotonic()) if needs_s else at_most_s
        if left_s < needs_s:
            self.problems.append(f"no time for {name}")
            return None
        begin_s = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "kervan", *words, "--json"],
                env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=left_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self.problems.append(f"{name} took longer than {left_s:.0f} s")
            return None
        print(f"{name}: exit status {done.returncode} after {time.monotonic() - begin_s:.1f} s", flush=True)
        (self.out / f"{name}.txt").write_text(f"$ kervan {' '.join(words)}\n{done.stdout}\n{done.stderr}")
        if done.returncode != 0:
            self.problems.append(f"{name} failed: {done.stderr.strip()[-300:]}")
            return None
        answer: Row = json.loads(done.stdout) if done.stdout.strip().startswith(("{", "[")) else {}
        return answer

    @contextmanager
    def fleet(self, name: str, model: Path, *words: str) -> Iterator[tuple[str, float] | None]:
        """A fleet's URL and how long its start took; it is gone afterwards. None where it did not start."""
        port, begin_s = free_port(), time.monotonic()
        up = ("up", str(model), "--name", name, "--port", str(port), "--detach", *words)
        told = self.kervan(f"{name}-up", *up, at_most_s=330)
        try:
            yield None if told is None else (str(told["url"]), time.monotonic() - begin_s)
        finally:
            self.ends_s = max(self.ends_s, time.monotonic() + 60)  # there is always time to end it
            self.kervan(f"{name}-down", "down", "--name", name, at_most_s=60)


def figures(run: Row) -> Row:
    """What the tables need of a bench's result."""
    found = run.get("result", run)
    return {
        "out_tok_s": found["out_tok_s"],
        "req_s": found["req_s"],
        "duration_s": found["duration_s"],
        "ok": found["requests"]["ok"],
        "errors": found["requests"]["errors"] + found["requests"]["truncated"],
        **{key: {q: found[key][q] for q in ("mean", "p50", "p95", "p99", "max")} for key in TIMES},
        "valid": found["valid"],
        "slo_share": found["slo_share"],
        "faults": [one | {"command": one["command"].replace(f"{sys.executable} -m ", "")} for one in found["faults"]],
    }


def service(steps: Steps, model: Path, args: Sequence[str], env: Sequence[str], *, is_tiny: bool) -> Row:
    """One replica of the 70B shape: closed loops and rates, each beside what the planner says."""
    words = [word for arg in args for word in ("--engine-arg", arg)]
    counted = () if is_tiny else SERVICE_ARGS
    of_plan = [word for arg in counted for word in ("--engine-arg", arg)]
    isl, osl = (64, 16) if is_tiny else (ISL, OSL)
    plan = ["plan", str(model), "--gpu", "H200", "--gpus", "1", "--layout", "tp=1"]
    plan += ["--isl", str(isl), "--osl", str(osl), *of_plan]
    streams_of, rates = ((1, 4), (2.0,)) if is_tiny else (STREAMS, RATES)
    told = {
        streams: steps.kervan(f"plan-streams-{streams}", *plan, "--concurrency", str(streams), at_most_s=60, needs_s=0)
        for streams in streams_of
    }
    told_rates = {
        rate: steps.kervan(f"plan-rate-{rate}", *plan, "--rate", str(rate), "--slo", SLO, at_most_s=60, needs_s=0)
        for rate in rates
    }
    row: Row = {"isl": isl, "osl": osl, "loops": [], "rates": []}
    with steps.fleet("service", model, "--gateways", "1" if is_tiny else "2", *words, *env) as started:
        if started is None:
            return row
        url, row["up_s"] = started
        status = steps.kervan("service-status", "status", "--name", "service")
        replicas = (status or {}).get("replicas", ())
        row["starts_s"] = [replica.get("start_s") for replica in replicas]
        row["kv_tokens"] = kv_tokens(Path(replicas[0]["log"])) if replicas else None
        lengths = ["--isl", str(isl), "--osl", str(osl), "--slo", SLO]
        for streams in streams_of:
            requests, needs_s = streams * ROUNDS.get(streams, 2), LOADS_S.get(streams, 10)
            load = ["--streams", str(streams), "--num-requests", str(requests)]
            bench = ["bench", url, *lengths, *load]
            run = steps.kervan(f"service-streams-{streams}", *bench, at_most_s=180, needs_s=needs_s)
            if run:
                row["loops"].append({"streams": streams, **figures(run), "predicted": predicted(told[streams])})
        seconds = 5 if is_tiny else RATE_S
        for rate in rates:
            bench = ["bench", url, *lengths, "--rate", str(rate), "--duration", f"{seconds}s"]
            run = steps.kervan(f"service-rate-{rate}", *bench, at_most_s=120, needs_s=seconds + 12)
            if run:
                load_of = {"rate": rate, "seconds": seconds, "seed": 0}  # bench's own
                row["rates"].append({**load_of, **figures(run), "predicted": predicted(told_rates[rate])})
    return row


def kv_tokens(log: Path) -> int | None:
    """What vLLM says of its KV cache."""
    found = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text(errors="replace"))
    return int(found[1].replace(",", "")) if found else None


def predicted(told: Row | None) -> Row | None:
    """The planner's figures for the one layout that was asked for."""
    best = next(iter((told or {}).get("candidates", ())), None)
    if best is None or not best["fits"]:
        return None
    return {key: best[key] for key in ("out_tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")}


def moves(steps: Steps, model: Path, args: Sequence[str], env: Sequence[str], *, is_tiny: bool) -> Row:
    """Two replicas of the 8B shape on one GPU, under load: undisturbed, one killed, one drained."""
    words = [word for arg in args for word in ("--engine-arg", arg)]
    share = [] if is_tiny else ["--gpus-per-replica", "0.5"]
    streams, osl = (8, 128) if is_tiny else (MOVES_STREAMS, MOVES_OSL)
    row: Row = {"streams": streams, "osl": osl, "runs": []}
    with steps.fleet("moves", model, "--replicas", "2", "--gateways", "1", *share, *words, *env) as started:
        if started is None:
            return row
        url, row["up_s"] = started
        status = steps.kervan("moves-status", "status", "--name", "moves")
        row["starts_s"] = [replica.get("start_s") for replica in (status or {}).get("replicas", ())]
        for what in ("undisturbed", "kill", "drain"):
            status = steps.kervan(f"moves-before-{what}", "status", "--name", "moves") or {}
            ready = [replica for replica in status.get("replicas", ()) if replica["state"] == "ready"]
            if len(ready) < 2:
                steps.problems.append(f"{len(ready)} of 2 replicas are ready before {what}")
                continue
            commands = {
                "kill": f"kill -9 {ready[0]['pid']}",
                "drain": f"{sys.executable} -m kervan drain {ready[0]['id']} --name moves --deadline 30s",
            }
            fault = ["--at", f"{FAULT_AT_S}s {commands[what]}"] if what in commands else []
            load = ["--streams", str(streams), "--duration", f"{15 if is_tiny else MOVES_S}s", "--isl", "64"]
            run = steps.kervan(f"moves-{what}", "bench", url, *load, "--osl", str(osl), *fault, at_most_s=150)
            if run:
                row["runs"].append({"what": what, **figures(run)})
                broken, faults = row["runs"][-1]["errors"], row["runs"][-1]["faults"]
                if broken:
                    steps.problems.append(f"{broken} streams of {what} broke")
                # None: the load was over before the command; a drain waits until the replica is gone
                if any(one["exit_code"] not in (0, None) for one in faults) or len(faults) != len(fault[1:]):
                    steps.problems.append(f"the {what} did not happen: {faults}")
            wait_until_ready(steps, what)
    return row


def wait_until_ready(steps: Steps, what: str) -> None:
    """Until two replicas are ready again, or there is no time."""
    while time.monotonic() < steps.ends_s - 10:
        told = steps.kervan(f"moves-after-{what}", "status", "--name", "moves")
        if [replica["state"] for replica in (told or {}).get("replicas", ())].count("ready") >= 2:
            return
        time.sleep(2)


def beside(measured: float, predicted_value: float | None) -> str:
    if predicted_value is None:
        return f"{measured:9,.1f} {'-':>9} {'':>5}"
    return f"{measured:9,.1f} {predicted_value:9,.1f} {predicted_value / measured - 1 if measured else 0:+5.0%}"


def tables(content: Row) -> list[str]:
    lines = []
    if found := content.get("service"):
        lines += [
            f"70B shape in FP8, {found['isl']} in, {found['osl']} out; up after {found.get('up_s', 0):.0f} s; "
            "measured, predicted",
            f"{'load':10} {'tok/s':>26} {'TTFT p50, ms':>26} {'TPOT p50, ms':>26}  TTFT p95, p99   TPOT p99  failed",
        ]
        for one in [*found["loops"], *found["rates"]]:
            guess = one["predicted"] or {}
            load = f"{one['streams']} streams" if "streams" in one else f"{one['rate']}/s"
            # A plan's rate is that of a steady state; a short run begins and ends with few streams.
            tokens_s = guess.get("out_tok_s") if "streams" in one else None
            lines.append(
                f"{load:10} {beside(one['out_tok_s'], tokens_s):>26} "
                f"{beside(1e3 * one['ttft_s']['p50'], guess.get('ttft_p50_ms')):>26} "
                f"{beside(1e3 * one['tpot_s']['p50'], guess.get('tpot_p50_ms')):>26}  "
                f"{one['ttft_s']['p95']:6.2f} {one['ttft_s']['p99']:6.2f} s  {1e3 * one['tpot_s']['p99']:5.1f} ms  "
                f"{one['errors']:6}"
            )
    if found := content.get("moves"):
        lines += [
            f"two replicas of the 8B shape on one GPU, {found['streams']} streams, {found['osl']} out",
            f"{'':12} {'tok/s':>9} {'whole':>6} {'failed':>6} {'gap p50, ms':>12} {'p99, ms':>8} {'longest, s':>11}",
        ]
        lines += [
            f"{one['what']:12} {one['out_tok_s']:9,.0f} {one['ok']:6} {one['errors']:6} "
            f"{1e3 * one['gap_s']['p50']:12.1f} "
            f"{1e3 * one['gap_s']['p99']:8.1f} {one['gap_s']['max']:11.2f}"
            for one in found["runs"]
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=["service", "moves", "all"], default="all")
    parser.add_argument("--tiny", type=Path, help="a small model's directory: the same steps on the CPU")
    parser.add_argument("--for", dest="for_s", type=float, default=DEFAULT_S, help="seconds for all of it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    steps = Steps(options.out, time.monotonic() + options.for_s)
    place = Path(tempfile.mkdtemp(prefix="service-70b-"))
    os.environ["KERVAN_HOME"] = str(place / "home")
    env = [word for pair in TINY_ENV for word in ("--env", pair)] if options.tiny else []
    content: Row = {}
    try:
        for part, run in (("service", service), ("moves", moves)):
            if options.part not in (part, "all"):
                continue
            shape = {"service": "llama3-70b", "moves": "llama3-8b"}[part]
            config = json.loads((HERE / f"models/{shape}/config.json").read_text())
            (place / shape).mkdir()
            model = options.tiny.resolve() if options.tiny else write_model(config, place / shape)
            of_part = SERVICE_ARGS if part == "service" else ("max_model_len=4096",)
            args = TINY_ARGS if options.tiny else (*of_part, *DUMMY)
            content[part] = run(steps, model, args, env, is_tiny=options.tiny is not None)
    finally:
        lines = tables(content)
        (options.out / "table.txt").write_text("\n".join([*lines, *steps.problems]) + "\n")
        whole = records.record("service-70b", {**content, "problems": steps.problems})
        words = ["DIR" if word == str(options.out) else word for word in sys.argv[1:]]
        whole["command"] = " ".join(["python", "benchmarks/service_70b_h200.py", *words])
        records.write(options.out / "record.json", whole)
        for log in (place / "home/logs").glob("*.log"):
            shutil.copy(log, options.out)
        with tarfile.open(options.out / "service-70b.tar.gz", "w:gz") as tar:
            for path in sorted(options.out.iterdir()):
                if path.suffix != ".gz":
                    tar.add(path, arcname=path.name)
        shutil.rmtree(place, ignore_errors=True)
        print("\n".join([*lines, *(f"PROBLEM: {problem}" for problem in steps.problems)]))
    return 1 if steps.problems else 0


if __name__ == "__main__":
    sys.exit(main())
