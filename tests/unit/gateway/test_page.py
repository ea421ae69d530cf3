"""A gateway's own metrics page, and how it gets those of other gateways."""

import asyncio
import re
from typing import Any

import pytest
from harness.gateway import listening
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from kervan import metrics
from kervan.config.workload import Slo
from kervan.fleet.directory import GatewayEntry, NodeEntry, NodeNotice, ReplicaEntry, Scaling, Snapshot
from kervan.fleet.events import Counted, EventCounts
from kervan.fleet.histogram import Histogram
from kervan.gateway import page
from kervan.gateway.merged_page import merge_pages
from kervan.metrics import Descriptor

REPLICAS = [
    ReplicaEntry("r1", "spot", "n", 1, "ready", "a:1", running=3, waiting=2, kv_cache_usage=0.5),
    ReplicaEntry('r"2\n', "on-demand", "n", 1, "draining", "a:2", running=1, kv_cache_usage=0.25),
    ReplicaEntry("r3", "spot", "n", 1, "starting", beat_age_s=7.0),
]
OWN: dict[Descriptor, page.Values] = {metrics.LINKS: 2, metrics.STREAMS_MOVED: {("lost",): 7}}
GATEWAYS = [GatewayEntry("gw-1", "n", 2, "", "", True, beat_age_s=0.5, busy=0.25)]
SCALING = Scaling(
    "slo", {"spot": 3}, "3 are needed", {"load_requests_per_s": 2.5}, "there is no room", 1.7e9, {"spot": 2, "x": None},
    changes={"spot": {"up": 2, "down": 1}},
)  # fmt: skip
EVENTS = EventCounts(
    starts={"spot": 4}, start_s={"spot": Counted([0] * 4 + [3] + [0] * 7, 40.5)}, start_failures=1, drains={"spot": 2},
    notices={"preemption": {"aws": 1}}, notice_to_empty_s=Counted([1] + [0] * 12, 0.04),
)  # fmt: skip
NOTICE = NodeNotice("preemption", "aws", True, None, 0.0)
SNAPSHOT = Snapshot(
    1, REPLICAS, GATEWAYS, [], [NodeEntry("n", notices=[NOTICE]), NodeEntry("m")], targets={"spot": 3}, scaling=SCALING,
    slo=Slo(ttft_s=2.0, tpot_s=0.05), bounds={"spot": (1, 8)}, events=EVENTS, usd_per_h={"spot": 7.0},
)  # fmt: skip
LABELS = ("chat", 'm"x')


def families(text: str) -> dict[str, tuple[str, dict[frozenset[str], float]]]:
    """Of a page: name -> type, and values by label values."""
    return {
        family.name: (family.type, {frozenset(sample.labels.values()): sample.value for sample in family.samples})
        for family in text_string_to_metric_families(text)
    }


