"""CPU of a gateway per token: where it goes, and what vLLM's cache of environment variables saves, in turn (ABBA).

    python benchmarks/gateway_cpu.py MODEL [--streams 64,256] [--rounds 16] [--record FILE]

The gateway runs in this process, over one twin in another one; `kervan bench` in a third loads it. Both sides are the
same process and the same streams: every few seconds the cache is switched on or off. CPU is that of the gateway's
thread, without py-spy (medians of rounds, and 95% of what a round saved); then py-spy samples for as long again, with
the cache on. MODEL: a directory with a tokenizer.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from kervan.bench import records
from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.gateway.active import active_s
from kervan.gateway.server import Gateway, GatewayConfig
from kervan.ports import free_port
from kervan.profile import py_spy, samples
from kervan.profile.summary import working_samples
from kervan.stats import bootstrap_interval
from kervan.twin.replica import TwinSpec
from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

SECRET = "benchmark"
ISL, OSL = 32, 256
WARM_S = 6.0


def config_of(model: str, port: int) -> GatewayConfig:
    fleet = FleetConfig(model=model, engine_args={"max_model_len": 2048})
    return GatewayConfig(
        gateway_id="gw-benchmark", node="127.0.0.1", engine_argv=fleet.engine_argv, secret=SECRET, host="127.0.0.1",
        port=port, internal_host="127.0.0.1", public_host="127.0.0.1", max_queued_streams=1024,
        hold_timeout_s=30.0, stop_timeout_s=1.0, opens_when_attached=False, is_twin=True, shared_port=False,
        fleet_name="benchmark", models=(), replay_s=0.0, replay_max_bytes=0, remembered_requests=1000,
    )  # fmt: skip


class Cache:
    """vLLM's two ways of looking up a variable."""

    def __init__(self) -> None:
        from vllm import envs

        self._envs, self._uncached = envs, envs.__getattr__
        envs.enable_envs_cache()
        self._cached = envs.__getattr__

    def switch(self, is_on: bool) -> None:
        self._envs.__getattr__ = self._cached if is_on else self._uncached


async def measure(gateway: Gateway, cache: Cache, url: str, streams: int, rounds: int, each_s: float) -> dict[str, Any]:
    """One load: microseconds per token with the cache off and on, by round, and by part."""
    whole_s = WARM_S + 5 * rounds * each_s + 10
    command = [sys.executable, "-m", "kervan", "bench", url, "--streams", str(streams), "--duration", f"{whole_s:.0f}s"]
    command += ["--isl", str(ISL), "--osl", str(OSL), "--json"]
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    try:
        link = gateway.fleet.links[0]
        begun_s = time.monotonic()
        while gateway.fleet.num_streams < streams and time.monotonic() - begun_s < 60:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        await asyncio.sleep(WARM_S)
        found: dict[bool, list[float]] = {False: [], True: []}

        async def once(is_on: bool, for_s: float) -> float:
            cache.switch(is_on)
            tokens, cpu_s = link.num_tokens, time.thread_time()
            await asyncio.sleep(for_s)
            return (time.thread_time() - cpu_s) / max(1, link.num_tokens - tokens) * 1e6

        for number in range(rounds):
            order = (False, True, True, False) if number % 2 == 0 else (True, False, False, True)
            each = [(is_on, await once(is_on, each_s)) for is_on in order]
            for is_on in (False, True):
                found[is_on].append(statistics.mean(us for side, us in each if side == is_on))
        tokens, began_s, was_active_s = link.num_tokens, time.monotonic(), active_s()
        raw = await asyncio.to_thread(py_spy.record, os.getpid(), rounds * each_s)
        sampled_s = time.monotonic() - began_s
        stacks = samples.fold("\n".join(line for line in raw.splitlines() if "MainThread" in line))
        counts = working_samples(stacks, (active_s() - was_active_s) / sampled_s * rounds * each_s * py_spy.RATE_HZ)
        on = statistics.median(found[True])
        saved = [without - with_cache for without, with_cache in zip(found[False], found[True], strict=True)]
        return {
            "streams": streams,
            "tok_s_sampled": (link.num_tokens - tokens) / sampled_s,
            "us_per_token_without": found[False],
            "us_per_token_with": found[True],
            "us_without_median": statistics.median(found[False]),
            "us_with_median": on,
            "saved_us_median": statistics.median(saved),
            "saved_us_interval": list(bootstrap_interval(saved)),
            "us_by_part": {name: on * count / sum(counts.values()) for name, count in counts.items() if count},
            "samples": stacks.num_samples,
            "functions": stacks.functions[:25],
        }
    finally:
        client.terminate()
        await client.wait()


async def run(args: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    timing = StepTiming(base_s=args.step_s, prefill_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
    limits = TwinLimits(
        num_blocks=100_000, max_num_seqs=1024, max_num_batched_tokens=8192, max_model_len=2048, last_token=899
    )
    spec = TwinSpec("twin", "127.0.0.1", SECRET, TwinSettings(timing, limits))
    twin = EngineProcess(spec, log_path=place / "twin.log", module=TWIN_ENGINE)
    try:
        while twin.ready is None:  # noqa: ASYNC110 - told by another thread
            await asyncio.sleep(0.1)
        entry = ReplicaEntry(
            "twin", "on-demand", "127.0.0.1", twin.pid, "ready", twin.ready.address, public_key=twin.ready.public_key
        )
        port = free_port()
        gateway = Gateway(config_of(str(args.model), port))
        await gateway.start()
        gateway.update(Snapshot(1, [entry], [], []))
        await gateway.wait_attached()
        cache, loads = Cache(), []
        for streams in map(int, args.streams.split(",")):
            url = f"http://127.0.0.1:{port}"
            loads.append(await measure(gateway, cache, url, streams, args.rounds, args.each_s))
            print(json.dumps(loads[-1]), file=sys.stderr, flush=True)
        await gateway.stop()
        return loads
    finally:
        twin.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", default="64,256")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--each-s", type=float, default=1.0)
    parser.add_argument("--step-s", type=float, default=0.1, help="of the twin: each stream gets a token in that time")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kg-") as place:
        loads = uvloop.run(run(args, Path(place)))
    for load in loads:
        low, high = load["saved_us_interval"]
        print(
            f"{load['streams']:>5} streams, {load['tok_s_sampled']:,.0f} tokens/s: {load['us_without_median']:.1f} us "
            f"per token without, {load['us_with_median']:.1f} with the cache; a round saved "
            f"{load['saved_us_median']:.1f} [{low:.1f}, {high:.1f}]"
        )
        print("      " + ", ".join(f"{name} {us:.1f}" for name, us in load["us_by_part"].items()))
    if args.record:
        content = records.record("gateway-cpu", {"isl": ISL, "osl": OSL, "step_s": args.step_s, "loads": loads})
        print(records.write(args.record, content | {"command": "python benchmarks/gateway_cpu.py MODEL"}))


if __name__ == "__main__":
    main()
