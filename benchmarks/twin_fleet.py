"""A fleet of twins on a Ray of its own: started, loaded, metered and ended. `twins.py` uses it."""

import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import soak
from meters import Sampler, memory, window

from kervan.bench import benchmark
from kervan.bench.load import Endpoint, Load
from kervan.serve import cluster

NAME = "twins"
COMMAND_TIMEOUT_S = 120.0
COUNTERS = ("kervan_streams_moved_total", "kervan_replicas_lost_total")


class TwinFleet:
    """`with TwinFleet(...)`: up at the beginning, down at the end; logs are copied to `logs` then."""

    def __init__(self, model: Path, num_twins: int, num_gateways: int, *, step_s: float, port: int, logs: Path | None):
        self.words = (
            "up", str(model), "--name", NAME, "--engine", "twin", "--gpu", "H200", "--twin", f"base_s={step_s}",
            "--twin", "prefill_token_s=0", "--twin", "sequence_s=0", "--twin", "context_token_s=0",
            "--engine-arg", "max_model_len=2048", "--replicas", str(num_twins), "--gateways", str(num_gateways),
            "--port", str(port), "--detach", "--json",
        )  # fmt: skip
        self.num_twins, self.step_s, self.logs = num_twins, step_s, logs
        self.start_s = 0.0
        self._status: dict[str, Any] = {}

    def __enter__(self) -> "TwinFleet":
        self._home = Path(tempfile.mkdtemp(prefix="kt-"))
        os.environ["KERVAN_HOME"] = str(self._home)
        begin_s = time.monotonic()
        try:
            self._status = json.loads(self._kervan(*self.words, timeout_s=4 * COMMAND_TIMEOUT_S))
        except BaseException:
            self.__exit__()
            raise
        self.start_s = time.monotonic() - begin_s
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._kervan("down", "--name", NAME)
        except subprocess.SubprocessError as error:
            print(f"down: {error}", flush=True)
            if (local := cluster.find_local_ray()) is not None:
                cluster.stop_local_ray(local)
        if self.logs is not None and (self._home / "logs").exists():
            shutil.copytree(self._home / "logs", self.logs, dirs_exist_ok=True)
        shutil.rmtree(self._home, ignore_errors=True)

    @staticmethod
    def _kervan(*words: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        command = [sys.executable, "-m", "kervan", *words]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s).stdout

    def scale_gateways(self, count: int) -> None:
        if count != len(self._status["gateways"]):
            words = ("scale", "--gateways", str(count), "--name", NAME, "--json")
            self._status = json.loads(self._kervan(*words))

    @property
    def url(self) -> str:
        return str(self._status["url"])

    @property
    def gateway_pids(self) -> list[int]:
        return [gateway["pid"] for gateway in self._status["gateways"]]

    @property
    def twin_pids(self) -> list[int]:
        return [replica["pid"] for replica in self._status["replicas"]]

    def processes(self) -> dict[str, list[int]]:
        """Of this fleet's Ray, by role."""
        local = cluster.find_local_ray()
        assert local is not None
        found: dict[str, list[int]] = collections.defaultdict(list)
        for process in [psutil.Process(local.pid), *psutil.Process(local.pid).children(recursive=True)]:
            try:
                found[soak.role(process, NAME)].append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def memory(self) -> dict[str, Any]:
        """By role: how many processes, and MiB of each; and the sum of all."""
        found: dict[str, Any] = {}
        for role, pids in self.processes().items():
            found[role] = {"processes": len(pids), **memory(pids)}
        total = sum(one["processes"] * one["pss_mib"] for one in found.values())
        return {**found, "total_mib": total}

    def _counts(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return {
            name: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)) for name in COUNTERS
        }

    def measure(
        self, streams: int, *, isl: str, osl: str, warm_s: float, measured_s: float, processes: int
    ) -> dict[str, Any]:
        """Load it with so many streams in a closed loop; what came within `measured_s` after `warm_s`."""
        load = Load(streams=streams, duration_s=warm_s + measured_s, isl=isl, osl=osl, timeout_s=120.0)
        prepared = benchmark.prepare(Endpoint(url=self.url), load)
        gateways, twins = self.gateway_pids, self.twin_pids
        others = {role: pids for role, pids in self.processes().items() if role not in ("gateway", "twin")}
        before = self._counts()
        client = benchmark.ClientOptions(processes=processes, calibrates=False, reconciles=False)
        with Sampler([*gateways, *twins, *(pid for pids in others.values() for pid in pids)]) as sampler:
            result = benchmark.measure(prepared, load, client=client)
        after, tally = self._counts(), result.tally
        begin_s, end_s, tokens = window(tally.timeline, warm_s, warm_s + measured_s)
        if not tokens:
            raise RuntimeError(f"no token came: {tally.errors} {tally.messages}")

        def used_s(pid: int) -> float:
            try:
                return sampler.cpu_s(pid, tally.start_s + end_s) - sampler.cpu_s(pid, tally.start_s + begin_s)
            except KeyError:  # it came or went meanwhile
                return 0.0

        wall_s = end_s - begin_s
        by_gateway = [used_s(pid) for pid in gateways]
        ttft_s, gap_s = (result.quantile(name, 0.5) for name in ("ttft_s", "gap_s"))
        return {
            "gateways": len(gateways),
            "twins": self.num_twins,
            "streams": streams,
            "wall_s": wall_s,
            "tok_s": tokens / wall_s,
            "twins_offer_tok_s": streams / self.step_s,
            "tokens_per_chunk": tally.output_tokens / tally.num_chunks,
            "gateway_us_per_token": sum(by_gateway) / tokens * 1e6,
            "tok_s_per_gateway_core": tokens / sum(by_gateway),
            "gateway_core_shares": [round(one / wall_s, 3) for one in by_gateway],
            "twin_us_per_token": sum(map(used_s, twins)) / tokens * 1e6,
            "other_core_shares": {role: round(sum(map(used_s, pids)) / wall_s, 3) for role, pids in others.items()},
            "client_core_share": result.outcome.cpu_s / result.outcome.wall_s,
            "client_processes": processes,
            "client_busiest_share": result.outcome.busiest_share,
            "ok": tally.ok,
            "errors": dict(tally.errors),
            "messages": tally.messages,
            "ttft_p50_s": ttft_s,
            "gap_p50_s": gap_s,
            "longest_gap_s": tally.longest_gap_s,
            **{name.removeprefix("kervan_").removesuffix("_total"): after[name] - before[name] for name in COUNTERS},
        }
