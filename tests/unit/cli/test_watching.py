"""What `kervan status --why` and `kervan top` say of a fleet, from what its directory holds."""

import dataclasses
import json
from typing import Any

import pytest
from msgspec import structs

from kervan.cli import render, top
from kervan.cli.live import history
from kervan.cli.live.history import events
from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import (
    Decided,
    GatewayEntry,
    NodeEntry,
    NodeNotice,
    PrefixTokens,
    ReplicaEntry,
    Scaling,
    Snapshot,
    StartFailure,
    Traffic,
)
from kervan.serve.placement import NodeDevices
from kervan.serve.status import FleetStatus, fleet_status
from kervan.serve.why import explain, notice_lines, scaling_lines

CONFIG = FleetConfig(model="org/model", replicas=2, gateways=1, tp=4)


def replica(name: str, state: Any = "ready", **more: Any) -> ReplicaEntry:
    return ReplicaEntry(**{"id": name, "pool": "on-demand", "node": "10.0.0.1", "pid": 7, "state": state} | more)


def gateway(name: str = "gw", **more: Any) -> GatewayEntry:
    given = {"id": name, "node": "10.0.0.1", "pid": 8, "url": "http://h:1", "internal_url": "", "is_ready": True} | more
    return GatewayEntry(**given)


def snapshot(*entries: Any, failures: tuple[StartFailure, ...] = ()) -> Snapshot:
    return Snapshot(
        1,
        [e for e in entries if isinstance(e, ReplicaEntry)],
        [e for e in entries if isinstance(e, GatewayEntry)],
        list(failures),
        [e for e in entries if isinstance(e, NodeEntry)],
    )


def node(name: str, free: float, total: int = 8) -> NodeDevices:
    return NodeDevices(name, total, free, "accelerator_type:H200")


WHOLE = (replica("a"), replica("b"), gateway())


@pytest.mark.parametrize(
    ("entries", "nodes", "sentence"),
    [
        pytest.param(
            (replica("a"), gateway()), [node("n1", 3), node("n2", 0)],
            "1 replica of 2 waits for 4 GPUs on one node: node n1 has 3 free of 8, node n2 has 0 free of 8; "
            "add a node, or kervan scale 1", id="no room",
        ),
        pytest.param((replica("a"), gateway()), [node("n1", 4)], "there is room for 4 GPUs on one node",
                     id="being placed"),
        pytest.param((replica("a"), gateway()), [], "Ray is starting the process", id="CPU"),
        pytest.param((replica("a"), replica("b", "starting", reason="for 9 s", log_path="/l"), gateway()), [],
                     "replica b is starting for 9 s on 10.0.0.1; its log: /l", id="starting"),
        pytest.param((replica("a"), replica("b", "unhealthy", reason="no step for 60 s"), gateway()), [],
                     "replica b is unhealthy: no step for 60 s; it is replaced", id="unhealthy"),
        pytest.param((replica("a"), replica("b", "draining"), gateway()), [], "replica b is draining", id="draining"),
        pytest.param((replica("a"), replica("b", reason="too slow"), gateway()), [], "replica b: too slow", id="note"),
        pytest.param((replica("a"), replica("b")), [], "1 of 1 gateways are missing", id="no gateway"),
        pytest.param((replica("a"), replica("b"), gateway(is_ready=False, reason="the gateway is starting")), [],
                     "gateway gw is not ready: the gateway is starting", id="gateway starting"),
    ],
)  # fmt: skip
def test_one_sentence_for_each_thing(entries: tuple[Any, ...], nodes: list[NodeDevices], sentence: str) -> None:
    (told,) = explain(CONFIG, snapshot(*entries), nodes, [])
    assert sentence in told


def test_a_whole_fleet_needs_no_words() -> None:
    assert explain(CONFIG, snapshot(*WHOLE), [node("n", 0)], []) == []


SCALING = Scaling(
    "slo", {"on-demand": 2}, "2 are needed: 9 requests/s", {"load_requests_per_s": 9.0}, since_s=0.0,
    history=[Decided(0.0, {"on-demand": 1}, {"on-demand": 2}, "2 are needed: 9 requests/s")],
)  # fmt: skip


def test_what_keeps_autoscaling_from_its_work_comes_first() -> None:
    stuck = structs.replace(SCALING, problem="no gateway has told anything for 6 s; the numbers stay")
    (told,) = explain(CONFIG, structs.replace(snapshot(*WHOLE), scaling=stuck), [node("n", 0)], [])
    assert told == "autoscaling (slo): no gateway has told anything for 6 s; the numbers stay"


def test_why_there_are_so_many_replicas_is_told_with_numbers_and_the_last_changes() -> None:
    now, numbers, change = scaling_lines(SCALING)
    assert now == "autoscaling (slo): on-demand 2: 2 are needed: 9 requests/s"
    assert numbers == "  load_requests_per_s 9"
    assert change.endswith("on-demand 1 -> 2: 2 are needed: 9 requests/s")
    assert scaling_lines(SCALING, last=0) == [now, numbers]
    assert scaling_lines(Scaling("slo", {"on-demand": 1}, "")) == [
        "autoscaling (slo): on-demand 1: nothing is decided yet"
    ]


