"""Fleets in several layouts on this host's GPUs, random weights: throughput, and what their starts were spent on.

    python benchmarks/layouts.py replicas   # 8B: one replica and bare vLLM side by side, then two replicas, then two on
                                            # one GPU (--gpus-per-replica 0.5)
    python benchmarks/layouts.py tensor     # 70B: TP over all GPUs, and bare vLLM with the same
    python benchmarks/layouts.py stages     # 70B: a pipeline stage on each of two Ray nodes, each with half of the GPUs
    python benchmarks/layouts.py experts    # MoE of 30B: TP over all GPUs, then the running fleet changed to TP and EP

Rows are printed as they come, the table last; a record (--record DIR) is written anew after each row, so one that is
cut short keeps what it has. --model and --streams make a small try on CPU possible.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import overhead
import servers
from servers import HERE

from kervan.bench import benchmark, client_floor, records
from kervan.bench.benchmark import measure, prepare
from kervan.bench.client_floor import ClientFloor
from kervan.bench.load import Endpoint, Load
from kervan.errors import KervanError
from kervan.ports import free_port

Row = dict[str, Any]
SHAPES = {"replicas": "llama3-8b", "tensor": "llama3-70b", "stages": "llama3-70b", "experts": "qwen3-30b-a3b"}
PROGRESS = re.compile(r"^\[ *([\d.]+) s\] (.*)$", re.MULTILINE)


class Bench:
    """Loads what answers at a URL, and keeps the rows."""

    def __init__(self, args: argparse.Namespace, log_dir: Path) -> None:
        self.args = args
        self.log_dir = log_dir
        self.rows: list[Row] = []
        self._floors: dict[int, ClientFloor] = {}
        self._begin_s = time.monotonic()
        self._seed = 0
        settings = {"isl": args.isl, "osl": args.osl, "streams": args.streams, "engine": args.engine_arg}
        self._record = records.record(f"layouts-{args.what}", {"settings": settings, "rows": self.rows})
        self._record["command"] = shlex.join(["python", "benchmarks/layouts.py", args.what])
        self._path: Path | None = args.record

    def keep(self, row: Row) -> None:
        row = {"at_s": round(time.monotonic() - self._begin_s, 1), **row}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self._path is not None:
            self._path = records.write(self._path, self._record)

    def load(self, what: str, url: str, streams: int, *, rounds: int = 1) -> None:
        """`rounds` runs of three requests per stream (at most 512), after one short one."""
        requests = max(4, min(3 * streams, 512))
        try:
            self._one(url, streams, streams, osl=4)
            for _ in range(rounds):
                self.keep({"what": what, "streams": streams, **self._one(url, streams, requests, osl=self.args.osl)})
        except KervanError as error:
            self.keep({"what": what, "streams": streams, "failed": str(error)[:500]})

    def _one(self, url: str, streams: int, requests: int, *, osl: int) -> Row:
        self._seed += 1
        settings = Load(streams=streams, num_requests=requests, isl=str(self.args.isl), osl=str(osl), seed=self._seed)
        if streams not in self._floors:
            self._floors[streams] = client_floor.choose(streams)
        result = measure(
            prepare(Endpoint(url=url, model="shape"), settings),
            settings,
            client=benchmark.ClientOptions(reconciles=False),
            floor=self._floors[streams],
        )
        return overhead.figures(result)

    def first_token_s(self, url: str) -> float:
        """Seconds to the first token of one request, the first one of all."""
        return float(self._one(url, 1, 1, osl=1)["ttft_p50_s"])


class Fleet:
    """A fleet that runs; `kervan` speaks to it."""

    def __init__(self, bench: Bench, url: str, environment: Mapping[str, str]) -> None:
        self.bench = bench
        self.url = url
        self._environment = environment

    def kervan(self, *words: str) -> str:
        name = ["--name", f"bench-{os.getpid()}"]
        done = subprocess.run(
            [sys.executable, "-m", "kervan", *words, *name],
            env={**os.environ, **self._environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise servers.ServerError(f"kervan {' '.join(words)}: {done.stderr[-500:]}")
        return done.stdout

    def tell_start(self, what: str, total_s: float, log: str = "") -> None:
        """Keep a row with what a start was spent on."""
        status = json.loads(self.kervan("status", "--json"))
        self.bench.keep(
            {
                "what": what,
                "start_s": round(total_s, 1),
                "first_token_s": round(self.bench.first_token_s(self.url), 3),
                "progress": [[float(at_s), words] for at_s, words in PROGRESS.findall(log)],
                "engines": [{"nodes": r["nodes"], **r["start_s"]} for r in status["replicas"]],
            }
        )

    def change(self, what: str, *words: str) -> None:
        """Run a command that changes the fleet, and keep a row for the starts in it."""
        begin_s = time.monotonic()
        self.kervan(*words)
        self.tell_start(what, time.monotonic() - begin_s)


@contextlib.contextmanager
def fleet(bench: Bench, what: str, model: str, *up_args: str, env: Mapping[str, str] | None = None) -> Iterator[Fleet]:
    """`kervan up` until it answers."""
    environment = {
        "PYTHONPATH": os.pathsep.join(p for p in (str(HERE.parent / "src"), os.environ.get("PYTHONPATH")) if p)
    }
    environment |= {"KERVAN_HOME": str(bench.log_dir / "home"), **(env or {})}
    log_dir = bench.log_dir / re.sub(r"\W+", "-", what)
    engine_args = servers.parse_engine_args(bench.args.engine_arg) | {"served_model_name": "shape"}
    begin_s = time.monotonic()
    with servers.kervan_fleet(
        model, engine_args, log_dir=log_dir, env={}, up_args=up_args, timeout_s=bench.args.start_timeout_s,
        process_env=environment,
    ) as starting:  # fmt: skip
        server = starting.wait()
        made = Fleet(bench, server.url, environment)
        made.tell_start(f"start {what}", time.monotonic() - begin_s, starting.log.read_text(errors="replace"))
        yield made


@contextlib.contextmanager
def bare(bench: Bench, what: str, model: str, env: Mapping[str, str], **layout: int) -> Iterator[str]:
    """vLLM's own server; its URL."""
    engine_args = servers.parse_engine_args(bench.args.engine_arg) | {"served_model_name": "shape", **layout}
    begin_s = time.monotonic()
    log_dir = bench.log_dir / re.sub(r"\W+", "-", what)
    with servers.bare_vllm(
        model, engine_args, log_dir=log_dir, env=env, timeout_s=bench.args.start_timeout_s
    ) as starting:
        url = starting.wait().url
        bench.keep({"what": f"start {what}", "start_s": round(time.monotonic() - begin_s, 1)})
        yield url


