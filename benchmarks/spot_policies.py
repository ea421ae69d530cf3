"""Policies on spot nodes under the same load and market, in the simulator: what share kept the SLO, and for how much.

    python benchmarks/spot_policies.py --data DIR           # all; about 20 minutes on one core
    python benchmarks/spot_policies.py --loads market       # some; also: spotserve-0304, spotserve-0506
    python benchmarks/spot_policies.py --data DIR --record  # and write benchmarks/records/spot-policies-DATE.json; rows
                                                            # that it has, and were not run again, stay

Azure's chat requests of November 2023, one request/s for a replica (a 32B model on two H100, TTFT 3 s, TPOT 100 ms),
100 s from a decision to ready, 120 s of notice. Spot nodes as SpotServe recorded them for 22 minutes of two days, over
and over; or a market of three zones that are short together, another one for each seed. In the first 15 minutes fleets
of 8 on-demand replicas go over to spot: they are paid and not counted.

The default policy (`slo`, with a spot and an on-demand pool, and with on-demand only), SkyServe's SpotHedge at several
targets, extra replicas and delays, and `fill`. The best setting of SpotHedge is the cheapest of those that keep the SLO
for 99% of the requests in all seeds together; if none does, the one that keeps most. It is chosen after the fact, for
each load: the default policy has no such choice.
"""

import dataclasses
import datetime
import json
import multiprocessing
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from policies import AZURE, GPU, KEPT, MODEL, START_S, TP, arguments, chosen, engine

from kervan.config import node_trace
from kervan.config.autoscale import resolve
from kervan.config.node_trace import NodeChange, NodeTrace
from kervan.config.workload import parse_slo, read_trace
from kervan.errors import ConfigError
from kervan.simulate import policies
from kervan.simulate.duration import fixed
from kervan.simulate.fleet import Simulation
from kervan.simulate.market import MarketModel
from kervan.simulate.replica_rate import scaled_to
from kervan.simulate.setup import FleetSetup, LoadSetup, PoolSetup

HERE = Path(__file__).parent
SPOTSERVE = "https://github.com/Hsword/SpotServe"
MOST = 24
SETTLES_S, HOUR_S = 900.0, 3600.0
INITIAL = 8
USD, SPOT_USD = 10.0, 3.5  # of a replica and hour; assumed
RATES, EXTRAS = (0.4, 0.5, 0.6, 0.7, 0.8), (0, 1, 2, 4)
DELAYS = {"": {}, " quick": {"upscale_delay_s": 0, "downscale_delay_s": 300}}
EVERY = (
    "slo", "slo on-demand", "fill",
    *(f"spothedge:{rate}+{extra}{delays}" for rate in RATES for extra in EXTRAS for delays in DELAYS),
)  # fmt: skip


def fleet(nodes: NodeTrace | MarketModel, requests: Path) -> FleetSetup:
    """Enough on demand at the start, and nothing counted in the first `SETTLES_S`, in which spot takes their place."""
    start = fixed(START_S)
    load = LoadSetup(trace=tuple(read_trace(requests)), counts_from_s=SETTLES_S)
    setup = FleetSetup(
        engine=engine(32_768),
        pools=(
            PoolSetup(name="on-demand", minimum=1, maximum=MOST, start=start, usd_per_hour=USD),
            PoolSetup(name="spot", minimum=0, maximum=MOST, start=start, usd_per_hour=SPOT_USD, nodes=nodes),
        ),
        load=load,
        slo=parse_slo("ttft=3s,tpot=100ms"),
        initial=INITIAL,
    )
    return dataclasses.replace(setup, engine=setup.engine.scaled(scaled_to(setup, 1.0).scale))


def recorded(path: Path, requests: Path) -> FleetSetup:
    """What SpotServe's nodes did, over and over, once the fleet has settled."""
    trace = node_trace.read(path)
    first = trace.changes[0].nodes
    there, changes = set(first), [NodeChange(0.0, "add", first)]
    begin_s = SETTLES_S
    while begin_s < HOUR_S:
        if begin_s > SETTLES_S:  # as at the beginning again
            gone, back = tuple(sorted(there.difference(first))), tuple(sorted(set(first) - there))
            changes += [NodeChange(begin_s, "remove", gone)] if gone else []
            changes += [NodeChange(begin_s, "add", back)] if back else []
            there = set(first)
        for change in trace.changes[1:]:
            changes.append(NodeChange(begin_s + change.at_s, change.word, change.nodes))
            there = there.union(change.nodes) if change.word == "add" else there.difference(change.nodes)
        begin_s += trace.end_s
    return fleet(NodeTrace(tuple(changes), begin_s), requests)


def load_makers(data: Path) -> dict[str, tuple[Callable[[], FleetSetup], int]]:
    """By name, with how many seeds. `data`: where Azure's and SpotServe's files are."""
    requests = data / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
    days = {
        f"spotserve-{day}": (lambda day=day: recorded(data / "spotserve" / f"trace_{day}_real.txt", requests), 1)
        for day in ("0304", "0506")
    }
    market = MarketModel(zones=3, nodes=6)
    return {**days, "market": (lambda: fleet(market, requests), 5)}


