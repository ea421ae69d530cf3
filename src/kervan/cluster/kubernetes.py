"""Kubernetes objects around a RayCluster: the fleet's start, the entry for clients, budgets of disruption, policies.

Plain mappings, in the API's own words; `tests/unit/cluster/test_kuberay.py` checks them against Kubernetes' schemas.
"""

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from kervan.cluster.fleet_file import for_cluster, settings
from kervan.cluster.request import RenderRequest
from kervan.cluster.text import plain_yaml
from kervan.errors import ConfigError

USER_ID = 10001  # of the images that deploy/ builds
CONFIG_DIRECTORY = "/etc/kervan"
FLEET_FILE = f"{CONFIG_DIRECTORY}/fleet.yaml"
ENTRY_FILE = "/etc/kervan-entry/haproxy.cfg"
ENTRY_HEALTH_PORT = 8404
ENTRY_REPLICAS = 2
DASHBOARD_PORT = 8265
GCS_PORT = 6379
RAY_METRICS_PORT = 8080
MAX_GATEWAY_PODS = 64
START_TIMEOUT_S = 3600
START_RETRIES = 20

# In what Kubernetes calls the restricted profile.
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def labels(request: RenderRequest, part: str) -> dict[str, str]:
    """Of an object that is a part of the fleet."""
    return {
        "app.kubernetes.io/name": "kervan",
        "app.kubernetes.io/instance": request.name,
        "app.kubernetes.io/component": part,
    }


def metadata(request: RenderRequest, name: str, part: str) -> dict[str, Any]:
    """Name, namespace and labels."""
    return {"name": name, "namespace": request.namespace, "labels": labels(request, part)}


def secret_name(request: RenderRequest) -> str:
    """The Secret with the keys `api-key` and `hf-token`; it is made by hand, so that no file here has a secret."""
    return f"{request.name}-secrets"


def secret_variable(request: RenderRequest, variable: str, key: str, *, is_optional: bool) -> dict[str, Any]:
    """An environment variable out of the fleet's Secret."""
    reference = {"name": secret_name(request), "key": key, "optional": is_optional}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def tls_volume(request: RenderRequest) -> dict[str, Any]:
    """The Secret with the certificate, as `kubectl create secret tls` makes it: with `tls.crt` and `tls.key`."""
    return {"name": "tls", "secret": {"secretName": f"{request.name}-tls", "defaultMode": 0o440}}


def tls_mount(request: RenderRequest) -> dict[str, Any]:
    """Where the fleet's settings expect it. Raises: ConfigError for other names than those in the Secret."""
    certificate, key = PurePosixPath(request.fleet.tls_certificate), PurePosixPath(request.fleet.tls_key)
    if (certificate.name, key) != ("tls.crt", certificate.with_name("tls.key")) or not certificate.is_absolute():
        raise ConfigError(
            f"tls_certificate={certificate} and tls_key={key}: a Secret of Kubernetes holds tls.crt and tls.key; give "
            "for example /etc/kervan-tls/tls.crt and /etc/kervan-tls/tls.key"
        )
    return {"name": "tls", "mountPath": str(certificate.parent), "readOnly": True}


def fleet_config_map(request: RenderRequest) -> dict[str, Any]:
    """What `kervan up` reads on the head."""
    fleet = for_cluster(
        request.fleet, gpus_per_node=request.machine.gpus, nodes=request.most_nodes, adds_nodes=request.is_scaled
    )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(request, f"{request.name}-fleet", "fleet"),
        "data": {"fleet.yaml": plain_yaml(settings(fleet))},
    }


def start_job(request: RenderRequest, config_map: Mapping[str, Any]) -> dict[str, Any]:
    """The Job that runs `kervan up` on the head, as a job of Ray's: a driver has to be on a node of the cluster.

    Its name has a hash of the settings, so applying changed files runs it again, and `kervan up` brings the changes
    into the fleet that runs. Pods wait for nodes by failing: the Job tries again, at growing intervals.
    """
    digest = hashlib.sha256(config_map["data"]["fleet.yaml"].encode()).hexdigest()[:8]
    up = ["kervan", "up", "--config", FLEET_FILE, "--name", request.name, "--address", "auto", "--detach"]
    # A ConfigMap that changed reaches the head's files within a minute or two; the driver waits for it there.
    wait = f"until sha256sum {FLEET_FILE} | grep -q ^{digest}; do sleep 5; done"
    command = ["ray", "job", "submit", "--address", f"http://{request.name}-head-svc:{DASHBOARD_PORT}", "--"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(request, f"{request.name}-up-{digest}", "start"),
        "spec": {
            "backoffLimit": START_RETRIES,
            "activeDeadlineSeconds": START_TIMEOUT_S,
            "ttlSecondsAfterFinished": 24 * 3600,
            "template": {
                "metadata": {"labels": labels(request, "start")},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "securityContext": POD_SECURITY,
                    "containers": [
                        {
                            "name": "up",
                            "image": request.image,
                            "command": [*command, "sh", "-c", f"{wait}; exec {shlex.join(up)}"],
                            "env": token_variables(request),
                            "resources": {
                                "requests": {"cpu": "250m", "memory": "512Mi"},
                                "limits": {"memory": "1Gi"},
                            },
                            "securityContext": CONTAINER_SECURITY,
                        }
                    ],
                },
            },
        },
    }


