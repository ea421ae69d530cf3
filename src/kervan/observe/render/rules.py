"""Recording and alert rules as data, and the file that Prometheus reads.

Each alert says what it means, why its threshold is where it is, and what to do: in its annotations, and in
docs/monitoring.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kervan.observe.render import queries as q

PAGE_URL = "https://github.com/kervan-ai/kervan/blob/main/docs/monitoring.md"
Severity = Literal["critical", "warning", "info"]
DEFAULT_OBJECTIVE = 0.99
# Of the share that missed the SLO: those that the burn-rate alerts compare.
BURN_WINDOWS = ("5m", "30m", "1h", "6h", "3d")


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that Prometheus computes ahead: `record` names its level, metric and operation."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True)
class Alert:
    """`for_`: how long `expr` must hold, as Prometheus writes it. `summary` may have `{{ $labels.x }}`."""

    name: str
    expr: str
    for_: str
    severity: Severity
    summary: str
    meaning: str
    threshold: str
    action: str


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated together."""

    name: str
    recordings: Sequence[Recording] = ()
    alerts: Sequence[Alert] = ()


def _bad(window: str) -> str:
    return f"fleet:kervan_streams_bad:ratio_rate{window}"


QUEUED = "fleet:kervan_streams_queued:sum"
OPEN = "fleet:kervan_streams_open:sum"
MOVED = "fleet:kervan_streams_moved_unplanned:increase5m"

RECORDINGS = (
    *(Recording(_bad(window), q.in_rules(q.BAD_SHARE, window)) for window in BURN_WINDOWS),
    Recording(OPEN, q.in_rules(q.OPEN)),
    Recording(QUEUED, q.in_rules(q.QUEUED)),
    Recording(MOVED, q.in_rules(q.MOVED_UNPLANNED, "5m")),
    Recording(
        "fleet:kervan_time_to_first_token_seconds:p95_5m",
        q.in_rules(q.quantile(0.95, "kervan_time_to_first_token_seconds"), "5m"),
    ),
    Recording(
        "fleet:kervan_time_per_output_token_seconds:p95_5m",
        q.in_rules(q.quantile(0.95, "kervan_time_per_output_token_seconds"), "5m"),
    ),
)


def _burn(long: str, short: str, factor: float, budget: float) -> str:
    bound = f"{factor * budget:.6g}"
    return f"{_bad(long)} > {bound} and {_bad(short)} > {bound}"


def _slo_alerts(objective: float) -> tuple[Alert, ...]:
    """Burn rates over two windows each: the long one so that little does not alert, the short one so that it ends soon.

    Source: https://sre.google/workbook/alerting-on-slos/ (multiwindow, multi-burn-rate; factors for 30 days).
    """
    budget = 1 - objective
    told = f"at most {budget:.3g} of the streams may miss the SLO (objective {objective:.4g})"
    action = (
        "See on the fleet's dashboard which outcome grows. slow: more replicas (kervan scale), or a smaller "
        "load; refused: "
        "the queue is full, as slow; broken: kervan status --why and the logs of the replicas."
    )
    return (
        Alert(
            "KervanSloBurnsFast",
            _burn("1h", "5m", 14.4, budget),
            "2m",
            "critical",
            "{{ $labels.fleet }}: {{ $value | humanizePercentage }} of the streams of the last hour missed the SLO",
            "Streams miss the fleet's SLO, break or are refused so often that the budget of a month is gone in "
            "two days.",
            f"{told}; 14.4 times that uses 2% of a month's budget in an hour.",
            action,
        ),
        Alert(
            "KervanSloBurns",
            _burn("6h", "30m", 6, budget),
            "15m",
            "critical",
            "{{ $labels.fleet }}: {{ $value | humanizePercentage }} of the streams of the last 6 hours missed the SLO",
            "As KervanSloBurnsFast, slower: the budget of a month is gone in five days.",
            f"{told}; 6 times that uses 5% of a month's budget in 6 hours.",
            action,
        ),
        Alert(
            "KervanSloBurnsSlowly",
            _burn("3d", "6h", 1, budget),
            "1h",
            "warning",
            "{{ $labels.fleet }}: {{ $value | humanizePercentage }} of the streams of the last 3 days missed the SLO",
            "The budget of a month will just not last.",
            f"{told}; exactly that, for 3 days, uses 10% of a month's budget.",
            action,
        ),
    )


