"""What kervan itself costs, with simulated engines: no model computes, so nothing hides it. CPU only.

    python benchmarks/twins.py client --twins 16 --streams 1024        # the fleet client alone, without vLLM's frontend
    python benchmarks/twins.py routing --replicas 1,16,256             # one placement
    python benchmarks/twins.py fleet --model DIR --twins 16 --gateways 1,2,4 --streams 1024   # the whole, over HTTP

`--record DIR` writes what was found to a file there. Twins take `--step` seconds for a step; they must not be the
bottleneck, so their own share of the CPU is told too.
"""

import argparse
import asyncio
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from kervan.bench import records

OSL = 256
ISL = 64


def cpu_s(pids: list[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def memory_mib(pids: list[int]) -> float:
    """Mean proportional set size."""
    return statistics.mean(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20


# ---- the fleet client alone


async def client_alone(
    num_twins: int, num_streams: int, step_s: float, warm_s: float, measured_s: float
) -> dict[str, Any]:
    """Streams on twins through a `FleetClient` with vLLM's codec in this process."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from kervan.fleet.client import FleetClient
    from kervan.fleet.link import Member
    from kervan.fleet.process import TWIN_ENGINE, EngineProcess
    from kervan.fleet.vllm.codec import VllmCodec
    from kervan.twin.engine import Limits, StepTiming, TwinSettings
    from kervan.twin.replica import TwinSpec

    timing = StepTiming(base_s=step_s, prefill_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
    limits = Limits(num_blocks=100_000, max_num_seqs=1024, max_num_batched_tokens=1 << 20, max_model_len=8192)
    with tempfile.TemporaryDirectory() as directory:
        names = [f"t{i:03}" for i in range(num_twins)]
        twins = [
            EngineProcess(
                TwinSpec(name, "127.0.0.1", "s", TwinSettings(timing, limits)),
                log_path=Path(directory) / f"{name}.log",
                module=TWIN_ENGINE,
            )
            for name in names
        ]
        while len(ready := [twin.ready for twin in twins if twin.ready]) < num_twins:  # noqa: ASYNC110 - threads tell
            await asyncio.sleep(0.05)
        client = FleetClient(VllmCodec(), secret="s")
        client.set_members(Member(name, engine.address) for name, engine in zip(names, ready, strict=True))
        while len(client.links) < num_twins:  # noqa: ASYNC110 - a benchmark may poll
            await asyncio.sleep(0.05)
        number = 0
        tokens = 0

        async def ask() -> None:
            nonlocal number
            number += 1
            await client.add(
                EngineCoreRequest(
                    request_id=str(number), prompt_token_ids=[number % 1000] * ISL, mm_features=None,
                    sampling_params=SamplingParams(max_tokens=OSL, ignore_eos=True), pooling_params=None,
                    arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
                )
            )  # fmt: skip

        async def consume() -> None:
            nonlocal tokens
            while True:
                outputs = await client.outputs.get()
                for output in outputs.outputs:
                    tokens += len(output.new_token_ids)
                    if output.finish_reason is not None:
                        await ask()

        for _ in range(num_streams):
            await ask()
        consumer = asyncio.create_task(consume())
        await asyncio.sleep(warm_s)
        pids = [twin.pid for twin in twins]
        before = tokens, time.process_time(), time.monotonic(), cpu_s(pids)
        await asyncio.sleep(measured_s)
        num, own_s, wall_s, twins_s = (
            now - then
            for now, then in zip((tokens, time.process_time(), time.monotonic(), cpu_s(pids)), before, strict=True)
        )
        found = {
            "twins": num_twins,
            "streams": num_streams,
            "tok_s": num / wall_s,
            "client_us_per_token": own_s / num * 1e6,
            "twin_us_per_token": twins_s / num * 1e6,
            "client_core_share": own_s / wall_s,
            "twin_mib": memory_mib(pids),
            "lost_or_given_up": client.counts.lost_replicas + client.counts.given_up,
        }
        consumer.cancel()
        await client.close()
        for twin in twins:
            twin.kill()
    return found


# ---- one placement


def routing_cost(num_replicas: int, rounds: int = 3000) -> dict[str, Any]:
    import random

    from kervan.policy import routing

    rng = random.Random(0)
    loads = [routing.ReplicaLoad(f"r{i:04}", rng.randrange(10_000)) for i in range(num_replicas)]
    times = []
    for _ in range(7):
        begin_s = time.perf_counter()
        for _ in range(rounds):
            routing.decide(loads)
        times.append((time.perf_counter() - begin_s) / rounds)
    return {"replicas": num_replicas, "us": statistics.median(times) * 1e6, "us_worst_of_7": max(times) * 1e6}


# ---- the whole fleet


def kervan(*words: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kervan", *words],
        env={**os.environ, "KERVAN_HOME": str(home)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def fleet(
    model: str, num_twins: int, gateways: list[int], num_streams: int, step_s: float, duration: str
) -> list[dict[str, Any]]:
    """`kervan up --engine twin`, then `kervan bench` at each number of gateways."""
    found = []
    with tempfile.TemporaryDirectory(prefix="kt-") as directory:
        home = Path(directory)
        begin_s = time.monotonic()
        up = json.loads(
            kervan(
                "up", model, "--name", "twins", "--engine", "twin", "--gpu", "H200", "--twin", f"base_s={step_s}",
                "--engine-arg", "max_model_len=2048", "--replicas", str(num_twins), "--gateways", str(gateways[0]),
                "--port", "18431", "--detach", "--json", home=home,
            )
        )  # fmt: skip
        start_s = time.monotonic() - begin_s
        try:
            for count in gateways:
                status = up if count == gateways[0] else json.loads(
                    kervan("scale", "--gateways", str(count), "--name", "twins", "--json", home=home)
                )  # fmt: skip
                gateway_pids = [g["pid"] for g in status["gateways"]]
                twin_pids = [r["pid"] for r in status["replicas"]]
                before = cpu_s(gateway_pids), cpu_s(twin_pids)
                result = json.loads(
                    kervan(
                        "bench", status["url"], "--streams", str(num_streams), "--isl", str(ISL), "--osl", str(OSL),
                        "--duration", duration, "--json", home=home,
                    )
                )  # fmt: skip
                gateway_s, twin_s = cpu_s(gateway_pids) - before[0], cpu_s(twin_pids) - before[1]
                tokens = result["output_tokens"]
                found.append(
                    {
                        "gateways": count, "twins": num_twins, "streams": num_streams, "start_s": start_s,
                        "tok_s": result["out_tok_s"], "failed": result["requests"]["errors"],
                        "gateway_us_per_token": gateway_s / tokens * 1e6, "twin_us_per_token": twin_s / tokens * 1e6,
                        "tok_s_per_gateway_core": tokens / gateway_s,
                        "gateway_mib": memory_mib(gateway_pids), "twin_mib": memory_mib(twin_pids), "bench": result,
                    }
                )  # fmt: skip
                show({key: value for key, value in found[-1].items() if key != "bench"})
        finally:
            kervan("down", "--name", "twins", home=home)
    return found


def show(found: dict[str, Any]) -> None:
    print("  ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["client", "routing", "fleet"])
    parser.add_argument("--twins", type=int, default=16)
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--replicas", type=numbers, default=[1, 16, 256])
    parser.add_argument("--gateways", type=numbers, default=[1])
    parser.add_argument("--model", help="For fleet: a model directory with a tokenizer.")
    parser.add_argument("--step", type=float, default=0.05)
    parser.add_argument("--measured", type=float, default=15.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    runs: list[dict[str, Any]]
    if args.what == "routing":
        runs = [routing_cost(count) for count in args.replicas]
    elif args.what == "client":
        runs = [
            asyncio.run(client_alone(args.twins, args.streams, args.step, 5.0, args.measured))
            for _ in range(args.repeat)
        ]
    else:
        runs = fleet(args.model, args.twins, args.gateways, args.streams, args.step, f"{args.measured:g}s")
    if args.what != "fleet":
        for run in runs:
            show(run)
    if args.record is not None:
        command = shlex.join(["python", "benchmarks/twins.py", *sys.argv[1:]])
        made = {**records.record(f"twins-{args.what}", {"runs": runs}), "command": command}
        print(records.write(args.record, made))


if __name__ == "__main__":
    main()