def test_a_decision_is_an_event_once() -> None:
    before = structs.replace(snapshot(*WHOLE), scaling=structs.replace(SCALING, history=[]))
    after = structs.replace(snapshot(*WHOLE), scaling=SCALING)
    (event,) = events(before, after)
    assert "on-demand 1 -> 2" in event
    assert list(events(after, after)) == []


def test_lost_nodes_and_failed_starts_are_named() -> None:
    failed = StartFailure("c", "CapacityError", "out of memory; use --tp 8")
    told = explain(CONFIG, snapshot(replica("a"), gateway(), failures=(failed,)), [node("n", 8)], ["10.0.0.9"])
    assert told[1:] == [
        "node 10.0.0.9 is dead; its replicas and gateways are started elsewhere",
        "c failed: out of memory; use --tp 8",
    ]


def test_a_node_lost_long_ago_is_no_news() -> None:
    """Ray lists dead nodes for good, those that an autoscaler took away too."""
    assert explain(CONFIG, snapshot(*WHOLE), [node("n", 0)], ["10.0.0.9"]) == []
    suffering = (replica("a", reason="too slow"), replica("b"), gateway())
    assert explain(CONFIG, snapshot(*suffering), [], ["10.0.0.9"]) == ["replica a: too slow"]


def test_a_lost_node_is_named_while_what_was_on_it_is_still_listed() -> None:
    late = {"node": "10.0.0.9", "beat_age_s": 6.2}
    told = explain(CONFIG, snapshot(replica("a"), replica("b", **late), gateway(**late)), [], ["10.0.0.9"])
    why = "it is dead, or node 10.0.0.9 is overloaded or cut off; after 10 s without one it is listed no more"
    assert told == [
        f"replica b is late: last heartbeat 6.2 s ago; {why}",
        f"gateway gw is late: last heartbeat 6.2 s ago; {why}",
        "node 10.0.0.9 is dead; its replicas and gateways are started elsewhere",
    ]


def test_what_does_not_fit_since_a_node_was_lost_is_explained() -> None:
    told = explain(CONFIG, snapshot(replica("a"), gateway()), [node("n1", 0, 4)], ["10.0.0.9"])
    assert told == [
        "1 replica of 2 waits for 4 GPUs on one node: node n1 has 0 free of 4; add a node, or kervan scale 1",
        "node 10.0.0.9 is dead; its replicas and gateways are started elsewhere",
    ]


def test_a_fleet_whose_last_gpu_is_gone_waits_for_gpus() -> None:
    """Nothing is started on the CPU cores that are left."""
    config = dataclasses.replace(CONFIG, device="GPU")
    told = explain(config, snapshot(replica("a"), gateway()), [], [])
    assert told == [
        "1 replica of 2 waits for 4 GPUs on one node: no node has any; add a node, or kervan scale 1",
    ]


BUSY = (
    replica("a", running=3, waiting=1, kv_cache_usage=0.25),
    replica("b", "draining"),
    gateway("g1", streams=3, moved=2, traffic={"a": Traffic(100.0, 0.2), "b": Traffic(5.0, None)}),
    gateway("g2", streams=1, held=1, traffic={"a": Traffic(50.0, 0.4)}),
)


def test_status_sums_what_gateways_tell_of_prefix_caches() -> None:
    traffic = [Traffic(0.0, None, prefix=PrefixTokens(*told)) for told in ((300, 200, 150), (64, 64, 80))]
    gateways = [gateway(f"g{n}", traffic={"a": told}) for n, told in enumerate(traffic)]
    status = fleet_status(CONFIG, snapshot(replica("a"), replica("b"), *gateways)).to_dict()
    assert [shown["prefix_tokens"] for shown in status["replicas"]] == [
        {"possible": 364, "predicted": 264, "hits": 230},
        {"possible": 0, "predicted": 0, "hits": 0},
    ]


def test_traffic_is_summed_over_gateways() -> None:
    assert history.traffic(snapshot(*BUSY), "a") == history.ReplicaTraffic(150.0, pytest.approx(0.3))
    assert history.traffic(snapshot(*BUSY), "b") == history.ReplicaTraffic(5.0, None)
    assert history.traffic(snapshot(*BUSY), "unknown") == history.ReplicaTraffic(0, None)


def shown(status: FleetStatus, width: int = 160) -> list[str]:
    """What `kervan top --once` prints."""
    return [line.plain.rstrip() for line in top.view(status, width)]


