"""What kervan itself costs, with simulated engines: no model computes, so nothing hides it. CPU only.

    python benchmarks/twins.py client --twins 16 --streams 1024        # the fleet client alone, without vLLM's frontend
    python benchmarks/twins.py routing --replicas 1,16,256             # one placement
    python benchmarks/twins.py shell                                   # one request's way into vLLM's app
    python benchmarks/twins.py fleet --model DIR --twins 64 --streams 64   # a whole fleet over HTTP, and its memory
    python benchmarks/twins.py scaling --model DIR --record DIR        # 1, 2 and 4 gateways, on a host with 16 cores
    python benchmarks/twins.py table --record FILE                     # what a record says

`--record` takes a directory for a new record, or a `.json` file to which this part is added. Twins take `--step`
seconds for a step and nothing else; they must not be the bottleneck, so their own share of the CPU is told too.
"""

import argparse
import asyncio
import json
import os
import resource
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from meters import cpu_s, memory

from kervan.bench import records

OSL = 256
ISL = 64
# In the whole fleet lengths differ, so that streams do not end all at once.
FLEET_ISL, FLEET_OSL = "64", "64..192"
STREAMS_PER_GATEWAY = 256
STOP_S = 25.0  # what a fleet may take to end
Save = Callable[[dict[str, Any]], None]


# ---- the fleet client alone


