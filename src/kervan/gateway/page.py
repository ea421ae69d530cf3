"""One gateway's Prometheus page: vLLM's metrics of the process, kervan's own, and the fleet's as of one engine."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import aiohttp
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kervan.fleet.directory import ReplicaEntry
from kervan.vendor import vllm_names

# Name, kind, help and value.
Row = tuple[str, Literal["gauge", "counter"], str, float]

PEER_TIMEOUT_S = 2.0
# vLLM's gauges of one engine, replaced by the fleet's, computed from all replicas.
REPLACED_GAUGES = frozenset(
    {
        vllm_names.REQUESTS_RUNNING,
        vllm_names.REQUESTS_WAITING,
        vllm_names.REQUESTS_WAITING_BY_REASON,
        vllm_names.KV_CACHE_USAGE,
    }
)
STATES = ("starting", "ready", "draining", "unhealthy")


class _Families(Collector):
    """Metrics that are there already, as `generate_latest` asks for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def write(rows: Iterable[Row], *, model_name: str, replicas: Sequence[ReplicaEntry], has_vllm: bool) -> str:
    """The page. `rows`: the gateway's own metrics; `has_vllm`: vLLM's app runs in this process and has metrics."""
    families = [family for family in REGISTRY.collect() if family.name not in REPLACED_GAUGES] if has_vllm else []
    families += [
        (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, text, value=value)
        for name, kind, text, value in rows
    ]
    families += _fleet(model_name, replicas)
    return generate_latest(_Families(families)).decode()


def _fleet(model_name: str, replicas: Sequence[ReplicaEntry]) -> Iterator[Metric]:
    """vLLM's engine gauges for the fleet as one engine, and kervan's own per replica."""
    live = [replica for replica in replicas if replica.is_reachable]
    usage = sum(replica.kv_cache_usage for replica in live) / len(live) if live else 0.0
    for name, text, value in (
        (
            vllm_names.REQUESTS_RUNNING,
            "Requests in the batches of all replicas.",
            sum(replica.running for replica in live),
        ),
        (vllm_names.REQUESTS_WAITING, "Requests queued at all replicas.", sum(replica.waiting for replica in live)),
        (vllm_names.KV_CACHE_USAGE, "KV cache use, 0 to 1, mean of the replicas.", usage),
    ):
        family = GaugeMetricFamily(name, text, labels=("engine", "model_name"))
        family.add_metric(("0", model_name), value)
        yield family
    states = GaugeMetricFamily("kervan_replicas", "Replicas by state.", labels=("state",))
    for state in STATES:
        states.add_metric((state,), sum(replica.state == state for replica in replicas))
    yield states
    for field, text in (
        ("running", "Requests in the replica's batch."),
        ("waiting", "Requests queued at the replica."),
        ("kv_cache_usage", "The replica's KV cache use, 0 to 1."),
    ):
        family = GaugeMetricFamily(f"kervan_replica_{field}", text, labels=("replica", "pool"))
        for replica in live:
            family.add_metric((replica.id, replica.pool), getattr(replica, field))
        yield family


async def fetch(urls: Iterable[str]) -> list[str | None]:
    """The pages of other gateways, in order; None for one that does not come within PEER_TIMEOUT_S.

    They are asked directly: a proxy that the environment names does not know addresses inside of the cluster.
    """
    timeout = aiohttp.ClientTimeout(total=PEER_TIMEOUT_S)

    async def get(session: aiohttp.ClientSession, url: str) -> str | None:
        try:
            async with session.get(url) as response:
                return await response.text() if response.ok else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        return await asyncio.gather(*(get(session, url) for url in urls))
