"""Prometheus' own tools take what `kervan observe render` writes, and each alert fires when it should and not else."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from harness.prometheus import promtool

from kervan.cli import outputs
from kervan.observe.render import files, queries, rules
from kervan.observe.render.dashboards import DASHBOARDS

STEP_S = 30
OWN = 'fleet="FLEET",model_name="m"'
GATEWAY = f'{OWN},gateway="g"'
REPLICA = f'{OWN},pool="on-demand",replica="r"'
POOL = f'{OWN},pool="on-demand"'
GPU = 'Hostname="FLEET",gpu="0"'

# A fleet at work: two replicas of at most four, 1 stream per second, some drained, a GPU at its power cap in prefill, and
# an XID that a program caused. Values are promtool's: `0+30x400` begins at 0 and grows by 30 each 30 s.
HEALTHY = {
    f'kervan_streams_ended_total{{{GATEWAY},outcome="good"}}': "0+30x400",
    f'kervan_streams_ended_total{{{GATEWAY},outcome="slow"}}': "0x400",
    f'kervan_streams_ended_total{{{GATEWAY},outcome="broken"}}': "0x400",
    f'kervan_streams_ended_total{{{GATEWAY},outcome="refused"}}': "0x400",
    f'kervan_streams_ended_total{{{GATEWAY},outcome="left"}}': "0+10x400",
    f'kervan_streams_broken_total{{{GATEWAY},reason="expired"}}': "0x400",
    f"kervan_streams_open{{{GATEWAY}}}": "20x400",
    f'kervan_streams_queued{{{GATEWAY},cause="first_token"}}': "1x400",
    f'kervan_streams_queued{{{GATEWAY},cause="no_replica"}}': "0x400",
    f'kervan_streams_moved_total{{{GATEWAY},reason="lost"}}': "0x400",
    f'kervan_streams_moved_total{{{GATEWAY},reason="drained"}}': "0+5x400",
    f'kervan_admission_requests_total{{{GATEWAY},decision="admitted"}}': "0+30x400",
    f'kervan_admission_requests_total{{{GATEWAY},decision="queue_full"}}': "0x400",
    f"kervan_directory_age_seconds{{{GATEWAY}}}": "0.5x400",
    f"kervan_gateway_heartbeat_age_seconds{{{GATEWAY}}}": "0.9x400",
    f"kervan_replica_kv_cache_usage{{{REPLICA}}}": "0.6x400",
    f"kervan_replica_stalled_seconds{{{REPLICA}}}": "0.2x400",
    f'kervan_replicas{{{OWN},state="ready"}}': "2x400",
    f'kervan_replicas{{{OWN},state="late"}}': "0x400",
    f"kervan_replica_starts_total{{{POOL}}}": "2x400",
    f"kervan_start_failures_total{{{OWN}}}": "0x400",
    f"kervan_replicas_target{{{POOL}}}": "2x400",
    f"kervan_replicas_minimum{{{POOL}}}": "1x400",
    f"kervan_replicas_maximum{{{POOL}}}": "4x400",
    f'kervan_autoscaling_problem{{{OWN},policy="slo"}}': "0x400",
    f'kervan_notice_to_empty_seconds_bucket{{{OWN},le="10.0"}}': "0x20 1x400",
    f'kervan_notice_to_empty_seconds_bucket{{{OWN},le="30.0"}}': "0x20 1x400",
    f'kervan_notice_to_empty_seconds_bucket{{{OWN},le="+Inf"}}': "0x20 1x400",
    'vllm:num_preemptions_total{fleet="FLEET",model_name="m",engine="0",gateway="g"}': "0x400",
    'up{job="kervan",instance="FLEET"}': "1x400",
    f"DCGM_FI_DEV_XID_ERRORS{{{GPU}}}": "0x40 31x400",
    f"DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{GPU}}}": "0x400",
    f"DCGM_FI_DEV_ROW_REMAP_FAILURE{{{GPU}}}": "0x400",
    f"DCGM_FI_DEV_CLOCKS_EVENT_REASONS{{{GPU}}}": "4x400",
    f"DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL{{{GPU}}}": "0x400",
    f"DCGM_FI_DEV_PCIE_LINK_WIDTH{{{GPU}}}": "16x400",
    f"DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH{{{GPU}}}": "16x400",
}


@dataclass(frozen=True)
class Case:
    """What is other than healthy, and when the alert has fired."""

    series: dict[str, str] = field(default_factory=dict)
    at: str = "30m"


def of(name: str, values: str, at: str = "30m") -> Case:
    """The one healthy series whose name and labels begin so has other values."""
    (key,) = [key for key in HEALTHY if key.startswith(name)]
    return Case({key: values}, at)


SLOW = f'kervan_streams_ended_total{{{GATEWAY},outcome="slow"'
NOTICE = "kervan_notice_to_empty_seconds_bucket"
FAILING = {
    "KervanSloBurnsFast": of(SLOW, "0+10x400"),  # 10 of 40
    "KervanSloBurns": of(SLOW, "0+3x400"),  # 3 of 33, 9%
    "KervanSloBurnsSlowly": of(SLOW, "0+0.5x400", "64m"),  # 1 of 61
    "KervanStreamsBreak": of("kervan_streams_broken_total", "0x50 1x400", "27m"),
    "KervanMovesStorm": of(f'kervan_streams_moved_total{{{GATEWAY},reason="lost"', "0+5x400"),  # 50 in 5 min, 20 open
    "KervanQueueGrows": of(f'kervan_streams_queued{{{GATEWAY},cause="no_replica"', "0+2x400"),
    "KervanRefuses": of(f'kervan_admission_requests_total{{{GATEWAY},decision="queue_full"', "0+1x400"),
    "KervanKvCacheFull": of("kervan_replica_kv_cache_usage", "0.95x400"),
    "KervanPreempts": of("vllm:num_preemptions_total", "0+6x400"),  # 0.2/s
    "KervanReplicaLate": of(f'kervan_replicas{{{OWN},state="late"', "1x400"),
    "KervanReplicaStalls": of("kervan_replica_stalled_seconds", "0x50 11+15x400", "27m"),
    "KervanStartsFail": of("kervan_start_failures_total", "0x40 1x5 2x5 3x400", "27m"),
    "KervanColdStartLoop": of("kervan_replica_starts_total", "0+1x400"),
    "KervanNoReplica": of(f'kervan_replicas{{{OWN},state="ready"', "2x50 0x400"),
    "KervanGatewayDown": of("up", "1x50 0x400"),
    "KervanGatewayLate": of("kervan_gateway_heartbeat_age_seconds", "0.5x50 1+30x400", "27m"),
    "KervanFleetGone": of("kervan_streams_open", "20x50 stale"),
    "KervanDirectoryGone": of("kervan_directory_age_seconds", "0.5x50 1+30x400"),
    "KervanAtMaximum": of("kervan_replicas_target", "4x400"),
    "KervanCannotScale": of("kervan_autoscaling_problem", "1x400"),
    "KervanNoticeTooLate": of(f'{NOTICE}{{{OWN},le="10.0"', "0x400"),
    "GpuXid": of("DCGM_FI_DEV_XID_ERRORS", "0x40 79x400"),
    "GpuEcc": of("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "0x40 1x400"),
    "GpuThrottled": of("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "76x400"),  # the power cap, and 64 and 8
    "GpuLinkDown": of("DCGM_FI_DEV_PCIE_LINK_WIDTH", "16x40 8x400"),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rendered")
    texts = files.for_prometheus(
        directory, ["127.0.0.1:8000"], fleet="", dcgm=["127.0.0.1:9400"], has_ray=True, objective=0.99
    )
    outputs.write_files("DIR", directory, texts)
    return directory


def test_prometheus_takes_the_configuration_and_the_rules(rendered: Path) -> None:
    done = promtool("check", "config", "prometheus.yml", cwd=rendered)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(rules.RECORDINGS) + len(rules.alerts())} rules found" in done.stdout


def test_there_is_a_failing_fleet_for_each_alert() -> None:
    assert FAILING.keys() == {alert.name for alert in rules.alerts()}


def fleet(name: str, changed: dict[str, str]) -> list[dict[str, str]]:
    """All series of one fleet, its GPU and its target, which have its name."""
    series = {**HEALTHY, **changed}
    return [{"series": key.replace("FLEET", name), "values": values} for key, values in series.items()]


def firing(alert: str, name: str, count: int, at: str) -> dict[str, object]:
    whose = " or ".join(
        f'ALERTS{{{label}="{name}",alertname=~"{alert}",alertstate="firing"}}'
        for label in ("fleet", "Hostname", "instance")
    )
    samples = [{"labels": "{}", "value": count}] if count else []
    return {"expr": f"count({whose})", "eval_time": at, "exp_samples": samples}


def test_each_alert_fires_on_a_failing_fleet_and_none_on_a_healthy_one(rendered: Path) -> None:
    """All fleets beside each other, so that none takes another one's numbers for its own."""
    series = [*fleet("healthy", {})]
    expected = [firing(".*", "healthy", 0, at) for at in ("2m", "27m", "30m", "64m")]
    for name, case in FAILING.items():
        series += fleet(name, case.series)
        expected += [firing(name, name, 0, "0m"), firing(name, name, 1, case.at)]
    one = {"interval": f"{STEP_S}s", "input_series": series, "promql_expr_test": expected}
    content = {"rule_files": ["rules/kervan.yml"], "evaluation_interval": f"{STEP_S}s", "tests": [one]}
    (rendered / "test.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = promtool("test", "rules", "test.yml", cwd=rendered)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_every_panel_parses(rendered: Path) -> None:
    found = [
        queries.for_fleet(query.expr, "1m") for board in DASHBOARDS for panel in board.panels for query in panel.queries
    ]
    groups = [{"name": "panels", "rules": [{"record": f"panel:{n}", "expr": expr} for n, expr in enumerate(found)]}]
    (rendered / "panels.yml").write_text(yaml.safe_dump({"groups": groups}))
    done = promtool("check", "rules", "panels.yml", cwd=rendered)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(found)} rules found" in done.stdout
