"""Autoscaling policies under the same loads, in the simulator: what share kept the SLO, and with how many replicas.

    python benchmarks/policies.py                      # all loads; about 20 minutes on two cores
    python benchmarks/policies.py --loads ramp,code    # some
    python benchmarks/policies.py --policies slo,ray:5 # of each load, some of the policies
    python benchmarks/policies.py --record             # and write benchmarks/records/policies-DATE.json; rows that
                                                       # the record has, and were not run again, stay

For each load: the default policy (`slo`), Ray Serve's target policy at several targets with Ray's other defaults, the
least fixed number that keeps the SLO, and the oracle. The best setting of Ray's policy is the one with the fewest
replica-hours of those that keep the SLO for 99% of the requests; if none does, the one that keeps most. It is chosen
after the fact, for each load: the default policy has no such choice. The oracle is chosen in the same way, of those
that take a replica for 1 to 0.4 of what its model says.
"""

import argparse
import csv
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import platform
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from kervan.bench.arrivals import Stage
from kervan.cli.plan import plan_request
from kervan.config.workload import parse_lengths, parse_slo, read_trace
from kervan.errors import ConfigError
from kervan.plan import load as plan_load
from kervan.plan import screen
from kervan.simulate import policies
from kervan.simulate.duration import fixed
from kervan.simulate.engine import EngineFacts
from kervan.simulate.fleet import Simulation
from kervan.simulate.loads import parse_ramp
from kervan.simulate.replica_rate import scaled_to
from kervan.simulate.setup import FleetSetup, LoadSetup, PoolSetup

HERE = Path(__file__).parent
MODEL, GPU, TP = HERE / "models" / "qwen25-32b", "H100", 2
START_S = 100.0
TARGETS = (3, 5, 7, 10, 14, 20, 28, 40, 56)
ORACLES = ("oracle", "oracle:0.9", "oracle:0.8", "oracle:0.7", "oracle:0.6", "oracle:0.5", "oracle:0.4")
KEPT = 0.99
AZURE = "https://github.com/Azure/AzurePublicDataset"
MOONCAKE = "https://github.com/kvcache-ai/Mooncake"
SERVEGEN = "https://github.com/alibaba/ServeGen"


def engine(max_model_len: int) -> EngineFacts:
    """A 32B model on two H100: what llm-d's benchmark ran its model on."""
    request = plan_request(
        str(MODEL), gpu=GPU, gpus=TP, fixed={"tp": TP}, isl=parse_lengths("1000"), osl=parse_lengths("300"), rate=1.0,
        engine_args={"max_model_len": max_model_len},
    )  # fmt: skip
    found = screen.screen(plan_load.load(request))[0]
    return EngineFacts.of(found.step_time, found.memory.kv_tokens)


def fleet(load: LoadSetup, slo: str, low: int, high: int, rate: float | None, **more: Any) -> FleetSetup:
    """`rate`: step times are scaled so that a replica keeps the SLO up to so many requests/s."""
    pool = PoolSetup(name="on-demand", minimum=low, maximum=high, start=fixed(START_S))
    setup = FleetSetup(engine=engine(32_768), pools=(pool,), load=load, slo=parse_slo(slo), **more)
    if rate is None:
        return setup
    return dataclasses.replace(setup, engine=setup.engine.scaled(scaled_to(setup, rate).scale))


def ramp(arrivals: str) -> FleetSetup:
    """llm-d's episode: https://github.com/llm-d/llm-d, guides/workload-autoscaling/slo-aware."""
    load = LoadSetup(
        stages=parse_ramp("2:330s,4:360s,6:360s,8:360s,10:360s,4:360s,1:300s"),
        process=arrivals,  # type: ignore[arg-type]
        isl=parse_lengths("normal:mean=4000,std=300,min=3500,max=4500"),
        osl=parse_lengths("normal:mean=1000,std=80,min=900,max=1100"),
    )
    return fleet(load, "ttft=3s,tpot=100ms", 3, 8, 1.45)


def trace(path: Path, slo: str, initial: int, rate: float | None = 1.0) -> FleetSetup:
    """A recorded hour; it begins at full load, so `initial` replicas are there."""
    return fleet(LoadSetup(trace=tuple(read_trace(path))), slo, 1, 40, rate, initial=initial)


def servegen(path: Path, day: int) -> FleetSetup:
    """A day of ServeGen's rates (arXiv 2505.09999), at 15 replicas in its fullest ten minutes."""
    with path.open() as file:
        rates = [float(row["total_rate_rps"]) for row in csv.DictReader(file)][day * 144 : (day + 1) * 144 + 1]
    scale = 15 / max(rates)
    stages = tuple(Stage(a * scale, b * scale, 600.0) for a, b in itertools.pairwise(rates))
    load = LoadSetup(
        stages=stages, isl=parse_lengths("lognormal:median=700,sigma=0.9,max=8000"),
        osl=parse_lengths("lognormal:median=200,sigma=0.8,max=2000"),
    )  # fmt: skip
    return fleet(load, "ttft=3s,tpot=100ms", 1, 40, 1.0, initial=round(1.5 * rates[0] * scale) + 1)