@contextlib.contextmanager
def two_ray_nodes(num_gpus: int, log_dir: Path) -> Iterator[dict[str, str]]:
    """A Ray cluster of two nodes on this host, each with half of the GPUs (or one core); its environment."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block"]
    port = free_port()
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "benchmark-" * 4, "RAY_worker_niceness": "0"}
    environment["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] = "0.5"
    half = num_gpus // 2
    processes = []
    try:
        for node in range(2):
            place = ["--address", f"127.0.0.1:{port}"]
            if node == 0:
                place = ["--head", "--port", str(port), "--include-dashboard=false"]
            gpus = ",".join(str(i) for i in range(node * half, (node + 1) * half))
            has = ["--num-gpus", str(half)] if half else ["--num-cpus", "1"]
            log_dir.mkdir(parents=True, exist_ok=True)
            path = log_dir / f"ray-{node}.log"
            with path.open("w") as log:
                process = subprocess.Popen(
                    [*ray, *place, *has],
                    env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": gpus},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            processes.append(process)
            deadline_s = time.monotonic() + 120
            while "Ray runtime started" not in path.read_text():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise servers.ServerError(f"Ray node {node} did not start: {path.read_text()[-500:]}")
                time.sleep(0.2)
        yield {**environment, "KERVAN_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        for process in processes:
            servers.stop_group(process)


# ---- scenarios


def replicas(bench: Bench, model: str) -> None:
    streams = bench.args.streams
    most = streams[-1]
    with fleet(bench, "1 replica", model, "--replicas", "1") as made:
        with bare(bench, "bare", model, {"CUDA_VISIBLE_DEVICES": "1"}) as url:
            for what, where in (("bare", url), ("1 replica", made.url), ("1 replica", made.url), ("bare", url)):
                for count in streams:
                    bench.load(what, where, count)
        made.change("scale to 2", "scale", "2")
        bench.load("2 replicas", made.url, 2 * most, rounds=3)
        made.change("scale to 1", "scale", "1")
        bench.load("1 replica", made.url, most, rounds=2)
    with fleet(bench, "2 on one GPU", model, "--replicas", "2", "--gpus-per-replica", "0.5") as made:
        bench.load("2 on one GPU", made.url, most, rounds=2)


def tensor(bench: Bench, model: str) -> None:
    tp = bench.args.num_gpus or 2
    with fleet(bench, f"tp {tp}", model, "--tp", str(tp)) as made:
        for count in bench.args.streams:
            bench.load(f"tp {tp}", made.url, count)
    with bare(bench, f"bare tp {tp}", model, {}, tensor_parallel_size=tp) as url:
        for count in bench.args.streams:
            bench.load(f"bare tp {tp}", url, count)


def stages(bench: Bench, model: str) -> None:
    tp = max(1, bench.args.num_gpus // 2)
    with two_ray_nodes(bench.args.num_gpus, bench.log_dir) as environment:
        layout = ["--address", environment.pop("KERVAN_ADDRESS"), "--tp", str(tp), "--pp", "2"]
        what = f"tp {tp} x pp 2 on 2 nodes"
        with fleet(bench, what, model, *layout, "--nodes-per-replica", "2", env=environment) as made:
            for count in bench.args.streams:
                bench.load(what, made.url, count)


def experts(bench: Bench, model: str) -> None:
    tp = bench.args.num_gpus or 2
    with fleet(bench, f"tp {tp}", model, "--tp", str(tp)) as made:
        for count in bench.args.streams:
            bench.load(f"tp {tp}", made.url, count)
        made.change(f"change to ep {tp}", "up", model, "--ep", str(tp), "--yes", "--json")
        for count in bench.args.streams:
            bench.load(f"tp {tp} ep {tp}", made.url, count)


SCENARIOS = {"replicas": replicas, "tensor": tensor, "stages": stages, "experts": experts}


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'what':<28} {'streams':>7} {'tok/s':>9} {'TTFT p50 ms':>12} {'p99':>9} {'TPOT p50 ms':>12}"]
    for row in rows:
        if "start_s" in row:
            parts = ["  ".join(f"{k} {v}" for k, v in e.items() if k != "nodes") for e in row.get("engines", [])]
            lines.append(f"{row['what']:<28} {row['start_s']:>7} s, first token {row.get('first_token_s', '-')} s")
            lines += [f"{'':<28} {part}" for part in parts]
        elif "failed" in row:
            lines.append(f"{row['what']:<28} {row.get('streams', ''):>7} FAILED {row['failed'][:200]}")
        else:
            ms = [1000 * (row[key] or 0) for key in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s")]
            errors = f"  ERRORS {row['errors']}" if row["errors"] else ""
            lines.append(
                f"{row['what']:<28} {row['streams']:>7} {row['out_tok_s']:>9.1f} {ms[0]:>12.1f} {ms[1]:>9.1f} "
                f"{ms[2]:>12.2f}{errors}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(SCENARIOS))
    parser.add_argument("--model", help="model directory; default: the shape named above, made anew")
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--isl", type=int, default=1024)
    parser.add_argument("--osl", type=int, default=256)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V", help="for every server, repeatable")
    parser.add_argument("--start-timeout-s", type=float, default=400.0)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--record", type=Path, metavar="DIR")
    args = parser.parse_args()
    args.num_gpus = overhead.hardware()["num_gpus"]
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="layouts-"))
    with tempfile.TemporaryDirectory() as place:
        model = args.model
        if model is None:
            model = f"{place}/{SHAPES[args.what]}"
            config = HERE / "models" / SHAPES[args.what] / "config.json"
            subprocess.run([sys.executable, HERE / "shape_model.py", config, model], check=True)
            args.engine_arg = [
                "load_format=dummy",
                "max_model_len=8192",
                "enable_prefix_caching=false",
                *args.engine_arg,
            ]
        bench = Bench(args, log_dir)
        try:
            SCENARIOS[args.what](bench, model)
        except servers.ServerError as error:
            bench.keep({"what": args.what, "failed": str(error)[-1500:]})
        finally:
            print(table(bench.rows), flush=True)


if __name__ == "__main__":
    main()
