"""What a start or a change waits for, and what it says meanwhile."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from kervan.config.fleet import FleetConfig
from kervan.errors import CapacityError, EngineError
from kervan.fleet.directory import GatewayEntry, ReplicaEntry, Snapshot, StartFailure
from kervan.serve import readiness
from kervan.serve.directory.client import DirectoryClient
from kervan.serve.readiness import slowest_start, wait_until_ready
from kervan.serve.versions import versions

CONFIG = FleetConfig(model="org/model", replicas=2, gateways=1)
MADE = versions(CONFIG)


class ScriptedDirectory:
    """Tells one snapshot after the other, and is its own response."""

    def __init__(self, *snapshots: Snapshot):
        self._snapshots: Iterator[Snapshot] = iter(snapshots)

    def snapshot(self) -> "ScriptedDirectory":
        return self

    def result(self) -> Snapshot:
        return next(self._snapshots)


def replica(name: str, state: Any = "ready", version: str = MADE.replicas, **more: Any) -> ReplicaEntry:
    return ReplicaEntry(name, "on-demand", "h", 1, state, version=version, **more)


def gateway(name: str, *, is_ready: bool = True, version: str = MADE.gateways) -> GatewayEntry:
    return GatewayEntry(name, "h", 1, "http://h:1", "", is_ready, version=version)


def listed(*entries: ReplicaEntry | GatewayEntry, failures: tuple[StartFailure, ...] = ()) -> Snapshot:
    replicas = [entry for entry in entries if isinstance(entry, ReplicaEntry)]
    gateways = [entry for entry in entries if isinstance(entry, GatewayEntry)]
    return Snapshot(1, replicas, gateways, list(failures))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "POLL_S", 0.0)


def wait(*snapshots: Snapshot, after_failure: int = 0) -> tuple[str, list[str]]:
    """The URL of the fleet that is ready, and the lines that were told."""
    lines: list[str] = []
    directory = cast(DirectoryClient, ScriptedDirectory(*snapshots))
    status = wait_until_ready(
        CONFIG, directory, lines.append, after_failure=after_failure, awaited={"on-demand": CONFIG.replicas}
    )
    return status.url, lines


def test_a_start_is_over_when_all_are_ready() -> None:
    url, lines = wait(
        listed(),
        listed(replica("a"), replica("b", "starting"), gateway("g")),
        listed(replica("a"), replica("b", "starting"), gateway("g")),
        listed(replica("a"), replica("b"), gateway("g", is_ready=False)),
        listed(replica("a"), replica("b"), gateway("g")),
    )
    assert url == "http://h:1"
    assert lines == [
        "0/2 replicas and 0/1 gateways ready",
        "1/2 replicas and 1/1 gateways ready",
        "2/2 replicas and 0/1 gateways ready",
        "2/2 replicas and 1/1 gateways ready",
    ]


def test_a_change_is_over_when_the_old_ones_are_gone() -> None:
    new = (replica("a"), replica("b"), gateway("g"))
    _, lines = wait(
        listed(*new, replica("c", "draining", "old"), gateway("h", version="old")),
        listed(*new, replica("c", "draining", "old")),
        listed(*new),
    )
    assert lines == [
        "2/2 replicas and 1/1 gateways ready, 1 replica and 1 gateway to go",
        "2/2 replicas and 1/1 gateways ready, 1 replica and 0 gateways to go",
        "2/2 replicas and 1/1 gateways ready",
    ]


@pytest.mark.parametrize(("kind", "error"), [("CapacityError", CapacityError), ("Unknown", EngineError)])
def test_a_failed_start_ends_it_with_its_error(kind: str, error: type[Exception]) -> None:
    known = StartFailure("a", "EngineError", "an earlier one", number=1)
    failed = StartFailure("b", kind, "out of memory; use --tp 8", number=2)
    with pytest.raises(error, match="out of memory; use --tp 8"):
        wait(listed(failures=(known,)), listed(failures=(known, failed)), after_failure=1)


def test_the_slowest_start_is_told_by_its_parts() -> None:
    entries = (replica("a", start_s={"load": 1.0}), replica("b", start_s={"import": 2.0, "load": 3.04, "rest": 0.01}))
    assert slowest_start(listed(*entries)) == "5.0 s: import 2.0, load 3.0"
    assert slowest_start(listed(replica("a"))) == ""
