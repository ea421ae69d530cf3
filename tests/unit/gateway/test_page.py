"""A gateway's own metrics page, and how it gets those of other gateways."""

import asyncio
from typing import Any

import pytest
from harness.gateway import listening
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from kervan.fleet.directory import ReplicaEntry
from kervan.gateway import page

REPLICAS = [
    ReplicaEntry("r1", "spot", "n", 1, "ready", "a:1", running=3, waiting=2, kv_cache_usage=0.5),
    ReplicaEntry('r"2\n', "on-demand", "n", 1, "draining", "a:2", running=1, kv_cache_usage=0.25),
    ReplicaEntry("r3", "spot", "n", 1, "starting"),
]
ROWS: list[page.Row] = [
    ("kervan_links", "gauge", "Replicas this gateway is linked to.", 2),
    ("kervan_streams_moved_total", "counter", "Streams placed again on another replica.", 7),
]


def families(text: str) -> dict[str, tuple[str, dict[tuple[str, ...], float]]]:
    """Of a page: name -> type, and values by label values."""
    return {
        family.name: (family.type, {tuple(sample.labels.values()): sample.value for sample in family.samples})
        for family in text_string_to_metric_families(text)
    }


def test_a_page_has_the_gateways_metrics_and_the_fleets() -> None:
    text = page.write(ROWS, model_name='m"x', replicas=REPLICAS, has_vllm=False)
    assert families(text) == {
        "kervan_links": ("gauge", {(): 2}),
        "kervan_streams_moved": ("counter", {(): 7}),
        "vllm:num_requests_running": ("gauge", {("0", 'm"x'): 4}),
        "vllm:num_requests_waiting": ("gauge", {("0", 'm"x'): 2}),
        "vllm:kv_cache_usage_perc": ("gauge", {("0", 'm"x'): 0.375}),
        "kervan_replicas": ("gauge", {("starting",): 1, ("ready",): 1, ("draining",): 1, ("unhealthy",): 0}),
        "kervan_replica_running": ("gauge", {("spot", "r1"): 3, ("on-demand", 'r"2\n'): 1}),
        "kervan_replica_waiting": ("gauge", {("spot", "r1"): 2, ("on-demand", 'r"2\n'): 0}),
        "kervan_replica_kv_cache_usage": ("gauge", {("spot", "r1"): 0.5, ("on-demand", 'r"2\n'): 0.25}),
    }
    assert "# HELP kervan_links Replicas this gateway is linked to.\n" in text
    assert "\nkervan_streams_moved_total 7.0\n" in text
    assert '\nkervan_replica_running{pool="spot",replica="r1"} 3.0\n' in text


def test_the_fleets_gauges_stand_for_those_of_vllms_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "of one engine", ["engine"], registry=registry).labels("0").set(9)
    Counter("vllm:prompt_tokens", "of this gateway", registry=registry).inc(5)
    monkeypatch.setattr(page, "REGISTRY", registry)
    found = families(page.write(ROWS, model_name="m", replicas=REPLICAS, has_vllm=True))
    assert found["vllm:num_requests_running"][1] == {("0", "m"): 4}
    assert found["vllm:prompt_tokens"][1] == {(): 5}


async def answering(scope: Any, receive: Any, send: Any) -> None:
    status = 200 if scope["path"] == "/metrics" else 404
    if scope["path"] == "/slow":
        await asyncio.sleep(60)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"up 1\n"})


async def test_other_gateways_are_asked_past_any_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    async with listening(answering) as url:
        assert await page.fetch([f"{url}/metrics"]) == ["up 1\n"]


async def test_a_gateway_that_does_not_answer_has_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PEER_TIMEOUT_S", 1.0)
    async with listening(answering) as url:
        urls = [f"{url}/other", f"{url}/slow", "http://127.0.0.1:1/metrics", f"{url}/metrics"]
        assert await page.fetch(urls) == [None, None, None, "up 1\n"]
