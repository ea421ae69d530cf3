"""How long a replica is away when it is killed or added under load, with warm starts and without.

    python benchmarks/restarts.py                      # 8B shape, random weights, two replicas on one GPU
    python benchmarks/restarts.py --model DIR ...      # a small model on CPU

For each side, a fleet is started and loaded with streams that do not end. One replica after the other is killed: how
long until the next one is ready, and the longest gap of a stream, with the tokens that all streams had by then: what
has moved is read again at once. Then, of two replicas, one is removed and added.
Random weights say nothing sure in bf16, so tokens are counted, not compared (`kervan chaos` compares them).
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import servers
from servers import HERE

from kervan.bench import records
from kervan.ports import free_port

Row = dict[str, Any]
POLL_S = 0.1
TIMEOUT_S = 240.0
SETTLE_S = 3.0
DUMMY = ["load_format=dummy", "max_model_len=4096", "enable_prefix_caching=false", "gpu_memory_utilization=0.45"]


@dataclass
class Streams:
    """So many streams that never end: each asks again when it has all its tokens."""

    url: str
    model: str
    count: int
    max_tokens: int
    tokens: int = 0
    broken: list[str] = field(default_factory=list)
    whole: int = 0
    gaps_s: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    _is_over: bool = False

    async def start(self) -> None:
        """Returns when each has tokens."""
        self.gaps_s, self.held = [0.0] * self.count, [0] * self.count
        began = [asyncio.Event() for _ in range(self.count)]
        self._tasks = [asyncio.create_task(self._stream(n, began[n])) for n in range(self.count)]
        await asyncio.gather(*(event.wait() for event in began))

    async def stop(self) -> None:
        """Returns when what is in flight has ended."""
        self._is_over = True
        await asyncio.gather(*self._tasks)

    def longest_gap_s(self) -> float:
        """Since the last time."""
        longest, self.gaps_s = max(self.gaps_s), [0.0] * self.count
        return longest

    async def _stream(self, number: int, began: asyncio.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            asked = 0
            while not self._is_over:
                asked += 1
                prompt = [5 + (number * 37 + asked * 11 + i) % 400 for i in range(64)]
                body = {"model": self.model, "prompt": prompt, "max_tokens": self.max_tokens, "ignore_eos": True,
                        "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
                await self._one(session, body, number, began)

    async def _one(
        self, session: aiohttp.ClientSession, body: dict[str, Any], number: int, began: asyncio.Event
    ) -> None:
        usage, last_s = 0, 0.0
        self.held[number] = 0
        try:
            async with session.post(f"{self.url}/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now_s = time.monotonic()
                    if last_s:
                        self.gaps_s[number] = max(self.gaps_s[number], now_s - last_s)
                    last_s = now_s
                    self.held[number] += 1  # one token each, or a few after a gap
                    began.set()
                    usage = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens") or usage
        except (aiohttp.ClientError, TimeoutError) as error:
            self.broken.append(repr(error)[:200])
            await asyncio.sleep(0.5)
            return
        self.tokens += usage
        if usage == self.max_tokens:
            self.whole += 1
        else:
            self.broken.append(f"{usage} tokens of {self.max_tokens}")


class Side:
    """One fleet, with or without warm starts."""

    def __init__(self, args: argparse.Namespace, model: str, *, is_warm: bool, place: Path):
        self.args = args
        self.is_warm = is_warm
        self.name = "warm" if is_warm else "cold"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._model = model
        self._known: list[str] = []  # replicas, in the order in which they came
        self._config = place / f"{self.name}.yaml"
        self._config.write_text(f"warm_start: {str(is_warm).lower()}\n")

    def kervan(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kervan", *words], capture_output=True, text=True, timeout=580, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return done.stdout

    def up(self) -> float:
        """Seconds that `kervan up` took."""
        arguments = [word for argument in self.args.engine_arg for word in ("--engine-arg", argument)]
        arguments += [word for pair in self.args.env for word in ("--env", pair)]
        share = ["--gpus-per-replica", "0.5"] if self.args.model is None and self.args.replicas > 1 else []
        begin_s = time.monotonic()
        self.kervan(
            *("up", self._model, "--name", self.name, "--detach", "--port", str(self.port)),
            *("--replicas", str(self.args.replicas), "--config", str(self._config), "--gateways", "1"),
            *("--engine-arg", "served_model_name=shape"),
            *share, *arguments,
        )  # fmt: skip
        return time.monotonic() - begin_s

    def replicas(self) -> list[Row]:
        """As `kervan status` shows them."""
        found: list[Row] = json.loads(self.kervan("status", "--name", self.name, "--json"))["replicas"]
        return found

    def new_start(self) -> Row:
        """What the start of the replica was spent on that had not been there before."""
        (new,) = (replica for replica in self.replicas() if replica["id"] not in self._known)
        self._known.append(new["id"])
        start: Row = new["start_s"]
        return start

    async def until_linked(self, session: aiohttp.ClientSession, count: int, gone: str = "") -> None:
        """Until the gateway gives work to so many replicas, none of them `gone`."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            async with session.get(f"{self.url}/kervan/status") as response:
                linked = set((await response.json())["replicas"])
            if len(linked) == count and gone not in linked:
                return
            await asyncio.sleep(POLL_S)
        raise TimeoutError(f"after {TIMEOUT_S:.0f} s not {count} replicas linked: {linked}")

    async def measure(self) -> Row:
        """All of one side."""
        row: Row = {"side": self.name, "up_s": round(await asyncio.to_thread(self.up), 1)}
        print(f"{self.name}: up {row['up_s']} s", flush=True)
        try:
            timeout = aiohttp.ClientTimeout(total=60)
            async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
                await self.until_linked(session, self.args.replicas)
                ready = await asyncio.to_thread(self.replicas)
                row["starts"] = [replica["start_s"] for replica in ready]
                self._known = [replica["id"] for replica in ready]
                row["memory"] = memory(ready)
                streams = Streams(self.url, "shape", self.args.streams, self.args.max_tokens)
                await streams.start()
                await asyncio.sleep(SETTLE_S)
                streams.longest_gap_s()
                row["kills"] = [await self.kill(session, streams) for _ in range(self.args.kills)]
                await asyncio.sleep(SETTLE_S)
                if self.args.replicas > 1:
                    row["scale"] = await self.scale(session)
                await streams.stop()
                row["streams"] = {"whole": streams.whole, "tokens": streams.tokens, "broken": streams.broken}
        finally:
            await asyncio.to_thread(self.kervan, "down", "--name", self.name)
        return row

    async def scale(self, session: aiohttp.ClientSession) -> Row:
        """One replica less, and one more: how long until the gateway gives work to that."""
        await asyncio.to_thread(self.kervan, "scale", str(self.args.replicas - 1), "--name", self.name)
        begin_s = time.monotonic()
        await asyncio.to_thread(self.kervan, "scale", str(self.args.replicas), "--name", self.name)
        await self.until_linked(session, self.args.replicas)
        to_ready_s = round(time.monotonic() - begin_s, 1)
        return {"to_ready_s": to_ready_s, "start_s": await asyncio.to_thread(self.new_start)}

    async def kill(self, session: aiohttp.ClientSession, streams: Streams) -> Row:
        """Kill the replica that has lived longest; what that cost."""
        of_id = {replica["id"]: replica for replica in await asyncio.to_thread(self.replicas)}
        oldest = of_id[next(known for known in self._known if known in of_id)]
        streams.longest_gap_s()
        held = sum(streams.held)
        begin_s = time.monotonic()
        os.kill(oldest["pid"], signal.SIGKILL)
        await self.until_linked(session, self.args.replicas, gone=oldest["id"])
        to_ready_s = round(time.monotonic() - begin_s, 1)
        await asyncio.sleep(SETTLE_S)  # streams that waited have a token then
        row = {
            "to_ready_s": to_ready_s,
            "tokens_of_streams": held,
            "longest_gap_s": round(streams.longest_gap_s(), 2),
            "start_s": await asyncio.to_thread(self.new_start),
        }
        print(f"{self.name}: {json.dumps(row)}", flush=True)
        return row


