"""Start, watch and stop the servers that the benchmarks compare, each as a subprocess with its log in a file.

Entering `bare_vllm`, `kervan_fleet`, `ray_llm` or `naive_service` starts it and returns at once; `Starting.wait` gives
the `Server` when it answers, so several start side by side. Leaving the context stops it and everything it started.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kervan.direct_http import open_direct
from kervan.ports import free_port

HERE = Path(__file__).resolve().parent
EngineArgs = Mapping[str, Any]


class ServerError(RuntimeError):
    """A server did not start; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers. Process groups are the roots of trees; a tree belongs to the innermost named root.

    `front` serves HTTP, `engine` computes, `control` is what else it needs running (Ray).
    """

    name: str
    url: str
    model: str
    front: tuple[int, ...]
    engine: tuple[int, ...]
    control: tuple[int, ...] = ()


@dataclass
class Starting:
    """A server that was started. `wait` may be called again and gives the same `Server`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    timeout_s: float
    _connect: "Callable[[Starting], Server]" = field(repr=False)
    _server: Server | None = None

    def wait(self) -> Server:
        """Raises: ServerError if it exits or does not answer within `timeout_s` of this call."""
        if self._server is None:
            self._server = self._connect(self)
        return self._server

    def fail(self, reason: str) -> ServerError:
        tail = self.log.read_text(errors="replace").splitlines()[-25:] if self.log.exists() else []
        return ServerError("\n".join([f"{self.name}: {reason}; end of {self.log}:", *tail]))


def parse_assignments(items: Iterable[str]) -> dict[str, str]:
    """`["a=1", "b=x"]` -> `{"a": "1", "b": "x"}`. Raises: ValueError without `=`."""
    pairs = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ValueError(f"{item!r}: write key=value")
        pairs[key] = value
    return pairs


def typed(value: str) -> Any:
    """A JSON value where it is one (`true`, `4`, `0.5`, `{"a": 1}`), else the text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def parse_engine_args(items: Iterable[str]) -> dict[str, Any]:
    """vLLM names with underscores -> typed values, from `key=value` items."""
    return {key.replace("-", "_"): typed(value) for key, value in parse_assignments(items).items()}


def vllm_flags(engine_args: EngineArgs) -> list[str]:
    """As `vllm serve` reads them: `--key value`, `--key` for true, `--no-key` for false."""
    flags = []
    for key, value in engine_args.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", _text(value)]
    return flags


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def bare_vllm(
    model: str, engine_args: EngineArgs, *, log_dir: Path, env: Mapping[str, str], timeout_s: float = 300.0
) -> Iterator[Starting]:
    """vLLM's own OpenAI server."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *vllm_flags(engine_args)]

    def connect(starting: Starting) -> Server:
        url = f"http://127.0.0.1:{port}"
        served = _wait_for_json(starting, f"{url}/v1/models")["data"][0]["id"]
        pid = starting.process.pid
        engine = tuple(p.pid for p in psutil.Process(pid).children() if "EngineCore" in _title(p))
        return Server("bare", url, served, (pid,), engine)

    with _subprocess("bare", command, log_dir=log_dir, env=env, timeout_s=timeout_s, connect=connect) as starting:
        yield starting


@contextmanager
def naive_service(
    model: str, engine_args: EngineArgs, *, log_dir: Path, env: Mapping[str, str], timeout_s: float = 300.0
) -> Iterator[Starting]:
    """`naive_service.py`, the baseline that blocks its event loop."""
    port = free_port()
    command = [sys.executable, str(HERE / "naive_service.py"), "--model", model, "--port", str(port)]
    for key, value in engine_args.items():
        command += ["--engine-arg", f"{key}={_text(value)}"]

    def connect(starting: Starting) -> Server:
        url = f"http://127.0.0.1:{port}"
        _wait_for_json(starting, f"{url}/v1/models")
        pid = starting.process.pid
        engine = tuple(p.pid for p in psutil.Process(pid).children() if "EngineCore" in _title(p))
        return Server("naive", url, model, (pid,), engine)

    with _subprocess("naive", command, log_dir=log_dir, env=env, timeout_s=timeout_s, connect=connect) as starting:
        yield starting


