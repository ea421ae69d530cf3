"""Forked vLLM engines: the tokens of one that was started anew, one process from which they come, and its end."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.live import eventually_async, is_alive
from harness.shared_fleet import Models
from harness.twin_bench import SECRET, TwinBench
from harness.warm_place import WarmPlace, place_of_servers

from kervan.config.fleet import FleetConfig
from kervan.fleet import warm_start
from kervan.fleet.control import EngineSpec
from kervan.fleet.process import EngineProcess

pytestmark = pytest.mark.timeout(600)

ARGUMENTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
PROMPT = list(range(40, 72))
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "seed": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
}
Start = Callable[..., EngineProcess]


@pytest.fixture
def place() -> Iterator[WarmPlace]:
    """Of this test's own: there is no server yet."""
    with place_of_servers() as place:
        yield place


@pytest.fixture
def start(
    request: pytest.FixtureRequest, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Engines of the demo model, forked for this process or not, from a server in `place`, or `warm_place`."""
    shared = "warm_place" in request.fixturenames
    place: WarmPlace = request.getfixturevalue("warm_place" if shared else "place")
    monkeypatch.setattr(tempfile, "tempdir", place.directory)
    engines: list[EngineProcess] = []
    argv = list(FleetConfig(model=str(models.demo), engine_args=ARGUMENTS).engine_argv)

    def start(name: str, *, is_forked: bool, **env: str) -> EngineProcess:
        engine = EngineProcess(
            EngineSpec(name, argv, "127.0.0.1", SECRET),
            log_path=tmp_path / f"{name}.log",
            env={**place.environment, **env},
            fork_for_pid=os.getpid() if is_forked else None,
        )
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.kill()


def stack_of(pid: int) -> str:
    """Where its stack begins: another place in each program that is started, and the same in its forks."""
    return next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "[stack]" in line).split("-")[1]


async def answers(engine: EngineProcess) -> dict[str, list[int]]:
    """Its tokens for each request."""
    bench = TwinBench(engine.log_path.parent)
    await bench.join(engine.log_path.stem, engine)
    for name, sampling in REQUESTS.items():
        await bench.add(name, PROMPT, 24, **sampling)
    await bench.ended(*REQUESTS)
    bench.twins.clear()  # it lives on
    await bench.close()
    return {name: bench.tokens(name) for name in REQUESTS}


@pytest.mark.destructive  # it ends the server that others have too
async def test_forked_engines(start: Start, warm_place: WarmPlace) -> None:
    engines = {"anew": start("anew", is_forked=False), "one": start("one", is_forked=True)}
    engines["two"] = start("two", is_forked=True)
    told = {name: await answers(engine) for name, engine in engines.items()}
    assert told["one"] == told["two"] == told["anew"]
    assert all(len(tokens) == 24 for tokens in told["anew"].values())

    servers = {name: psutil.Process(engine.pid).ppid() for name, engine in engines.items()}
    assert servers["one"] == servers["two"] != os.getpid() == servers["anew"]
    # Its workers are forked too: no process of it has been started from a program since.
    workers = psutil.Process(engines["two"].pid).children(recursive=True)
    assert [worker for worker in workers if stack_of(worker.pid) == stack_of(servers["two"])]
    assert stack_of(servers["two"]) != stack_of(os.getpid())

    # Killed: the end is seen, nothing of it is left, and the next one comes from where it came.
    group = [engines["one"].pid, *(child.pid for child in psutil.Process(engines["one"].pid).children(recursive=True))]
    engines["one"].strike("kill")
    await eventually_async(engines["one"].ended.is_set, "its end is seen", 20)
    await eventually_async(lambda: not any(map(is_alive, group)), "nothing is left", 20)
    engines["three"] = start("three", is_forked=True)
    assert await answers(engines["three"]) == told["anew"]
    assert psutil.Process(engines["three"].pid).ppid() == servers["two"]

    # Without its server an engine goes on and ends as any.
    server = psutil.Process(servers["two"])
    server.kill()
    await eventually_async(lambda: not is_alive(server.pid), "the server is gone", 20)
    assert await answers(engines["two"]) == told["anew"]
    for name in ("two", "three"):
        engines[name].stop(20)
        assert engines[name].ended.is_set()


async def test_an_engine_starts_anew_where_none_can_be_forked(start: Start) -> None:
    place = Path(tempfile.gettempdir()) / f"kervan-warm-{os.getuid()}"
    place.mkdir(mode=0o755)  # others may write there
    engine = start("alone", is_forked=True)
    await eventually_async(lambda: engine.pid, "there is a process", 60)
    assert psutil.Process(engine.pid).ppid() == os.getpid()
    assert engine.log_path.read_text().startswith(
        f"starts anew: {place} is not this user's alone: chmod 700, or remove it\n"
    )
    engine.kill()


async def test_an_engine_that_cannot_be_started_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more_processes(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr("kervan.fleet.warm_start.subprocess.Popen", no_more_processes)
    engine = start("none", is_forked=True)
    await eventually_async(engine.ended.is_set, "its end is told", 20)
    assert engine.failure is not None
    assert engine.failure.message == "the engine process could not be started: no more processes"


async def test_an_engine_that_is_told_to_end_before_it_is_there(
    start: Start, warm_place: WarmPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_told, fork = threading.Event(), warm_start.fork

    def fork_late(*args: Any, **more: Any) -> Any:
        assert is_told.wait(60)
        return fork(*args, **more)

    monkeypatch.setattr(warm_start, "fork", fork_late)
    engine = start("never", is_forked=True)
    assert engine.pid == 0
    engine.kill()
    assert engine.ended.is_set()
    assert engine.failure is not None
    is_told.set()
    await eventually_async(lambda: not psutil.pid_exists(engine.pid) if engine.pid else False, "it is gone", 400)