def memory(replicas: list[Row]) -> Row:
    """MB of main memory: the warm process (its own; with what its forks share), and each engine with its workers."""
    row: Row = {"engines_pss": []}
    for replica in replicas:
        engine = psutil.Process(replica["pid"])
        tree = [engine, *engine.children(recursive=True)]
        row["engines_pss"].append(round(sum(part.memory_full_info().pss for part in tree) / 1e6))
        if (parent := engine.parent()) and any("warm_process" in word for word in parent.cmdline()):
            full = parent.memory_full_info()
            row["warm_process"] = {name: round(getattr(full, name) / 1e6) for name in ("rss", "pss", "uss")}
    return row


def table(rows: list[Row]) -> str:
    """Seconds; a line per side."""
    lines = ["side   up    kill to ready, each    median  longest gap  scale to ready  broken"]
    for row in rows:
        kills = [kill["to_ready_s"] for kill in row["kills"]]
        scaled_s = row["scale"]["to_ready_s"] if "scale" in row else float("nan")
        lines.append(
            f"{row['side']}  {row['up_s']:6.1f}  {' '.join(f'{s:5.1f}' for s in kills):22}  "
            f"{statistics.median(kills):5.1f}  {max(kill['longest_gap_s'] for kill in row['kills']):9.2f}  "
            f"{scaled_s:12.1f}  {len(row['streams']['broken']):8}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; without it the 8B shape with random weights")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2, help="1: the GPU is its own, and streams wait for it")
    parser.add_argument("--sides", default="cold,warm", help="in this order; the first fills the machine's caches")
    parser.add_argument("--engine-arg", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["KERVAN_HOME"] = f"{place}/home"
        model = args.model
        if model is None:
            model = f"{place}/llama3-8b"
            config = HERE / "models/llama3-8b/config.json"
            subprocess.run([sys.executable, HERE / "shape_model.py", config, model], check=True)
            args.engine_arg = [*DUMMY, *args.engine_arg]
        servers.parse_engine_args(args.engine_arg)
        record = records.record("restarts", {"streams": args.streams, "replicas": args.replicas, "rows": (rows := [])})
        record["command"] = " ".join(["python", "benchmarks/restarts.py", *sys.argv[1:]])
        for side in args.sides.split(","):
            one = Side(args, model, is_warm=side == "warm", place=Path(place))
            rows.append(asyncio.run(one.measure()))
            print(json.dumps(rows[-1]), flush=True)
            if args.record:
                args.record = records.write(args.record, record)
    print(table(rows))


if __name__ == "__main__":
    main()