def load_makers(data: Path) -> dict[str, Callable[[], FleetSetup]]:
    """By name. `data`: where Azure's, Mooncake's and ServeGen's files are."""
    azure = data / "azure2023"
    return {
        "ramp": lambda: ramp("constant"),
        "ramp-poisson": lambda: ramp("poisson"),
        "chat": lambda: trace(azure / "AzureLLMInferenceTrace_conv.csv", "ttft=3s,tpot=100ms", 8),
        "code": lambda: trace(azure / "AzureLLMInferenceTrace_code.csv", "ttft=3s,tpot=100ms", 16),
        "mooncake": lambda: trace(data / "mooncake" / "conversation_trace.jsonl", "ttft=15s,tpot=100ms", 12, None),
        "servegen-small": lambda: servegen(data / "servegen" / "language-m-small-rate-10min.csv", 0),
        "servegen-r1": lambda: servegen(data / "servegen" / "reason-deepseek-r1-rate-10min.csv", 0),
    }


def run(job: tuple[str, FleetSetup, str, int]) -> dict[str, Any]:
    """One policy under one load."""
    load, setup, name, seed = job
    outcome = Simulation(setup, policies.make(name, setup, seed), seed).run()
    return {
        "load": load, "policy": name, "seed": seed, "requests": outcome.requests, "kept": round(outcome.attained, 5),
        "mean_replicas": round(outcome.mean_replicas, 3), 
        "replica_hours": round(outcome.mean_replicas * outcome.episode_s / 3600, 3),
        "max_replicas": outcome.max_replicas, "started": outcome.started_replicas, "moves": outcome.moves,
        "ttft_p99_s": outcome.ttft_s["p99"], "tpot_p99_s": outcome.tpot_s["p99"], "episode_s": round(outcome.episode_s),
    }  # fmt: skip


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fewest replica-hours of those that keep the SLO, else the one that keeps most."""
    keep = [row for row in rows if row["kept"] >= KEPT]
    if keep:
        return min(keep, key=lambda row: row["replica_hours"])
    return max(rows, key=lambda row: row["kept"])


def table(rows: Sequence[dict[str, Any]], loads: Sequence[str]) -> list[str]:
    """Markdown: a row per load."""
    lines = ["| load | slo: kept, replicas | Ray's best | best fixed number | oracle |", f"|{'---|' * 5}"]
    for load in loads:
        here = [row for row in rows if row["load"] == load]
        slo = next(row for row in here if row["policy"] == "slo")
        ray = best([row for row in here if row["policy"].startswith("ray")])
        fixed_best = best([row for row in here if row["policy"].startswith("fixed")])
        oracle = best([row for row in here if row["policy"].startswith("oracle")])
        cells = [f"{row['kept']:.2%}, {row['mean_replicas']:.2f}" for row in (slo, ray, fixed_best, oracle)]
        cells[1] += f" (target {ray['policy'].partition(':')[2]})"
        lines.append(f"| {load} | {' | '.join(cells)} |")
    return lines


def arguments(about: str | None, folders: str) -> argparse.ArgumentParser:
    """The options of a comparison of policies. `folders`: those that `--data` has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=HERE / "traces",
        help=f"folder with {folders}, as their authors publish them (record: sources)",
    )  # fmt: skip
    parser.add_argument("--loads", help="joined by commas; without it, all")
    parser.add_argument("--policies", help="joined by commas; without it, all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write a record")
    return parser


def chosen(loads: str | None, known: Collection[str]) -> list[str]:
    """Those of `--loads`. Raises: SystemExit for one that is unknown."""
    names = loads.split(",") if loads else list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no load {unknown[0]!r}; known: {', '.join(known)}")
    return names


def main() -> None:
    parser = arguments(__doc__, "azure2023/, mooncake/ and servegen/")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    makers = load_makers(args.data)
    loads = chosen(args.loads, makers)
    jobs = []
    for load in loads:
        try:
            setup = makers[load]()
        except (ConfigError, OSError) as error:
            sys.exit(f"load {load}: {error}")
        most = setup.pools[0].maximum
        steps = range(setup.pools[0].minimum, most + 1, 1 if most <= 12 else 3)
        every = ("slo", *ORACLES, *(f"ray:{target}" for target in TARGETS), *(f"fixed:{n}" for n in steps if n))
        for name in args.policies.split(",") if args.policies else every:
            policies.check(name)
            jobs.append((load, setup, name, args.seed))
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for row in pool.imap(run, jobs):
            rows.append(row)
            figures = f"{row['kept']:8.3%} {row['mean_replicas']:7.2f} replicas"
            print(f"{row['load']:15} {row['policy']:10} {figures}", flush=True)
    path = HERE / "records" / f"policies-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"
    if args.record and path.exists():
        new = {(row["load"], row["policy"]) for row in rows}
        before = json.loads(path.read_text())["rows"]
        rows = [row for row in before if (row["load"], row["policy"]) not in new] + rows
        loads = [load for load in makers if any(row["load"] == load for row in rows)]
    rows.sort(key=lambda row: loads.index(row["load"]))
    print("\n".join(table(rows, loads)))
    if args.record:
        record = {
            "what": "autoscaling policies in the simulator",
            "command": f"python benchmarks/policies.py --loads {','.join(loads)} --seed {args.seed} --record",
            "model": MODEL.name, "gpu": f"{TP}x {GPU}", "start_s": START_S, "python": platform.python_version(),
            "sources": {"chat, code": AZURE, "mooncake": MOONCAKE, "servegen": SERVEGEN},
            "rows": rows,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {path}")


if __name__ == "__main__":
    main()
