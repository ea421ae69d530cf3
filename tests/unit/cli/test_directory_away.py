"""What the commands say when the fleet's directory, or Ray, stops answering: one line, and exit status 1."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RpcError

from kervan import cli
from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.serve import cluster, ray_internals

CONFIG = FleetConfig(model="org/model", replicas=2)
READY = [ReplicaEntry(name, "on-demand", "10.0.0.1", 7, "ready") for name in ("a", "b")]
Answer = Callable[[], Any]


class Method:
    def __init__(self, name: str):
        self.name = name

    def remote(self, *_: Any) -> str:
        return self.name


class Actor:
    """A handle of a directory actor: what its methods return stands for the answer under way."""

    def __getattr__(self, name: str) -> Method:
        return Method(name)


def fail(error: BaseException) -> Answer:
    def answer() -> Any:
        raise error

    return answer


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Answer]]:
    """What the directory answers, by its methods; to be changed."""
    found: dict[str, Answer] = {
        "fleet": lambda: (CONFIG.to_json(), "secret"),
        "snapshot": lambda: msgspec.msgpack.encode(Snapshot(1, READY, [], [])),
        "order": lambda: True,
    }

    def get(asked: str, *, timeout: float | None = None) -> Any:
        return found[asked]()

    monkeypatch.setattr(cluster, "connect", lambda _: None)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: Actor())
    monkeypatch.setattr(ray, "get", get)
    yield found


@pytest.mark.parametrize(
    "error",
    [GetTimeoutError("so long"), ActorUnavailableError("away", None), RayActorError(), ConnectionError("GCS is gone")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("command", "method"),
    [("status", "fleet"), ("status", "snapshot"), ("drain a", "order"), ("drain a", "snapshot"), ("scale 3", "fleet")],
)
def test_one_line_says_that_the_directory_is_away(
    answers: dict[str, Answer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    method: str,
    error: BaseException,
) -> None:
    answers[method] = fail(error)
    monkeypatch.setattr(sys, "argv", ["kervan", *command.split(), "--address", "10.0.0.1:6379"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "directory" in line
    assert "try again" in line


@pytest.mark.parametrize("command", ["status --why", "drain 10.0.0.1"])
def test_one_line_says_that_ray_is_away(
    answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(ray, "nodes", fail(RpcError("GCS is gone")))
    monkeypatch.setattr(ray_internals, "free_resources", fail(RpcError("GCS is gone")))
    monkeypatch.setattr(sys, "argv", ["kervan", *command.split(), "--address", "10.0.0.1:6379"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: Ray did not list the nodes of the cluster (RpcError: GCS is gone); try again in a few seconds\n"
    )