STREAM_ALERTS = (
    Alert(
        "KervanStreamsBreak",
        f"{q.in_rules(q.BROKEN, '5m')} > 0",
        "0m",
        "critical",
        "{{ $labels.fleet }}: {{ $value | humanize }} streams ended with an error in 5 minutes",
        "Streams ended with an error that kervan is there to prevent.",
        "0: the death of a replica breaks no stream; what does has lost two replicas, or waited longer than "
        "hold_timeout_s.",
        "The reason is a label of kervan_streams_broken_total. given_up: a request kills engines, see their logs; "
        "expired: no replica was there, see KervanStartsFail; engine: the engine's log.",
    ),
    Alert(
        "KervanMovesStorm",
        f"{MOVED} > clamp_min(avg_over_time({OPEN}[5m]), 10)",
        "2m",
        "warning",
        "{{ $labels.fleet }}: {{ $value | humanize }} moves off lost or stalled replicas in 5 minutes",
        "Streams move again and again, because replicas are lost or stand still one after the other.",
        "One loss moves each stream of one replica once; more moves in 5 minutes than there are streams (and "
        "more than 10) "
        "are several losses.",
        "kervan status --why; logs of the replicas that went; the GPU dashboard for XID and throttling.",
    ),
    Alert(
        "KervanQueueGrows",
        f"min_over_time({QUEUED}[5m]) > 0 and deriv({QUEUED}[10m]) > 0.05",
        "5m",
        "warning",
        "{{ $labels.fleet }}: the queue grows by {{ $value | humanize }} streams per second",
        "More comes than the replicas finish. Clients wait longer and longer, and are refused in the end.",
        "0.05/s is 3 more streams each minute; for 10 minutes, since a burst that replicas work off is gone before.",
        "More replicas: kervan scale, or a higher most (kervan scale 2..16). By cause on the fleet's dashboard.",
    ),
    Alert(
        "KervanRefuses",
        f"{q.in_rules(q.REFUSED, '5m')} > 0",
        "5m",
        "warning",
        "{{ $labels.fleet }}: {{ $value | humanize }} requests per second get 503",
        "The queue is full (max_queued_streams), and requests are refused with a time to come again.",
        "0: a fleet that is large enough refuses nothing; 5 minutes, as a burst may fill the queue.",
        "As KervanQueueGrows.",
    ),
)

REPLICA_ALERTS = (
    Alert(
        "KervanKvCacheFull",
        f"{q.in_rules(q.KV_CACHE)} > 0.9",
        "5m",
        "warning",
        "{{ $labels.fleet }}: the KV cache of {{ $labels.replica }} is {{ $value | humanizePercentage }} full",
        "The replica has hardly room for what its streams still write; it will preempt some.",
        "0.9: with streams of similar age, the last tenth fills within seconds. 5 minutes, as a batch of long "
        "prompts passes.",
        "More replicas, shorter contexts (max_model_len), fewer streams each (max_num_seqs), or an fp8 cache "
        "(kv_cache_dtype).",
    ),
    Alert(
        "KervanPreempts",
        f"{q.in_rules(q.PREEMPTIONS, '5m')} > 0.1",
        "10m",
        "warning",
        "{{ $labels.fleet }}: {{ $value | humanize }} preemptions per second",
        "Engines throw streams out of their KV cache and compute them again later.",
        "0.1/s: one each 10 s; each costs the prefill of its whole context, so some now and then do no harm.",
        "As KervanKvCacheFull.",
    ),
    Alert(
        "KervanReplicaLate",
        f"{q.in_rules(q.LATE)} > 0",
        "30s",
        "warning",
        "{{ $labels.fleet }}: {{ $value }} replicas have told nothing for over 2.5 s",
        "A replica's process or node does not run, or its network is gone. Its streams have moved.",
        "Two heartbeats, of a second each, are missing; 30 s, as a busy machine may pause.",
        "kervan status --why names it and its node.",
    ),
    Alert(
        "KervanReplicaStalls",
        f"{q.in_rules(q.STALLED)} > 10",
        "10s",
        "warning",
        "{{ $labels.fleet }}: {{ $labels.replica }} has made no step for {{ $value | humanizeDuration }}",
        "An engine has work and makes no step: a hung kernel or collective, or a very long prefill.",
        "10 s: far above any step; streams move off after a few seconds, the engine is ended after stall_timeout_s.",
        "kervan status --why (it says which rank is missing); the replica's log; kervan comm doctor on its node.",
    ),
    Alert(
        "KervanStartsFail",
        f"{q.in_rules(q.START_FAILURES, '15m')} >= 3",
        "0m",
        "critical",
        "{{ $labels.fleet }}: {{ $value | humanize }} starts failed in 15 minutes",
        "Replicas or gateways cannot start, and Ray tries again and again.",
        "3: one failure may be chance (a node that leaves), three are a cause that stays.",
        "kervan status lists the last failures with their causes and logs.",
    ),
    Alert(
        "KervanColdStartLoop",
        f"{q.in_rules(q.STARTS, '30m')} > 3 + 2 * {q.in_rules(q.TARGET)}",
        "5m",
        "critical",
        "{{ $labels.fleet }}: {{ $value | humanize }} starts in pool {{ $labels.pool }} in 30 minutes",
        "Replicas start, and are gone soon after: they die once they work, or the number goes up and down.",
        "More than 3, and each replica wanted twice, in 30 minutes: a full replacement (kervan up with other "
        "settings) is once.",
        "kervan status --why; logs of the replicas that went; kervan autoscale, if the target goes up and down.",
    ),
    Alert(
        "KervanNoReplica",
        f"{q.in_rules(q.READY)} == 0 and on (fleet) sum by (fleet) ({q.in_rules(q.TARGET)}) > 0",
        "1m",
        "critical",
        "{{ $labels.fleet }}: no replica is ready",
        "Nothing is answered; streams wait for hold_timeout_s, then end with an error.",
        "0 while some are wanted; a minute, which a forked replacement needs.",
        "kervan status --why.",
    ),
)

