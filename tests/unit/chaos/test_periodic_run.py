"""A whole run against a server and a fleet of this process; and what the command refuses."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness.places import TESTS
from harness.twin_server import SHAPE, TOKEN_S, TwinServer, serving

from kervan import cli
from kervan.bench.load import Endpoint
from kervan.chaos import checked_run, periodic_run
from kervan.chaos.periodic_run import check_size
from kervan.chaos.plans import DisruptionPlan
from kervan.chaos.schedule import DisruptionKind
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import GatewayEntry, ReplicaEntry, Snapshot


@dataclass
class MemoryFleet:
    """Replicas that are replaced some time after they were hit; three streams move each time."""

    num_replicas: int = 3
    replace_s: float = 0.2
    hits: list[tuple[DisruptionKind, str]] = field(default_factory=list)
    moved: int = 0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._names = [f"r{n}" for n in range(self.num_replicas)]
        self._next = self.num_replicas
        self._version = 1

    def look(self, version: int, timeout_s: float) -> Snapshot:
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)
            replicas = [ReplicaEntry(name, "on-demand", "h", 1, "ready", running=2) for name in self._names]
            gateway = GatewayEntry("g", "h", 2, "http://h", "http://h", True, moved=self.moved)
            return Snapshot(self._version, replicas, [gateway], [])

    def strike(self, kind: DisruptionKind, replica_id: str, deadline_s: float) -> bool:
        with self._changed:
            if replica_id not in self._names:
                return False
            self.hits.append((kind, replica_id))
            self._names.remove(replica_id)
            self._version += 1
            self.moved += 3
            self._changed.notify_all()
        if self.replace_s < 100:
            timer = threading.Timer(self.replace_s, self._replace)
            timer.daemon = True
            timer.start()
        return True

    def _replace(self) -> None:
        with self._changed:
            self._names.append(f"r{self._next}")
            self._next += 1
            self._version += 1
            self._changed.notify_all()


@pytest.fixture(autouse=True)
def no_gateways_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """This fleet tells what it moved when it moves it."""
    monkeypatch.setattr(checked_run, "BEAT_S", 0.05)


@pytest.fixture
def config(tmp_path: Path) -> FleetConfig:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return FleetConfig(model=str(tmp_path), engine="twin", gpu="H200", replicas=3)


@pytest.fixture
def server(config: FleetConfig) -> Iterator[TwinServer]:
    with serving(config) as made:
        yield made


def plan(**more: Any) -> DisruptionPlan:
    words: dict[str, Any] = {
        "periods_s": {"kill": 0.6}, "duration_s": 1.0, "streams": 8, "isl": "4..20", "osl": "10..40",
    }  # fmt: skip
    return DisruptionPlan(**(words | more))


def at(server: TwinServer) -> Endpoint:
    return Endpoint(url=server.url, model="m")


def test_a_fleet_that_breaks_nothing(server: TwinServer, config: FleetConfig) -> None:
    fleet, said = MemoryFleet(), list[str]()
    report = periodic_run.run(
        fleet, config, plan(periods_s={"kill": 0.6, "drain": 1.0}, duration_s=2.0), at(server), said.append
    )
    found = report.to_dict()
    assert report.is_good
    assert found["streams"] == server.count
    assert found["streams"] >= 8
    # kills at 0.6, 1.2, 1.8; a drain at 1.0
    assert [kind for kind, _ in fleet.hits] == ["kill", "drain", "kill", "kill"]
    assert (found["disruptions"], found["skipped"], found["moves"]) == (4, 0, 12)
    assert found["recover_s"]["max"] >= fleet.replace_s
    assert found["gap_s"]["p50"] >= TOKEN_S
    assert found["gap_s"]["p99"] <= found["gap_s"]["max"]
    assert found["client_late_s"] > 0
    assert said[1] == f"kill {fleet.hits[0][1]} with 2 streams; 2 others ready"


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("lose", {"tokens_lost": 1}),
        ("double", {"tokens_doubled": 2}),
        ("change", {"tokens_wrong": 7}),  # of ten tokens, from the fourth on
        ("break", {"broken": 1}),
        ("busy", {"broken": 1}),
    ],
)
def test_each_fault_is_counted(server: TwinServer, config: FleetConfig, fault: str, counted: dict[str, int]) -> None:
    server.faults = {3: fault}  # one of the eight that are sent at once, however slow this machine is
    said: list[str] = []
    report = periodic_run.run(MemoryFleet(), config, plan(osl="10"), at(server), said.append)
    found = report.to_dict()
    clean = {"broken": 0, "tokens_lost": 0, "tokens_doubled": 0, "tokens_wrong": 0}
    assert {name: found[name] for name in clean} == clean | counted
    assert not report.is_good
    assert sum(error["count"] for error in found["errors"].values()) == found["broken"]
    assert any(words.startswith("a stream ") for words in said)


def test_a_server_that_is_gone_breaks_every_stream(server: TwinServer, config: FleetConfig) -> None:
    server.faults = dict.fromkeys(range(1, 5000), "break")
    found = periodic_run.run(MemoryFleet(), config, plan(), at(server), lambda _: None).to_dict()
    assert found["broken"] == found["streams"] > 0
    assert found["tokens_lost"] == 0
    assert set(found["errors"]) == {"truncated"}


def test_nothing_is_disturbed_when_too_few_are_ready(server: TwinServer, config: FleetConfig) -> None:
    """Of three replicas, two others must be ready: only the first kill may be."""
    fleet = MemoryFleet(replace_s=1.5)
    found = periodic_run.run(
        fleet, config, plan(periods_s={"kill": 0.4}, duration_s=1.5, min_ready=2), at(server), lambda _: None
    ).to_dict()
    assert (found["disruptions"], found["skipped"], found["unrecovered"]) == (1, 2, 0)


def test_a_fleet_that_is_not_whole_again_is_told(
    server: TwinServer, config: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_run, "RECOVERY_S", -config.stall_timeout_s)
    report = periodic_run.run(MemoryFleet(replace_s=1e9), config, plan(), at(server), lambda _: None)
    assert [one.kind for one in report.unrecovered] == ["kill"]
    assert not report.is_good


def test_answers_of_a_real_model_are_judged_by_those_before(server: TwinServer, config: FleetConfig) -> None:
    """The server's own probe, 32 answers alone, 32 in a batch; one prompt is not answered twice in the same way."""
    real = FleetConfig(model=config.model, replicas=3)
    server.faults = {40: "change", 75: "lose"}
    said: list[str] = []
    found = periodic_run.run(MemoryFleet(), real, plan(osl="10", duration_s=2.0), at(server), said.append).to_dict()
    assert said[:2] == [
        "32 prompts are run twice without faults; later outputs are compared with these",
        "1 gave a different output in a batch, and are left out",
    ]
    assert (found["tokens_lost"], found["tokens_wrong"], found["broken"]) == (1, 0, 0)
    assert found["streams"] == server.count - 1 - 64


