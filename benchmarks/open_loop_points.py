"""Bare vLLM under requests that come at a rate (Poisson), random weights: the points that the planner's open loops are
compared with.

    python benchmarks/open_loop_points.py --for 560 --out DIR \\
        'llama3-8b 15@1024/128x35 4@1024/1024x60' 'qwen3-30b-a3b 8@1024/256x40'

A line is a model of models/ or a model directory, then loads: RATE@ISL/OSLxSECONDS. Servers run one after the other on
the first GPU. A row goes into the record as it comes, so a run that is cut short keeps what it has.

Of each load: figures over all requests, those of the steady middle (from `STEADY_FROM` of the time on, until no more
come), and TTFT by thirds of the time, which tells whether requests pile up.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import servers
from planner_points import model_directory

from kervan.bench import records
from kervan.bench.arrivals import Stage
from kervan.bench.benchmark import ClientOptions, Prepared, measure, prepare
from kervan.bench.load import Endpoint, Load
from kervan.bench.result import Result
from kervan.bench.sketch import merged

ENGINE_ARGS = {"load_format": "dummy", "enable_prefix_caching": False, "max_model_len": 8192}
STEADY_FROM = 0.4
DRAIN_S = 60.0  # for what is in flight when no more requests come; what is left then is cut off
WARM_UP = Load(streams=8, num_requests=16, isl="512", osl="16")
THIRDS = ((0, 11), (11, 21), (21, 32))  # of the blocks of a tally


@dataclass(frozen=True)
class OpenLoad:
    """Requests per second, of so many tokens in and out, for so long."""

    rate: float
    isl: int
    osl: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.rate:g}/s of {self.isl}/{self.osl} for {self.seconds:g} s"


def parse_load(text: str) -> OpenLoad:
    rate, _, rest = text.partition("@")
    isl, _, rest = rest.partition("/")
    osl, _, seconds = rest.partition("x")
    return OpenLoad(float(rate), int(isl), int(osl), float(seconds))


def run(prepared: Prepared, load: OpenLoad, seed: int, end_s: float) -> tuple[Result, bool]:
    """The result, and whether it was cut off."""
    is_cut = False

    def is_over(elapsed_s: float, _: Any) -> bool:
        nonlocal is_cut
        is_cut = is_cut or elapsed_s > load.seconds + DRAIN_S or time.monotonic() > end_s
        return is_cut

    arrivals = Load(
        stages=(Stage(load.rate, load.rate, math.inf),), duration_s=load.seconds, isl=str(load.isl), osl=str(load.osl),
        seed=seed,
    )  # fmt: skip
    client = ClientOptions(processes=2 if load.rate * load.osl < 4000 else 4, calibrates=False, reconciles=False)
    return measure(prepared, arrivals, client=client, on_progress=is_over), is_cut


def row(model: str, load: OpenLoad, result: Result, *, is_cut: bool, seed: int) -> dict[str, Any]:
    tally = result.tally
    whole = {
        name: {q: round(value, 5) for q, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
               if (value := tally.whole(f"{name}_s").quantile(share)) is not None}
        for name in ("ttft", "ttft_from_arrival", "tpot", "gap", "e2e", "late")
    }  # fmt: skip
    timeline = tally.timeline
    cells = {
        number: cell
        for number, cell in timeline.cells.items()
        if STEADY_FROM * load.seconds <= number * timeline.width_s < load.seconds - timeline.width_s
    }
    steady_s = len(cells) * timeline.width_s
    thirds = [
        merged(block["ttft_from_arrival_s"] for block in tally.blocks[begin:end]).quantile(0.5) for begin, end in THIRDS
    ]
    return {
        "model": model, "rate": load.rate, "isl": load.isl, "osl": load.osl, "seconds": load.seconds, "seed": seed,
        "ok": tally.ok, "errors": tally.num_errors, "is_cut": is_cut, "unfinished": tally.unfinished,
        "out_tok_s": round(result.out_tok_s, 1),
        "streams": round(result.streams_achieved, 1),
        "steady_tok_s": round(sum(cell.tokens for cell in cells.values()) / steady_s, 1) if cells else None,
        "steady_req_s": round(sum(cell.ok for cell in cells.values()) / steady_s, 3) if cells else None,
        "ttft_p50_s_by_third": [None if value is None else round(value, 4) for value in thirds],
        **whole,
        "doubts": result.doubts(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", metavar="LINE", help="a model and its loads, as above")
    parser.add_argument("--for", dest="for_s", type=float, default=560.0, metavar="SECONDS", help="in all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V", help="for every server, repeatable")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="likewise")
    args = parser.parse_args()
    begin_s = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    engine_args = {**ENGINE_ARGS, **servers.parse_engine_args(args.engine_arg)}
    rows: list[dict[str, Any]] = []
    content = {"engine_args": engine_args, "rows": rows}
    record = records.record("open-loop-points", content)
    record["command"] = shlex.join(["python", "benchmarks/open_loop_points.py", *sys.argv[1:]])
    path = records.write(args.out, record)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin_s:5.1f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="shapes-") as place:
        for line in args.lines:
            name, *loads = line.split()
            directory = str(model_directory(name, Path(place)))
            env = servers.parse_assignments(args.env)
            with servers.bare_vllm(directory, engine_args, log_dir=args.out, env=env, timeout_s=400.0) as starting:
                server = starting.wait()
                say(f"{name} is ready")
                prepared = prepare(Endpoint(url=server.url, model=server.model), WARM_UP)
                measure(prepared, WARM_UP, client=ClientOptions(processes=1, calibrates=False, reconciles=False))
                for seed, load in enumerate(map(parse_load, loads), 7):
                    left_s = args.for_s - (time.monotonic() - begin_s)
                    if left_s < load.seconds + 10:
                        say(f"{load}: not measured, {left_s:.0f} s were left")
                        continue
                    result, is_cut = run(prepared, load, seed, begin_s + args.for_s - 5)
                    rows.append(row(name, load, result, is_cut=is_cut, seed=seed))
                    records.write(path, record)
                    say(f"{load}: {json.dumps(rows[-1])}")


if __name__ == "__main__":
    main()
