"""A fleet that follows its load up and down: how soon a new replica gives tokens, how soon one that leaves is empty.

    python benchmarks/scaling.py --record benchmarks/records            # 8B shape, random weights, two on one GPU
    python benchmarks/scaling.py --engine twin --most 8 --output-tokens 1000,8000,32000 --record benchmarks/records

For each output length: a fleet of one replica rests, then `--streams` streams come at once, each of which asks again
when it has its answer; when all replicas of `--most` are there and have given tokens, all but `--rest` streams end when
their answer does, or are cut off by their client where answers are long, and the fleet becomes small again. Replicas
leave while the streams that stay are in the middle of their answers. `--cycles` times.

From need: from the surge until the first decision for more, until a new replica is ready, and until the first one has
given a token. From notice: from when a gateway hears that a replica leaves until it has no stream there, and until it
is gone. Tokens are counted: a stream is whole with as many as were asked for.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import servers
from restarts import DUMMY
from servers import HERE

from kervan.bench import records
from kervan.ports import free_port

Row = dict[str, Any]
POLL_S = 0.05
TTFT_POLL_S = 0.25
UP_S, DOWN_S = 240.0, 120.0
TWIN_STEP_S = 0.02
FIRST_TOKENS = re.compile(r'kervan_time_to_first_token_seconds_count\{[^}]*replica="([^"]+)"[^}]*\} ([0-9.]+)')


@dataclass
class Seen:
    """When what happened to one replica, by this process's clock."""

    listed_s: float
    ready_s: float | None = None
    first_token_s: float | None = None
    notice_s: float | None = None
    empty_s: float | None = None
    gone_s: float | None = None
    streams_at_notice: int = 0


@dataclass
class Watch:
    """Looks at one gateway again and again."""

    url: str
    replicas: dict[str, Seen] = field(default_factory=dict)
    linked: dict[str, int] = field(default_factory=dict)
    targets: list[tuple[float, int]] = field(default_factory=list)
    reason: str = ""
    policy: str = ""

    async def forever(self, session: aiohttp.ClientSession) -> None:
        looked_s = 0.0
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{self.url}/kervan/status") as response:
                    self._take(await response.json(), time.monotonic())
                if time.monotonic() - looked_s > TTFT_POLL_S:
                    looked_s = time.monotonic()
                    async with session.get(f"{self.url}/metrics") as response:
                        self._first_tokens(await response.text(), time.monotonic())
            await asyncio.sleep(POLL_S)

    def _take(self, status: Row, now_s: float) -> None:
        self.linked = status["replicas"]
        scaling = status["directory"]["scaling"] or {"targets": {}, "reason": "", "policy": ""}
        self.reason, self.policy = scaling["reason"], scaling["policy"]
        target = sum(scaling["targets"].values())
        if target and (not self.targets or self.targets[-1][1] != target):
            self.targets.append((now_s, target))
        states = {entry["id"]: entry["state"] for entry in status["directory"]["replicas"]}
        for name, state in states.items():
            seen = self.replicas.setdefault(name, Seen(now_s))
            if state == "ready" and name in self.linked and seen.ready_s is None:
                seen.ready_s = now_s
            if state == "draining" and seen.notice_s is None:
                seen.notice_s, seen.streams_at_notice = now_s, self.linked.get(name, 0)
            if seen.notice_s is not None and seen.empty_s is None and not self.linked.get(name):
                seen.empty_s = now_s
        for name, seen in self.replicas.items():
            if name not in states and seen.gone_s is None:
                seen.gone_s = now_s
                seen.empty_s = seen.empty_s or (now_s if seen.notice_s is not None else None)

    def _first_tokens(self, page: str, now_s: float) -> None:
        for name, count in FIRST_TOKENS.findall(page):
            seen = self.replicas.get(name)
            if seen is not None and float(count) and seen.first_token_s is None:
                seen.first_token_s = now_s

    async def until(self, what: str, condition: Any, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"after {timeout_s:.0f} s not {what}: {self.linked}, targets {[n for _, n in self.targets]}, "
                    f"{self.policy}: {self.reason}"
                )
            await asyncio.sleep(POLL_S)


