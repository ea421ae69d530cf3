"""What Prometheus is to ask: its own configuration, or the objects of the Prometheus Operator on Kubernetes.

Every node with a gateway is a target, and answers for its own gateways (`/metrics/node`): each counts once, and a node
that is gone takes nothing with it. Sources: https://prometheus.io/docs/prometheus/2.42/configuration/configuration/ ,
https://prometheus-operator.dev/docs/api-reference/api/ , https://docs.ray.io/en/latest/cluster/metrics.html
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kervan.observe.render import rules
from kervan.observe.render.dashboards import DASHBOARDS, to_json

NODE_PAGE = "/metrics/node"
INTERVAL = "15s"
RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
GATEWAY_PORT = 8000
DCGM_PORT_NAME = "metrics"
MONITORING_API = "monitoring.coreos.com/v1"


@dataclass(frozen=True, slots=True)
class ScrapeTls:
    """How Prometheus checks gateways. `ca_file`: empty: with the roots of its machine.

    `server_name`: in the certificate, where that does not name the hosts which are scraped.
    """

    ca_file: str = ""
    server_name: str = ""


def prometheus(
    targets: Sequence[str],
    *,
    fleet: str = "",
    dcgm: Sequence[str] = (),
    has_ray: bool = False,
    tls: "ScrapeTls | None" = None,
) -> dict[str, Any]:
    """`prometheus.yml`. `targets`: HOST:PORT of each node with gateways; `fleet`: which one, where several share it.

    `dcgm`: HOST:PORT of dcgm-exporters; `has_ray`: Ray's own metrics too, from the file that its head node keeps.
    `tls`: gateways speak HTTPS.
    """
    gateways: dict[str, Any] = {
        "job_name": "kervan",
        "metrics_path": NODE_PAGE,
        "static_configs": [{"targets": [*targets]}],
    }
    if fleet:
        gateways["params"] = {"fleet": [fleet]}
    if tls is not None:
        settings = {"ca_file": tls.ca_file, "server_name": tls.server_name}
        gateways |= {"scheme": "https", "tls_config": {name: value for name, value in settings.items() if value}}
    jobs = [gateways]
    if has_ray:
        jobs.append({"job_name": "ray", "file_sd_configs": [{"files": [RAY_TARGETS]}]})
    if dcgm:
        jobs.append({"job_name": "dcgm", "static_configs": [{"targets": [*dcgm]}]})
    return {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": ["rules/*.yml"],
        "scrape_configs": jobs,
    }


def operator_monitors(
    namespace: str, labels: Mapping[str, str], port: int = GATEWAY_PORT, tls: ScrapeTls | None = None
) -> list[dict[str, Any]]:
    """PodMonitors of the gateways and of Ray on KubeRay's pods, and a ServiceMonitor of dcgm-exporter.

    `labels`: those by which a Prometheus chooses its monitors. A pod without a gateway is a target that is down, which
    no alert takes amiss: KervanGatewayDown is for static targets, and here heartbeats tell (KervanGatewayLate).
    """
    pods = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    gateways: dict[str, Any] = {"targetPort": port, "path": NODE_PAGE, "interval": INTERVAL}
    if tls is not None:
        gateways |= {"scheme": "https", "tlsConfig": {"serverName": tls.server_name}}
    ray = {"port": "metrics", "interval": INTERVAL}
    dcgm = {"port": DCGM_PORT_NAME, "interval": INTERVAL, "honorLabels": True}
    any_namespace = {"any": True}
    return [
        _object("PodMonitor", "kervan-gateways", namespace, labels,
                {"selector": pods, "podMetricsEndpoints": [gateways]}),
        _object("PodMonitor", "kervan-ray", namespace, labels, {"selector": pods, "podMetricsEndpoints": [ray]}),
        _object("ServiceMonitor", "kervan-dcgm", namespace, labels,
                {"selector": {"matchLabels": {"app.kubernetes.io/name": "dcgm-exporter"}},
                 "namespaceSelector": any_namespace, "endpoints": [dcgm]}),
    ]  # fmt: skip


def operator_rules(namespace: str, labels: Mapping[str, str], objective: float) -> dict[str, Any]:
    """The rules as a PrometheusRule."""
    return _object("PrometheusRule", "kervan", namespace, labels, rules.to_dict(objective))


def dashboard_maps(namespace: str) -> list[dict[str, Any]]:
    """The dashboards as ConfigMaps, which the sidecar of Grafana's charts looks for."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": board.uid, "namespace": namespace, "labels": {"grafana_dashboard": "1"}},
            "data": {f"{board.uid}.json": json.dumps(to_json(board), indent=1)},
        }
        for board in DASHBOARDS
    ]


def _object(kind: str, name: str, namespace: str, labels: Mapping[str, str], spec: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "kervan", **labels}}
    return {"apiVersion": MONITORING_API, "kind": kind, "metadata": metadata, "spec": {**spec}}
