"""What encrypting the traffic between gateways and replicas costs: CPU time per token, with and without. CPU only.

    python benchmarks/encryption.py --streams 2,64 --rounds 5 --record DIR
    python benchmarks/encryption.py table --record FILE

Two fleet clients with two twins each, one encrypted and one not, run in turns (A B B A). A step's tokens of all
streams of a gateway come in one message, so the cost falls with the streams that a replica runs at once. Everything
that both do counts: decoding, routing, the twins' own work; the difference is what CURVE costs.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import zmq
from meters import cpu_s, spread
from twins import _Asking

from kervan.bench import records

TWINS = 2
SIDES = ("plain", "encrypted")
ORDER = ("plain", "encrypted", "encrypted", "plain")
MEASURED = ("client_us_per_token", "twin_us_per_token", "client_us_per_message", "twin_us_per_message", "step_ms")


class Side:
    """A client and its twins. `run` loads them for a while, and leaves them idle."""

    def __init__(self, name: str, directory: Path, step_s: float) -> None:
        from kervan.fleet.client import FleetClient
        from kervan.fleet.process import TWIN_ENGINE, EngineProcess
        from kervan.fleet.vllm.codec import VllmCodec
        from kervan.twin.replica import TwinSpec
        from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

        encrypts = name == "encrypted"
        timing = StepTiming(base_s=step_s, prefill_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
        limits = TwinLimits(num_blocks=100_000, max_num_seqs=1024, max_num_batched_tokens=1 << 20, max_model_len=8192)
        self.twins = {
            f"{name}{i}": EngineProcess(
                TwinSpec(f"{name}{i}", "127.0.0.1", "s", TwinSettings(timing, limits), encrypts),
                log_path=directory / f"{name}{i}.log",
                module=TWIN_ENGINE,
            )
            for i in range(TWINS)
        }
        self.client = FleetClient(VllmCodec(), secret="s", encrypts=encrypts)

    async def is_ready(self) -> None:
        from kervan.fleet.link import Member

        while not all(twin.ready for twin in self.twins.values()):  # noqa: ASYNC110 - threads tell
            await asyncio.sleep(0.05)
        self.client.set_members(
            Member(name, twin.ready.address, twin.ready.public_key) for name, twin in self.twins.items() if twin.ready
        )
        while len(self.client.links) < TWINS:  # noqa: ASYNC110 - a benchmark may poll
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self.client.close()
        for twin in self.twins.values():
            twin.kill()

    async def run(self, streams: int, warm_s: float, measured_s: float) -> dict[str, float]:
        asking = _Asking(self.client)
        consumer = asyncio.create_task(asking.consume())
        for _ in range(streams):
            await asking.ask()
        await asyncio.sleep(warm_s)
        pids = [twin.pid for twin in self.twins.values()]

        def now() -> tuple[float, ...]:
            messages = sum(link.num_outputs for link in self.client.links)
            return asking.num_tokens, messages, time.process_time(), cpu_s(pids), time.monotonic()

        before = now()
        await asyncio.sleep(measured_s)
        tokens, messages, own_s, twins_s, wall_s = (after - then for after, then in zip(now(), before, strict=True))
        consumer.cancel()
        await self.client.abort([str(number + 1) for number in range(asking.num_requests)])
        await asyncio.sleep(0.3)
        while not self.client.outputs.empty():
            self.client.outputs.get_nowait()
        values = (1e6 * own_s / tokens, 1e6 * twins_s / tokens, 1e6 * own_s / messages, 1e6 * twins_s / messages,
                  1e3 * wall_s * TWINS / messages)  # fmt: skip
        return dict(zip(MEASURED, values, strict=True))


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as directory:
        async with AsyncExitStack() as stack:
            sides = {}
            for name in SIDES:
                sides[name] = Side(name, Path(directory), args.step)
                stack.push_async_callback(sides[name].close)
                await sides[name].is_ready()
            for streams in args.streams:
                runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
                for _ in range(args.rounds):
                    for name in ORDER:
                        runs[name].append(await sides[name].run(streams, args.warm, args.measured))
                found.append({"streams": streams, **{name: summed(runs[name]) for name in SIDES}, "runs": runs})
                print(json.dumps({key: value for key, value in found[-1].items() if key != "runs"}), flush=True)
    return found


def summed(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread([run[name] for run in runs]) for name in MEASURED}


def table(found: list[dict[str, Any]]) -> str:
    """Medians with the least and the most; what encryption adds is the difference of the medians."""
    heads = ("streams", "where", "plain, us per token", "encrypted, us per token", "added", "added, us per message")
    rows = [f"| {' | '.join(heads)} |", "|" + len(heads) * "---|"]
    for level in found:
        for where in ("client", "twin"):
            plain, ours = (level[side][f"{where}_us_per_token"] for side in SIDES)
            by_message = [level[side][f"{where}_us_per_message"]["median"] for side in SIDES]
            shown = [f"{one['median']:.1f} ({one['min']:.1f}..{one['max']:.1f})" for one in (plain, ours)]
            added = (f"{ours['median'] - plain['median']:.1f}", f"{by_message[1] - by_message[0]:.1f}")
            rows.append("| " + " | ".join([str(level["streams"]), where, *shown, *added]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measure", "table"], default="measure")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[2, 64])
    parser.add_argument("--step", type=float, default=0.004, help="Seconds of a twin's step.")
    parser.add_argument("--rounds", type=int, default=5, help="Of four runs each.")
    parser.add_argument("--warm", type=float, default=0.7)
    parser.add_argument("--measured", type=float, default=2.0)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    if args.what == "table":
        print(table(json.loads(args.record.read_text())["levels"]))
        return
    import uvloop

    found = uvloop.run(measure(args))
    print(table(found))
    if args.record is not None:
        places = {str(args.record): args.record.name}
        command = shlex.join(["python", "benchmarks/encryption.py", *(places.get(word, word) for word in sys.argv[1:])])
        made = {**records.record("encryption", {"levels": found}), "command": command}
        made["versions"] |= {"pyzmq": zmq.__version__, "libzmq": zmq.zmq_version(), "msgspec": msgspec.__version__}
        print(records.write(args.record, made))


if __name__ == "__main__":
    main()
