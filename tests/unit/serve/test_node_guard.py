"""What becomes of a node's notices, with directories as they are, clouds that answer over HTTP, and no Ray."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from harness.clouds import Azure, scheduled_event, serving
from harness.live import until

from kervan.errors import FleetError
from kervan.fleet.directory import Directory, Drain, GatewayEntry, NodeEntry, ReplicaEntry, Traffic
from kervan.notices import state_file
from kervan.notices.node import NodeWatch, watching
from kervan.notices.settings import NoticeSettings
from kervan.notices.state_file import NodeState
from kervan.serve.node_guard import NO_HURRY_S, ClusterView, NodeGuard

HERE, ELSEWHERE = "10.0.0.1", "10.0.0.2"


class Cluster:
    """One fleet's directory, replicas that do what they are told, and a Ray that can drain."""

    def __init__(self) -> None:
        self.directory = Directory(time.monotonic)
        self.replicas: dict[str, ReplicaEntry] = {}
        self.gateways: dict[str, GatewayEntry] = {}
        self.done: list[tuple[str, float]] = []  # (what, seconds that were left), in order
        self.told: list[NodeEntry] = []
        self.problem = ""
        self.has_moved_directories = self.may_linger = False
        self.has_fleet = self.has_other_nodes = self.obeys = True
        self.is_drained = False
        self.drained_at_s: float | None = None

    def add(self, name: str, node: str = HERE, state: Any = "ready", **more: Any) -> None:
        self.replicas[name] = ReplicaEntry(**{"id": name, "pool": "p", "node": node, "pid": 0, "state": state} | more)

    def add_gateway(self, name: str, node: str = HERE, pid: int = 0, **more: Any) -> None:
        self.gateways[name] = GatewayEntry(name, node, pid, "", "", is_ready=True, **more)

    async def exchange(self, entry: NodeEntry) -> ClusterView:
        self.told.append(entry)
        self.directory.beat_node(entry)
        for replica in list(self.replicas.values()):
            orders = self.directory.beat_replica(replica)
            if self.obeys and any(isinstance(order, Drain) for order in orders):
                del self.replicas[replica.id]
                self.directory.remove(replica.id)
        for gateway in self.gateways.values():
            self.directory.beat_gateway(gateway)
        snapshots = {"fleet": self.directory.snapshot()} if self.has_fleet else {}
        return ClusterView(snapshots, not self.has_other_nodes, self.is_drained, self.drained_at_s)

    async def drain_node(self, remaining_s: float) -> None:
        if self.problem:
            raise FleetError(self.problem)
        self.done.append(("drain", remaining_s))
        self.is_drained, self.drained_at_s = True, time.time() + remaining_s

    async def drain_replica(self, fleet: str, replica_id: str, drain: Drain) -> None:
        self.done.append((replica_id, drain.deadline_s))
        self.may_linger = drain.may_linger
        assert self.directory.order(replica_id, drain)

    async def move_directories(self) -> None:
        assert not [replica for replica in self.replicas.values() if replica.node == HERE]
        self.has_moved_directories = True

    @property
    def orders(self) -> list[str]:
        return [what for what, _ in self.done]


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.add("a")
    cluster.add("b", ELSEWHERE)
    return cluster


@contextlib.asynccontextmanager
async def guarded(
    cluster: Cluster, settings: NoticeSettings | None = None, **more: Any
) -> AsyncIterator[tuple[NodeWatch, "asyncio.Task[str]"]]:
    """A guard of HERE at work, and the task that ends when it is done."""
    guard = NodeGuard(HERE, cluster, since_s=1000.0, settle_s=0.0, **more)
    watch = watching(
        settings or NoticeSettings(watch=()),
        guard.on_notice,
        node=HERE,
        on_withdrawn=guard.on_withdrawn,
        also=[guard.drained],
    )
    async with asyncio.timeout(20), watch as found:
        running = asyncio.create_task(guard.run(found.watcher))
        try:
            yield found, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def rounds(cluster: Cluster, count: int) -> None:
    """So many more looks at the cluster."""
    seen = len(cluster.told)
    await until(lambda: len(cluster.told) >= seen + count)