def token_variables(request: RenderRequest) -> list[dict[str, Any]]:
    """Ray's token, which KubeRay keeps in a Secret with the cluster's name."""
    reference = {"name": request.name, "key": "auth_token"}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}},
    ]


# ---- the entry


def gateway_service(request: RenderRequest) -> dict[str, Any]:
    """A name for the addresses of all workers, of which some have a gateway; the entry asks each."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(request, f"{request.name}-gateways", "gateways"),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"ray.io/cluster": request.name, "ray.io/node-type": "worker"},
            "ports": [{"name": "http", "port": request.fleet.port, "targetPort": request.fleet.port}],
        },
    }


def entry_service(request: RenderRequest) -> dict[str, Any]:
    """What clients connect to."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(request, request.name, "entry"),
        "spec": {
            "type": "ClusterIP",
            "selector": labels(request, "entry"),
            "ports": [{"name": "http", "port": request.fleet.port, "targetPort": "http"}],
        },
    }


def entry_configuration(request: RenderRequest) -> str:
    """HAProxy's: connections go to gateways that answer /health/ready, wherever they are now.

    With TLS it passes connections on as they are, and the gateways end them: it needs no key.
    """
    has_tls = bool(request.fleet.tls_certificate)
    if request.fleet.tls_client_ca:
        raise ConfigError(
            f"tls_client_ca={request.fleet.tls_client_ca}: the entry asks gateways for their health, and has no "
            "certificate to show; leave it out, and keep strangers out by API keys"
        )
    mode, checked = ("tcp", "check check-ssl verify none") if has_tls else ("http", "check")
    own_mode = "\n    mode http" if has_tls else ""
    most = min(MAX_GATEWAY_PODS, max(1, request.most_nodes))
    host = f"{request.name}-gateways.{request.namespace}.svc.cluster.local"
    return f"""\
global
    maxconn 20000
    hard-stop-after 10m

defaults
    mode {mode}
    timeout connect 3s
    timeout client 1h
    timeout server 1h
    timeout http-request 60s
    option redispatch
    retries 2

resolvers cluster
    parse-resolv-conf
    hold valid 5s
    hold nx 5s

frontend clients
    bind :{request.fleet.port}
    default_backend gateways

frontend health{own_mode}
    bind :{ENTRY_HEALTH_PORT}
    monitor-uri /alive
    acl none_ready nbsrv(gateways) lt 1
    http-request return status 503 if {{ path /ready }} none_ready
    http-request return status 200 if {{ path /ready }}

backend gateways
    balance leastconn
    option httpchk GET /health/ready
    http-check expect status 200
    default-server {checked} inter 2s fall 2 rise 1 resolvers cluster init-addr none
    server-template gateway {most} {host}:{request.fleet.port}
"""