async def client_alone(
    num_twins: int,
    streams: list[int],
    step_s: float,
    warm_s: float,
    measured_s: float,
    repeat: int,
    routings: list[str],
) -> list[dict[str, Any]]:
    """Streams on twins through a `FleetClient` with vLLM's codec in this process; more and more of them."""
    from kervan.fleet.client import FleetClient
    from kervan.fleet.link import Member
    from kervan.fleet.process import TWIN_ENGINE, EngineProcess
    from kervan.fleet.vllm.codec import VllmCodec
    from kervan.twin.replica import TwinSpec
    from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

    timing = StepTiming(base_s=step_s, prefill_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
    limits = TwinLimits(num_blocks=100_000, max_num_seqs=1024, max_num_batched_tokens=1 << 20, max_model_len=8192)
    found: list[dict[str, Any]] = []
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
        client = FleetClient(VllmCodec(), secret="s")
        try:
            while len(ready := [t.ready for t in twins if t.ready]) < num_twins:  # noqa: ASYNC110 - threads tell
                await asyncio.sleep(0.05)
            client.set_members(
                Member(name, engine.address, engine.public_key) for name, engine in zip(names, ready, strict=True)
            )
            while len(client.links) < num_twins:  # noqa: ASYNC110 - a benchmark may poll
                await asyncio.sleep(0.05)
            asking = _Asking(client)
            consumer = asyncio.create_task(asking.consume())
            pids = [twin.pid for twin in twins]
            for count in streams:
                while asking.num_streams < count:
                    asking.num_streams += 1
                    await asking.ask()
                for routing in repeat * routings:
                    client.prefixes.is_on = routing == "prefix"
                    await asyncio.sleep(warm_s)
                    one = await _measure(asking, pids, measured_s)
                    row = {"twins": num_twins, "streams": count, "step_s": step_s, "routing": routing}
                    found.append({**row, **one})
                    show(found[-1])
            consumer.cancel()
        finally:
            await client.close()
            for twin in twins:
                twin.kill()
    return found


def on_a_gateways_loop(job: Coroutine[Any, Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    import uvloop

    found: list[dict[str, Any]] = uvloop.run(job)
    return found


class _Asking:
    """A closed loop: each answer that has ended is followed by a new request."""

    def __init__(self, client: Any):
        self.client = client
        self.num_streams = self.num_requests = self.num_tokens = 0

    async def ask(self) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self.num_requests += 1
        await self.client.add(
            EngineCoreRequest(
                request_id=str(self.num_requests), prompt_token_ids=[self.num_requests % 1000] * ISL, mm_features=None,
                sampling_params=SamplingParams(max_tokens=OSL, ignore_eos=True), pooling_params=None,
                arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
            )
        )  # fmt: skip

    async def consume(self) -> None:
        while True:
            outputs = await self.client.outputs.get()
            for output in outputs.outputs:
                self.num_tokens += len(output.new_token_ids)
                if output.finish_reason is not None:
                    await self.ask()


async def _measure(asking: _Asking, pids: list[int], measured_s: float) -> dict[str, Any]:
    before = asking.num_tokens, time.process_time(), time.monotonic(), cpu_s(pids)
    await asyncio.sleep(measured_s)
    after = asking.num_tokens, time.process_time(), time.monotonic(), cpu_s(pids)
    tokens, own_s, wall_s, twins_s = (now - then for now, then in zip(after, before, strict=True))
    counts = asking.client.counts
    return {
        "tok_s": tokens / wall_s,
        "client_us_per_token": own_s / tokens * 1e6,
        "twin_us_per_token": twins_s / tokens * 1e6,
        "client_core_share": own_s / wall_s,
        **{f"twin_{name}": value for name, value in memory(pids).items()},
        "lost_or_given_up": counts.broken_links + counts.given_up,
    }


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


# ---- one request


class _OpenView:
    """A fleet with room, as the shell sees it."""

    def __init__(self) -> None:
        from kervan.fleet.admitted import Admitted

        self._admitted = Admitted(lambda: 12_288)

    def readiness(self) -> str | None:
        return None

    def admit(self, size: Any, session: str = "") -> Any:
        from kervan.policy import admission

        state = admission.AdmissionState(
            outstanding_streams=500,
            capacity_streams=16_384,
            max_queued_streams=1024,
            num_gateways=1,
            completed_per_s=9.0,
        )
        decision = admission.decide(state, size.num_streams)
        assert decision.admitted
        return self._admitted.take(size.num_streams, is_bulk=decision.is_bulk)

    def model_name(self) -> str:
        return "model"

    async def metrics(self, gateway: str | None = None) -> bytes | None:
        return b""

    async def status(self) -> dict[str, object]:
        return {}

    async def explain(self, request_id: str) -> bytes | None:
        return None

    def stream_opened(self) -> None: ...

    def stream_closed(self) -> None: ...


async def shell_cost(rounds: int = 3000) -> dict[str, Any]:
    """What kervan's shell around vLLM's app adds to a request; chunks of an answer do not pass through it."""
    from kervan.gateway.shell import GatewayShell

    body = json.dumps({"model": "model", "prompt": list(range(ISL)), "max_tokens": 128, "stream": True}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: Any) -> None:
        pass

    async def inner(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    shell = GatewayShell(_OpenView())
    shell.attach(inner)
    times = []
    for _ in range(7):
        spent_s = []
        for app in (inner, shell):
            begin_s = time.perf_counter()
            for _ in range(rounds):
                await app(scope, receive, send)
            spent_s.append((time.perf_counter() - begin_s) / rounds)
        times.append(spent_s[1] - spent_s[0])
    return {"shell_us_per_request": statistics.median(times) * 1e6, "us_worst_of_7": max(times) * 1e6}


# ---- the whole fleet


def fleet(args: argparse.Namespace) -> dict[str, Any]:
    """A fleet that comes up, its memory, and what it does under load."""
    from twin_fleet import TwinFleet

    words = {"step_s": args.step, "port": args.port, "logs": args.logs}
    with TwinFleet(args.model, args.twins, args.gateways[0], **words) as twins:
        found: dict[str, Any] = {"start_s": twins.start_s, "memory_idle": twins.memory(), "runs": []}
        print(f"up after {twins.start_s:.1f} s, {found['memory_idle']['total_mib']:,.0f} MiB", flush=True)
        for count in args.gateways:
            twins.scale_gateways(count)
            for streams in args.streams:
                for _ in range(args.repeat):
                    found["runs"].append(_load(twins, streams, args))
        found["memory"] = twins.memory()
        begin_s = time.monotonic()
    found["end_s"] = time.monotonic() - begin_s
    for role, one in sorted(found["memory"].items()):
        print(role, one if isinstance(one, float) else {key: round(value, 1) for key, value in one.items()})
    return found


def _load(twins: Any, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = twins.measure(
        streams, isl=FLEET_ISL, osl=FLEET_OSL, warm_s=args.warm, measured_s=args.measured, processes=args.processes
    )
    show(found)
    return found


def loads(gateways: list[int], streams: int) -> Iterator[tuple[int, int]]:
    """(gateways, streams), most gateways first: as many streams for each gateway, then `streams` for all of them."""
    for count in sorted(gateways, reverse=True):
        each = streams * count // max(gateways)
        yield count, each
        if each != streams:
            yield count, streams


def scaling(args: argparse.Namespace, save: Save) -> dict[str, Any]:
    """The same load on fewer and fewer gateways: they start together, which is faster than one after the other."""
    from twin_fleet import TwinFleet

    end_s = time.monotonic() + args.deadline
    streams = args.streams[0]
    planned = list(loads(args.gateways, streams))
    found: dict[str, Any] = {"planned": planned, "client": [], "runs": [], "skipped": []}
    each = sorted({count // gateways for gateways, count in planned})
    alone = client_alone(args.twins, each, args.step, args.warm, args.measured / 2, 1, ["prefix"])
    try:
        found["client"] = on_a_gateways_loop(asyncio.wait_for(alone, args.deadline / 3))
    except Exception as error:  # noqa: BLE001 - the fleet is measured all the same
        found["skipped"].append(f"client alone: {error!r}")
    save(found)
    words = {"step_s": args.step, "port": args.port, "logs": args.logs}
    try:
        with TwinFleet(args.model, args.twins, max(args.gateways), **words) as twins:
            found["start_s"] = twins.start_s
            print(f"up after {twins.start_s:.1f} s", flush=True)
            longest_s = args.warm + args.measured + 10.0
            for count, asked in planned:
                begin_s = time.monotonic()
                if begin_s + longest_s + STOP_S > end_s:
                    found["skipped"].append(f"{count} gateways, {asked} streams: no time is left")
                    continue
                twins.scale_gateways(count)
                found["runs"].append(_load(twins, asked, args))
                longest_s = max(longest_s, time.monotonic() - begin_s)
                if "memory" not in found:
                    found["memory"] = twins.memory()
                save(found)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what was measured is kept, and why there is no more
        found["skipped"].append(f"the rest: {error!r}")
        print(f"ended early: {error!r}", flush=True)
    save(found)
    print(scaling_table(found))
    return found


def scaling_table(found: dict[str, Any]) -> str:
    """Rows by gateways and streams. kervan's own CPU is that of the fleet client alone at as many streams."""
    alone = {one["streams"]: one["client_us_per_token"] for one in found["client"]}
    heads = ("gateways", "streams", "tok/s", "offered", "tok/chunk", "gateway us/tok", "kervan us/tok",
             "frontend us/tok", "tok/s per gateway core", "gateway cores", "twin us/tok", "client cores", "failed",
             "moved")  # fmt: skip
    rows: list[tuple[Any, ...]] = [heads]
    for one in sorted(found["runs"], key=lambda one: (one["gateways"], one["streams"])):
        own_us, all_us = alone.get(one["streams"] // one["gateways"]), one["gateway_us_per_token"]
        rows.append(
            (
                one["gateways"], one["streams"], f"{one['tok_s']:,.0f}", f"{one['twins_offer_tok_s']:,.0f}",
                f"{one['tokens_per_chunk']:.2f}", f"{all_us:.1f}", "-" if own_us is None else f"{own_us:.1f}",
                "-" if own_us is None else f"{all_us - own_us:.1f}", f"{one['tok_s_per_gateway_core']:,.0f}",
                f"{sum(one['gateway_core_shares']):.2f}", f"{one['twin_us_per_token']:.1f}",
                f"{one['client_core_share']:.2f}", sum(one["errors"].values()), f"{one['streams_moved']:.0f}",
            )
        )  # fmt: skip
    return "\n".join([*("| " + " | ".join(map(str, row)) + " |" for row in rows), *found["skipped"]])


# ---- records


def show(found: dict[str, Any]) -> None:
    print("  ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True)


class Record:
    """A record with one part for each command; kept on disk after each change."""

    def __init__(self, args: argparse.Namespace):
        self.path, self.part = args.record, args.part or args.what
        places = {str(place): place.name for place in (args.model, args.record, args.logs) if place is not None}
        self.command = shlex.join(["python", "benchmarks/twins.py", *(places.get(word, word) for word in sys.argv[1:])])

    def save(self, found: dict[str, Any]) -> None:
        if self.path is None:
            return
        fresh = made = records.record("twins", {"parts": {}})
        if self.path.suffix == ".json" and self.path.exists():
            made = json.loads(self.path.read_text())
        made.pop("command", None)  # each part has its own
        told = {"date": fresh["date"], "command": self.command, "kervan": fresh["versions"].get("kervan", "unknown")}
        made["parts"][self.part] = {**told, **found}
        self.path = records.write(self.path, made)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["client", "routing", "shell", "fleet", "scaling", "table"])
    parser.add_argument("--twins", type=int, default=16)
    parser.add_argument("--streams", type=numbers, default=[1024])
    parser.add_argument("--replicas", type=numbers, default=[1, 16, 256])
    parser.add_argument("--gateways", type=numbers, help="[default: 1; for scaling 1,2,4]")
    parser.add_argument("--model", type=Path, help="For fleet and scaling: a model directory with a tokenizer.")
    parser.add_argument("--step", type=float, help="Seconds of a twin's step [default: 0.05; for scaling 0.025].")
    parser.add_argument("--warm", type=float, default=3.0, help="Seconds under load before each measurement.")
    parser.add_argument("--measured", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--processes", type=int, help="Of the client [default: one for eight cores].")
    parser.add_argument("--deadline", type=float, default=195.0, help="Seconds that scaling may take.")
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--logs", type=Path, help="Copy the logs of gateways and twins there.")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--routing", default="prefix", help="Of the client; prefix,least-load alternates.")
    parser.add_argument("--part", help="The part's name in the record [default: the command].")
    args = parser.parse_args()
    if args.what in ("fleet", "scaling") and args.model is None:
        parser.error(f"{args.what} needs --model")
    is_scaling = args.what == "scaling"
    args.gateways = args.gateways or ([1, 2, 4] if is_scaling else [1])
    args.step = args.step or (0.025 if is_scaling else 0.05)
    args.processes = args.processes or max(1, len(os.sched_getaffinity(0)) // 8)
    return args


def main() -> None:
    args = arguments()
    if args.what == "table":
        print(scaling_table(json.loads(args.record.read_text())["parts"]["scaling"]))
        return
    # A plain SIGTERM would skip the clean-up and leave a fleet running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    record = Record(args)
    found: dict[str, Any]
    if args.what == "routing":
        found = {"runs": [routing_cost(count) for count in args.replicas]}
        for one in found["runs"]:
            show(one)
    elif args.what == "shell":
        found = asyncio.run(shell_cost())
        show(found)
    elif args.what == "client":
        words = (args.twins, args.streams, args.step, args.warm, args.measured, args.repeat, args.routing.split(","))
        found = {"runs": on_a_gateways_loop(client_alone(*words))}
    elif args.what == "fleet":
        found = fleet(args)
    else:
        found = scaling(args, record.save)
    record.save(found)
    if record.path is not None:
        print(f"record: {record.path}")


if __name__ == "__main__":
    main()
