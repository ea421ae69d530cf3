"""What `--otlp` costs a gateway, for each request and each token: two gateways over one twin, of which one traces.

    python benchmarks/tracing.py [--rounds 4] [--record FILE]

Both are processes with vLLM's app, as a fleet has them; another process takes the spans. They take turns (ABBA), with
answers of 4 tokens and of 256: CPU is that of the gateway's process, a token's cost the difference by the tokens.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil
from remembering import receiving

from kervan.bench import records
from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.gateway.process import GatewayProcess
from kervan.gateway.server import GatewayConfig
from kervan.ports import free_port
from kervan.twin.replica import TwinSpec
from kervan.twin.settings import settings

SECRET = "s3cret"
STREAMS = 8
SHORT, LONG = 4, 256
REQUESTS = {SHORT: 240, LONG: 32}
MODEL = Path(__file__).parent / "models/llama3-8b"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def fleet(otlp: str) -> FleetConfig:
    twin = {"base_s": 0.004, "prefill_token_s": 0, "sequence_s": 0, "context_token_s": 0}
    return FleetConfig(
        model=str(MODEL), engine="twin", gpu="H200", twin=twin, otlp=otlp,
        engine_args={"max_model_len": 2048, "served_model_name": "twin"},
    )  # fmt: skip


def config_of(name: str, of: FleetConfig) -> GatewayConfig:
    return GatewayConfig(
        gateway_id=name, node="127.0.0.1", engine_argv=of.engine_argv, secret=SECRET, host="127.0.0.1",
        port=free_port(), internal_host="127.0.0.1", public_host="127.0.0.1",
        max_queued_streams=256, hold_timeout_s=30.0,
        stop_timeout_s=5.0, opens_when_attached=True, is_twin=True, shared_port=False, fleet_name="traced", models=(),
        replay_s=0.0, replay_max_bytes=0, remembered_requests=1000, otlp=of.traces_url,
    )  # fmt: skip


async def requests(port: int, num_tokens: int, count: int) -> None:
    """So many answers, `STREAMS` at a time; each is whole."""
    body = {"model": "twin", "prompt": list(range(5, 69)), "max_tokens": num_tokens, "ignore_eos": True, "stream": True,
            "return_token_ids": True}  # fmt: skip
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}

    async def client(left: list[int]) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as http:
            while left:
                left.pop()
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    events = [
                        json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: {")
                    ]
                tokens = [
                    token for event in events for choice in event["choices"] for token in choice["token_ids"] or ()
                ]
                assert response.status_code == 200 and len(tokens) == num_tokens, (response.status_code, events)

    left = [0] * count
    await asyncio.gather(*(client(left) for _ in range(STREAMS)))


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def measure(rounds: int, directory: Path) -> dict[str, Any]:
    with receiving() as url:
        fleets = {"plain": fleet(""), "traced": fleet(url)}
        spec = TwinSpec("a", "127.0.0.1", SECRET, settings(fleets["plain"]))
        twin = EngineProcess(spec, log_path=directory / "twin.log", module=TWIN_ENGINE)
        gateways = {
            name: GatewayProcess(config_of(name, of), log_path=directory / f"{name}.log") for name, of in fleets.items()
        }
        try:
            while twin.ready is None:
                assert twin.failure is None, twin.failure
                await asyncio.sleep(0.05)
            entry = ReplicaEntry(
                "a", "on-demand", "127.0.0.1", twin.pid, "ready", twin.ready.address, public_key=twin.ready.public_key
            )
            env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
            for gateway in gateways.values():
                gateway.update(Snapshot(1, [entry], [], []))
                await gateway.start((), env=env)
            while not all(gateway.entry for gateway in gateways.values()):  # noqa: ASYNC110 - they tell each second
                await asyncio.sleep(0.05)
            pids = {name: gateway.entry.pid for name, gateway in gateways.items() if gateway.entry is not None}
            found: dict[str, dict[int, list[float]]] = {name: {SHORT: [], LONG: []} for name in gateways}
            for gateway in gateways.values():
                await requests(gateway.config.port, SHORT, 50)  # warm
            for number in range(rounds):
                for name in ("plain", "traced") if number % 2 == 0 else ("traced", "plain"):
                    for num_tokens, count in REQUESTS.items():
                        before_s = cpu_s(pids[name])
                        await requests(gateways[name].config.port, num_tokens, count)
                        await asyncio.sleep(1.5)  # spans leave in batches
                        found[name][num_tokens].append((cpu_s(pids[name]) - before_s) / count * 1e6)
            return {"streams": STREAMS, "requests": REQUESTS, "rounds": rounds, **summary(found)}
        finally:
            for gateway in gateways.values():
                await gateway.stop()
            twin.kill()


def summary(found: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Microseconds of CPU; medians, and the least and most of all rounds."""
    rows = {}
    for name, times in found.items():
        tokens = [(long - short) / (LONG - SHORT) for short, long in zip(times[SHORT], times[LONG], strict=True)]
        requests_us = [short - SHORT * token for short, token in zip(times[SHORT], tokens, strict=True)]
        rows[name] = {"cpu_us_per_request": _spread(requests_us), "cpu_us_per_token": _spread(tokens)}
    differences = {
        what: _spread([b - a for a, b in zip(found["plain"][length], found["traced"][length], strict=True)])
        for what, length in (("short", SHORT), ("long", LONG))
    }
    return {"cpu": rows, "traced_minus_plain_us_per_request": differences}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(measure(given.rounds, Path(directory)))
    print(json.dumps(found, indent=1))
    if given.record:
        command = {"command": f"python benchmarks/tracing.py --rounds {given.rounds}"}
        print(records.write(given.record, records.record("tracing", found) | command))


if __name__ == "__main__":
    main()
