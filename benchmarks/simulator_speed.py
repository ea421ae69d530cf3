"""How fast the simulator computes: requests per second of one process and of all cores, and a day of 20 replicas.

python benchmarks/simulator_speed.py --record benchmarks/records
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from kervan.bench import records
from kervan.bench.arrivals import Stage
from kervan.cli.plan import plan_request
from kervan.config.workload import parse_lengths, parse_slo
from kervan.plan import load as plan_load
from kervan.plan import screen
from kervan.simulate import compare
from kervan.simulate.duration import fixed
from kervan.simulate.engine import EngineFacts
from kervan.simulate.setup import FleetSetup, LoadSetup, PoolSetup

MODELS = Path(__file__).parent / "models"
HOURS = (0.35, 0.3, 0.25, 0.25, 0.3, 0.4, 0.55, 0.7, 0.85, 0.95, 1.0, 1.0, 0.95, 0.95, 0.95, 0.9, 0.9, 0.85, 0.8, 0.75,
         0.65, 0.55, 0.5, 0.4)  # of the highest rate, hour by hour  # fmt: skip


def fleet(model: str, gpu: str, tp: int, *, isl: str, osl: str, stages: tuple[Stage, ...], replicas: int) -> FleetSetup:
    prompt, output = parse_lengths(isl), parse_lengths(osl)
    request = plan_request(
        str(MODELS / model), gpu=gpu, gpus=tp, fixed={"tp": tp}, isl=prompt, osl=output, rate=1.0, engine_args={}
    )
    (screened,) = screen.screen(plan_load.load(request))
    pool = PoolSetup(name="on-demand", minimum=1, maximum=replicas, start=fixed(100.0))
    return FleetSetup(
        engine=EngineFacts.of(screened.step_time, screened.memory.kv_tokens),
        pools=(pool,),
        load=LoadSetup(stages=stages, isl=prompt, osl=output),
        slo=parse_slo("ttft=3s,tpot=100ms"),
        gateways=-(-replicas // 4),
        decides_every_s=5.0 if sum(stage.duration_s for stage in stages) > 6 * 3600 else 1.0,  # as the command does
    )


def measured(setup: FleetSetup, names: list[str], seeds: range, processes: int) -> dict[str, Any]:
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    compared = compare.run(setup, names, seeds, processes=processes)
    wall_s = time.perf_counter() - begin_s
    outcomes = [outcome for one in compared for outcome in one.outcomes]
    requests = sum(outcome.requests for outcome in outcomes)
    return {
        "requests": requests,
        "runs": len(outcomes),
        "wall_s": round(wall_s, 2),
        "cpu_s": round(time.process_time() - cpu_s, 2) if processes == 1 else None,
        "requests_per_min": round(60 * requests / wall_s),
        "attained": [round(outcome.attained, 4) for outcome in outcomes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0, help="of load in each run")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    busy = fleet(
        "qwen25-32b", "H100", 2, isl="3500..4500", osl="900..1100", replicas=8,
        stages=(Stage(7.0, 7.0, 60 * args.minutes),),
    )  # fmt: skip
    day = fleet(
        "llama3-70b", "H200", 2, isl="2000..5000", osl="1000..3000", replicas=20,
        stages=tuple(Stage(4.0 * share, 4.0 * share, 3600.0) for share in HOURS),
    )  # fmt: skip
    found = {
        "one process, 8 replicas, fixed": measured(busy, ["fixed"], range(1), 1),
        "all cores, 8 replicas, fixed": measured(busy, ["fixed"], range(2 * cores), cores),
        "one process, 8 replicas, slo": measured(busy, ["slo"], range(1), 1),
        "a day of up to 20 replicas, fixed": measured(day, ["fixed"], range(1), 1),
        "a day of up to 20 replicas, slo": measured(day, ["slo"], range(1), 1),
    }
    print(json.dumps(found, indent=2))
    if args.record is not None:
        content = {"cores": cores, "load_average": os.getloadavg(), "measured": found}
        print("record:", records.write(args.record, records.record("simulator-speed", content)))


if __name__ == "__main__":
    main()
