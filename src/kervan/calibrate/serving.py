"""Short runs of vLLM's own server in given layouts, each with random weights: throughput, latency and memory.

Servers whose GPUs do not overlap run side by side. They are started together and loaded together, and no server starts
while another is loaded, since a start takes the host's cores.
"""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kervan.bench.benchmark import ClientOptions, Prepared, measure, prepare
from kervan.bench.load import Endpoint, Load
from kervan.bench.result import Result
from kervan.bench.servers import answers
from kervan.calibrate.measurements import Memory, Serving
from kervan.config.engine_arguments import to_argv
from kervan.errors import ConfigError, EngineError, KervanError
from kervan.ports import free_port
from kervan.vendor import vllm_names

ENGINE_ARGS: Mapping[str, Any] = {"load_format": "dummy", "enable_prefix_caching": False, "max_model_len": 8192}
START_TIMEOUT_S = 400.0
STOP_GRACE_S = 10.0
MIN_PHASE_S = 45.0  # with less time left, no server is worth starting
NEXT_START = 0.7  # of the longest start so far: the least that another one is expected to take
POINT_S = 60.0
DRAIN_S = 60.0  # for what is in flight when the time of a point is over
STREAMS_PER_PROCESS = 128

Say = Callable[[str], None]
OnRow = Callable[["Serving | Memory"], None]
CommandOf = Callable[["Server", int, Mapping[str, Any]], list[str]]


@dataclass(frozen=True, slots=True)
class Point:
    """One load: a closed loop of `concurrency` streams."""

    concurrency: int
    isl: int = 1024
    osl: int = 256

    @property
    def num_requests(self) -> int:
        """Four per stream, at least 8 and at most 512 (but one per stream)."""
        return max(8, min(4 * self.concurrency, 512), self.concurrency)

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if self.concurrency < 1 or self.isl < 1 or self.osl < 2:
            raise ConfigError(f"{self}: at least 1 stream, 1 token in and 2 out are needed to have a time per token")

    def __str__(self) -> str:
        return f"{self.concurrency} streams, {self.isl} in, {self.osl} out"


@dataclass(frozen=True, slots=True)
class Server:
    """A server to measure. `model`: its name in the rows; `directory`: has config.json and tokenizer.

    `dp`: engines of this server, each with the whole attention and a batch of its own (vLLM's data parallelism).
    `ep`: 1, or as many as `tp * dp`. `gpus`: `tp * pp * dp` indices.
    """

    model: str
    directory: Path
    tp: int
    pp: int
    ep: int
    gpus: tuple[int, ...]
    points: tuple[Point, ...]
    dp: int = 1

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if min(self.tp, self.pp, self.ep, self.dp) < 1 or self.ep not in (1, self.tp * self.dp):
            raise ConfigError(f"{self}: tp, pp, ep and dp are at least 1, and ep is 1 or as large as tp x dp")
        needed = self.tp * self.pp * self.dp
        if len(set(self.gpus)) != needed or len(self.gpus) != needed:
            listed = ",".join(map(str, self.gpus))
            sizes = f"tp {self.tp} x pp {self.pp}" + (f" x dp {self.dp}" if self.dp > 1 else "")
            raise ConfigError(f"{self}: {sizes} needs {needed} GPUs, not {listed!r}")
        if not self.points:
            raise ConfigError(f"{self}: there is no load to measure; name a concurrency")

    def __str__(self) -> str:
        more = "".join(f" {key} {size}" for key, size in (("dp", self.dp), ("ep", self.ep)) if size > 1)
        return f"{self.model} tp {self.tp} pp {self.pp}{more}"

    def engine_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """vLLM's arguments by its own names; `given` goes over the defaults."""
        layout: dict[str, Any] = {"tensor_parallel_size": self.tp, "pipeline_parallel_size": self.pp}
        if self.dp > 1:
            layout["data_parallel_size"] = self.dp
        if self.ep > 1:
            layout["enable_expert_parallel"] = True
        return {**ENGINE_ARGS, **given, **layout, "served_model_name": self.model}


def phases(servers: Iterable[Server]) -> list[list[Server]]:
    """Servers that run side by side, in the order given: one whose GPUs are taken begins the next phase."""
    groups: list[list[Server]] = []
    taken: set[int] = set()
    for server in servers:
        if not groups or taken & set(server.gpus):
            groups.append([])
            taken = set()
        groups[-1].append(server)
        taken |= set(server.gpus)
    return groups