def run(job: tuple[str, FleetSetup, str, int]) -> dict[str, Any]:
    """One policy in one market."""
    load, setup, name, seed = job
    kind, _, how = name.partition(" ")
    if how == "on-demand":
        setup = dataclasses.replace(setup, pools=setup.pools[:1])
    elif how:
        asked = resolve(
            policy="", slo="", schedule=(), time_zone="UTC", autoscaling=DELAYS[f" {how}"], maximum=2 * MOST
        )
        setup = dataclasses.replace(setup, autoscaling=asked)
    outcome = Simulation(setup, policies.make(kind, setup, seed), seed).run()
    return {
        "load": load, "policy": name, "seed": seed, "counted": outcome.counted, "good": outcome.counted_good,
        "usd": round(outcome.usd or 0.0, 3),
        "replica_hours": {pool: round(hours, 3) for pool, hours in outcome.replica_hours.items()},
        "lost_replicas": outcome.lost_replicas, "moves": outcome.moves, "broken": outcome.broken,
        "recomputed_tokens": outcome.recomputed_tokens, "ttft_p99_s": outcome.ttft_s["p99"],
    }  # fmt: skip


def summed(rows: Sequence[dict[str, Any]], load: str) -> dict[str, dict[str, float]]:
    """By policy, over the seeds: the share that kept the SLO, dollars, lost replicas, moves."""
    here = [row for row in rows if row["load"] == load]
    return {
        name: {
            "kept": sum(row["good"] for row in mine) / sum(row["counted"] for row in mine),
            **{what: sum(row[what] for row in mine) for what in ("usd", "lost_replicas", "moves", "broken")},
        }
        for name in dict.fromkeys(row["policy"] for row in here)
        if (mine := [row for row in here if row["policy"] == name])
    }


def best_hedge(policies_of: dict[str, dict[str, float]]) -> str:
    """The cheapest setting of SpotHedge that keeps the SLO, else the one that keeps most."""
    hedges = {name: row for name, row in policies_of.items() if name.startswith("spothedge")}
    if keep := {name: row for name, row in hedges.items() if row["kept"] >= KEPT}:
        return min(keep, key=lambda name: keep[name]["usd"])
    return max(hedges, key=lambda name: hedges[name]["kept"])


def table(rows: Sequence[dict[str, Any]], loads: Sequence[str]) -> list[str]:
    """Markdown: a row per load and policy."""
    lines = ["| market | policy | kept | USD | replicas lost | streams moved | broken |", f"|{'---|' * 7}"]
    for load in loads:
        found = summed(rows, load)
        hedge = best_hedge(found)
        for name, told in (("slo", "slo"), (hedge, f"best {hedge}"), ("fill", "fill"), ("slo on-demand",) * 2):
            row = found[name]
            counts = " | ".join(f"{row[what]:,.0f}" for what in ("lost_replicas", "moves", "broken"))
            lines.append(f"| {load} | {told} | {row['kept']:.2%} | {row['usd']:.2f} | {counts} |")
    return lines


def main() -> None:
    args = arguments(__doc__, "azure2023/ and spotserve/").parse_args()
    makers = load_makers(args.data)
    loads = chosen(args.loads, makers)
    jobs = []
    for load in loads:
        make, num_seeds = makers[load]
        try:
            setup = make()
        except (ConfigError, OSError) as error:
            sys.exit(f"load {load}: {error}")
        for name in args.policies.split(",") if args.policies else EVERY:
            policies.check(name.partition(" ")[0])
            jobs += [(load, setup, name, seed) for seed in range(num_seeds)]
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for row in pool.imap(run, jobs):
            rows.append(row)
            print(
                f"{row['load']:15} {row['policy']:24} {row['seed']} {row['good'] / row['counted']:8.3%} "
                f"{row['usd']:8.2f} USD", flush=True,
            )  # fmt: skip
    path = HERE / "records" / f"spot-policies-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"
    if args.record and path.exists():
        new = {(row["load"], row["policy"]) for row in rows}
        rows += [row for row in json.loads(path.read_text())["rows"] if (row["load"], row["policy"]) not in new]
        loads = [load for load in makers if any(row["load"] == load for row in rows)]
        rows.sort(key=lambda row: (loads.index(row["load"]), EVERY.index(row["policy"]), row["seed"]))
    if args.record or not args.policies:
        print("\n".join(table(rows, loads)))
    if args.record:
        record = {
            "what": "policies on spot nodes in the simulator",
            "command": f"python benchmarks/spot_policies.py --loads {','.join(loads)} --record",
            "model": MODEL.name, "gpu": f"{TP}x {GPU}", "usd_per_replica_hour": (USD, SPOT_USD), "start_s": START_S,
            "python": platform.python_version(), "sources": {"requests": AZURE, "spotserve": SPOTSERVE}, "rows": rows,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {path}")


if __name__ == "__main__":
    main()