def test_one_look_has_the_head_the_replicas_and_the_gateways() -> None:
    told = shown(FleetStatus("chat", "http://h:1", CONFIG, snapshot(*BUSY)))
    assert told[0].split()[:2] == ["chat", "http://h:1"]
    assert told[1] == "4 streams, 1 held, 155 tok/s, TTFT 300 ms"
    rows = {line.split()[0]: line.split() for line in told if line}
    assert rows["replica"][:8] == ["replica", "state", "run", "wait", "KV", "tok/s", "TTFT", "pool"]
    assert rows["a"][:8] == ["a", "ready", "3", "1", "25%", "150", "300", "ms"]
    assert rows["b"][:7] == ["b", "draining", "0", "0", "0%", "5", "-"]
    assert rows["g1"][:7] == ["g1", "ready", "3", "0", "2", "0%", "105"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_one_look_fits_where_it_is_printed(width: int) -> None:
    long = replica("c", "unhealthy", reason="no step for 60 s, and more that is to be said of it " * 4)
    told = shown(FleetStatus("chat", "http://h:1", CONFIG, snapshot(*BUSY, long)), width)
    assert max(len(line) for line in told[1:]) <= width  # the first one has addresses, to be copied
    assert any(line.startswith("c ") and "unhealthy" in line for line in told)


def test_events_between_two_looks() -> None:
    before = snapshot(replica("a"), replica("b", "starting"), replica("c"), gateway("g1", moved=2))
    failed = StartFailure("d", "EngineError", "broke", number=1)
    after = snapshot(
        replica("a"), replica("b"), replica("d", "starting"), gateway("g1", moved=5), gateway("g2", is_ready=False),
        failures=(failed,),
    )  # fmt: skip
    assert list(events(before, after)) == [
        "replica b: starting -> ready",
        "replica c is gone (was ready)",
        "replica d appeared: starting",
        "gateway g2 appeared: starting",
        "gateway g1 moved 3 streams",
        "d failed: broke",
    ]
    assert list(events(after, after)) == []


def test_what_is_late_is_shown_so_with_its_last_sign_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    found = snapshot(replica("a"), replica("b", beat_age_s=3.14), gateway("g1", beat_age_s=6.2), gateway("g2"))
    told = FleetStatus("chat", "http://h:1", CONFIG, found)
    render.print_status(told)
    for found_lines in (capsys.readouterr().out.splitlines(), shown(told)):
        lines = {line.split()[0]: line for line in found_lines if line.strip()}
        assert "late: last heartbeat 3.1 s ago, before that ready" in lines["b"]
        assert "late: last heartbeat 6.2 s ago, before that ready" in lines["g1"]
        assert "late" not in lines["a"] + lines["g2"]
    listed = top.to_dict(told)
    assert [(r["late"], r["last_heartbeat_s"]) for r in listed["replicas"]] == [(False, 0.0), (True, 3.14)]  # type: ignore[attr-defined]
    assert [(g["late"], g["ready"]) for g in listed["gateways"]] == [(True, False), (False, True)]  # type: ignore[attr-defined]
    assert list(events(snapshot(replica("b")), snapshot(replica("b", beat_age_s=3.14)))) == ["replica b: ready -> late"]


def test_brackets_in_names_and_reasons_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    failed = StartFailure("gw", "FleetError", "ended with status 1; its last line: INFO [model.py:733] [/tmp/x] broke")
    config = dataclasses.replace(CONFIG, model="/models/[bold]a[/b]")
    render.print_status(FleetStatus("chat", "http://h:1", config, snapshot(*WHOLE, failures=(failed,))))
    printed = capsys.readouterr().out
    assert "/models/[bold]a[/b]  tp" in printed
    assert f"gw failed: {failed.message}" in printed


NOW_S = 1000.0
PREEMPTION = NodeNotice("preemption", "aws", True, 1100.0, 980.0)
LEAVING = NodeEntry("10.0.0.1", ["aws"], [PREEMPTION])


def test_what_is_said_of_nodes() -> None:
    found = snapshot(
        *WHOLE, LEAVING, NodeEntry("10.0.0.2", ["azure"], [], "azure cannot be read: [Errno 1]"), NodeEntry("10.0.0.3", ["aws"]),
        NodeEntry("10.0.0.4", ["aws"], [], "", is_drained=True),
    )  # fmt: skip
    assert notice_lines(found, NOW_S) == [
        "node 10.0.0.1 leaves in 100 s: preemption (aws)",
        "node 10.0.0.2 may miss its notice: azure cannot be read: [Errno 1]",
        "node 10.0.0.4 is drained: Ray puts nothing there any more",
    ]


def test_status_and_top_show_a_node_under_notice(capsys: pytest.CaptureFixture[str]) -> None:
    told = FleetStatus("chat", "http://h:1", CONFIG, snapshot(*WHOLE, LEAVING))
    line = "node 10.0.0.1 leaves in 0 s: preemption (aws)"
    render.print_status(told)
    assert line in capsys.readouterr().out
    assert line in shown(told)
    assert list(events(snapshot(*WHOLE), snapshot(*WHOLE, LEAVING))) == [
        "node 10.0.0.1: leaves in 120 s: preemption (aws)"
    ]
    (node,) = json.loads(json.dumps(told.to_dict()))["nodes"]
    assert (node["node"], node["watches"], node["drained"]) == ("10.0.0.1", ["aws"], False)
    assert node["notices"] == [
        {"kind": "preemption", "source": "aws", "certain": True, "deadline_s": 1100.0, "seen_s": 980.0}
    ]