CONTROL_ALERTS = (
    Alert(
        "KervanGatewayDown",
        'up{job="kervan"} == 0',
        "1m",
        "critical",
        "{{ $labels.instance }} does not answer Prometheus",
        "No gateway of the node answers: clients that were connected there are cut off.",
        "A minute: several scrapes have failed; a gateway that is replaced is back before.",
        "kervan status --why; the node; the log of the gateway.",
    ),
    Alert(
        "KervanGatewayLate",
        f"{q.in_rules(q.GATEWAY_AGE)} > 5",
        "15s",
        "warning",
        "{{ $labels.fleet }}: gateway {{ $labels.gateway }} has told nothing for {{ $value | humanizeDuration }}",
        "A gateway's process or node does not run, or its loop is stuck.",
        "5 s: five heartbeats; after 10 s it is listed no more, and KervanGatewayDown tells of its node.",
        "kervan status --why.",
    ),
    Alert(
        "KervanFleetGone",
        "count by (fleet) (kervan_streams_open offset 10m) unless on (fleet) count by (fleet) (kervan_streams_open)",
        "1m",
        "critical",
        "{{ $labels.fleet }}: no gateway tells anything any more",
        "All gateways of a fleet that was there 10 minutes ago are gone.",
        "Ends by itself 10 minutes after a fleet was stopped on purpose.",
        "kervan status; kervan up starts it again.",
    ),
    Alert(
        "KervanDirectoryGone",
        f"{q.in_rules(q.DIRECTORY_AGE)} > 15",
        "30s",
        "warning",
        "{{ $labels.fleet }}: no gateway has heard of the directory for {{ $value | humanizeDuration }}",
        "The fleet's directory, or Ray, does not answer. Streams go on; new replicas are not found.",
        "15 s: it tells each second, and Ray restarts it within about ten.",
        "kervan status says what of Ray does not answer; ray status on the head node.",
    ),
    Alert(
        "KervanAtMaximum",
        f"{q.in_rules(q.TARGET)} >= {q.in_rules(q.MAXIMUM)} and {q.in_rules(q.MAXIMUM)} > {q.in_rules(q.MINIMUM)}",
        "15m",
        "info",
        "{{ $labels.fleet }}: pool {{ $labels.pool }} has had its most replicas for 15 minutes",
        "The autoscaler can add nothing more. No harm yet; the next rise of the load meets no reserve.",
        "The settings' most; fleets and pools of a fixed number are left out.",
        "kervan scale with a higher most, like kervan scale 2..16.",
    ),
    Alert(
        "KervanCannotScale",
        f"{q.in_rules(q.total('kervan_autoscaling_problem', scope='fleet'))} > 0",
        "5m",
        "warning",
        "{{ $labels.fleet }}: no decision about replicas can be made, or be followed",
        "More replicas are wanted than the cluster has room for, or the policy fails.",
        "5 minutes: nodes that a cluster's autoscaler adds take about that long.",
        "kervan autoscale and kervan status --why say what is missing.",
    ),
    Alert(
        "KervanNoticeTooLate",
        "histogram_quantile(0.99, max by (fleet, le) (increase(kervan_notice_to_empty_seconds_bucket[1h]))) > 25",
        "0m",
        "warning",
        "{{ $labels.fleet }}: a node took {{ $value | humanizeDuration }} from its notice to empty",
        "Nodes that will go are not empty much before they do.",
        "25 s: Azure and Google Cloud give 30 s. With AWS alone (120 s) it may be raised.",
        "Shorter contexts move faster; more replicas take them sooner: docs/notices.md.",
    ),
)

