"""A fleet of two replicas under load: one is killed, comes back, and then one is drained.

The load is `kervan bench`'s client in a closed loop; each chunk's time is the kernel's. Random weights say nothing sure
in bf16, so tokens are counted, not compared (`kervan chaos` compares them).
"""

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import servers
from servers import HERE

from kervan.bench import eventloop
from kervan.bench.endpoint import find_alphabet, first_look
from kervan.bench.load import Endpoint, Load
from kervan.bench.load_client import LoadClient, Share
from kervan.chaos import effects, fleet_under_test
from kervan.chaos.checked_load import SAMPLING, CheckedStream, StreamObserver
from kervan.chaos.effects import Disruption
from kervan.config.workload import Slo
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.serve import drain
from kervan.stats import quantile

Row = dict[str, Any]
Keep = Callable[[Row], None]
WARM_S = 8.0  # the opening burst of prefills
BASELINE_S = 15.0
STORM_S = 10.0  # in which others' gaps count
SETTLE_S = 10.0  # after which the replica that has come back has its share
DRAIN_DEADLINE_S = 60.0
END_S = 45.0  # kept for the streams to end, and the fleet
POLL_S = 0.5
BEAT_S = 1.5  # after which all gateways have told what they moved
DUMMY = ["load_format=dummy", "max_model_len=8192", "enable_prefix_caching=false"]


def run(args: argparse.Namespace, keep: Keep) -> str:
    """Start the fleet, disturb it, and end it. Rows go to `keep`; returns the table."""
    rows: list[Row] = []

    def both(row: Row) -> None:
        rows.append(row)
        keep(row)

    with tempfile.TemporaryDirectory() as place:
        os.environ["KERVAN_HOME"] = str(args.out / "home")  # of the commands and of this process
        model, engine_args = args.model, list(args.engine_arg)
        if model is None:
            model = f"{place}/llama3-8b"
            config = HERE / "models/llama3-8b/config.json"
            subprocess.run([sys.executable, HERE / "shape_model.py", config, model], check=True)
            engine_args = [*DUMMY, *engine_args]
        begin_s = time.monotonic()
        with servers.kervan_fleet(
            model,
            servers.parse_engine_args(engine_args) | {"served_model_name": "shape"},
            log_dir=args.out,
            env=servers.parse_assignments(args.env),
            replicas=2,
            gateways=args.gateways,
            timeout_s=max(60.0, args.deadline_s - time.monotonic() - 60.0),
        ) as starting:
            server = starting.wait()
            both({"what": "start", "took_s": round(time.monotonic() - begin_s, 1), "gateways": len(server.front)})
            factory, _ = eventloop.factory()
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(_Storm(args, both, server.url, f"bench-{os.getpid()}").run())
    return table(rows)


class _Storm:
    def __init__(self, args: argparse.Namespace, keep: Keep, url: str, name: str) -> None:
        self._args, self._keep, self._url, self._name = args, keep, url, name
        self._errors: dict[str, int] = {}
        self._messages: dict[str, str] = {}
        self._ended: list[CheckedStream] = []
        self._observer = StreamObserver(self._count)

    async def run(self) -> None:
        endpoint, probe = await asyncio.to_thread(first_look, Endpoint(url=self._url, sampling=SAMPLING))
        load = Load(
            streams=self._args.streams, duration_s=3600.0, isl=str(self._args.isl), osl=self._args.osl, timeout_s=400.0
        )
        alphabet, _ = await asyncio.to_thread(find_alphabet, endpoint, load, probe, None)
        self._fleet = await asyncio.to_thread(
            lambda: fleet_under_test.find(self._url, headers=(), name=self._name, address=None)
        )
        self._client = LoadClient(Share(load, endpoint, alphabet, Slo()))
        self._client.prepare()
        await self._client.connect_first()
        running = asyncio.create_task(self._client.run(time.time(), self._observer))
        try:
            await self._scenes()
        finally:
            self._client.stop_sending()
            left_s = max(5.0, self._args.deadline_s - time.monotonic() - 25.0)
            await asyncio.wait({running}, timeout=left_s)
            if not running.done():
                self._client.end()
            await asyncio.wait({running}, timeout=5.0)
            self._keep(self._verdict())

    def _streams(self) -> list[CheckedStream]:
        """Ended or in flight, with all that has come."""
        self._client.in_flight()
        return [*self._ended, *self._observer.open.values()]

    def _count(self, stream: CheckedStream) -> None:
        self._ended.append(stream)
        exchange = stream.exchange
        error = exchange.error
        if error is None and len(stream.tokens) != exchange.request.output_tokens:
            error = "token_ids"
        if error is not None:
            self._errors[error] = self._errors.get(error, 0) + 1
            self._messages.setdefault(error, exchange.message)
            self._keep({"what": "a stream broke", "error": error, "message": self._messages[error]})

    def _verdict(self) -> Row:
        return {
            "what": "all streams",
            "streams": len(self._ended),
            "tokens": sum(len(stream.tokens) for stream in self._streams()),
            "broken": sum(self._errors.values()),
            "errors": self._errors,
            "unfinished": self._client.unfinished,
            "client_late_s": round(self._client.lag.largest, 4),
        }

    # ---- scenes

    async def _scenes(self) -> None:
        await asyncio.sleep(WARM_S + BASELINE_S)
        now_s = time.time()
        self._keep({"what": "undisturbed", **self._all_gaps(now_s - BASELINE_S, now_s, set())})
        await self._kill()
        if await self._returned():
            await asyncio.sleep(SETTLE_S)
            now_s = time.time()
            self._keep({"what": "undisturbed again", **self._all_gaps(now_s - SETTLE_S / 2, now_s, set())})
            await self._drain()

    async def _kill(self) -> None:
        snapshot = await self._look()
        victim = self._ready(snapshot)[0]
        before = _moved(snapshot)
        self._killed_s = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.sleep(STORM_S)
        await asyncio.sleep(BEAT_S)
        moves = _moved(await self._look()) - before
        self._keep({"what": "kill", **self._effect(self._killed_s, moves, STORM_S), "running_there": victim.running})
        self._victim = victim.id

    async def _returned(self) -> bool:
        """Wait until two replicas are ready."""
        while time.monotonic() < self._args.deadline_s - END_S - 30.0:
            ready = self._ready(await self._look())
            if len(ready) >= 2 and all(replica.id != self._victim for replica in ready):
                self._keep({"what": "return", "after_s": round(time.time() - self._killed_s, 1)})
                return True
            await asyncio.sleep(POLL_S)
        self._keep({"what": "return", "failed": "not within the time limit"})
        return False

    async def _drain(self) -> None:
        snapshot = await self._look()
        victim = self._ready(snapshot)[0]  # the one that was there all the time
        at_s = time.time()
        left_s = self._args.deadline_s - time.monotonic() - END_S
        drained = await asyncio.to_thread(
            drain.drain, self._name, victim.id, min(DRAIN_DEADLINE_S, max(10.0, left_s)), None
        )
        await asyncio.sleep(BEAT_S)
        moves = _moved(await self._look()) - _moved(snapshot)
        self._keep(
            {
                "what": "drain",
                **self._effect(at_s, moves, drained.took_s),
                "running_there": victim.running,
                "drained_after_s": round(drained.took_s, 2),
            }
        )

    async def _look(self) -> Snapshot:
        return await asyncio.to_thread(self._fleet.look, -1, 0.0)

    @staticmethod
    def _ready(snapshot: Snapshot) -> list[ReplicaEntry]:
        """The one that has been ready for the longest comes first."""
        ready = [replica for replica in snapshot.replicas if replica.state == "ready"]
        return sorted(ready, key=lambda replica: (-replica.ready_for_s, replica.id))

    # ---- what clients saw

    def _effect(self, at_s: float, moves: int, storm_s: float) -> Row:
        """Gaps of the `moves` streams that waited longest of those in flight at `at_s`, and all gaps of the others."""
        event = [Disruption(0, "kill", "", at_s, felt_s=at_s)]
        waits: list[tuple[float, int]] = []
        for stream in self._streams():
            sent_s, number = stream.exchange.sent_s, stream.exchange.number
            if sent_s <= at_s and stream.tokens_s and stream.tokens_s[-1] > at_s:
                waits += [(longest_s, number) for longest_s in effects.longest_gaps_s(sent_s, stream.tokens_s, event)]
        waits.sort(reverse=True)
        moved = {number for _, number in waits[:moves]}
        moved_s = [wait for wait, _ in waits[:moves]]
        return {
            "in_flight": len(waits),
            "moves": moves,
            "gap": _quantiles(moved_s),
            "others": self._all_gaps(at_s, at_s + storm_s, moved),
            "waits_ms": [round(1000 * wait, 1) for wait, _ in waits],
        }

    def _all_gaps(self, begin_s: float, end_s: float, without: set[int]) -> Row:
        """Each gap between chunks that ended in this time, and first tokens and tokens that came in it."""
        gaps: list[float] = []
        ttfts: list[float] = []
        tokens = 0
        for stream in self._streams():
            if stream.exchange.number in without:
                continue
            times = stream.tokens_s
            tokens += sum(begin_s < at_s <= end_s for at_s in times)
            gaps += [after - before for before, after in itertools.pairwise(times) if begin_s < after <= end_s]
            if times and begin_s < times[0] <= end_s:
                ttfts.append(times[0] - stream.exchange.sent_s)
        return {
            "gap": _quantiles(gaps),
            "ttft": _quantiles(ttfts),
            "chunks_per_s": round(tokens / (end_s - begin_s), 1),
        }


def _moved(snapshot: Snapshot) -> int:
    return sum(gateway.moved for gateway in snapshot.gateways)


def _quantiles(seconds: Sequence[float]) -> Row:
    if not seconds:
        return {"count": 0}
    found = {name: round(quantile(seconds, share), 4) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"count": len(seconds), **found, "max": round(max(seconds), 4)}


def table(rows: Sequence[Row]) -> str:
    """Milliseconds."""
    lines = [f"{'':<34} {'count':>7} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9}  ms"]

    def line(name: str, found: Row) -> None:
        values = "".join(f" {1000 * found[key]:>9.1f}" for key in ("p50", "p90", "p99", "max") if key in found)
        lines.append(f"{name:<34} {found['count']:>7}{values}")

    for row in rows:
        if "moves" in row:
            line(f"{row['what']}: longest gap, moved", row["gap"])
            line(f"{row['what']}: gaps of the others", row["others"]["gap"])
            line(f"{row['what']}: first tokens meanwhile", row["others"]["ttft"])
        elif "gap" in row:
            line(f"{row['what']}: gaps", row["gap"])
            line(f"{row['what']}: first tokens", row["ttft"])
        else:
            lines.append(", ".join(f"{key} {value}" for key, value in row.items()))
    return "\n".join(lines)