def test_a_real_model_that_fails_undisturbed_is_told_before_anything_is_hit(
    server: TwinServer, config: FleetConfig
) -> None:
    fleet = MemoryFleet()
    server.faults = {10: "break"}
    with pytest.raises(FleetError, match="failed before any fault was injected: truncated"):
        periodic_run.run(fleet, FleetConfig(model=config.model, replicas=3), plan(), at(server), lambda _: None)
    assert fleet.hits == []


# ---- the command


CTRL_C = """
import os, signal, sys, threading
sys.path[:0] = {path!r}
from test_periodic_run import *
config = FleetConfig(model=sys.argv[2], engine="twin", gpu="H200", replicas=3)
fleet = MemoryFleet()

def interrupt():
    while not fleet.hits:
        time.sleep(0.05)
    time.sleep(0.9)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
report = periodic_run.run(fleet, config, plan(duration_s=300.0), Endpoint(url=sys.argv[1], model="m"), lambda _: None)
print(json.dumps(report.to_dict() | {{"is_good": report.is_good}}))
"""


def test_ctrl_c_ends_it_early_with_the_report(server: TwinServer, config: FleetConfig) -> None:
    code = CTRL_C.format(path=[str(Path(__file__).parent), str(TESTS)])
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, server.url, config.model], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["was_interrupted"], found["is_good"], found["broken"]) == (True, True, 0)
    assert found["disruptions"] > 0
    assert found["unfinished"] > 0
    assert time.monotonic() - begin_s < 60


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """The exit status and the words of `kervan chaos`."""

    def run_command(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["kervan", "chaos", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    return run_command


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "give --kill-every, --drain-every or --hang-every"),
        (("--kill-every", "10s", "--for", "5s"), "--kill-every 10 s is not between 0 and the 5 s of --for"),
        (("--kill-every", "0s"), "--kill-every 0 s is not between 0 and the 60 s of --for"),
        (("--kill-every", "soon"), "--kill-every 'soon' is not a duration"),
        (("--kill-every", "1s", "--streams", "0"), "--streams '0' is not a whole number from 1 to 65,536"),
        (("--kill-every", "1s", "--min-ready", "-1"), "--min-ready -1 is not a whole number of at least 0"),
        (("--kill-every", "1s", "--deadline", "x"), "--deadline 'x' is not a duration"),
    ],
)
def test_bad_words_are_refused(refused: Callable[..., tuple[object, str]], words: tuple[str, ...], why: str) -> None:
    code, said = refused("http://127.0.0.1:1", *words)
    assert code == 2
    assert why in said


def test_what_is_no_fleet_is_refused(server: TwinServer, refused: Callable[..., tuple[object, str]]) -> None:
    for url, why in (
        (server.url, "is not a kervan fleet: GET /kervan/status: HTTP Error 404"),
        ("http://127.0.0.1:1", "is not a kervan fleet: GET /kervan/status: <urlopen error"),
        ("nonsense://x", "is not a server URL"),
    ):
        code, said = refused(url, "--kill-every", "1s")
        assert code == 2
        assert why in said


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"isl": "many"}, "'many' is not a number of tokens"),
        ({"streams": 2_000_000}, "--streams 2000000 needs 2000200 open files, and the limit is"),
    ],
)
def test_loads_that_cannot_be_are_refused(
    server: TwinServer, config: FleetConfig, more: dict[str, Any], why: str
) -> None:
    fleet = MemoryFleet()
    with pytest.raises(ConfigError, match=why):
        periodic_run.run(fleet, config, plan(**more), at(server), lambda _: None)
    assert fleet.hits == []


def test_fleets_are_what_plans_are_checked_against() -> None:
    plan = DisruptionPlan(periods_s={"kill": 1.0}, duration_s=5.0, streams=1)
    check_size(plan, FleetConfig(model="m", replicas=2))
    with pytest.raises(
        ConfigError, match=r"the fleet has 1 replica, and --min-ready 1 wants 1 besides.*kervan scale 2"
    ):
        check_size(plan, FleetConfig(model="m", replicas=1))
