"""`kervan chaos --replay` on a cluster of this process; and what the command refuses."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness.places import TRACES
from harness.twin_server import SHAPE, serving

from kervan import cli
from kervan.bench.load import Endpoint
from kervan.chaos import checked_run
from kervan.chaos.checked_load import RepeatedTrace
from kervan.chaos.node_replay import ReplayRun, fleet_config
from kervan.chaos.plans import ReplayPlan
from kervan.chaos.schedule import DisruptionKind
from kervan.errors import ConfigError, EngineError
from kervan.fleet.directory import GatewayEntry, ReplicaEntry, Snapshot

ARRIVALS = str(TRACES / "azure_conv_2023_first_3min.csv")
# In milliseconds; at speed 10: b comes at 0.3 s and goes at 0.8 s, a goes at 1.2 s, the end is at 1.6 s.
COURSE = (
    '[0, "add", {"nodes": ["a"]}]',
    '[3000, "add", {"nodes": ["b"]}]',
    '[8000, "remove", {"nodes": ["b"]}]',
    '[12000, "remove", {"nodes": ["a"]}]',
    '[16000, "DONE", {"nodes": []}]',
)


@dataclass
class MemoryCluster:
    """Nodes that have a replica at once, and on-demand ones that cover at once. `orders`: what was done to them.

    A replica that is drained goes after `drain_s`, and two streams with it.
    """

    drain_s: float = 0.1
    orders: list[str] = field(default_factory=list)
    moved: int = 0
    refuses: str = ""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._on: dict[str, str] = {}  # replica by address
        self._version = 1

    def look(self, version: int, timeout_s: float) -> Snapshot:
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)
            covers = ["on-demand-1", *(["on-demand-2"] if len(self._on) < 2 else [])]
            replicas = [ReplicaEntry(name, "on-demand", "h", 1, "ready") for name in covers]
            replicas += [ReplicaEntry(name, "spot", ip, 1, "ready", running=2) for ip, name in self._on.items()]
            gateway = GatewayEntry("g", "h", 2, "http://h", "http://h", True, moved=self.moved)
            return Snapshot(self._version, replicas, [gateway], [])

    def strike(self, kind: DisruptionKind, replica_id: str, deadline_s: float) -> bool:
        self.orders.append(f"{kind} {replica_id} in {deadline_s:g} s")
        timer = threading.Timer(self.drain_s, self._end, (replica_id.replace("spot-", ""),))
        timer.daemon = True
        timer.start()
        return True

    def add(self, ip: str) -> None:
        if ip == self.refuses:
            raise EngineError(f"Ray did not give node {ip}")
        with self._changed:
            self.orders.append(f"add {ip}")
            self._on[ip] = f"spot-{ip}"
            self._tell()

    def drain(self, ip: str, deadline_s: float) -> None:
        self.orders.append(f"drain node {ip} in {deadline_s:g} s")

    def remove(self, ip: str) -> None:
        self.orders.append(f"remove {ip}")
        self._end(ip)

    def _end(self, ip: str) -> None:
        with self._changed:
            if self._on.pop(ip, None):
                self.moved += 2
                self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()


@pytest.fixture(autouse=True)
def no_gateways_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """This cluster tells what it moved when it moves it."""
    monkeypatch.setattr(checked_run, "BEAT_S", 0.05)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path)


def plan(place: Path, **more: Any) -> ReplayPlan:
    nodes, trace = place / "nodes.txt", place / "requests.csv"
    nodes.write_text("\n".join(COURSE))
    rows = [f"2023-11-16 18:00:{n // 10:02d}.{n % 10},{100 * (25 - n % 25)},20" for n in range(100)]  # 10 a second
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return ReplayPlan(**({"nodes": str(nodes), "trace": str(trace), "speed": 10.0} | more))


@pytest.fixture
def play(model: str, tmp_path: Path) -> Iterator[Callable[..., tuple[Any, list[str]]]]:
    """Plays on a cluster; the report, and what was said."""
    config = fleet_config(model, plan(tmp_path), "replay", 8000)

    with serving(config) as server:

        def run(nodes: MemoryCluster, **more: Any) -> tuple[Any, list[str]]:
            said: list[str] = []
            asked = plan(tmp_path, **more)
            replay = ReplayRun(nodes, config, asked, asked.course(), nodes, said.append)
            replay.prepare()
            return replay.run_to_end(Endpoint(url=server.url, model="m")), said

        yield run


def test_nodes_come_and_go_with_a_notice(play: Callable[..., tuple[Any, list[str]]]) -> None:
    nodes = MemoryCluster()
    report, said = play(nodes, deadline_s=5.0)
    first, second = "127.0.1.1", "127.0.1.2"
    assert nodes.orders == [
        f"add {first}",
        f"add {second}",
        *(f"{what} in 5 s" for what in (f"drain node {second}", f"drain spot-{second}")),
        f"remove {second}",
        *(f"{what} in 5 s" for what in (f"drain node {first}", f"drain spot-{first}")),
        f"remove {first}",
    ]
    found = report.to_dict()
    assert report.is_good
    assert (found["disruptions"], found["kinds"].keys(), found["moves"]) == (2, {"drain"}, 4)
    assert (found["nodes_added"], found["nodes_removed"], found["unrecovered"]) == (2, 2, 0)
    assert found["streams"] > 10
    assert found["requests_cut"] > 0  # the first ones have up to 2500 tokens
    assert found["recover_s"]["max"] >= nodes.drain_s
    sizes = [(row["nodes"], row["on-demand"], row["spot"]) for row in found["over_time"]]
    steps = [(1, 2, 1), (2, 1, 2), (1, 2, 1), (0, 2, 0)]
    assert [size for size in sizes if size in steps] == steps
    assert found["over_time"][-1]["at_s"] >= 1.2
    assert f"b at {second} leaves in 5 s, with spot-{second} and its 2 streams" in said
    assert said[-1].startswith("recovered") or said[-1] == "a has left"


def test_nodes_are_killed_without_one(play: Callable[..., tuple[Any, list[str]]]) -> None:
    nodes = MemoryCluster()
    report, said = play(nodes, deadline_s=0.0)
    assert nodes.orders == ["add 127.0.1.1", "add 127.0.1.2", "remove 127.0.1.2", "remove 127.0.1.1"]
    assert report.is_good
    assert report.to_dict()["kinds"].keys() == {"kill"}
    assert "b at 127.0.1.2 is killed, with spot-127.0.1.2 and its 2 streams" in said


def test_a_node_that_is_not_empty_goes_at_its_deadline(play: Callable[..., tuple[Any, list[str]]]) -> None:
    nodes = MemoryCluster(drain_s=60.0)
    report, _ = play(nodes, deadline_s=0.2)
    assert [order for order in nodes.orders if order.startswith("remove")] == ["remove 127.0.1.2", "remove 127.0.1.1"]
    assert report.is_good


def test_a_node_that_does_not_come_is_told(play: Callable[..., tuple[Any, list[str]]]) -> None:
    with pytest.raises(EngineError, match=r"Ray did not give node 127\.0\.1\.2"):
        play(MemoryCluster(refuses="127.0.1.2"))


def test_only_a_part_is_played(tmp_path: Path) -> None:
    course = plan(tmp_path, duration_s=1.0).course()
    assert (course.end_s, [change.at_s for change in course.changes]) == (1.0, [0.0, 0.3, 0.8])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"speed": 0.0}, "--speed 0 is not above 0"),
        ({"speed": float("nan")}, "--speed nan is not above 0"),
        ({"trace_speed": -1.0}, "--trace-speed -1 is not above 0"),
        ({"max_nodes": 0}, "--max-nodes 0 is outside 1..32"),
        ({"duration_s": 0.0}, "--for 0 s is not above 0"),
        ({"duration_s": 0.5}, "in the 0.5 s that .*nodes.txt is played, no node goes; leave --for out, or give more"),
    ],
)
def test_what_cannot_be_played(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan(tmp_path, **more).course()


def test_requests_come_again_when_their_trace_is_over(tmp_path: Path, model: str) -> None:
    """Three rows within 2 s: the first one comes again at 3 s. 100 + 5 tokens fit a model of 64 as 59 + 5."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:00:0{at_s},{tokens},5" for at_s, tokens in ((0, 10), (1, 20), (2, 100))]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(rows))
    load = plan(tmp_path, trace=str(path), trace_speed=1.0).load(4.5)
    arrivals = RepeatedTrace(load, max_model_len=64)
    assert [(at_s, row.input_tokens) for at_s, row in arrivals] == [(0, 10), (1, 20), (2, 59), (3, 10), (4, 20)]
    assert arrivals.num_cut == 1


