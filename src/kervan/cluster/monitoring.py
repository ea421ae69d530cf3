"""For Prometheus' operator: a target for the fleet's page of metrics, and NVIDIA's exporter of GPU metrics."""

from typing import Any

from kervan.cluster import kubernetes
from kervan.cluster.request import RenderRequest

DCGM_IMAGE = "nvcr.io/nvidia/k8s/dcgm-exporter:4.5.3-4.8.2-distroless"
DCGM_PORT = 9400
POD_RESOURCES = "/var/lib/kubelet/pod-resources"


def objects(request: RenderRequest) -> list[dict[str, Any]]:
    """What `extras` names."""
    made: list[dict[str, Any]] = []
    if "servicemonitor" in request.extras:
        made.append(fleet_monitor(request))
    if "dcgm" in request.extras:
        made += [dcgm_daemon_set(request), dcgm_service(request), dcgm_monitor(request)]
    return made


def fleet_monitor(request: RenderRequest) -> dict[str, Any]:
    """One target for the fleet, whichever gateway answers: two would count everything twice.

    Prometheus finds each pod of the entry; they get the Service's address and equal labels, and equal targets are one.
    """
    address = f"{request.name}.{request.namespace}.svc:{request.fleet.port}"
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": kubernetes.metadata(request, request.name, "entry"),
        "spec": {
            "selector": {"matchLabels": kubernetes.labels(request, "entry")},
            "endpoints": [
                {
                    "port": "http",
                    "path": "/metrics",
                    "interval": "15s",
                    "relabelings": [
                        {"targetLabel": "__address__", "replacement": address},
                        {"targetLabel": "instance", "replacement": request.name},
                        {"action": "labeldrop", "regex": "pod|container|node"},
                    ],
                }
            ],
        },
    }


def dcgm_daemon_set(request: RenderRequest) -> dict[str, Any]:
    """On each node with GPUs, without taking one: it asks for no `nvidia.com/gpu`."""
    pod_labels = kubernetes.labels(request, "dcgm")
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": kubernetes.metadata(request, f"{request.name}-dcgm", "dcgm"),
        "spec": {
            "selector": {"matchLabels": pod_labels},
            "template": {
                "metadata": {"labels": pod_labels},
                "spec": {
                    "automountServiceAccountToken": False,
                    "nodeSelector": {"nvidia.com/gpu.present": "true"},
                    "tolerations": [{"operator": "Exists"}],
                    "containers": [
                        {
                            "name": "dcgm-exporter",
                            "image": DCGM_IMAGE,
                            "env": [
                                {"name": "DCGM_EXPORTER_LISTEN", "value": f":{DCGM_PORT}"},
                                {"name": "DCGM_EXPORTER_KUBERNETES", "value": "true"},
                                {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"},
                            ],
                            "ports": [{"name": "metrics", "containerPort": DCGM_PORT}],
                            "securityContext": {
                                "runAsNonRoot": False,
                                "runAsUser": 0,
                                "allowPrivilegeEscalation": True,
                                # For the profiling metrics; it need not be privileged.
                                "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
                            },
                            "resources": {
                                "requests": {"cpu": "100m", "memory": "256Mi"},
                                "limits": {"memory": "512Mi"},
                            },
                            "volumeMounts": [{"name": "pod-resources", "mountPath": POD_RESOURCES, "readOnly": True}],
                        }
                    ],
                    "volumes": [{"name": "pod-resources", "hostPath": {"path": POD_RESOURCES}}],
                },
            },
        },
    }


def dcgm_service(request: RenderRequest) -> dict[str, Any]:
    """Where Prometheus finds the exporters."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": kubernetes.metadata(request, f"{request.name}-dcgm", "dcgm"),
        "spec": {
            "clusterIP": "None",
            "selector": kubernetes.labels(request, "dcgm"),
            "ports": [{"name": "metrics", "port": DCGM_PORT, "targetPort": "metrics"}],
        },
    }


def dcgm_monitor(request: RenderRequest) -> dict[str, Any]:
    """A target for each node."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": kubernetes.metadata(request, f"{request.name}-dcgm", "dcgm"),
        "spec": {
            "selector": {"matchLabels": kubernetes.labels(request, "dcgm")},
            "endpoints": [{"port": "metrics", "path": "/metrics", "interval": "15s"}],
        },
    }
