"""The same requests through a live fleet of twins and through the simulator: how far apart they are.

    python benchmarks/simulator_validation.py --replicas 2 --ramp 4:180s --record benchmarks/records
    python benchmarks/simulator_validation.py --replicas 1..4 --policy slo --ramp 1:60s,6:120s,1:120s --start-time 20s

Live: `kervan up --engine twin` with a real gateway and real Ray Serve in real time, loaded by `kervan bench --trace`
with requests that are drawn once. Simulated: the same rows of the trace, the twins' own step times, and with --policy
the same policy. Twins are slow (`--twin`), so that what this machine's cores add is small. `--svg`: both lines in one
plot.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from kervan.bench import records
from kervan.config import autoscale
from kervan.config.fleet import FleetConfig
from kervan.config.workload import TraceRow, parse_lengths, parse_slo
from kervan.facts import architecture, hardware
from kervan.facts import model as models
from kervan.facts.layout import Layout
from kervan.plan import screen
from kervan.plan.calibration import PRIOR
from kervan.policy.autoscale import choose
from kervan.policy.autoscale.state import ReplicaModel
from kervan.sim import limits as engine_limits
from kervan.sim import memory
from kervan.sim.constants import Constants
from kervan.sim.step_time import Batch
from kervan.simulate import loads, policies
from kervan.simulate.duration import parse_durations
from kervan.simulate.engine import EngineFacts, EngineTimes
from kervan.simulate.fleet import Simulation
from kervan.simulate.setup import FleetSetup, LoadSetup, PoolSetup
from kervan.simulate.tally import Outcome
from kervan.twin import capacity as twin_capacity
from kervan.twin.settings import settings
from kervan.twin.token_engine import TwinSettings

NAME = "validation"
TWIN = ("base_s=0.04", "prefill_token_s=0.0002", "sequence_s=0.001", "context_token_s=0.000001")
TIMEOUT_S = 600.0
ACCEPTED_SHARE = 0.10
LOOK_S = 1.0
# Of a gateway on this machine: what `kervan bench` sees between a step's end and a token is small beside a twin's step.
GATEWAY = Constants(prompt_s=0.004, prompt_token_s=2e-6, output_s=150e-6, delivery_s=0.004)


class TwinTimes:
    """The step times of a twin, which composes one step after the other."""

    composes_ahead = False

    def __init__(self, twin: TwinSettings) -> None:
        limits = twin.limits
        self.num_blocks = limits.num_blocks
        self.max_num_seqs = limits.max_num_seqs
        self.max_num_batched_tokens = limits.max_num_batched_tokens
        self.context_token_s = twin.timing.context_token_s
        self._timing = twin.timing

    def step_s(self, batch: Batch) -> float:
        """As the twin computes it; of a prompt in part, the sequence is not counted."""
        prompts = max(batch.samples - batch.sequences, int(batch.prefill_tokens > 0))
        return self._timing.step_s(
            prefill_tokens=batch.prefill_tokens,
            sequences=batch.sequences + prompts,
            context_tokens=int(batch.context_tokens) + batch.prefill_tokens,
        )


def kervan(*words: str, timeout_s: float = TIMEOUT_S) -> str:
    """What a command of this checkout printed."""
    command = [sys.executable, "-m", "kervan", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s).stdout


def write_trace(path: Path, rows: Sequence[TraceRow]) -> None:
    """In Azure's form, which `kervan bench` reads."""
    begin = datetime.datetime(2026, 1, 1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for row in rows:
            at = begin + datetime.timedelta(seconds=row.at_s)
            writer.writerow([at.strftime("%Y-%m-%d %H:%M:%S.%f") + "0", row.input_tokens, row.output_tokens])


class ReplicaLog(threading.Thread):
    """How many replicas the gateways are told of, by state, once a second."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.begun_s = time.monotonic()
        self.seen: list[tuple[float, dict[str, int]]] = []
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            with contextlib.suppress(httpx.HTTPError):
                text = httpx.get(f"{self.url}/metrics", timeout=10).text
                self.seen.append((time.monotonic() - self.begun_s, counted(text)))
            time.sleep(LOOK_S)


def counted(metrics: str) -> dict[str, int]:
    """Replicas by state, from `kervan_replicas{...state="ready"...}` of a metrics page."""
    found: dict[str, int] = {}
    for line in metrics.splitlines():
        if line.startswith("kervan_replicas{"):
            state = line.partition('state="')[2].partition('"')[0]
            found[state] = found.get(state, 0) + round(float(line.rpartition(" ")[2]))
    return found


IDLE_S = 30  # the live policy has watched an idle fleet for so long when the load comes
Seen = list[tuple[float, dict[str, int]]]


def run_live(args: argparse.Namespace, traces: Sequence[Path], record: Path) -> list[tuple[dict[str, Any], Seen]]:
    """Each trace through one fleet: what the client saw, and the replicas over time."""
    words = ["up", args.model, "--name", NAME, "--replicas", args.replicas, "--gateways", str(args.gateways)]
    words += ["--port", str(args.port), "--detach"]
    if args.engine == "twin":
        words += ["--engine", "twin", "--gpu", args.gpu, *(word for text in args.twin for word in ("--twin", text))]
    words += [word for text in engine_args(args) for word in ("--engine-arg", text)]
    if args.policy:
        words += ["--slo", args.slo]
    words += args.up
    print("kervan", *words, flush=True)
    kervan(*words)
    found = []
    try:
        url = json.loads(kervan("status", "--name", NAME, "--json"))["url"]
        for trace in traces:
            log = ReplicaLog(url)
            log.start()
            bench = ["bench", url, "--trace", str(trace), "--slo", args.slo, "--timeout", "600s", "--no-calibration"]
            out = kervan(*bench, "--seed", str(args.seed), "--record", str(record), "--json", timeout_s=3600)
            if args.policy:
                time.sleep(args.settle)
            log.is_over = True
            log.join()
            found.append((json.loads(out), log.seen))
    finally:
        kervan("down", "--name", NAME)
    return found


def engine_args(args: argparse.Namespace) -> list[str]:
    found = ["max_model_len=4096", "enable_prefix_caching=false"]
    if args.budget:
        found.append(f"max_num_batched_tokens={args.budget}")
    return [*found, "load_format=dummy"] if args.engine == "vllm" else found


def run_simulated(args: argparse.Namespace, rows: Sequence[TraceRow], seed: int) -> Outcome:
    """The same in the simulator."""
    least, _, most = args.replicas.partition("..")
    arguments = dict(text.split("=") for text in engine_args(args))
    described = models.read_config(args.model)
    assert described is not None
    spec, gpu = architecture.parse(described, args.model), hardware.gpu(args.gpu)
    limits = engine_limits.limits(spec, gpu, arguments)
    times: EngineTimes | None = None
    if args.engine == "twin":
        config = FleetConfig(
            model=args.model, engine="twin", gpu=args.gpu, twin=dict(text.split("=") for text in args.twin),
            engine_args=arguments,
        )  # fmt: skip
        twin = settings(config)
        model: ReplicaModel | None = twin_capacity.capacity(twin)  # what the live fleet's policy is given
        times, constants = TwinTimes(twin), GATEWAY
        kv_tokens = twin.limits.num_blocks * twin.limits.block_size
    else:
        model = None
        constants = dataclasses.replace(
            PRIOR.constants, kv_bandwidth_share=screen.UNEVEN_KV_SHARE * PRIOR.constants.kv_bandwidth_share
        )
        kv_tokens = memory.estimate(spec, Layout(1, 1), gpu, limits).kv_tokens
    facts = EngineFacts(
        spec=spec, layout=Layout(1, 1), gpu=gpu, limits=limits, constants=constants, kv_tokens=kv_tokens
    )
    idle_s = IDLE_S if args.policy else 0
    waited = tuple(dataclasses.replace(row, at_s=row.at_s + idle_s) for row in rows)
    pool = PoolSetup(
        name="on-demand", minimum=int(least), maximum=int(most or least), start=parse_durations(args.start_time)
    )
    setup = FleetSetup(
        engine=facts, pools=(pool,), load=LoadSetup(trace=waited), slo=parse_slo(args.slo), gateways=args.gateways
    )
    name = args.policy or f"fixed:{least}"
    policies.check(name)
    policy = policies.make(name, setup, seed)
    if model is not None and name == "slo":
        policy = choose.policy(
            autoscale.resolve(
                policy="slo", slo=args.slo, schedule=(), time_zone="UTC", autoscaling={}, maximum=pool.maximum
            ),
            model,
        )
    outcome = Simulation(setup, policy, seed, times=times).run()
    return dataclasses.replace(
        outcome,
        duration_s=outcome.duration_s - idle_s,
        timeline={name: values[idle_s:] for name, values in outcome.timeline.items()},
        decisions=[(at_s - idle_s, reason) for at_s, reason in outcome.decisions],
    )


def measure(args: argparse.Namespace, rows: Sequence[Sequence[TraceRow]]) -> list[tuple[dict[str, float | None], Seen]]:
    """The figures of each load on a live fleet, and what replicas there were."""
    home = Path(tempfile.mkdtemp(prefix="kv-"))
    os.environ["KERVAN_HOME"] = str(home)
    try:
        traces = [home / f"trace-{place}.csv" for place in range(len(rows))]
        for trace, each in zip(traces, rows, strict=True):
            write_trace(trace, each)
        found = run_live(args, traces, home / "bench.json")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return [(measured_live(args, each, told, seen), seen) for each, (told, seen) in zip(rows, found, strict=True)]


def figures_live(live: dict[str, Any]) -> dict[str, float | None]:
    return {
        "ttft_p50_s": live["ttft_from_arrival_s"]["p50"],
        "ttft_p95_s": live["ttft_from_arrival_s"]["p95"],
        "tpot_p50_s": live["tpot_s"]["p50"],
        "tpot_p95_s": live["tpot_s"]["p95"],
        "goodput_per_s": live["goodput_req_s"],
        "requests": live["requests"]["ok"],
        "failed": live["requests"]["errors"],
    }


def figures_simulated(outcome: Outcome) -> dict[str, float | None]:
    return {
        "ttft_p50_s": outcome.ttft_s["p50"],
        "ttft_p95_s": outcome.ttft_s["p95"],
        "tpot_p50_s": outcome.tpot_s["p50"],
        "tpot_p95_s": outcome.tpot_s["p95"],
        "goodput_per_s": outcome.good / outcome.duration_s,
        "requests": outcome.finished,
        "failed": outcome.broken + outcome.shed,
    }


def mean_replicas(seen: Sequence[tuple[float, dict[str, int]]], until_s: float) -> float:
    counts = [sum(n for state, n in states.items() if state != "unhealthy") for at_s, states in seen if at_s <= until_s]
    return statistics.fmean(counts) if counts else 0.0


def drawn(args: argparse.Namespace, ramp: str) -> list[TraceRow]:
    """The requests of a load, the first at 0."""
    load = LoadSetup(
        stages=loads.parse_ramp(ramp), process="poisson", isl=parse_lengths(args.isl), osl=parse_lengths(args.osl)
    )
    found = list(load.requests(args.seed))
    return [TraceRow(at_s - found[0][0], isl, osl) for at_s, isl, osl, _ in found]


def compared(
    args: argparse.Namespace, rows: Sequence[TraceRow], outcome: Outcome, measured: dict[str, float | None]
) -> dict[str, dict[str, float | None]]:
    """Each figure, live and simulated."""
    simulated = figures_simulated(outcome)
    if args.policy:
        length = len(outcome.timeline["ready"])
        there = [sum(outcome.timeline[phase][i] for phase in ("ready", "starting", "draining")) for i in range(length)]
        simulated["mean_replicas"] = statistics.fmean(there[: int(min(rows[-1].at_s, length))])
    table: dict[str, dict[str, float | None]] = {}
    print(f"{'':16}{'live':>12}{'simulated':>12}{'apart':>9}")
    for name, value in simulated.items():
        other = measured.get(name)
        apart = None if not other or value is None else value / other - 1
        table[name] = {"live": other, "simulated": value, "apart": apart}
        words = "" if apart is None else f"{apart:+8.1%}"
        print(f"{name:16}{other if other is not None else float('nan'):12.4f}{value or 0.0:12.4f} {words}", flush=True)
    return table


def measured_live(
    args: argparse.Namespace, rows: Sequence[TraceRow], live: dict[str, Any], seen: Seen
) -> dict[str, float | None]:
    """The live figures, over the time that requests came."""
    found = figures_live(live)
    found["goodput_per_s"] = (found["goodput_per_s"] or 0.0) * live["duration_s"] / max(1e-9, rows[-1].at_s)
    if args.policy:
        found["mean_replicas"] = mean_replicas(seen, min(rows[-1].at_s, live["duration_s"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "models" / "llama3-8b"))
    parser.add_argument("--engine", choices=("twin", "vllm"), default="twin", help="vllm: on this machine's GPU")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--replicas", default="2", help="N, or MIN..MAX with --policy")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--policy", default="", help="slo or ray; without it a fixed number")
    parser.add_argument("--up", action="append", default=[], help="one more word for kervan up; repeatable")
    parser.add_argument("--ramp", action="append", default=None, help="a load; repeatable, on the same fleet [4:180s]")
    parser.add_argument("--isl", default="256..1024")
    parser.add_argument("--osl", default="32..256")
    parser.add_argument("--slo", default="ttft=1s,tpot=150ms")
    parser.add_argument("--twin", action="append", default=None, help=f"settings of twins [{', '.join(TWIN)}]")
    parser.add_argument("--budget", type=int, default=2048, help="max_num_batched_tokens; 0: vLLM's default")
    parser.add_argument("--start-time", default="10s", help="simulated, from a decision to ready")
    parser.add_argument("--settle", type=float, default=60.0, help="seconds to watch the replicas after the load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=18_640)
    parser.add_argument("--accepted", type=float, default=ACCEPTED_SHARE, help="how far apart figures may be")
    parser.add_argument(
        "--live-from",
        type=Path,
        help="a record, whose live figures are compared with a new simulation of the same options",
    )
    parser.add_argument("--only-simulated", action="store_true")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    args.twin = args.twin or list(TWIN)
    args.ramp = args.ramp or ["4:180s"]
    rows = [drawn(args, ramp) for ramp in args.ramp]
    outcomes = [run_simulated(args, each, args.seed) for each in rows]
    if args.only_simulated:
        for ramp, outcome in zip(args.ramp, outcomes, strict=True):
            print(ramp, json.dumps(figures_simulated(outcome)))
        return
    if args.live_from is not None:
        before = json.loads(args.live_from.read_text())
        live = [
            ({name: cell["live"] for name, cell in part["compared"].items()}, part.get("replicas_live", []))
            for part in before["loads"]
        ]
    else:
        before = None
        live = measure(args, rows)
    parts = []
    for ramp, each, outcome, (told, seen) in zip(args.ramp, rows, outcomes, live, strict=True):
        print(f"load {ramp}")
        table = compared(args, each, outcome, told)
        part: dict[str, Any] = {"load": ramp, "compared": table, "decisions_simulated": outcome.decisions}
        if args.policy:
            part["replicas_live"] = [[round(at_s, 1), states] for at_s, states in seen]
            part["replicas_simulated"] = {name: outcome.timeline[name] for name in ("ready", "starting", "draining")}
        parts.append(part)
    off = [
        f"{part['load']} {name} {value['apart']:+.1%}"
        for part in parts
        for name, value in part["compared"].items()
        if value["apart"] is not None and abs(value["apart"]) > args.accepted
    ]
    print("within" if not off else f"not within {args.accepted:.0%}: {', '.join(off)}")
    record = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "loads": parts,
        "load_average": os.getloadavg() if before is None else before["load_average"],
        "live_date": None if before is None else before["date"],
    }
    if args.record is not None:
        print("record:", records.write(args.record, records.record("simulator-validation", record)))
    if args.svg is not None and args.policy:
        write_plot(args.svg, parts[0])
    sys.exit(bool(off))


def write_plot(path: Path, part: dict[str, Any]) -> None:
    """Replicas over time, live and simulated, as an SVG."""
    live = [(at_s, sum(states.values())) for at_s, states in part["replicas_live"]]
    phases = part["replicas_simulated"].values()
    simulated = [(float(second), sum(column)) for second, column in enumerate(zip(*phases, strict=True))]
    end_s = max(at_s for at_s, _ in live)
    most = max(count for _, count in (*live, *simulated))
    width, height, left, top, bottom = 720, 260, 40, 12, 34
    across, down = (width - left - 12) / end_s, (height - top - bottom) / most

    def place(at_s: float, count: float) -> str:
        return f"{left + at_s * across:.1f} {height - bottom - count * down:.1f}"

    def steps(line: Sequence[tuple[float, float]]) -> str:
        found, before = [f"M {place(*line[0])}"], line[0][1]
        for at_s, count in line:
            if count != before and at_s <= end_s:
                found.append(f"L {place(at_s, before)} L {place(at_s, count)}")
                before = count
        return " ".join([*found, f"L {place(end_s, before)}"])

    texts = [
        f'<text x="{left - 8}" y="{height - bottom - count * down + 4:.1f}" text-anchor="end">{count}</text>'
        for count in range(int(most) + 1)
    ] + [
        f'<text x="{left + at_s * across:.1f}" y="{height - bottom + 18}" text-anchor="middle">{at_s} s</text>'
        for at_s in range(0, int(end_s) + 1, 60)
    ]
    paths = [
        f'<path d="M {place(0, count)} L {place(end_s, count)}" stroke="#8886" stroke-width="0.5"/>'
        for count in range(int(most) + 1)
    ] + [
        f'<path d="{steps(line)}" stroke="{color}" stroke-width="2"{dash}/>'
        for line, color, dash in ((live, "#1f77b4", ""), (simulated, "#d62728", ' stroke-dasharray="5 3"'))
    ]
    legend = (
        f'<text x="{left + 16}" y="{top + 12}" fill="#1f77b4">live</text>'
        f'<text x="{left + 56}" y="{top + 12}" fill="#d62728">simulated (dashed)</text>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    path.write_text(
        f'{head} font-size="12" fill="#888">{"".join(texts)}{legend}<g fill="none">{"".join(paths)}</g></svg>\n'
    )


if __name__ == "__main__":
    main()