def test_a_trace_that_outlasts_the_nodes_is_not_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": at_ms, "input_length": 10, "output_length": 5} for at_ms in (0, 1000, 2000, 8000)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    load = plan(tmp_path, trace=str(path), trace_speed=1.0).load(4.5)
    assert [at_s for at_s, _ in RepeatedTrace(load, max_model_len=64)] == [0.0, 1.0, 2.0]


# ---- the command


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--replay", "n"), "--replay needs requests meanwhile; add --trace FILE"),
        (("--replay", "n", "--trace", "t"), "node trace n cannot be read"),
        (("--replay", "n", "--trace", "t", "--kill-every", "3s"), "--kill-every has no meaning with --replay"),
        (("--replay", "n", "--trace", "t", "--streams", "3"), "--streams has no meaning with --replay"),
        (("--kill-every", "3s", "--trace", "t"), "--trace is for --replay; add --replay FILE, or leave it out"),
        (("--kill-every", "3s", "--max-nodes", "3"), "--max-nodes is for --replay"),
        (("--replay", str(TRACES / "spotserve_0304.txt"), "--trace", "nowhere"), "trace nowhere does not exist"),
        (("--replay", str(TRACES / "spotserve_0304.txt"), "--trace", ARRIVALS), "'./nowhere' is neither a directory"),
    ],
)
def test_bad_words_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], why: str
) -> None:
    """Before anything is started."""
    monkeypatch.setattr(sys, "argv", ["kervan", "chaos", "./nowhere", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert why in capsys.readouterr().err
