"""The Grafana dashboards as data, and the JSON that every version of Grafana imports ("classic", `schemaVersion`).

Source: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kervan.observe.render import queries as q

GRID = 24  # columns of Grafana's grid
SCHEMA_VERSION = 39  # of Grafana 10 and 11; later ones migrate it when they load it
Shape = Literal["timeseries", "stat"]
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """One line, or several with `{{label}}` in their legend; `expr` is one of `queries`."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit`: Grafana's name of it. `help`: what it shows and which values are healthy."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    shape: Shape = "timeseries"
    help: str = ""
    width: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A drop-down: the values that `label` has in `metric`."""

    name: str
    label: str
    metric: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """`uid` is what links and provisioning know it by."""

    uid: str
    title: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...]

    @property
    def panels(self) -> Iterator[Panel]:
        """Of all rows, from the top."""
        for row in self.rows:
            yield from row.panels


FLEET = Variable("fleet", "fleet", "kervan_streams_open")


def _line(title: str, *lines: tuple[str, str], unit: str = "short", help: str = "", width: int = 8) -> Panel:
    return Panel(title, tuple(Query(*line) for line in lines), unit, "timeseries", help, width)


def _stat(title: str, expr: str, unit: str = "short", help: str = "") -> Panel:
    return Panel(title, (Query(expr, "{{fleet}}"),), unit, "stat", help, 3)


def _quantiles(metric: str, *, scope: Any = "gateway", where: str = "") -> tuple[tuple[str, str], ...]:
    return tuple(
        (q.quantile(share, metric, scope=scope, where=where), f"p{100 * share:g}") for share in (0.5, 0.95, 0.99)
    )


def _bound(name: str) -> tuple[str, str]:
    return q.total("kervan_slo_bound_seconds", scope="fleet", where=f'bound="{name}"'), f"SLO {name}"


def _two(metric: str, *, by: str = "replica", where: str = "") -> tuple[tuple[str, str], ...]:
    return tuple(
        (q.quantile(share, metric, by, where=where), f"{{{{{by}}}}} p{100 * share:g}") for share in (0.5, 0.95)
    )


REPLICA = 'replica=~"$replica"'
GATEWAY = 'gateway=~"$gateway"'

FLEET_DASHBOARD = Dashboard(
    "kervan-fleet",
    "kervan: fleet",
    (
        Row(
            "Now",
            (
                _stat("Streams open", q.OPEN),
                _stat("Generated tokens/s", q.GENERATED, "short"),
                _stat(
                    "SLO kept",
                    f"1 - {q.BAD_SHARE}",
                    "percentunit",
                    "Share of the streams that ended; empty while none ends.",
                ),
                _stat("Replicas ready", q.READY),
                _stat("Replicas wanted", f"sum by (fleet) ({q.TARGET})"),
                _stat("Streams queued", q.QUEUED, help="Those that prefill now are among them."),
                _stat("Broken, in an hour", q.BROKEN.replace("$W", "1h"), help="Anything but 0 is a fault."),
                _stat(
                    "Cost per hour", q.COST, "currencyUSD", "By kervan's price list, of the replicas that are there."
                ),
            ),
        ),
        Row(
            "Service level",
            (
                _line(
                    "Time to first token",
                    *_quantiles("vllm:time_to_first_token_seconds"),
                    _bound("ttft"),
                    unit="s",
                    help="As clients see it, waits included; vLLM's own, over all gateways.",
                ),
                _line(
                    "Time per output token",
                    *_quantiles("kervan_time_per_output_token_seconds"),
                    _bound("tpot"),
                    unit="s",
                    help="At the replicas, without the pauses of moves.",
                ),
                _line("Request latency", *_quantiles("vllm:e2e_request_latency_seconds"), unit="s"),
                _line(
                    "Streams ended",
                    (q.ENDED_BY_OUTCOME, "{{outcome}}"),
                    unit="reqps",
                    help="slow, broken and refused spend the error budget.",
                ),
                _line("Share that missed the SLO", (q.BAD_SHARE, "{{fleet}}"), unit="percentunit"),
                _line(
                    "Broken streams",
                    (q.rate("kervan_streams_broken_total", "reason"), "{{reason}}"),
                    unit="reqps",
                    help="0, unless requests are wrong in a way that kills engines, or replicas are missing for long.",
                ),
            ),
        ),
        Row(
            "Load",
            (
                _line(
                    "Streams",
                    (q.OPEN, "open"),
                    (q.total("kervan_streams_bound"), "bound"),
                    help="At the bound, requests are refused with 503 and a time to come again.",
                ),
                _line(
                    "Queue by cause",
                    (q.QUEUED_BY_CAUSE, "{{cause}}"),
                    help="first_token is usual under load; no_replica is not, unless the fleet may have none.",
                ),
                _line(
                    "Admission", (q.rate("kervan_admission_requests_total", "decision"), "{{decision}}"), unit="reqps"
                ),
                _line(
                    "Tokens/s",
                    (q.GENERATED, "generated"),
                    (q.PREFILLED, "prefilled"),
                    help="Prefilled: of prompts and moved streams, without those in prefix caches.",
                ),
                _line(
                    "Batch and queue of engines",
                    (q.total("vllm:num_requests_running", scope="fleet"), "running"),
                    (q.total("vllm:num_requests_waiting", scope="fleet"), "waiting"),
                ),
                _line(
                    "KV cache, mean",
                    (q.total("vllm:kv_cache_usage_perc", scope="fleet"), "{{fleet}}"),
                    unit="percentunit",
                    help="Above 0.9 engines begin to preempt.",
                ),
            ),
        ),
        Row(
            "API keys",
            (
                _line(
                    "Requests by key",
                    (q.rate("kervan_key_requests_total", "key"), "{{key}}"),
                    (q.KEY_REJECTED, "{{key}}: {{reason}}"),
                    unit="reqps",
                    help="A reason is why a request of that key was refused.",
                ),
                _line(
                    "Tokens/s by key",
                    (q.rate("kervan_key_prompt_tokens_total", "key"), "{{key}}: prompts"),
                    (q.rate("kervan_key_cached_tokens_total", "key"), "{{key}}: of these cached"),
                    (q.rate("kervan_key_generated_tokens_total", "key"), "{{key}}: generated"),
                    help="Counted when a stream ends.",
                ),
                _line("Streams by key", (q.total("kervan_key_streams", "key"), "{{key}}")),
            ),
        ),
        Row(
            "Moves, drains, notices",
            (
                _line(
                    "Moves",
                    (q.rate("kervan_streams_moved_total", "reason", how="increase"), "{{reason}}"),
                    help="Streams that went on at another replica. drained is planned; lost and stalled are faults.",
                ),
                _line("Pause of a move", *_quantiles("kervan_stream_move_pause_seconds"), unit="s"),
                _line(
                    "Tokens computed again",
                    (q.rate("kervan_move_recomputed_tokens_total"), "{{fleet}}"),
                    help="What moves cost.",
                ),
                _line("Drains", (q.rate("kervan_drains_total", "pool", scope="fleet", how="increase"), "{{pool}}")),
                _line("Drain to empty", *_quantiles("kervan_drain_seconds"), unit="s"),
                _line(
                    "Nodes under notice",
                    (q.total("kervan_nodes_under_notice", scope="fleet"), "now"),
                    (
                        f"{q.rate('kervan_notices_total', scope='fleet', how='increase')} or "
                        f"0 * {q.total('kervan_nodes_under_notice', scope='fleet')}",
                        "notices",
                    ),
                ),
                _line(
                    "Notice to empty",
                    *_quantiles("kervan_notice_to_empty_seconds", scope="fleet"),
                    unit="s",
                    help="Must stay below what the cloud gives: 120 s on AWS, 30 s on Azure and Google Cloud. "
                    "Empty until there was a notice.",
                ),
            ),
        ),
        Row(
            "Replicas and scaling",
            (
                _line("Replicas by state", (q.total("kervan_replicas", "state", scope="fleet"), "{{state}}")),
                _line(
                    "Target and bounds",
                    (q.TARGET, "{{pool}} target"),
                    (q.MINIMUM, "{{pool}} least"),
                    (q.MAXIMUM, "{{pool}} most"),
                    (q.ROOM, "{{pool}} room"),
                ),
                _line(
                    "Decisions",
                    (
                        q.rate("kervan_autoscaling_decisions_total", "pool,direction", scope="fleet", how="increase"),
                        "{{pool}} {{direction}}",
                    ),
                ),
                _line("Start of a replica", *_quantiles("kervan_replica_start_seconds", scope="fleet"), unit="s"),
                _line("Starts", (q.STARTS, "{{pool}}"), (q.START_FAILURES, "failed")),
                _line(
                    "What decisions stand on",
                    (q.total("kervan_autoscaling_number", "number", scope="fleet"), "{{number}}"),
                    help="Empty where the number of replicas is fixed.",
                ),
            ),
        ),
    ),
    (FLEET,),
)

REPLICA_DASHBOARD = Dashboard(
    "kervan-replica",
    "kervan: replicas",
    (
        Row(
            "Latency and work",
            (
                _line(
                    "Time to first token",
                    *_two("kervan_time_to_first_token_seconds", where=REPLICA),
                    _bound("ttft"),
                    unit="s",
                    help="From placing a stream there.",
                ),
                _line(
                    "Time per output token",
                    *_two("kervan_time_per_output_token_seconds", where=REPLICA),
                    _bound("tpot"),
                    unit="s",
                ),
                _line(
                    "Stands still for",
                    (q.STALLED.replace("{$F}", f"{{{REPLICA},$F}}"), "{{replica}}"),
                    unit="s",
                    help="With work and without a step. A long prefill shows here too.",
                ),
                _line(
                    "Generated tokens/s",
                    (q.rate("kervan_replica_generated_tokens_total", "replica", where=REPLICA), "{{replica}}"),
                ),
                _line(
                    "Prefilled tokens/s",
                    (q.rate("kervan_replica_prefilled_tokens_total", "replica", where=REPLICA), "{{replica}}"),
                ),
                _line(
                    "Batch", (q.total("kervan_replica_running", "replica", scope="fleet", where=REPLICA), "{{replica}}")
                ),
                _line(
                    "Queue", (q.total("kervan_replica_waiting", "replica", scope="fleet", where=REPLICA), "{{replica}}")
                ),
                _line(
                    "KV cache",
                    (q.total("kervan_replica_kv_cache_usage", "replica", scope="fleet", where=REPLICA), "{{replica}}"),
                    unit="percentunit",
                ),
                _line(
                    "Last heartbeat",
                    (
                        q.total("kervan_replica_heartbeat_age_seconds", "replica", scope="fleet", where=REPLICA),
                        "{{replica}}",
                    ),
                    unit="s",
                    help="They come every second; late is above 2.5 s.",
                ),
            ),
        ),
        Row(
            "Prefix caches and preemptions",
            (
                _line(
                    "Prompt tokens found in the cache",
                    (q.rate("kervan_prefix_hit_tokens_total", "replica", where=REPLICA), "{{replica}}"),
                ),
                _line(
                    "Expected there, and possible elsewhere",
                    (q.rate("kervan_prefix_predicted_tokens_total", where=REPLICA), "expected"),
                    (q.rate("kervan_prefix_possible_tokens_total", where=REPLICA), "possible"),
                    help="What is possible and not expected is what routing gave up for balance.",
                ),
                _line(
                    "Preemptions",
                    (q.PREEMPTIONS, "{{fleet}}"),
                    unit="ops",
                    help="Each computes a whole stream again; the KV cache is too small for the load.",
                ),
            ),
        ),
    ),
    (FLEET, Variable("replica", "replica", "kervan_replica_heartbeat_age_seconds")),
)

GATEWAY_DASHBOARD = Dashboard(
    "kervan-gateway",
    "kervan: gateways",
    (
        Row(
            "Gateways",
            (
                _line(
                    "Event loop busy",
                    (q.total("kervan_gateway_busy_ratio", "gateway", scope="fleet", where=GATEWAY), "{{gateway}}"),
                    unit="percentunit",
                    help="Above 0.7 tokens wait for the loop: more gateways, like kervan scale --gateways 1..4.",
                ),
                _line(
                    "CPU",
                    (q.rate("process_cpu_seconds_total", "gateway", where=GATEWAY), "{{gateway}}"),
                    unit="percentunit",
                ),
                _line(
                    "Resident memory",
                    (q.total("process_resident_memory_bytes", "gateway", where=GATEWAY), "{{gateway}}"),
                    unit="bytes",
                ),
                _line("Streams open", (q.total("kervan_streams_open", "gateway", where=GATEWAY), "{{gateway}}")),
                _line("HTTP requests open", (q.total("kervan_requests_open", "gateway", where=GATEWAY), "{{gateway}}")),
                _line(
                    "Streams started",
                    (q.rate("kervan_streams_started_total", "gateway", where=GATEWAY), "{{gateway}}"),
                    unit="reqps",
                ),
                _line("Gateways by state", (q.total("kervan_gateways", "state", scope="fleet"), "{{state}}")),
                _line(
                    "Last heartbeat",
                    (
                        q.total("kervan_gateway_heartbeat_age_seconds", "gateway", scope="fleet", where=GATEWAY),
                        "{{gateway}}",
                    ),
                    unit="s",
                ),
                _line(
                    "Directory heard of",
                    (q.total("kervan_directory_age_seconds", "gateway", where=GATEWAY), "{{gateway}}"),
                    unit="s",
                ),
            ),
        ),
        Row(
            "Links to replicas, and requests",
            (
                _line(
                    "Links",
                    (q.total("kervan_links", "gateway", where=GATEWAY), "{{gateway}}"),
                    help="As many as replicas are ready or drain.",
                ),
                _line(
                    "Links that broke",
                    (q.rate("kervan_links_broken_total", "gateway", where=GATEWAY, how="increase"), "{{gateway}}"),
                ),
                _line(
                    "Replicas lost, and come back",
                    (f"max by (fleet) (increase(kervan_replicas_lost_total{{{GATEWAY},$F}}[$W]))", "lost"),
                    (f"max by (fleet) (increase(kervan_replicas_returned_total{{{GATEWAY},$F}}[$W]))", "came back"),
                ),
                _line(
                    "Finished by vLLM's reason",
                    (q.rate("vllm:request_success_total", "finished_reason", where=GATEWAY), "{{finished_reason}}"),
                    unit="reqps",
                ),
                _line("Prompt tokens of requests", *_two("vllm:request_prompt_tokens", by="gateway", where=GATEWAY)),
                _line(
                    "Output tokens of requests", *_two("vllm:request_generation_tokens", by="gateway", where=GATEWAY)
                ),
            ),
        ),
    ),
    (FLEET, Variable("gateway", "gateway", "kervan_streams_open")),
)

EACH = "{{Hostname}} {{gpu}}"
THROTTLES = (
    (4, "power cap"),
    (8, "hardware"),
    (32, "thermal, software"),
    (64, "thermal, hardware"),
    (128, "power brake"),
)

GPU_DASHBOARD = Dashboard(
    "kervan-gpu",
    "kervan: GPUs",
    (
        Row(
            "Work",
            (
                _line(
                    "SMs active",
                    (q.gpu("DCGM_FI_PROF_SM_ACTIVE"), EACH),
                    unit="percentunit",
                    help="Share of the SMs with a warp; needs a CSV with DCGM_FI_PROF_SM_ACTIVE.",
                ),
                _line(
                    "Tensor cores active",
                    (q.gpu("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), EACH),
                    unit="percentunit",
                    help="High in prefill, low in decode, which waits for memory.",
                ),
                _line(
                    "Memory bandwidth used",
                    (q.gpu("DCGM_FI_PROF_DRAM_ACTIVE"), EACH),
                    unit="percentunit",
                    help="High in decode.",
                ),
                _line(
                    "A kernel ran",
                    (q.gpu("DCGM_FI_DEV_GPU_UTIL"), EACH),
                    unit="percent",
                    help="Says only that some kernel or copy ran, however small: not how much of the GPU worked.",
                ),
                _line(
                    "Memory used",
                    (f"{q.gpu('DCGM_FI_DEV_FB_USED')} * 1048576", EACH),
                    unit="bytes",
                    help="vLLM takes all that it may when it starts, so it says nothing of the load: see the KV cache.",
                ),
                _line("SM clock", (f"{q.gpu('DCGM_FI_DEV_SM_CLOCK')} * 1e6", EACH), unit="hertz"),
            ),
        ),
        Row(
            "Links",
            (
                _line(
                    "NVLink",
                    (q.gpu("DCGM_FI_PROF_NVLINK_TX_BYTES"), f"{EACH} sent"),
                    (q.gpu("DCGM_FI_PROF_NVLINK_RX_BYTES"), f"{EACH} received"),
                    unit="Bps",
                ),
                _line(
                    "PCIe",
                    (q.gpu("DCGM_FI_PROF_PCIE_TX_BYTES"), f"{EACH} sent"),
                    (q.gpu("DCGM_FI_PROF_PCIE_RX_BYTES"), f"{EACH} received"),
                    unit="Bps",
                ),
                _line(
                    "PCIe retries",
                    (q.gpu_rate("DCGM_FI_DEV_PCIE_REPLAY_COUNTER"), EACH),
                    unit="ops",
                    help="0 on a healthy slot.",
                ),
            ),
        ),
        Row(
            "Health",
            (
                _line("Temperature", (q.gpu("DCGM_FI_DEV_GPU_TEMP"), EACH), unit="celsius"),
                _line("Power", (q.gpu("DCGM_FI_DEV_POWER_USAGE"), EACH), unit="watt"),
                _line(
                    "Clocks held down",
                    *((q.gpu_throttled(bit), f"{EACH} {name}") for bit, name in THROTTLES),
                    help="The power cap is usual in prefill; the others are not.",
                ),
                _line(
                    "Last XID",
                    (q.gpu("DCGM_FI_DEV_XID_ERRORS"), EACH),
                    help="0: none since the exporter started. NVIDIA's list says what each number is.",
                ),
                _line("Uncorrectable ECC errors", (q.gpu("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"), EACH)),
                _line("Remapped rows", (q.gpu("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS"), EACH)),
            ),
        ),
    ),
    (Variable("hostname", "Hostname", "DCGM_FI_DEV_GPU_TEMP"), Variable("gpu", "gpu", "DCGM_FI_DEV_GPU_TEMP")),
)

DASHBOARDS: tuple[Dashboard, ...] = (FLEET_DASHBOARD, REPLICA_DASHBOARD, GATEWAY_DASHBOARD, GPU_DASHBOARD)


# ---- Grafana's JSON


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports, or reads from a provisioned directory."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["kervan"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "title": "kervan",
                "type": "dashboards",
                "tags": ["kervan"],
                "asDropdown": True,
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "annotations": {"list": []},
        "templating": {"list": [_data_source(), *map(_variable, dashboard.variables)]},
        "panels": list(_placed(dashboard.rows)),
    }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(variable: Variable) -> dict[str, Any]:
    selector = '{fleet=~"$fleet"}' if variable.name in ("replica", "gateway") else ""
    query = f"label_values({variable.metric}{selector}, {variable.label})"
    return {
        "name": variable.name,
        "label": variable.name,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": query, "refId": variable.name},
        "definition": query,
        "refresh": 2,  # when the time range changes, so that new replicas are found
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """All panels with their places, from left to right and downwards, each row of panels below its heading."""
    number, y = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": GRID, "h": 1},
        }
        y += 1
        x, tallest = 0, 0
        for panel in row.panels:
            height = 4 if panel.shape == "stat" else 8
            if x + panel.width > GRID:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            yield _panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": height})
            x, tallest = x + panel.width, max(tallest, height)
        y += tallest


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + place),
            "expr": q.in_grafana(query.expr),
            "legendFormat": query.legend,
            "datasource": DATA_SOURCE,
            "editorMode": "code",
            "range": True,
        }
        for place, query in enumerate(panel.queries)
    ]
    is_stat = panel.shape == "stat"
    style: dict[str, Any] = (
        {} if is_stat else {"custom": {"lineWidth": 1, "fillOpacity": 5, "showPoints": "never", "spanNulls": False}}
    )
    return {
        "id": number,
        "type": panel.shape,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATA_SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, **style}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
        if is_stat
        else {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }
