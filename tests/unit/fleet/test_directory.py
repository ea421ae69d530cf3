import msgspec
import pytest

from kervan.config.fault import Fault
from kervan.fleet.directory import (
    EXPIRY_S,
    LATE_S,
    MAX_FAILURES,
    Directory,
    Drain,
    GatewayEntry,
    NodeEntry,
    NodeNotice,
    Order,
    ReplicaEntry,
    ReplicaState,
    Snapshot,
    StartFailure,
    Strike,
    Suffer,
)
from kervan.fleet.link import members


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(clock: Clock) -> Directory:
    return Directory(clock)


def replica(replica_id: str, state: ReplicaState = "ready", address: str = "tcp://h:1", **more: object) -> ReplicaEntry:
    return ReplicaEntry(id=replica_id, pool="on-demand", node="h", pid=1, state=state, address=address, **more)


def gateway(gateway_id: str, *, is_ready: bool = True) -> GatewayEntry:
    return GatewayEntry(gateway_id, "h", 2, "http://h:8000", "http://h:9001", is_ready)


def test_a_snapshot_lists_entries_in_order_of_id(directory: Directory) -> None:
    for name in ("c", "a", "b"):
        directory.beat_replica(replica(name))
        directory.beat_gateway(gateway(name))
    snapshot = directory.snapshot()
    assert [entry.id for entry in snapshot.replicas] == ["a", "b", "c"]
    assert [entry.id for entry in snapshot.gateways] == ["a", "b", "c"]


def test_an_entry_whose_beats_are_late_says_so(directory: Directory, clock: Clock) -> None:
    directory.beat_replica(replica("a", reason="too slow"))
    directory.beat_gateway(gateway("g"))
    clock.now_s += LATE_S
    assert [entry.lateness for entry in directory.snapshot().replicas] == [""]
    clock.now_s += 1.0
    snapshot = directory.snapshot()
    assert snapshot.replicas[0].lateness == snapshot.gateways[0].lateness == "late: last heartbeat 3.5 s ago"
    assert snapshot.replicas[0].reason == "too slow"
    directory.beat_gateway(gateway("g"))
    assert directory.snapshot().gateways[0].lateness == ""


def test_an_entry_lives_as_long_as_its_beats(directory: Directory, clock: Clock) -> None:
    directory.beat_replica(replica("a"))
    directory.beat_replica(replica("b"))
    directory.beat_gateway(gateway("g"))
    clock.now_s += EXPIRY_S
    directory.beat_replica(replica("b"))
    assert [entry.id for entry in directory.snapshot().replicas] == ["a", "b"]  # exactly at the limit: still there
    before = directory.version
    clock.now_s += 0.1
    snapshot = directory.snapshot()
    assert [entry.id for entry in snapshot.replicas] == ["b"]
    assert snapshot.gateways == []
    assert snapshot.version == before + 2


@pytest.mark.parametrize(
    ("second", "is_change"),
    [
        pytest.param(replica("a"), False, id="the same"),
        pytest.param(replica("a", running=9, waiting=3, kv_cache_usage=0.5), False, id="load only"),
        pytest.param(replica("a", "draining"), True, id="state"),
        pytest.param(replica("a", address="tcp://h:2"), True, id="address"),
        pytest.param(replica("b"), True, id="a new one"),
    ],
)
def test_the_version_grows_with_what_gateways_follow(
    directory: Directory, second: ReplicaEntry, is_change: bool
) -> None:
    directory.beat_replica(replica("a"))
    before = directory.version
    directory.beat_replica(second)
    assert (directory.version > before) is is_change
    assert second in directory.snapshot().replicas


def test_the_version_grows_with_a_gateways_readiness(directory: Directory) -> None:
    directory.beat_gateway(gateway("g", is_ready=False))
    before = directory.version
    directory.beat_gateway(gateway("g", is_ready=False))
    assert directory.version == before
    directory.beat_gateway(gateway("g"))
    assert directory.version == before + 1


def test_the_version_grows_with_what_a_gateway_can_be_asked_for(directory: Directory) -> None:
    directory.beat_gateway(gateway("g"))
    before = directory.version
    directory.beat_gateway(msgspec.structs.replace(gateway("g"), neighbours=("b",)))
    assert directory.version == before
    directory.beat_gateway(msgspec.structs.replace(gateway("g"), models=("llama", "sql")))
    assert directory.version == before + 1


def test_goodbye_removes_at_once_and_only_once(directory: Directory) -> None:
    directory.beat_replica(replica("a"))
    directory.beat_gateway(gateway("g"))
    before = directory.version
    for name in ("a", "g", "a", "never seen"):
        directory.remove(name)
    after = directory.snapshot()
    assert (after.version, after.replicas, after.gateways, after.failures) == (before + 2, [], [], [])


def test_failures_are_kept_up_to_a_bound_newest_last(directory: Directory) -> None:
    for i in range(MAX_FAILURES + 5):
        directory.report_failure(StartFailure("a", "ConfigError", f"failure {i}"))
    failures = directory.snapshot().failures
    assert [failure.message for failure in failures] == [f"failure {i}" for i in range(5, MAX_FAILURES + 5)]


def test_a_new_directory_fills_from_the_next_beats(clock: Clock) -> None:
    entries = [replica("a"), replica("b", "draining")]
    old, new = Directory(clock), Directory(clock)
    for entry in entries:
        old.beat_replica(entry)
        new.beat_replica(entry)
    assert new.snapshot().replicas == old.snapshot().replicas == entries