async def test_a_notice_empties_the_node_and_the_account_is_left(cluster: Cluster, tmp_path: Path) -> None:
    """Ray first, so that nothing comes back; then the replicas, with the time that is left; Azure hears that it is over."""
    place = tmp_path / "state.json"
    cloud = Azure()
    cluster.add_gateway("g", ELSEWHERE, traffic={"a": Traffic(1.0, None, 40, 2), "b": Traffic(1.0, None, 7, 0)})
    cluster.add("a", running=3, waiting=1)
    cluster.obeys = False
    async with serving(cloud) as server:
        settings = NoticeSettings(watch=("azure",), azure_url=server.url, azure_period_s=0.05)
        async with guarded(cluster, settings, state_place=str(place)) as (_, running):
            await rounds(cluster, 1)
            end = datetime.fromtimestamp(time.time() + 60, UTC)
            cloud.events = [scheduled_event(NotBefore=format_datetime(end.replace(microsecond=0), usegmt=True))]
            await until(place.exists)
            first = state_file.read(str(place))
            assert first is not None
            assert (first.requests_served, first.streams_in_flight, first.streams_moved) == (40, 4, 2)
            assert cluster.orders == ["drain", "a"]
            assert all(57 < left_s <= 60 for _, left_s in cluster.done)
            (told,) = cluster.directory.snapshot().nodes
            assert [(one.kind, one.source, one.is_certain) for one in told.notices] == [("preemption", "azure", True)]
            assert told.notices[0].deadline_s == int(end.timestamp())
            assert cloud.approved == []
            await rounds(cluster, 2)
            assert cluster.orders == ["drain", "a"]  # once
            assert cluster.may_linger
            cluster.add_gateway("g", ELSEWHERE, traffic={"a": Traffic(0.0, None, 41, 5)})
            cluster.obeys = True
            del cluster.replicas["a"]
            cluster.directory.remove("a")
            assert await running == "the node is drained and empty"
            assert cloud.approved == ["602d9444"]
            assert cluster.has_moved_directories
    last = state_file.read(str(place))
    assert last is not None
    assert last.notice is not None
    assert (last.requests_served, last.streams_in_flight, last.streams_moved) == (41, 0, 5)
    assert (last.node, last.since_s, last.notice.event_id) == (HERE, 1000.0, "602d9444")


async def test_a_recommendation_moves_nothing(cluster: Cluster) -> None:
    cloud = Azure()
    cloud.events = [scheduled_event("freeze", "Freeze")]
    async with serving(cloud) as server:
        settings = NoticeSettings(watch=("azure",), azure_url=server.url, azure_period_s=0.05)
        async with guarded(cluster, settings):
            await until(lambda: cluster.told and cluster.told[-1].notices)
            assert cluster.told[-1].notices[0].describe(time.time()) == "pauses for some seconds: pause (azure)"
            assert cluster.done == []


async def test_a_nearer_deadline_is_told_again(cluster: Cluster) -> None:
    cluster.obeys = False
    async with guarded(cluster) as (watch, _):
        watch.operator.announce(remaining_s=300, event_id="e")
        await until(lambda: len(cluster.done) == 2)
        watch.operator.announce(remaining_s=50, event_id="e")
        await until(lambda: len(cluster.done) == 4)
        await rounds(cluster, 2)
    assert [(what, round(left_s, -1)) for what, left_s in cluster.done] == [
        ("drain", 300), ("a", 300), ("drain", 50), ("a", 50),
    ]  # fmt: skip


async def test_without_a_deadline_there_is_time(cluster: Cluster) -> None:
    async with guarded(cluster) as (watch, running):
        watch.operator.announce()
        assert await running == "the node is drained and empty"
    assert not cluster.may_linger
    assert all(NO_HURRY_S - 10 < left_s <= NO_HURRY_S for _, left_s in cluster.done)


async def test_a_fleet_that_is_only_here_goes_on_until_it_is_ready_elsewhere(cluster: Cluster) -> None:
    cluster.add("b", ELSEWHERE, "starting")
    async with guarded(cluster) as (watch, running):
        watch.operator.announce(remaining_s=60)
        await until(lambda: cluster.orders == ["drain"])  # so that one is started elsewhere
        await rounds(cluster, 2)
        assert cluster.orders == ["drain"]
        cluster.add("b", ELSEWHERE)
        assert await running == "the node is drained and empty"
    assert cluster.orders == ["drain", "a"]


async def test_a_fleet_that_is_only_here_leaves_in_the_end(cluster: Cluster) -> None:
    del cluster.replicas["b"]
    async with guarded(cluster) as (watch, _):
        watch.operator.announce(remaining_s=4)
        await until(lambda: cluster.orders == ["drain", "a"])


async def test_the_only_node_of_a_cluster_is_not_drained_until_there_is_another(cluster: Cluster) -> None:
    """Serve would end its replicas ahead of time, and could put none anywhere."""
    del cluster.replicas["b"]
    cluster.has_other_nodes = False
    async with guarded(cluster) as (watch, _):
        watch.operator.announce(remaining_s=60)
        await until(lambda: cluster.told[-1:] and cluster.told[-1].notices)
        await rounds(cluster, 2)
        assert cluster.done == []
        cluster.has_other_nodes = True
        await until(lambda: cluster.orders == ["drain"])


