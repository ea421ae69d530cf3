"""What a directory counts of its fleet."""

from kervan.fleet.directory import Directory, Drain, NodeEntry, NodeNotice, ReplicaEntry, ReplicaState, StartFailure

GOES = NodeNotice("preemption", "aws", True, 100.0, 0.0)
MAY_GO = NodeNotice("rebalance", "aws", False, None, 0.0)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def replica(
    name: str, state: ReplicaState = "ready", *, node: str = "h", running: int = 0, age_s: float = 0.0
) -> ReplicaEntry:
    return ReplicaEntry(name, "spot", node, 1, state, "a:1", running=running, age_s=age_s)


def test_starts_count_once_and_take_the_time_until_ready() -> None:
    directory = Directory(Clock())
    directory.beat_replica(replica("a", "starting", age_s=1.0))
    directory.beat_replica(replica("a", "starting", age_s=2.0))
    directory.beat_replica(replica("a", age_s=7.0))
    directory.beat_replica(replica("a", age_s=8.0))
    directory.beat_replica(replica("b", age_s=500.0))  # it was there before this directory
    directory.report_failure(StartFailure("c", "EngineError", "no"))
    events = directory.snapshot().events
    assert (events.starts, events.start_failures) == ({"spot": 2}, 1)
    assert (sum(events.start_s["spot"].counts), events.start_s["spot"].sum_s) == (1, 7.0)


def test_a_drain_counts_once_whoever_tells_of_it() -> None:
    directory = Directory(Clock())
    for name in ("a", "b"):
        directory.beat_replica(replica(name))
    assert directory.snapshot().events.drains == {"spot": 0}
    directory.order("a", Drain(30.0))
    directory.beat_replica(replica("a", "draining"))
    directory.beat_replica(replica("b", "draining"))
    assert directory.snapshot().events.drains == {"spot": 2}


def told(directory: Directory) -> tuple[dict[str, dict[str, int]], int, float]:
    events = directory.snapshot().events
    assert events.notice_to_empty_s is not None
    return events.notices, sum(events.notice_to_empty_s.counts), events.notice_to_empty_s.sum_s


def test_a_node_is_empty_when_no_replica_on_it_has_a_stream() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.beat_replica(replica("a", running=3))
    directory.beat_replica(replica("b", node="other", running=3))
    directory.beat_node(NodeEntry("h", notices=[MAY_GO]))
    assert told(directory) == ({"rebalance": {"aws": 1}}, 0, 0.0)
    directory.beat_node(NodeEntry("h", notices=[MAY_GO, GOES]))
    directory.beat_node(NodeEntry("other2", notices=[GOES]))  # nothing of this fleet is there
    told(directory)
    clock.now_s += 4.0
    directory.beat_replica(replica("a", "draining", running=1))
    directory.beat_replica(replica("b", node="other", running=3))
    assert told(directory)[1] == 0
    clock.now_s += 2.0
    directory.beat_replica(replica("a", "draining"))
    assert told(directory) == ({"rebalance": {"aws": 1}, "preemption": {"aws": 2}}, 1, 6.0)
    directory.remove("a")
    clock.now_s += 30.0
    assert told(directory)[1] == 1


def test_a_node_that_dies_with_its_streams_is_empty_then() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.beat_replica(replica("a", running=3))
    directory.beat_node(NodeEntry("h", notices=[GOES]))
    told(directory)
    clock.now_s += 20.0  # neither it nor its node is heard of
    assert told(directory)[1:] == (1, 20.0)