def test_a_page_has_the_gateways_metrics_and_the_fleets() -> None:
    pauses = Histogram((0.1, 1.0))
    for pause_s in (0.05, 0.5, 0.6, 30.0):
        pauses.observe(pause_s)
    text = page.write(
        {**OWN, metrics.MOVE_PAUSE: pauses}, fleet_name="chat", model_name='m"x', snapshot=SNAPSHOT, age_s=1.0,
        has_vllm=False,
    )  # fmt: skip
    own = {
        "kervan_links": ("gauge", {(): 2}),
        "kervan_streams_moved": ("counter", {("lost",): 7}),
        "kervan_replicas": (
            "gauge",
            {("starting",): 0, ("ready",): 1, ("draining",): 1, ("unhealthy",): 0, ("late",): 1},
        ),
        "kervan_replicas_target": ("gauge", {("spot",): 3}),
        "kervan_replicas_room": ("gauge", {("spot",): 2}),
        "kervan_autoscaling_number": ("gauge", {("slo", "load_requests_per_s"): 2.5}),
        "kervan_autoscaling_problem": ("gauge", {("slo",): 1}),
        "kervan_autoscaling_changed_timestamp_seconds": ("gauge", {("slo",): 1.7e9}),
        "kervan_replica_running": ("gauge", {("r1", "spot"): 3, ('r"2\n', "on-demand"): 1}),
        "kervan_replica_waiting": ("gauge", {("r1", "spot"): 2, ('r"2\n', "on-demand"): 0}),
        "kervan_replica_kv_cache_usage": ("gauge", {("r1", "spot"): 0.5, ('r"2\n', "on-demand"): 0.25}),
        "kervan_replica_heartbeat_age_seconds": (
            "gauge",
            {("r1", "spot"): 1.0, ('r"2\n', "on-demand"): 1.0, ("r3", "spot"): 8.0},
        ),
        "kervan_slo_bound_seconds": ("gauge", {("ttft",): 2.0, ("tpot",): 0.05}),
        "kervan_replica_starts": ("counter", {("spot",): 4}),
        "kervan_start_failures": ("counter", {(): 1}),
        "kervan_drains": ("counter", {("spot",): 2}),
        "kervan_notices": ("counter", {("preemption", "aws"): 1}),
        "kervan_nodes_under_notice": ("gauge", {(): 1}),
        "kervan_replicas_minimum": ("gauge", {("spot",): 1}),
        "kervan_replicas_maximum": ("gauge", {("spot",): 8}),
        "kervan_autoscaling_decisions": ("counter", {("spot", "up"): 2, ("spot", "down"): 1}),
        "kervan_cost_usd_per_hour": ("gauge", {("spot",): 7.0}),
        "kervan_gateways": ("gauge", {("ready",): 1, ("not_ready",): 0, ("late",): 0}),
        "kervan_gateway_heartbeat_age_seconds": ("gauge", {("gw-1",): 1.5}),
        "kervan_gateway_busy_ratio": ("gauge", {("gw-1",): 0.25}),
    }
    found = families(text)
    assert set(found) - {name for name in found if name.startswith("vllm")} == own.keys() | {
        "kervan_stream_move_pause_seconds", "kervan_replica_start_seconds", "kervan_notice_to_empty_seconds"
    }  # fmt: skip
    histogram = {sample.name.rpartition("_")[2] + sample.labels.get("le", ""): sample.value for sample in next(
        family.samples for family in text_string_to_metric_families(text) if family.type == "histogram"
    )}  # fmt: skip
    assert histogram == {"bucket0.1": 1, "bucket1.0": 3, "bucket+Inf": 4, "count": 4, "sum": pytest.approx(31.15)}
    assert {name: found[name] for name in own} == {
        name: (kind, {frozenset({*LABELS, *labels}): value for labels, value in values.items()})
        for name, (kind, values) in own.items()
    }
    assert {name: values for name, values in found.items() if name.startswith("vllm")} == {
        "vllm:num_requests_running": ("gauge", {frozenset({*LABELS, "0"}): 4}),
        "vllm:num_requests_waiting": ("gauge", {frozenset({*LABELS, "0"}): 2}),
        "vllm:kv_cache_usage_perc": ("gauge", {frozenset({*LABELS, "0"}): 0.375}),
    }
    assert f"# HELP kervan_links {metrics.LINKS.help}\n" in text
    started = [line for line in text.splitlines() if line.startswith("kervan_replica_start_seconds_count")]
    assert started == ['kervan_replica_start_seconds_count{fleet="chat",model_name="m\\"x",pool="spot"} 3.0']
    assert '\nkervan_streams_moved_total{fleet="chat",model_name="m\\"x",reason="lost"} 7.0\n' in text
    assert '\nkervan_gateway_heartbeat_age_seconds{fleet="chat",gateway="gw-1",model_name="m\\"x"} 1.5\n' in text


def test_the_merged_page_counts_the_fleet_once_and_each_gateway_apart() -> None:
    text = page.write(OWN, fleet_name="chat", model_name="m", snapshot=SNAPSHOT, has_vllm=False)
    merged = merge_pages({"gw-1": text, "gw-2": text})
    assert merged.count("\nkervan_links{") == 2
    once = ("kervan_replicas_target{", "kervan_replicas_room{", "kervan_autoscaling_number{")
    for name in (*once, 'kervan_replicas{fleet="chat",model_name="m",state="ready"}'):
        assert merged.count(f"\n{name}") == 1
    (age,) = re.findall(r"\nkervan_gateway_heartbeat_age_seconds(\{.*\}) ", merged)
    assert "exported_gateway" not in age


def test_the_fleets_gauges_stand_for_those_of_vllms_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "of one engine", ["engine"], registry=registry).labels("0").set(9)
    Counter("vllm:prompt_tokens", "of this gateway", registry=registry).inc(5)
    monkeypatch.setattr(page, "REGISTRY", registry)
    found = families(page.write(OWN, fleet_name="chat", model_name="m", snapshot=SNAPSHOT, has_vllm=True))
    assert found["vllm:num_requests_running"][1] == {frozenset({"chat", "0", "m"}): 4}
    assert found["vllm:prompt_tokens"][1] == {frozenset({"chat"}): 5}


async def answering(scope: Any, receive: Any, send: Any) -> None:
    status = 200 if scope["path"] == "/metrics" else 404
    if scope["path"] == "/slow/metrics":
        await asyncio.sleep(60)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"up 1\n"})


async def test_other_gateways_are_asked_past_any_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    async with listening(answering) as url:
        assert await page.fetch([url]) == ["up 1\n"]


async def test_a_gateway_that_does_not_answer_has_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PEER_TIMEOUT_S", 1.0)
    async with listening(answering) as url:
        urls = [f"{url}/other", f"{url}/slow", "http://127.0.0.1:1", url]
        assert await page.fetch(urls) == [None, None, None, "up 1\n"]
