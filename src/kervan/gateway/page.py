"""One gateway's Prometheus page: vLLM's metrics of the process, kervan's own, and the fleet's as of one engine."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence

import aiohttp
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kervan import metrics
from kervan.fleet import pinned_tls
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.events import Counted
from kervan.fleet.histogram import PAUSE_BOUNDS_S, START_BOUNDS_S, Histogram
from kervan.fleet.usage import UNKNOWN
from kervan.gateway.keys import KeyRing
from kervan.metrics import Descriptor
from kervan.vendor import vllm_names

# By the values of a metric's labels, in their order; one value alone is that of a metric without any.
Value = float | Histogram
Values = Value | Mapping[tuple[str, ...], Value]

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
GATEWAY_STATES = ("ready", "not_ready", "late")


class _Families(Collector):
    """Metrics that are there already, as `generate_latest` asks for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def write(
    own: Mapping[Descriptor, Values],
    *,
    fleet_name: str,
    model_name: str,
    snapshot: Snapshot,
    age_s: float = 0.0,
    has_vllm: bool,
) -> str:
    """The page. `own`: what this gateway counts; all metrics get the label fleet, and kervan's model_name.

    `snapshot`: what the directory told, `age_s` ago; `has_vllm`: vLLM's app runs in this process and has metrics.
    """
    families = [family for family in REGISTRY.collect() if family.name not in REPLACED_GAUGES] if has_vllm else []
    families += _engine(model_name, snapshot.replicas)
    fleet = {"fleet": fleet_name}
    for family in families:
        family.samples = [sample._replace(labels=fleet | sample.labels) for sample in family.samples]
    labels = {**fleet, "model_name": model_name}
    told = {**own, **_of_fleet(snapshot, age_s)}
    families += [_family(descriptor, values, labels) for descriptor, values in told.items()]
    return generate_latest(_Families(families)).decode()


def key_metrics(keys: KeyRing) -> dict[Descriptor, Values]:
    """What each API key has used at this gateway; those that were revoked are gone with their last stream."""
    accounts = {(account.name,): account for account in keys.accounts()}
    totals = {name: account.total for name, account in accounts.items()}
    rejected: dict[tuple[str, ...], float] = {(UNKNOWN, "key"): 0}  # from 0 on, so that the first one is a rate
    for name, account in accounts.items():
        rejected |= {(*name, why): count for why, count in account.rejected.items()}
    return {
        metrics.KEY_REQUESTS: {name: total.requests for name, total in totals.items()},
        metrics.KEY_PROMPT_TOKENS: {name: total.prompt_tokens for name, total in totals.items()},
        metrics.KEY_CACHED_TOKENS: {name: total.cached_tokens for name, total in totals.items()},
        metrics.KEY_GENERATED_TOKENS: {name: total.generated_tokens for name, total in totals.items()},
        metrics.KEY_STREAMS: {name: total.streams for name, total in totals.items()},
        metrics.KEY_REJECTED: rejected,
    }


def _family(descriptor: Descriptor, values: Values, shared: Mapping[str, str]) -> Metric:
    name = descriptor.name
    family = Metric(name.removesuffix("_total"), descriptor.help, descriptor.kind)
    for label_values, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        labels = {**shared, **dict(zip(descriptor.labels, label_values, strict=True))}
        if isinstance(value, Histogram):
            buckets = value.buckets()
            for bound, count in buckets:
                family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{name}_count", labels, buckets[-1][1])
            family.add_sample(f"{name}_sum", labels, value.sum_s)
        else:
            family.add_sample(name, labels, value)
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


