"""How a replica ends, and what takes the place of an engine that has ended."""

import functools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, EngineError, FleetError
from kervan.fleet.control import EngineFailed, EngineLoad
from kervan.fleet.directory import StartFailure
from kervan.policy.watchdog import Health
from kervan.serve import preflights, replica_actor
from kervan.serve.replica_actor import EngineReplica, _Engine


async def test_a_replica_ends_although_its_directory_is_gone() -> None:
    """`kervan down` ends the directory when Serve takes too long to end the replicas."""

    async def remove(_: str) -> None:
        raise FleetError("the directory does not answer")

    said: list[str] = []
    process = SimpleNamespace(ready=None, kill=lambda: said.append("kill"), stop=lambda _: said.append("stop"))
    replica = SimpleNamespace(
        _engine=SimpleNamespace(id="a", process=process), _directory=SimpleNamespace(remove=remove), _is_draining=False,
        _drained=threading.Event(), _config=SimpleNamespace(drain_timeout_s=1.0),
    )  # fmt: skip
    replica._drain = functools.partial(EngineReplica._drain, replica)
    await EngineReplica.__del__(replica)
    assert said == ["kill", "stop"]
    assert replica._drained.is_set()


class Process:
    """As an `EngineProcess`, ready or failed at once."""

    def __init__(self, failure: str = "") -> None:
        self.ended = threading.Event()
        self.failure = EngineFailed("EngineError", failure) if failure else None
        self.ready = None if failure else SimpleNamespace(address="tcp://a", public_key="", engine_version="1")
        self.load = EngineLoad(0, 0, 0.0, 0, False)
        self.log_path, self.pid, self.start_s, self.stalled_s = "a.log", 1, {}, 0.0
        self.is_healthy, self.ends_when_killed = True, True
        self.rank_watch = SimpleNamespace(hang="")

    def health(self, _: float) -> Health:
        return Health(self.is_healthy, "made no step")

    def why_stalled(self) -> str:
        return ""

    def kill(self) -> None:
        if self.ends_when_killed:
            self.ended.set()


class Exited(BaseException):
    """In place of this process's end."""


class Replica(EngineReplica):
    """One that Python may collect: nobody awaits what `__del__` gives, as Serve does."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Bench:
    """A replica whose engines are such processes, and what its directory was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.coming: list[Process] = []
        self.replica: Any = Replica.__new__(Replica)
        self.replica._serve_id = "s1"
        self.replica._config, self.replica._pool, self.replica._version = FleetConfig(model="m"), "pool", "v"
        self.replica._node, self.replica._nodes, self.replica._placement = "n", [], None
        self.replica._is_draining, self.replica._drain_deadline_s = False, None
        self.replica._lock, self.replica._drained = threading.Lock(), threading.Event()
        self.replica._directory = SimpleNamespace(
            beat_replica=lambda entry: self.tell(entry.state, entry.id),
            remove=lambda engine_id: self.tell("removed", engine_id),
            report_failure=lambda failure: self.tell(f"failed: {failure.message}", failure.who),
        )
        self.replica._start = lambda: _Engine(f"e{2 - len(self.coming)}", self.coming.pop(0))  # type: ignore[arg-type]
        self.replica._engine = self.engine = _Engine("e0", Process())  # type: ignore[arg-type]

    def tell(self, what: str, who: str) -> Any:
        self.told.append((what, who))
        return SimpleNamespace(result=lambda _: None)

    def engine_ends(self) -> None:
        self.engine.process.ended.set()
        self.replica._on_change()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(replica_actor.os, "_exit", leave)
    made = Bench()
    made.engine.become_ready()
    return made


@pytest.mark.parametrize(
    ("files", "engine_args", "told"),
    [
        ([], {}, "node n has no {model}; copy the model to that path on each node"),
        (["config.json"], {}, "node n: {model} has no weights ("),
        (["config.json"], {"load_format": "dummy"}, ""),
        (
            ["config.json", "model.safetensors"],
            {},
            "node n: {model}/model.safetensors has 0 bytes, which are no weights",
        ),
        (["config.json", "model.pt"], {}, ""),
    ],
)
async def test_a_node_without_the_model_is_told(
    bench: Bench, tmp_path: Path, files: list[str], engine_args: dict[str, Any], told: str
) -> None:
    model = tmp_path / "model"
    for file in files:
        model.mkdir(exist_ok=True)
        (model / file).touch()
    reported: list[StartFailure] = []

    async def report(failure: StartFailure) -> None:
        reported.append(failure)

    bench.replica._config = FleetConfig(model=str(model), engine_args=engine_args)
    bench.replica._directory = SimpleNamespace(report_failure=report)
    if not told:
        await bench.replica._check_model()
        assert reported == []
        return
    with pytest.raises(ConfigError):
        await bench.replica._check_model()
    (failure,) = reported
    assert (failure.who, failure.kind) == ("pool on n", "ConfigError")
    assert failure.message.startswith(told.format(model=model))