def parse_memory(
    log: str, server: Server, engine_args: Mapping[str, Any] | None = None, start_s: float | None = None
) -> Memory | None:
    """What a server logged at its start; None when a line is missing, as on CPU.

    The largest weights and the smallest cache of the GPUs that logged one: vLLM gives all as many blocks as fit there.
    """
    weights = [float(line["gib"]) for line in vllm_names.WEIGHTS_LINE.finditer(log)]
    caches = [float(line["gib"]) for line in vllm_names.KV_CACHE_LINE.finditer(log)]
    tokens = [int(line["tokens"].replace(",", "")) for line in vllm_names.KV_TOKENS_LINE.finditer(log)]
    if not weights or not caches or not tokens:
        return None
    graphs = [float(line["gib"]) for line in vllm_names.GRAPHS_LINE.finditer(log)]
    logged = vllm_names.UTILIZATION_LINE.search(log)
    utilization = float(logged["share"]) if logged else vllm_names.GPU_MEMORY_UTILIZATION
    return Memory(
        model=server.model,
        tp=server.tp,
        pp=server.pp,
        ep=server.ep,
        dp=server.dp,
        gpu_memory_utilization=float((engine_args or {}).get("gpu_memory_utilization", utilization)),
        weights_gib_per_gpu=max(weights),
        kv_cache_gib_per_gpu=min(caches),
        kv_cache_tokens=min(tokens),
        cuda_graph_gib=max(graphs, default=None),
        start_s=start_s,
    )


@dataclass
class _Running:
    """A server's process. `url` is set when it answers."""

    server: Server
    process: "subprocess.Popen[bytes]"
    log: Path
    port: int
    begin_s: float = field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def failure(self, what: str) -> str:
        """Why it does not run: its last error lines, or else its last lines."""
        lines = [line.strip() for line in self.read_log().splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"(Error|Exception)\b.*:", line)]
        excerpt = " | ".join((errors or lines)[-3:])[-900:] or "no output"
        return f"{self.server}: {what}: {excerpt}"


