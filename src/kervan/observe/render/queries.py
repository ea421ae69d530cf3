"""Every PromQL query of the dashboards and rules, each in one place.

`$F` stands for what selects the fleet, and `$W` for a window: `in_grafana`, `in_rules` and `for_fleet` put them in.
What gateways count is added up. What the directory tells is the same on every page, so of several the maximum counts
(`kervan.metrics`).
"""

from kervan.metrics import Scope

RATE_WINDOW = "$__rate_interval"


def in_grafana(query: str) -> str:
    """For a panel: the fleet is the dashboard's variable, and the window fits the resolution."""
    return query.replace("$F", 'fleet=~"$fleet"').replace("$W", RATE_WINDOW)


def in_rules(query: str, window: str = "5m") -> str:
    """For a rule: of all fleets."""
    return query.replace(",$F}", "}").replace("{$F}", "").replace("$W", window)


def for_fleet(query: str, window: str, **variables: str) -> str:
    """What Grafana would ask with these values of its variables; those that are not given match everything."""
    found = in_grafana(query).replace(RATE_WINDOW, window)
    for name in ("fleet", "replica", "gateway", "hostname", "gpu"):
        found = found.replace(f"${name}", variables.get(name, ".*"))
    return found


def total(metric: str, by: str = "", *, scope: Scope = "gateway", where: str = "") -> str:
    """A gauge over the fleet, or by some of its labels."""
    how = "sum" if scope == "gateway" else "max"
    return f"{how} by ({_labels(by)}) ({metric}{{{_where(where)}}})"


def rate(metric: str, by: str = "", *, scope: Scope = "gateway", where: str = "", how: str = "rate") -> str:
    """Of a counter, per second or (`how="increase"`) in the window."""
    total_how = "sum" if scope == "gateway" else "max"
    return f"{total_how} by ({_labels(by)}) ({how}({metric}{{{_where(where)}}}[$W]))"


def quantile(share: float, metric: str, by: str = "", *, scope: Scope = "gateway", where: str = "") -> str:
    """Of a histogram in the window."""
    return f"histogram_quantile({share:g}, {rate(f'{metric}_bucket', f'{by},le', scope=scope, where=where)})"


def _labels(by: str) -> str:
    return ", ".join(dict.fromkeys(["fleet", *filter(None, by.split(","))]))


def _where(where: str) -> str:
    return f"{where},$F" if where else "$F"


# ---- the SLO

ENDED = "kervan_streams_ended_total"
BAD = f'sum by (fleet) (rate({ENDED}{{outcome=~"slow|broken|refused",$F}}[$W]))'
JUDGED = f'sum by (fleet) (rate({ENDED}{{outcome!="left",$F}}[$W]))'
BAD_SHARE = f"{BAD} / ({JUDGED} > 0)"
"""Of the streams that ended, those that did not keep the SLO, 0 to 1; nothing while none ends."""

# ---- load

OPEN = total("kervan_streams_open")
QUEUED = total("kervan_streams_queued")
QUEUED_BY_CAUSE = total("kervan_streams_queued", "cause")
GENERATED = rate("kervan_replica_generated_tokens_total")
PREFILLED = rate("kervan_replica_prefilled_tokens_total")
ENDED_BY_OUTCOME = rate(ENDED, "outcome")
BROKEN = rate("kervan_streams_broken_total", how="increase")
KEY_REJECTED = rate("kervan_key_rejected_total", "key,reason")
REFUSED = rate("kervan_admission_requests_total", where='decision="queue_full"')
MOVED = rate("kervan_streams_moved_total", how="increase")
MOVED_UNPLANNED = rate("kervan_streams_moved_total", where='reason!="drained"', how="increase")
PREEMPTIONS = rate("vllm:num_preemptions_total")

# ---- replicas

KV_CACHE = total("kervan_replica_kv_cache_usage", "pool,replica", scope="fleet")
# Each gateway that has a stream there sees it stand still; one without sees nothing.
STALLED = "max by (fleet, pool, replica) (kervan_replica_stalled_seconds{$F})"
READY = total("kervan_replicas", scope="fleet", where='state="ready"')
LATE = total("kervan_replicas", scope="fleet", where='state="late"')
TARGET = total("kervan_replicas_target", "pool", scope="fleet")
MINIMUM = total("kervan_replicas_minimum", "pool", scope="fleet")
MAXIMUM = total("kervan_replicas_maximum", "pool", scope="fleet")
ROOM = total("kervan_replicas_room", "pool", scope="fleet")
STARTS = rate("kervan_replica_starts_total", "pool", scope="fleet", how="increase")
START_FAILURES = rate("kervan_start_failures_total", scope="fleet", how="increase")
COST = f"sum by (fleet) ({total('kervan_cost_usd_per_hour', 'pool', scope='fleet')})"

# ---- gateways and the directory

GATEWAY_AGE = total("kervan_gateway_heartbeat_age_seconds", "gateway", scope="fleet")
# All gateways together have not heard of it: what one has not may be its own trouble.
DIRECTORY_AGE = "min by (fleet) (kervan_directory_age_seconds{$F})"

# ---- GPUs, under the names of dcgm-exporter

GPU = 'Hostname=~"$hostname",gpu=~"$gpu"'


def gpu(metric: str) -> str:
    """A gauge of each GPU."""
    return f"max by (Hostname, gpu) ({metric}{{{GPU}}})"


def gpu_rate(metric: str, how: str = "rate") -> str:
    """Of a counter of each GPU."""
    return f"max by (Hostname, gpu) ({how}({metric}{{{GPU}}}[$W]))"


def gpu_throttled(bit: int) -> str:
    """1 while a bit of the clocks' event reasons is set. DCGM before 3.3 had them under an older name."""
    reasons = f"({gpu('DCGM_FI_DEV_CLOCKS_EVENT_REASONS')} or {gpu('DCGM_FI_DEV_CLOCK_THROTTLE_REASONS')})"
    return f"floor({reasons} / {bit}) % 2"


def everywhere(query: str) -> str:
    """A query of GPUs for a rule: of all of them."""
    return query.replace(f"{{{GPU}}}", "")