async def test_a_notice_that_is_taken_back_ends_what_has_not_begun(cluster: Cluster) -> None:
    cluster.add("b", ELSEWHERE, "starting")
    async with guarded(cluster) as (watch, running):
        notice = watch.operator.announce(remaining_s=60)
        await until(lambda: cluster.orders == ["drain"])
        watch.operator.withdraw(notice.event_id)
        await until(lambda: not cluster.told[-1].notices)
        cluster.add("b", ELSEWHERE)
        await rounds(cluster, 3)
        assert cluster.orders == ["drain"]
        assert cluster.told[-1].is_drained  # which Ray does not undo
        assert not cluster.told[-1].notices
        cluster.directory.remove("a")
        del cluster.replicas["a"]
        assert await running == "the node is drained and empty"


async def test_a_drain_that_others_asked_ray_for_is_a_notice(cluster: Cluster) -> None:
    """`ray start --block` drains its node at SIGTERM."""
    cluster.is_drained, cluster.drained_at_s = True, time.time() + 30
    async with guarded(cluster) as (_, running):
        assert await running == "the node is drained and empty"
    assert cluster.orders == ["a"]
    assert 25 < cluster.done[-1][1] <= 30
    told = [one for entry in cluster.told for one in entry.notices]
    assert {(one.kind, one.source, one.deadline_s) for one in told} == {("sigterm", "ray", cluster.drained_at_s)}


async def test_trouble_with_ray_does_not_keep_streams(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.problem = "Ray does not drain"
    cluster.obeys = False
    async with guarded(cluster) as (watch, _):
        watch.operator.announce(remaining_s=60)
        await until(lambda: cluster.orders == ["a"])
        await rounds(cluster, 2)
        assert caplog.text.count("Ray does not drain") == 1
        cluster.problem = ""
        await until(lambda: cluster.orders == ["a", "drain"])


async def test_an_account_that_cannot_be_written_keeps_nothing(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    async with guarded(cluster, state_place=str(tmp_path / "file/state.json")) as (watch, running):
        watch.operator.announce(remaining_s=60)
        assert await running == "the node is drained and empty"
    assert "its account cannot be written" in caplog.text


async def test_a_gateway_that_is_not_listed_any_more_may_have_streams(cluster: Cluster) -> None:
    cloud = Azure()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:  # noqa: ASYNC220
        cluster.add_gateway("g", pid=process.pid)
        async with serving(cloud) as server:
            settings = NoticeSettings(watch=("azure",), azure_url=server.url, azure_period_s=0.05)
            async with guarded(cluster, settings) as (_, running):
                await rounds(cluster, 1)
                end = datetime.fromtimestamp(time.time() + 60, UTC)
                cloud.events = [scheduled_event(NotBefore=format_datetime(end, usegmt=True))]
                await until(lambda: "a" not in cluster.replicas)
                del cluster.gateways["g"]
                cluster.directory.remove("g")
                await rounds(cluster, 3)
                assert (running.done(), cloud.approved) == (False, [])
                process.kill()
                assert await running == "the node is drained and empty"
                assert cloud.approved == ["602d9444"]


async def test_it_ends_with_the_last_fleet(cluster: Cluster) -> None:
    cluster.has_fleet = False
    async with guarded(cluster) as (_, running):
        assert await running == "no fleet is left"


async def test_it_ends_where_no_fleet_has_anything(cluster: Cluster) -> None:
    """Ray takes a node with an actor for busy, and would never scale it down."""
    del cluster.replicas["a"]
    async with guarded(cluster, linger_s=0.0) as (_, running):
        assert await running == "no fleet has anything here"


async def test_the_account_of_the_node_before_is_told(cluster: Cluster) -> None:
    state = NodeState(node="old", since_s=1.0, written_s=2.0, requests_served=9, streams_in_flight=0, streams_moved=4)
    async with guarded(cluster, before=state):
        await rounds(cluster, 1)
    assert cluster.told[0].before == {
        "since_s": 1.0, "written_s": 2.0, "requests_served": 9, "streams_in_flight": 0, "streams_moved": 4,
    }  # fmt: skip


async def test_a_source_in_trouble_is_told(cluster: Cluster) -> None:
    settings = NoticeSettings(watch=("aws",), aws_url="http://127.0.0.1:1", aws_period_s=0.05)
    async with guarded(cluster, settings) as (watch, _):
        await until(lambda: watch.watcher.health["aws"].problem)
        watch.operator.announce(remaining_s=60)  # anything that makes it look again
        await until(lambda: cluster.told[-1:] and cluster.told[-1].problem)
        assert cluster.told[-1].problem.startswith("aws cannot be read: PUT http://127.0.0.1:1/latest/api/token")
        assert cluster.told[-1].watches == ["aws"]