def vllm_command(server: Server, port: int, engine_args: Mapping[str, Any]) -> list[str]:
    """The command line of vLLM's OpenAI server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(server.directory)]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *to_argv(server.engine_args(engine_args))]


def _start(
    server: Server, command: CommandOf, engine_args: Mapping[str, Any], log_dir: Path, env: Mapping[str, str]
) -> _Running:
    """Start a server and return at once; its output goes to a file in `log_dir`."""
    port = free_port()
    log_dir.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", str(server)) + "-gpu" + "-".join(map(str, server.gpus))
    log = log_dir / f"{name}-{port}.log"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "CUDA_VISIBLE_DEVICES": visible_devices(server.gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
        **env,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(server, port, engine_args),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that one signal reaches its workers too
        )
    return _Running(server, process, log, port)


def _stop(running: Sequence[_Running]) -> None:
    """End the servers and all that they started, together; returns when nothing of them is left."""
    trees: list[psutil.Process] = []
    for child in running:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(child.process.pid)
            trees += [*root.children(recursive=True), root]
    for number, grace_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, STOP_GRACE_S)):
        for child in running:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, number)
        _, trees = psutil.wait_procs(trees, timeout=grace_s)
    for process in trees:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(trees, timeout=STOP_GRACE_S)
    for child in running:
        child.process.wait()


def visible_devices(gpus: Sequence[int], visible: str | None) -> str:
    """`CUDA_VISIBLE_DEVICES` for `gpus`, which count among those that are `visible` to this process."""
    names = visible.split(",") if visible else []
    return ",".join(names[gpu] if gpu < len(names) else str(gpu) for gpu in gpus)


def _one_at_a_time(call: Callable[[Any], None], lock: threading.Lock) -> Callable[[Any], None]:
    def locked(value: Any) -> None:
        with lock:
            call(value)

    return locked


class ServingRuns:
    """Measures servers until a deadline; whatever is measured goes to `on_row` at once, and what is not to `on_note`.

    Both are called from one thread at a time.
    """

    def __init__(
        self,
        *,
        log_dir: Path,
        for_s: float,
        on_row: OnRow,
        on_note: Say,
        engine_args: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        point_s: float = POINT_S,
        command: CommandOf = vllm_command,
        say: Say = lambda _: None,
    ) -> None:
        self._log_dir = log_dir
        self._end_s = time.monotonic() + for_s - STOP_GRACE_S
        lock = threading.Lock()
        self._on_row: OnRow = _one_at_a_time(on_row, lock)
        self._on_note: Say = _one_at_a_time(on_note, lock)
        self._say: Say = _one_at_a_time(say, lock)
        self._engine_args = dict(engine_args or {})
        self._env = dict(env or {})
        self._point_s = point_s
        self._command = command
        self._longest_start_s = 0.0

    def measure(self, servers: Iterable[Server]) -> None:
        """Phase after phase. A server that fails is noted, and the others go on."""
        for phase in phases(servers):
            names = "; ".join(str(server) for server in phase)
            if self._left_s() < max(MIN_PHASE_S, NEXT_START * self._longest_start_s):
                self._on_note(f"{names}: not measured, {max(0.0, self._left_s()):.0f} s were left")
                continue
            self._say(f"starting {names}")
            running = []
            try:
                for server in phase:
                    running.append(_start(server, self._command, self._engine_args, self._log_dir, self._env))
                ready = self._wait(running)
                _stop([child for child in running if child not in ready])
                self._load(ready)
            finally:
                _stop(running)

    def _left_s(self) -> float:
        return self._end_s - time.monotonic()

    def _wait(self, running: Sequence[_Running]) -> list[_Running]:
        """Those that answer, when all have either answered or failed."""
        ready: list[_Running] = []
        waiting = list(running)
        end_s = time.monotonic() + min(START_TIMEOUT_S, self._left_s())
        while waiting:
            for child in list(waiting):
                took_s = time.monotonic() - child.begin_s
                if (code := child.process.poll()) is not None:
                    self._on_note(child.failure(f"exited {code}"))
                elif answers(child.url):
                    ready.append(child)
                    self._longest_start_s = max(self._longest_start_s, took_s)
                    self._say(f"{child.server} is ready after {took_s:.0f} s")
                    memory = parse_memory(child.read_log(), child.server, self._engine_args, round(took_s, 1))
                    if memory is None:
                        self._on_note(f"{child.server}: its log does not show weights and KV cache")
                    else:
                        self._on_row(memory)
                elif time.monotonic() > end_s:
                    self._on_note(child.failure(f"not ready after {took_s:.0f} s"))
                else:
                    continue
                waiting.remove(child)
            if waiting:
                time.sleep(0.25)
        return ready

    def _load(self, ready: Sequence[_Running]) -> None:
        """Load all, each from a thread of its own."""
        if not ready:
            return
        with ThreadPoolExecutor(len(ready)) as pool:
            try:
                list(pool.map(self._load_one, ready))
            except BaseException:
                self._end_s = -math.inf  # Ctrl-C: the threads end what they do
                raise

    def _load_one(self, child: _Running) -> None:
        """Every point of one server that there is time for."""
        try:
            prepared = self._warm_up(child)
            for number, point in enumerate(child.server.points):
                if self._left_s() < 5:
                    self._on_note(f"{child.server}: {point}: not measured, no time was left")
                    continue
                result, is_cut = self._run(prepared, point, seed=number + 1)
                row, why = to_row(child.server, point, result, is_cut=is_cut)
                if row is not None:
                    self._on_row(row)
                    figures = f"{row.out_tok_s:,.0f} tok/s, TPOT {1000 * row.tpot_p50_s:.1f} ms"
                    self._say(f"{child.server}: {point}: {figures}")
                for text in why:
                    self._on_note(f"{child.server}: {point}: {text}")
                if (code := child.process.poll()) is not None:
                    self._on_note(child.failure(f"exited {code} under load"))
                    break
        except KervanError as error:
            self._on_note(f"{child.server}: {error}")

    def _warm_up(self, child: _Running) -> Prepared:
        isl = min(512, child.server.points[0].isl)
        load = Load(streams=8, num_requests=16, isl=str(isl), osl="16", timeout_s=max(5.0, self._left_s()))
        prepared = prepare(Endpoint(url=child.url, model=child.server.model), load)
        if not prepared.probe.answered:
            raise EngineError(f"the server does not answer a first request: {prepared.probe.complaint}")
        measure(prepared, load, client=ClientOptions(processes=1, calibrates=False, reconciles=False))
        return prepared

    def _run(self, prepared: Prepared, point: Point, seed: int) -> tuple[Result, bool]:
        """One run, and whether it was stopped with requests in flight."""
        soft_s = min(self._point_s, max(1.0, self._left_s() - 5))
        load = Load(
            streams=point.concurrency, num_requests=point.num_requests, duration_s=soft_s, isl=str(point.isl),
            osl=str(point.osl), seed=seed, timeout_s=soft_s + DRAIN_S,
        )  # fmt: skip
        cut = False

        def is_over(elapsed_s: float, reports: Any) -> bool:
            nonlocal cut
            cut = cut or elapsed_s > soft_s + DRAIN_S or self._left_s() <= 0
            return cut

        processes = -(-point.concurrency // STREAMS_PER_PROCESS)
        client = ClientOptions(processes=processes, calibrates=False, reconciles=False)
        return measure(prepared, load, client=client, on_progress=is_over), cut


def to_row(server: Server, point: Point, result: Result, *, is_cut: bool) -> tuple[Serving | None, list[str]]:
    """The row of a run, None if it is not worth one, and what is to be said of it."""
    tally = result.tally
    if tally.num_errors or tally.ok < point.concurrency or is_cut:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.errors.items()))
        reasons = ["stopped early"] if is_cut else []
        reasons += [f"failed: {kinds}"] if kinds else []
        return None, [f"no row, {tally.ok} of {point.num_requests} requests ended; {'; '.join(reasons) or 'no time'}"]
    times_s = {}
    for name in ("ttft", "tpot"):
        for word, q in (("p50", 0.5), ("p99", 0.99)):
            value = result.quantile(f"{name}_s", q)
            assert value is not None, "an output of two tokens or more has both"
            times_s[f"{name}_{word}_s"] = round(value, 6)
    row = Serving(
        model=server.model,
        tp=server.tp,
        pp=server.pp,
        ep=server.ep,
        dp=server.dp,
        isl=point.isl,
        osl=point.osl,
        concurrency=point.concurrency,
        num_requests=tally.ok,
        out_tok_s=round(result.out_tok_s, 2),
        **times_s,
    )
    return row, result.doubts()