@contextmanager
def ray_llm(
    model: str,
    engine_args: EngineArgs,
    *,
    is_direct: bool,
    log_dir: Path,
    env: Mapping[str, str],
    timeout_s: float = 300.0,
) -> Iterator[Starting]:
    """`ray_llm_service.py`: Ray Serve LLM, with direct streaming behind HAProxy or as it comes.

    What answers HTTP and feeds the engine (proxy, ingress, LLM server) is front, as bare vLLM's API server is.
    """
    port = free_port()
    name = "ray-llm-direct" if is_direct else "ray-llm"
    command = [sys.executable, str(HERE / "ray_llm_service.py"), "--model", model, "--port", str(port)]
    for key, value in engine_args.items():
        command += ["--engine-arg", f"{key}={_text(value)}"]
    switches = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"} if is_direct else {}

    def connect(starting: Starting) -> Server:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + starting.timeout_s
        while "ready" not in starting.log.read_text(errors="replace").splitlines():
            if (code := starting.process.poll()) is not None:
                raise starting.fail(f"exited {code}")
            if time.monotonic() > deadline:
                raise starting.fail(f"not ready within {starting.timeout_s} s")
            time.sleep(0.25)
        served = _wait_for_json(starting, f"{url}/v1/models")["data"][0]["id"]
        mine = {p.pid: _title(p) for p in psutil.Process(starting.process.pid).children(recursive=True)}
        front = tuple(pid for pid, title in mine.items() if re.search(r"ray::(Serve|Proxy|HAProxy)|haproxy", title))
        front = tuple(pid for pid in front if "Controller" not in mine[pid])
        engine = tuple(pid for pid, title in mine.items() if "EngineCore" in title)
        control = (starting.process.pid, *(p.pid for p in psutil.Process(starting.process.pid).children()))
        return Server(name, url, served, front, engine, control)

    places: dict[str, Any] = {"log_dir": log_dir, "env": {**env, **switches}, "timeout_s": timeout_s}
    with _subprocess(name, command, **places, connect=connect) as starting:
        yield starting