def entry_config_map(request: RenderRequest) -> dict[str, Any]:
    """HAProxy's configuration."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(request, f"{request.name}-entry", "entry"),
        "data": {"haproxy.cfg": entry_configuration(request)},
    }


def entry_deployment(request: RenderRequest, config_map: Mapping[str, Any]) -> dict[str, Any]:
    """HAProxy, which Ray Serve brings along, in front of the gateways: where they are changes with the nodes."""
    digest = hashlib.sha256(config_map["data"]["haproxy.cfg"].encode()).hexdigest()[:16]
    pod_labels = labels(request, "entry")
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(request, f"{request.name}-entry", "entry"),
        "spec": {
            "replicas": ENTRY_REPLICAS,
            "selector": {"matchLabels": pod_labels},
            "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": pod_labels, "annotations": {"kervan/configuration": digest}},
                "spec": {
                    "automountServiceAccountToken": False,
                    # Open streams are let to their end: HAProxy takes no new ones after SIGUSR1, which preStop sends.
                    "terminationGracePeriodSeconds": round(request.fleet.drain_timeout_s) + 15,
                    "securityContext": POD_SECURITY,
                    "topologySpreadConstraints": [
                        {
                            "maxSkew": 1,
                            "topologyKey": "kubernetes.io/hostname",
                            "whenUnsatisfiable": "ScheduleAnyway",
                            "labelSelector": {"matchLabels": pod_labels},
                        }
                    ],
                    "containers": [
                        {
                            "name": "haproxy",
                            "image": request.image,
                            "command": ["haproxy", "-W", "-db", "-f", ENTRY_FILE],
                            "ports": [
                                {"name": "http", "containerPort": request.fleet.port},
                                {"name": "health", "containerPort": ENTRY_HEALTH_PORT},
                            ],
                            "readinessProbe": {
                                "httpGet": {"path": "/ready", "port": "health"},
                                "periodSeconds": 3,
                                "failureThreshold": 2,
                            },
                            "livenessProbe": {"httpGet": {"path": "/alive", "port": "health"}, "periodSeconds": 10},
                            "lifecycle": {
                                "preStop": {
                                    "exec": {
                                        "command": [
                                            "sh",
                                            "-c",
                                            # First so long that no new connection is sent here.
                                            f"sleep 5; kill -USR1 1; sleep {round(request.fleet.drain_timeout_s)}",
                                        ]
                                    }
                                }
                            },
                            "resources": {
                                "requests": {"cpu": "500m", "memory": "256Mi"},
                                "limits": {"memory": "1Gi"},
                            },
                            "securityContext": CONTAINER_SECURITY,
                            "volumeMounts": [
                                {"name": "configuration", "mountPath": "/etc/kervan-entry", "readOnly": True}
                            ],
                        }
                    ],
                    "volumes": [{"name": "configuration", "configMap": {"name": config_map["metadata"]["name"]}}],
                },
            },
        },
    }


# ---- what may happen to pods, and who may talk to them


def disruption_budgets(request: RenderRequest) -> list[dict[str, Any]]:
    """Kubernetes takes one worker at a time, and the head only when somebody deletes its pod.

    A worker that leaves drains first; the next one must not follow before the streams have found a place. The end of
    the head is that of the whole fleet, since Ray's state is there.
    """
    worker = {"ray.io/cluster": request.name, "ray.io/node-type": "worker"}
    return [
        _budget(request, f"{request.name}-workers", "workers", worker, {"maxUnavailable": 1}),
        _budget(request, f"{request.name}-head", "head", {**worker, "ray.io/node-type": "head"}, {"maxUnavailable": 0}),
        _budget(request, f"{request.name}-entry", "entry", labels(request, "entry"), {"maxUnavailable": 1}),
    ]


def _budget(
    request: RenderRequest, name: str, part: str, selector: Mapping[str, str], bound: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(request, name, part),
        "spec": {**bound, "selector": {"matchLabels": dict(selector)}},
    }


def network_policies(request: RenderRequest) -> list[dict[str, Any]]:
    """Who may connect: the cluster's pods to each other, the entry to gateways, the Job to Ray, all to the entry."""
    cluster = {"matchLabels": {"ray.io/cluster": request.name}}
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(request, f"{request.name}-cluster", "fleet"),
            "spec": {
                "podSelector": cluster,
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"podSelector": cluster}]},
                    {
                        "from": [{"podSelector": {"matchLabels": labels(request, "entry")}}],
                        "ports": [{"protocol": "TCP", "port": request.fleet.port}],
                    },
                    {
                        "from": [{"podSelector": {"matchLabels": labels(request, "start")}}],
                        "ports": [{"protocol": "TCP", "port": DASHBOARD_PORT}],
                    },
                    {
                        # KubeRay's operator, wherever it runs, and Prometheus, which reads Ray's metrics.
                        "from": [
                            {
                                "namespaceSelector": {},
                                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
                            },
                            {
                                "namespaceSelector": {},
                                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
                            },
                        ],
                        "ports": [
                            {"protocol": "TCP", "port": DASHBOARD_PORT},
                            {"protocol": "TCP", "port": RAY_METRICS_PORT},
                        ],
                    },
                ],
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(request, f"{request.name}-entry", "entry"),
            "spec": {
                "podSelector": {"matchLabels": labels(request, "entry")},
                "policyTypes": ["Ingress"],
                "ingress": [{"ports": [{"protocol": "TCP", "port": request.fleet.port}]}],
            },
        },
    ]