@pytest.mark.parametrize(
    ("state", "address", "is_reachable"),
    [
        ("starting", "", False),
        ("starting", "tcp://h:1", False),
        ("ready", "tcp://h:1", True),
        ("ready", "", False),
        ("draining", "tcp://h:1", True),
        ("unhealthy", "tcp://h:1", False),
    ],
)
def test_reachable_means_address_and_a_state_that_answers(
    state: ReplicaState, address: str, is_reachable: bool
) -> None:
    assert replica("a", state, address).is_reachable is is_reachable


def test_a_replica_that_is_told_to_drain_gets_no_more_work_before_it_knows() -> None:
    directory = Directory(lambda: 0.0)
    assert directory.order("a", Drain(30.0)) is False
    directory.beat_replica(replica("a", state="ready"))
    before = directory.version
    assert directory.order("a", Drain(30.0)) is True
    assert directory.version > before
    assert [entry.state for entry in directory.snapshot().replicas] == ["draining"]
    assert directory.beat_replica(replica("a", state="ready")) == [Drain(30.0)]
    assert directory.beat_replica(replica("a", state="ready")) == []
    assert [entry.state for entry in directory.snapshot().replicas] == ["draining"]
    directory.remove("a")
    directory.beat_replica(replica("a", state="ready"))
    assert [entry.state for entry in directory.snapshot().replicas] == ["ready"]


@pytest.mark.parametrize("may_linger", [True, False])
def test_gateways_hear_how_long_a_draining_replica_may_be_used(may_linger: bool) -> None:
    now_s = 0.0
    directory = Directory(lambda: now_s)
    directory.beat_replica(replica("a", state="ready"))
    directory.order("a", Drain(30.0, may_linger))
    now_s = 2.0
    (told,) = directory.snapshot().replicas
    assert (told.leaves_in_s, told.may_linger) == (28.0, may_linger)


def test_members_are_the_replicas_that_can_be_linked_to_and_when_they_leave(directory: Directory, clock: Clock) -> None:
    directory.beat_replica(replica("a", address="tcp://h:1"))
    directory.beat_replica(replica("b", address="tcp://h:2"))
    directory.beat_replica(replica("c", "draining", "tcp://h:3"))
    directory.beat_replica(replica("d", "starting", ""))
    directory.beat_replica(replica("e", "unhealthy", "tcp://h:5"))
    directory.order("b", Drain(30.0, may_linger=True))
    clock.now_s += 2.0
    listed = members(directory.snapshot())
    found = [(m.replica_id, m.address, m.is_draining, m.leaves_in_s, m.may_linger) for m in listed]
    assert found == [
        ("a", "tcp://h:1", False, None, False),
        ("b", "tcp://h:2", True, 28.0, True),
        ("c", "tcp://h:3", True, None, False),
    ]


@pytest.mark.parametrize("order", [Drain(5.0), Suffer(Fault("slow", 2.0)), Strike("kill"), Strike("hang")], ids=str)
def test_orders_arrive_as_they_were_given(directory: Directory, order: Order) -> None:
    directory.beat_replica(replica("a"))
    assert directory.order("a", msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=Order)) is True
    assert directory.beat_replica(replica("a")) == [order]


def test_a_replica_that_is_struck_is_ready_until_it_is_felt(directory: Directory) -> None:
    directory.beat_replica(replica("a"))
    before = directory.version
    directory.order("a", Strike("kill"))
    assert directory.version == before
    assert [entry.state for entry in directory.snapshot().replicas] == ["ready"]


def test_a_fleet_that_closes_is_told_of_at_once_and_may_open_again(directory: Directory) -> None:
    before = directory.version
    directory.set_closing(True)
    directory.set_closing(True)
    assert (directory.version, directory.snapshot().is_closing) == (before + 1, True)
    directory.set_closing(False)
    assert (directory.version, directory.snapshot().is_closing) == (before + 2, False)


NOTICE = NodeNotice("preemption", "aws", True, 1060.0, 1000.0)


def test_a_nodes_notice_is_told_at_once_and_forgotten_without_beats(directory: Directory, clock: Clock) -> None:
    directory.beat_node(NodeEntry("h", ["aws"]))
    before = directory.version
    directory.beat_node(NodeEntry("h", ["aws"]))
    assert directory.version == before
    directory.beat_node(NodeEntry("h", ["aws"], [NOTICE]))
    assert directory.version == before + 1
    assert directory.snapshot().nodes == [NodeEntry("h", ["aws"], [NOTICE])]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(directory.snapshot()), type=Snapshot) == directory.snapshot()
    clock.now_s += EXPIRY_S + 1
    assert directory.snapshot().nodes == []
    assert directory.version == before + 2


@pytest.mark.parametrize(
    ("notice", "words"),
    [
        (NOTICE, "leaves in 50 s: preemption (aws)"),
        (NodeNotice("operator", "operator", True, None, 1000.0), "goes: operator (operator)"),
        (NodeNotice("maintenance", "azure", True, 900.0, 800.0), "leaves in 0 s: maintenance (azure)"),
        (NodeNotice("rebalance", "aws", False, None, 1000.0), "may go: rebalance (aws)"),
        (NodeNotice("pause", "azure", False, 1060.0, 1000.0), "pauses for some seconds: pause (azure)"),
    ],
)
def test_a_notice_in_words(notice: NodeNotice, words: str) -> None:
    assert notice.describe(1010.0) == words