@dataclass
class Streams:
    """Streams that ask again and again; `cut`: left by their client on purpose."""

    url: str
    output_tokens: int
    whole: int = 0
    tokens: int = 0
    cut: int = 0
    broken: list[str] = field(default_factory=list)
    _tasks: dict[int, "asyncio.Task[None]"] = field(default_factory=dict)
    _numbers: int = 0
    _is_over: bool = False

    def start(self, count: int) -> None:
        for _ in range(count):
            self._numbers += 1
            self._tasks[self._numbers] = asyncio.create_task(self._ask(self._numbers))

    async def leave(self, rest: int) -> None:
        """All but the `rest` that came last go, in the middle of what they get."""
        for number in list(self._tasks)[: len(self._tasks) - rest]:
            self._tasks.pop(number).cancel()
            self.cut += 1

    async def end(self, *, waits: bool) -> None:
        """Let all end with their answers; or where that `waits` too long, leave."""
        self._is_over = True
        if not waits:
            await self.leave(0)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _ask(self, number: int) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=UP_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            asked = 0
            while not self._is_over:
                asked += 1
                prompt = [5 + (number * 37 + asked * 11 + i) % 400 for i in range(64)]
                body = {"model": "shape", "prompt": prompt, "max_tokens": self.output_tokens, "ignore_eos": True,
                        "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
                await self._one(session, body)

    async def _one(self, session: aiohttp.ClientSession, body: Row) -> None:
        usage = 0
        try:
            async with session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status == 503 and "Retry-After" in response.headers:
                    await asyncio.sleep(float(response.headers["Retry-After"]))
                    return
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.broken.append(str(event["error"])[:200])
                            return
                        usage = (event.get("usage") or {}).get("completion_tokens") or usage
        except (aiohttp.ClientError, TimeoutError) as error:
            self.broken.append(repr(error)[:200])
            await asyncio.sleep(0.5)
            return
        self.tokens += usage
        if usage == self.output_tokens:
            self.whole += 1
        else:
            self.broken.append(f"{usage} tokens of {self.output_tokens}")


class Fleet:
    """One fleet for all output lengths."""

    def __init__(self, args: argparse.Namespace, model: str, place: Path):
        self.args, self.port = args, free_port()
        self.url = args.url or f"http://127.0.0.1:{self.port}"
        self._model = model
        self._config = place / "scaling.yaml"
        each = max(1, args.streams // args.most)
        scaling = {"target_ongoing_requests": each, "upscale_delay_s": 0, "downscale_delay_s": args.wait_s,
                   "look_back_period_s": 2, "metrics_interval_s": 1}  # fmt: skip
        settings: Row = {"policy": args.policy, "replicas": f"1..{args.most}"}
        if args.policy == "ray":
            settings["autoscaling"] = scaling
        elif args.slo:
            settings["slo"] = args.slo
        if args.engine == "twin":
            settings |= {"engine": "twin", "gpu": "H200", "twin": {"base_s": TWIN_STEP_S}}
        self._config.write_text(json.dumps(settings))

    def kervan(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kervan", *words], capture_output=True, text=True, timeout=580, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return done.stdout

    def up(self) -> float:
        """Seconds that `kervan up` took."""
        arguments = [word for argument in self.args.engine_arg for word in ("--engine-arg", argument)]
        share = ["--gpus-per-replica", f"{1 / self.args.most:g}"] if self.args.engine == "vllm" else []
        begin_s = time.monotonic()
        self.kervan(
            *("up", self._model, "--name", "scaling", "--detach", "--port", str(self.port)),
            *("--config", str(self._config), "--gateways", "1", "--engine-arg", "served_model_name=shape"),
            *share, *arguments,
        )  # fmt: skip
        return round(time.monotonic() - begin_s, 1)

    async def cycle(self, watch: Watch, output_tokens: int) -> Row:
        """Up and down once."""
        args = self.args
        await watch.until("one replica", lambda: len(watch.linked) == 1, UP_S)
        before = set(watch.replicas)
        need_s = time.monotonic()
        changes = len(watch.targets)
        streams = Streams(self.url, output_tokens)
        streams.start(args.streams)
        coming = asyncio.create_task(self._more_come(watch, streams))
        await watch.until(
            f"tokens of {args.most} replicas",
            lambda: sum(s.first_token_s is not None and s.gone_s is None for s in watch.replicas.values()) >= args.most,
            UP_S,
        )
        coming.cancel()
        up = [seen for name, seen in watch.replicas.items() if name not in before]
        decided_s = next((at_s for at_s, _ in watch.targets[changes:] if at_s >= need_s), need_s)
        await asyncio.sleep(1.0)
        less_s = time.monotonic()
        await streams.leave(args.rest)
        await watch.until("one replica again", lambda: len(watch.linked) == 1, DOWN_S + args.wait_s)
        await asyncio.sleep(1.5)  # the directory's list comes once a second
        left = [seen for seen in watch.replicas.values() if seen.notice_s is not None and seen.notice_s >= less_s]
        await streams.end(waits=output_tokens <= 2000)
        row = {
            "output_tokens": output_tokens,
            "need_to_decision_s": round(decided_s - need_s, 2),
            "need_to_ready_s": sorted(round(s.ready_s - need_s, 2) for s in up if s.ready_s is not None),
            "need_to_first_token_s": sorted(
                round(s.first_token_s - need_s, 2) for s in up if s.first_token_s is not None
            ),
            "notice_to_empty_s": [round(s.empty_s - s.notice_s, 2) for s in left if s.empty_s and s.notice_s],
            "notice_to_gone_s": [round(s.gone_s - s.notice_s, 2) for s in left if s.gone_s and s.notice_s],
            "streams_at_notice": [seen.streams_at_notice for seen in left],
            "whole": streams.whole,
            "cut_by_client": streams.cut,
            "broken": streams.broken,
        }
        print(json.dumps(row), flush=True)
        return row

    async def _more_come(self, watch: Watch, streams: Streams) -> None:
        """Two streams for each replica that has none: those that are there stay where they are."""
        given: set[str] = set()
        while True:
            for name, count in watch.linked.items():
                if not count and name not in given:
                    given.add(name)
                    streams.start(2)
            await asyncio.sleep(POLL_S)

    async def measure(self, rows: list[Row]) -> None:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            watch = Watch(self.url)
            watching = asyncio.create_task(watch.forever(session))
            try:
                for output_tokens in self.args.lengths:
                    for _ in range(self.args.cycles):
                        rows.append(await self.cycle(watch, output_tokens))
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)


def quantile(values: list[float], share: float) -> float:
    """NaN of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def table(rows: list[Row]) -> str:
    """Seconds; a line per output length."""
    lines = [
        "output tokens  need to decision  to ready  to first token  notice to empty p50   p99  to gone  whole  broken"
    ]
    for length in dict.fromkeys(row["output_tokens"] for row in rows):
        own = [row for row in rows if row["output_tokens"] == length]
        empty, gone = ([s for row in own for s in row[f"notice_to_{what}_s"]] for what in ("empty", "gone"))
        ready, token = ([s for row in own for s in row[f"need_to_{what}_s"]] for what in ("ready", "first_token"))
        decision = statistics.median(row["need_to_decision_s"] for row in own)
        lines.append(
            f"{length:13,}  {decision:16.2f}  {min(ready, default=0):8.2f}  {min(token, default=0):14.2f}  "
            f"{quantile(empty, 0.5):19.2f}  {quantile(empty, 0.99):4.2f}  {quantile(gone, 0.5):7.2f}  "
            f"{sum(row['whole'] for row in own):5}  {sum(len(row['broken']) for row in own):6}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "twin"), default="vllm")
    parser.add_argument("--model", help="a model directory; without it the 8B shape with random weights")
    parser.add_argument("--most", type=int, default=2, help="replicas; of vLLM, they share one GPU")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rest", type=int, default=6, help="streams that stay")
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--output-tokens", default="2000")
    parser.add_argument("--policy", choices=("ray", "slo"), default="ray", help="ray: streams / most is the target")
    parser.add_argument("--slo", default="")
    parser.add_argument("--wait-s", type=float, default=3.0, help="before fewer: downscale_delay_s")
    parser.add_argument("--engine-arg", action="append", default=[])
    parser.add_argument("--url", default="", help="a fleet that runs, with these settings, and serves the name shape")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    args.lengths = [int(length) for length in args.output_tokens.split(",")]
    with tempfile.TemporaryDirectory() as place:
        os.environ["KERVAN_HOME"] = f"{place}/home"
        model = args.model or f"{place}/llama3-8b"
        longest = max(args.lengths) + 512
        if args.model is None and args.engine == "vllm" and not args.url:
            subprocess.run(
                [sys.executable, HERE / "shape_model.py", HERE / "models/llama3-8b/config.json", model], check=True
            )
            args.engine_arg = [*DUMMY, *args.engine_arg]
        elif args.model is None:
            described = json.loads((HERE / "models/llama3-8b/config.json").read_text())
            Path(model).mkdir()
            Path(model, "config.json").write_text(json.dumps({**described, "max_position_embeddings": 2 * longest}))
            args.engine_arg = [f"max_model_len={longest}", *args.engine_arg]
        servers.parse_engine_args(args.engine_arg)
        rows: list[Row] = []
        facts = {"engine": args.engine, "most": args.most, "streams": args.streams, "policy": args.policy, "rows": rows}
        record = records.record("scaling", facts)
        record["command"] = " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
        fleet = Fleet(args, model, Path(place))
        try:
            if not args.url:
                record["up_s"] = fleet.up()
                print(f"up: {record['up_s']} s", flush=True)
            asyncio.run(fleet.measure(rows))
        finally:
            if not args.url:
                fleet.kervan("down", "--name", "scaling")
            if args.record and rows:
                records.write(args.record, record)
    print(table(rows))


if __name__ == "__main__":
    main()