@pytest.mark.parametrize(
    ("settings", "is_needed"),
    [
        ({}, False),
        ({"tp": 2}, True),
        ({"pp": 2}, True),
        ({"tp": 2, "preflight": False}, False),
        ({"tp": 2, "engine": "twin", "gpu": "H200"}, False),
    ],
)
def test_only_replicas_of_several_ranks_have_a_preflight(settings: dict[str, Any], is_needed: bool) -> None:
    assert preflights.is_needed(FleetConfig(model="m", **settings)) is is_needed


async def test_a_host_that_fails_the_preflight_is_told_and_gets_no_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def problem(*_: Any, **__: Any) -> str:
        return "host n fails the preflight: results: data arrives wrong"

    reported: list[StartFailure] = []

    async def report(failure: StartFailure) -> None:
        reported.append(failure)

    monkeypatch.setattr(preflights, "problem", problem)
    bench.replica._directory = SimpleNamespace(report_failure=report)
    bench.replica._is_on_cpu = True
    bench.replica._config = FleetConfig(model="m")
    await bench.replica._check_links()
    bench.replica._config = FleetConfig(model="m", tp=2)
    with pytest.raises(EngineError, match="host n fails the preflight"):
        await bench.replica._check_links()
    (failure,) = reported
    assert (failure.who, failure.kind) == ("pool on n", "EngineError")
    assert failure.message == "host n fails the preflight: results: data arrives wrong"


def test_a_preflight_is_the_first_part_of_a_start(bench: Bench) -> None:
    assert bench.engine.start_s == {}
    bench.engine.process.start_s = {"imports": 2.0}
    assert bench.engine.start_s == {"imports": 2.0}
    bench.engine.preflight_s = 6.123
    assert bench.engine.start_s == {"preflight": 6.12, "imports": 2.0}


@pytest.fixture
def has_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_actor, "MIN_LIFE_S", 0.0)


@pytest.mark.usefixtures("has_lived")
def test_another_engine_takes_the_place_of_one_that_ended(bench: Bench) -> None:
    bench.coming = [Process()]
    bench.engine_ends()
    assert bench.told == [("unhealthy", "e0"), ("removed", "e0"), ("starting", "e1"), ("ready", "e1")]
    assert bench.replica._engine.id == "e1"
    bench.engine_ends()  # told again: nothing comes of it
    assert len(bench.told) == 4


@pytest.mark.usefixtures("has_lived")
def test_serve_has_its_turn_when_that_one_does_not_start(bench: Bench) -> None:
    bench.coming = [Process("no memory")]
    with pytest.raises(Exited):
        bench.engine_ends()
    assert bench.told[-2:] == [("failed: no memory", "e1"), ("removed", "e1")]


@pytest.mark.usefixtures("has_lived")
def test_serve_has_its_turn_when_no_process_can_be_started(bench: Bench) -> None:
    def no_more_processes() -> None:
        raise BlockingIOError("no more processes")

    bench.replica._start = no_more_processes
    with pytest.raises(Exited):
        bench.engine_ends()


def test_serve_has_its_turn_when_an_engine_ends_soon(bench: Bench) -> None:
    with pytest.raises(Exited):
        bench.engine_ends()
    assert bench.told == [("unhealthy", "e0")]


@pytest.mark.usefixtures("has_lived")
def test_workers_on_other_nodes_are_serves_to_replace(bench: Bench) -> None:
    bench.replica._placement = object()
    with pytest.raises(Exited):
        bench.engine_ends()


def test_a_replica_that_drains_starts_nothing(bench: Bench) -> None:
    bench.replica._is_draining = True
    bench.engine_ends()
    assert bench.told == []


@pytest.mark.usefixtures("has_lived")
def test_a_stalled_engine_is_replaced_for_that_reason(bench: Bench) -> None:
    bench.coming = [Process()]
    bench.engine.process.is_healthy = False  # type: ignore[attr-defined]
    bench.replica.check_health()
    assert (bench.engine.state, bench.engine.reason) == ("unhealthy", "made no step")
    bench.replica.check_health()  # it has ended, and that is seen by another thread
    bench.engine_ends()
    assert bench.told[0] == ("unhealthy", "e0")
    assert bench.engine.reason == "made no step"
    bench.replica.check_health()


def test_a_stalled_engine_that_cannot_be_ended_is_told_to_serve(bench: Bench) -> None:
    bench.engine.process.is_healthy = False  # type: ignore[attr-defined]
    bench.engine.process.ends_when_killed = False  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="made no step, and its process does not end"):
        bench.replica.check_health()