_XID = q.everywhere(q.gpu("DCGM_FI_DEV_XID_ERRORS"))


def _increase(metric: str, window: str) -> str:
    return q.everywhere(q.gpu_rate(metric, "increase")).replace("$W", window)


_CLOCKS = " or ".join(f"{q.everywhere(q.gpu_throttled(bit))} == 1" for bit in (8, 32, 64, 128))

GPU_ALERTS = (
    Alert(
        "GpuXid",
        " and ".join(f"{_XID} != {code}" for code in (0, 13, 31, 43, 45)),
        "0m",
        "critical",
        "{{ $labels.Hostname }} GPU {{ $labels.gpu }}: XID {{ $value }}",
        "The driver reported an error of the GPU, its memory or its links.",
        "Any but 13, 31, 43 and 45, which a program's own fault causes too (KervanReplicaStalls and restarts "
        "show those).",
        "Look the number up in NVIDIA's XID catalogue. 79: fallen off the bus; 48, 63, 64, 94, 95: memory; 74: NVLink. "
        "kervan drain NODE, then reset the GPU or the node.",
    ),
    Alert(
        "GpuEcc",
        f"{_increase('DCGM_FI_DEV_ECC_DBE_VOL_TOTAL', '1h')} > 0 or "
        f"{q.everywhere(q.gpu('DCGM_FI_DEV_ROW_REMAP_FAILURE'))} > 0",
        "0m",
        "critical",
        "{{ $labels.Hostname }} GPU {{ $labels.gpu }}: uncorrectable memory errors",
        "Memory of the GPU returned wrong data, or broken rows can be remapped no more.",
        "0: ECC corrects single bits; what it cannot correct ends the process that had it.",
        "kervan drain NODE; replace the GPU if the remapping has failed.",
    ),
    Alert(
        "GpuThrottled",
        _CLOCKS,
        "5m",
        "warning",
        "{{ $labels.Hostname }} GPU {{ $labels.gpu }}: clocks are held down by heat or power delivery",
        "The GPU runs slower than it could. Of tensor-parallel replicas all GPUs wait for it.",
        "Bits 8, 32, 64 and 128 of the event reasons (hardware, thermal, power brake); the power cap (4) is "
        "usual in prefill.",
        "Cooling and power of the node. The GPU dashboard shows which.",
    ),
    Alert(
        "GpuLinkDown",
        f"{_increase('DCGM_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_FAILED_EVENTS', '15m')} > 0 or "
        f"{_increase('DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL', '15m')} > 0 or "
        f"{q.everywhere(q.gpu('DCGM_FI_DEV_PCIE_LINK_WIDTH'))} < "
        f"{q.everywhere(q.gpu('DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH'))}",
        "0m",
        "warning",
        "{{ $labels.Hostname }} GPU {{ $labels.gpu }}: a link is down or narrower than it could be",
        "An NVLink went down, or the PCIe slot runs with fewer lanes: collectives or loads are slow, or hang.",
        "0 recoveries that failed, and all lanes. Of the next dcgm-exporter's fields some need a CSV of your own.",
        "kervan comm doctor on the node; kervan drain NODE; reseat or replace.",
    ),
)


def groups(objective: float = DEFAULT_OBJECTIVE) -> tuple[Group, ...]:
    """All rules. `objective`: the share of streams that is to keep the SLO, above 0 and below 1."""
    return (
        Group("kervan-recordings", RECORDINGS),
        Group("kervan-slo", (), _slo_alerts(objective)),
        Group("kervan-streams", (), STREAM_ALERTS),
        Group("kervan-replicas", (), REPLICA_ALERTS),
        Group("kervan-control", (), CONTROL_ALERTS),
        Group("kervan-gpus", (), GPU_ALERTS),
    )


def alerts(objective: float = DEFAULT_OBJECTIVE) -> tuple[Alert, ...]:
    """All alerts, in the order of the file."""
    return tuple(alert for group in groups(objective) for alert in group.alerts)


def to_dict(objective: float = DEFAULT_OBJECTIVE) -> dict[str, Any]:
    """The file as YAML has it; the `spec` of a PrometheusRule is the same."""
    return {"groups": [_group(group) for group in groups(objective)]}


def _group(group: Group) -> dict[str, Any]:
    rules: list[dict[str, Any]] = [{"record": one.record, "expr": one.expr} for one in group.recordings]
    rules += [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.for_,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.meaning,
                "threshold": alert.threshold,
                "action": alert.action,
                "runbook_url": f"{PAGE_URL}#{alert.name.lower()}",
            },
        }
        for alert in group.alerts
    ]
    return {"name": group.name, "rules": rules}