@contextmanager
def kervan_fleet(
    model: str,
    engine_args: EngineArgs,
    *,
    log_dir: Path,
    env: Mapping[str, str],
    replicas: int = 1,
    gateways: int | None = None,
    ingress: str | None = None,
    up_args: Sequence[str] = (),
    process_env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> Iterator[Starting]:
    """`kervan up` of this checkout's kervan; `kervan down` at the end, and what that leaves is killed.

    `env` goes to the fleet (`--env`) and to the commands, `process_env` only to the commands.
    """
    port = free_port()
    name = f"bench-{os.getpid()}"
    kervan = [sys.executable, "-m", "kervan"]
    src = str(HERE.parent / "src")
    own = {"PYTHONPATH": os.pathsep.join(p for p in (src, os.environ.get("PYTHONPATH")) if p), **(process_env or {})}
    command = [*kervan, "up", model, "--detach", "--name", name, "--port", str(port), "--replicas", str(replicas)]
    if gateways is not None:
        command += ["--gateways", str(gateways)]
    if ingress is not None:
        command += ["--ingress", ingress]
    for key, value in engine_args.items():
        command += ["--engine-arg", f"{key}={_text(value)}"]
    for key, value in env.items():
        command += ["--env", f"{key}={value}"]
    command += up_args
    started: set[psutil.Process] = set()
    begin = time.time() - 1

    def status(timeout_s: float) -> dict[str, Any]:
        done = subprocess.run(
            [*kervan, "status", "--name", name, "--json"],
            env={**os.environ, **own, **env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return found

    def connect(starting: Starting) -> Server:
        try:
            code = starting.process.wait(starting.timeout_s)
        except subprocess.TimeoutExpired:
            raise starting.fail(f"kervan up not done after {starting.timeout_s} s") from None
        if code:
            raise starting.fail(f"kervan up exited {code}")
        try:
            found = status(60)
        except (subprocess.SubprocessError, ValueError) as error:
            raise starting.fail(f"kervan status: {error} {getattr(error, 'stderr', '')}") from error
        front = tuple(g["pid"] for g in found["gateways"])
        engine = tuple(r["pid"] for r in found["replicas"])
        control = _ray_processes(front)
        ours = (psutil.Process(pid) for pid in (*front, *engine, *control))
        started.update(p for p in ours if p.create_time() >= begin)  # not a Ray that was there before
        url = found["url"].rstrip("/").removesuffix("/v1").replace("//0.0.0.0:", "//127.0.0.1:")
        served = _wait_for_json(starting, f"{url}/v1/models", process_may_exit=True)["data"][0]["id"]
        return Server("kervan", url, served, front, engine, control)

    places: dict[str, Any] = {"log_dir": log_dir, "env": {**own, **env}, "timeout_s": timeout_s}
    with _subprocess("kervan", command, **places, connect=connect, leaves_daemons=True) as starting:
        try:
            yield starting
        finally:
            if starting.process.poll() is None:
                stop_group(starting.process)
            with (log_dir / "kervan-down.log").open("wb") as log, suppress(subprocess.TimeoutExpired):
                down = [*kervan, "down", "--name", name]
                subprocess.run(down, env={**os.environ, **own, **env}, stdout=log, stderr=log, timeout=60, check=False)
            _kill([p for p in started if p.is_running()])


@contextmanager
def _subprocess(
    name: str,
    command: list[str],
    *,
    log_dir: Path,
    env: Mapping[str, str],
    timeout_s: float,
    connect: Callable[[Starting], Server],
    leaves_daemons: bool = False,
) -> Iterator[Starting]:
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,  # so that one signal reaches the engine processes too
        )
    try:
        yield Starting(name, process, log, timeout_s, connect)
    finally:
        if not leaves_daemons or process.poll() is None:  # what `kervan up` left running is for `kervan down`
            stop_group(process)


def stop_group(process: subprocess.Popen[bytes], grace_s: float = 30.0) -> None:
    """SIGTERM to the group, SIGKILL after `grace_s`; returns when the group and all descendants are gone."""
    descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _kill(descendants)


def _kill(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=5)
    for p in alive:
        with suppress(psutil.NoSuchProcess):
            p.kill()
    psutil.wait_procs(alive, timeout=10)


def _wait_for_json(starting: Starting, url: str, *, process_may_exit: bool = False) -> Any:
    deadline = time.monotonic() + starting.timeout_s
    while time.monotonic() < deadline:
        if not process_may_exit and (code := starting.process.poll()) is not None:
            raise starting.fail(f"exited {code}")
        try:
            with open_direct(url, timeout_s=5) as response:
                return json.load(response)
        except (OSError, ValueError):  # not listening yet, or not ready (an HTTPError is an OSError)
            time.sleep(0.25)
    raise starting.fail(f"{url} gave no answer within {starting.timeout_s} s")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def _raylets(worker: int) -> Iterator[psutil.Process]:
    """The raylet above a process, or above the one from which it was forked."""
    for above in psutil.Process(worker).parents():
        if above.name().startswith("raylet"):
            yield above
        elif "warm_process" in _title(above):  # `warm_process FD PLACE PID`, the last of which is the raylet's
            # A fork's title is one word of its command line, and lacks the last character of what it was forked with.
            digits = _title(above).split()[-1]
            yield from (
                p for p in psutil.process_iter() if p.name() == "raylet" and digits in (str(p.pid), str(p.pid)[:-1])
            )


def _ray_processes(workers: Sequence[int]) -> tuple[int, ...]:
    """The raylet of `workers`, and the other processes of its Ray session (GCS, dashboard); empty if there is none."""
    raylets = {raylet.pid: raylet for worker in workers for raylet in _raylets(worker)}
    sessions = {found for raylet in raylets.values() for found in re.findall(r"session_\d{4}[-_\d]+", _title(raylet))}
    others = {p.pid for p in psutil.process_iter() if any(session in _title(p) for session in sessions)}
    return tuple(sorted({*raylets, *others} - set(workers)))


@dataclass(frozen=True)
class Usage:
    """What processes used: CPU (user and system) since `Meter` began, memory now (`uss_bytes` None if unreadable)."""

    cpu_s: float
    rss_bytes: int
    uss_bytes: int | None


@dataclass(frozen=True)
class ServerUsage:
    """One `Usage` per process tree of each group: gateways and replicas apart."""

    front: tuple[Usage, ...]
    engine: tuple[Usage, ...]
    control: Usage


class Meter:
    """CPU of a server's processes from construction to `read`, children included."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start = self._cpu(self._trees())

    def read(self) -> ServerUsage:
        trees = self._trees()
        now = self._cpu(trees)

        def usage(pids: Iterable[int]) -> Usage:
            cpu_s, rss, uss = 0.0, 0, 0
            for pid in pids:
                with suppress(psutil.NoSuchProcess):
                    memory = psutil.Process(pid).memory_info()
                    cpu_s += now.get(pid, 0.0) - self._start.get(pid, 0.0)
                    rss += memory.rss
                    uss = -1 if uss < 0 else _uss(pid, uss)
            return Usage(cpu_s, rss, None if uss < 0 else uss)

        front = tuple(usage(trees[pid]) for pid in self._server.front)
        engine = tuple(usage(trees[pid]) for pid in self._server.engine)
        control = usage(pid for root in self._server.control for pid in trees[root])
        return ServerUsage(front, engine, control)

    def _trees(self) -> dict[int, list[int]]:
        """Root -> its processes. A process is counted under its nearest root, so once."""
        server = self._server
        roots = {*server.front, *server.engine, *server.control}
        trees: dict[int, list[int]] = {root: [] for root in roots}
        parents = {p.pid: p.info["ppid"] for p in psutil.process_iter(["ppid"])}
        for pid in parents:
            at = pid
            while at and at not in roots:
                at = parents.get(at, 0)
            if at:
                trees[at].append(pid)
        return trees

    @staticmethod
    def _cpu(trees: Mapping[int, list[int]]) -> dict[int, float]:
        seconds = {}
        for pid in (pid for tree in trees.values() for pid in tree):
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                seconds[pid] = times.user + times.system
        return seconds


def _uss(pid: int, so_far: int) -> int:
    try:
        return so_far + int(psutil.Process(pid).memory_full_info().uss)
    except (psutil.AccessDenied, OSError):
        return -1
