"""One gateway's Prometheus page: vLLM's metrics of the process, kervan's own, and the fleet's as of one engine."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import aiohttp
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kervan.fleet.directory import ReplicaEntry, Scaling, Snapshot
from kervan.fleet.histogram import Histogram
from kervan.vendor import vllm_names

# Name, kind, help and value, or values by the labels that the family has beside those of all.
Labels = tuple[tuple[str, str], ...]
Row = tuple[str, Literal["gauge", "counter"], str, float | Mapping[Labels, float]]
HistogramRow = tuple[str, str, Mapping[Labels, Histogram]]

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
STATES = ("starting", "ready", "draining", "unhealthy", "late")


class _Families(Collector):
    """Metrics that are there already, as `generate_latest` asks for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def write(
    rows: Iterable[Row],
    histograms: Iterable[HistogramRow] = (),
    *,
    fleet_name: str,
    model_name: str,
    snapshot: Snapshot,
    age_s: float = 0.0,
    has_vllm: bool,
) -> str:
    """The page. `rows` and `histograms`: the gateway's own metrics; kervan's all get the labels fleet and model_name.

    `snapshot`: what the directory told, `age_s` ago; `has_vllm`: vLLM's app runs in this process and has metrics.
    """
    families = [family for family in REGISTRY.collect() if family.name not in REPLACED_GAUGES] if has_vllm else []
    families += _engine(model_name, snapshot.replicas)
    own = [*map(_family, rows), *(_histogram(*row) for row in histograms), *_fleet(snapshot, age_s)]
    labels = {"fleet": fleet_name, "model_name": model_name}
    for family in own:
        family.samples = [sample._replace(labels=labels | sample.labels) for sample in family.samples]
    return generate_latest(_Families([*families, *own])).decode()


def _family(row: Row) -> Metric:
    name, kind, text, values = row
    family = Metric(name.removesuffix("_total"), text, kind)
    for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        family.add_sample(name, dict(labels), value)
    return family


def _histogram(name: str, text: str, values: Mapping[Labels, Histogram]) -> Metric:
    family = Metric(name, text, "histogram")
    for labels, histogram in values.items():
        buckets = histogram.buckets()
        for bound, count in buckets:
            family.add_sample(f"{name}_bucket", {**dict(labels), "le": bound}, count)
        family.add_sample(f"{name}_count", dict(labels), buckets[-1][1])
        family.add_sample(f"{name}_sum", dict(labels), histogram.sum_s)
    return family


def _engine(model_name: str, replicas: Sequence[ReplicaEntry]) -> Iterator[Metric]:
    """vLLM's engine gauges for the fleet as one engine."""
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


def _fleet(snapshot: Snapshot, age_s: float) -> Iterator[Metric]:
    """kervan's own of all replicas and gateways."""
    states = GaugeMetricFamily("kervan_replicas", "Replicas by state; late: no heartbeat lately.", labels=("state",))
    found = ["late" if replica.lateness else replica.state for replica in snapshot.replicas]
    for state in STATES:
        states.add_metric((state,), found.count(state))
    yield states
    targets = GaugeMetricFamily("kervan_replicas_target", "Replicas that the pool is to have now.", labels=("pool",))
    for pool, target in snapshot.targets.items():
        targets.add_metric((pool,), target)
    yield targets
    if snapshot.scaling is not None:
        yield from _scaling(snapshot.scaling)
    gateways = GaugeMetricFamily(
        "kervan_gateway_heartbeat_age_seconds", "Since the gateway's last heartbeat.", labels=("gateway",)
    )
    for gateway in snapshot.gateways:
        gateways.add_metric((gateway.id,), gateway.beat_age_s + age_s)
    yield gateways
    ages = GaugeMetricFamily(
        "kervan_replica_heartbeat_age_seconds", "Since the replica's last heartbeat.", labels=("replica", "pool")
    )
    for replica in snapshot.replicas:
        ages.add_metric((replica.id, replica.pool), replica.beat_age_s + age_s)
    yield ages
    live = [replica for replica in snapshot.replicas if replica.is_reachable]
    for field, text in (
        ("running", "Requests in the replica's batch."),
        ("waiting", "Requests queued at the replica."),
        ("kv_cache_usage", "The replica's KV cache use, 0 to 1."),
    ):
        family = GaugeMetricFamily(f"kervan_replica_{field}", text, labels=("replica", "pool"))
        for replica in live:
            family.add_metric((replica.id, replica.pool), getattr(replica, field))
        yield family


def _scaling(scaling: Scaling) -> Iterator[Metric]:
    """What the autoscaling policy decided last."""
    rooms = GaugeMetricFamily("kervan_replicas_room", "Replicas that the cluster can place.", labels=("pool",))
    for pool, room in scaling.room.items():
        if room is not None:
            rooms.add_metric((pool,), room)
    yield rooms
    numbers = GaugeMetricFamily(
        "kervan_autoscaling_number", "What the policy's last decision stands on.", labels=("policy", "number")
    )
    for name, value in scaling.numbers.items():
        numbers.add_metric((scaling.policy, name), value)
    yield numbers
    stuck = GaugeMetricFamily(
        "kervan_autoscaling_problem", "1 while no decision can be made, or not be followed.", labels=("policy",)
    )
    stuck.add_metric((scaling.policy,), bool(scaling.problem))
    yield stuck
    since = GaugeMetricFamily(
        "kervan_autoscaling_changed_timestamp_seconds", "When the targets changed last.", labels=("policy",)
    )
    since.add_metric((scaling.policy,), scaling.since_s)
    yield since


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