def _of_fleet(snapshot: Snapshot, age_s: float) -> dict[Descriptor, Values]:
    """What the directory has told of all replicas and gateways."""
    replicas, gateways, events = snapshot.replicas, snapshot.gateways, snapshot.events
    states = ["late" if replica.lateness else replica.state for replica in replicas]
    of_gateways = ["late" if g.lateness else "ready" if g.is_ready else "not_ready" for g in gateways]
    live = [replica for replica in replicas if replica.is_reachable]
    told: dict[Descriptor, Values] = {
        metrics.SLO_BOUND: {
            (name,): bound
            for name in ("ttft", "tpot", "e2e")
            if (bound := getattr(snapshot.slo, f"{name}_s")) is not None
        },
        metrics.REPLICAS: {(state,): states.count(state) for state in STATES},
        metrics.REPLICA_RUNNING: {(r.id, r.pool): r.running for r in live},
        metrics.REPLICA_WAITING: {(r.id, r.pool): r.waiting for r in live},
        metrics.REPLICA_KV_CACHE: {(r.id, r.pool): r.kv_cache_usage for r in live},
        metrics.REPLICA_BEAT_AGE: {(r.id, r.pool): r.beat_age_s + age_s for r in replicas},
        metrics.REPLICA_STARTS: _by_label(events.starts),
        metrics.REPLICA_START: _histograms(events.start_s, START_BOUNDS_S),
        metrics.START_FAILURES: events.start_failures,
        metrics.DRAINS: _by_label(events.drains),
        metrics.NOTICES: {
            (kind, source): count for kind, sources in events.notices.items() for source, count in sources.items()
        },
        metrics.NODES_NOTICED: sum(bool(node.notices) for node in snapshot.nodes),
        metrics.NOTICE_TO_EMPTY: _histogram(events.notice_to_empty_s, PAUSE_BOUNDS_S),
        metrics.REPLICAS_TARGET: _by_label(snapshot.targets),
        metrics.REPLICAS_MINIMUM: {(pool,): least for pool, (least, _) in snapshot.bounds.items()},
        metrics.REPLICAS_MAXIMUM: {(pool,): most for pool, (_, most) in snapshot.bounds.items()},
        metrics.COST: _by_label(snapshot.usd_per_h),
        metrics.GATEWAYS: {(state,): of_gateways.count(state) for state in GATEWAY_STATES},
        metrics.GATEWAY_BEAT_AGE: {(g.id,): g.beat_age_s + age_s for g in gateways},
        metrics.GATEWAY_BUSY: {(g.id,): g.busy for g in gateways},
    }
    if (scaling := snapshot.scaling) is not None:
        told |= {
            metrics.REPLICAS_ROOM: {(pool,): room for pool, room in scaling.room.items() if room is not None},
            metrics.DECISIONS: {
                (pool, way): count for pool, ways in scaling.changes.items() for way, count in ways.items()
            },
            metrics.AUTOSCALING_NUMBER: {(scaling.policy, name): value for name, value in scaling.numbers.items()},
            metrics.AUTOSCALING_PROBLEM: {(scaling.policy,): bool(scaling.problem)},
            metrics.AUTOSCALING_CHANGED: {(scaling.policy,): scaling.since_s},
        }
    return told


def _by_label(counts: Mapping[str, float]) -> dict[tuple[str, ...], Value]:
    return {(name,): count for name, count in counts.items()}


def _histograms(counted: Mapping[str, Counted], bounds: tuple[float, ...]) -> dict[tuple[str, ...], Value]:
    return {(name,): _histogram(one, bounds) for name, one in counted.items()}


def _histogram(counted: Counted | None, bounds: tuple[float, ...]) -> Histogram:
    return Histogram(bounds) if counted is None else Histogram(bounds, counted.counts, counted.sum_s)


def pinned(address: str) -> tuple[str, aiohttp.Fingerprint | bool]:
    """A gateway's internal address (`fleet.pinned_tls`) as a URL, and what aiohttp is to check, as its `ssl`."""
    url, digest = pinned_tls.split(address)
    return url, aiohttp.Fingerprint(bytes.fromhex(digest)) if digest else True


async def fetch(addresses: Iterable[str]) -> list[str | None]:
    """The pages of other gateways, by their internal addresses, in order.

    None for one that does not come within PEER_TIMEOUT_S. They are asked directly: a proxy that the environment names
    does not know addresses inside of the cluster.
    """
    timeout = aiohttp.ClientTimeout(total=PEER_TIMEOUT_S)

    async def get(session: aiohttp.ClientSession, address: str) -> str | None:
        url, pin = pinned(address)
        try:
            async with session.get(f"{url}/metrics", ssl=pin) as response:
                return await response.text() if response.ok else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        return await asyncio.gather(*(get(session, address) for address in addresses))
