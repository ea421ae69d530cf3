"""A fleet on Kubernetes: a RayCluster of KubeRay (ray.io/v1), and what KubeRay does not make.

No RayService: it deploys an import path with Serve's own configuration, watches Serve's proxies, and for each change
starts a second cluster. `kervan up` deploys its application itself, with a directory and a secret of the fleet beside
it, has no proxies, and changes a fleet in place, replica by replica; so a Job runs it on a RayCluster.
"""

from typing import Any

from kervan.cluster import kubernetes, monitoring
from kervan.cluster.nodes import NodeGroup
from kervan.cluster.request import RenderRequest
from kervan.cluster.text import as_yaml
from kervan.facts.markets import SPOT

RAY_VERSION = "2.60.0"
IDLE_TIMEOUT_S = 300
HEAD_RESOURCES = {"cpu": "4", "memory": "16Gi"}
HOME = "/home/kervan"


def files(request: RenderRequest) -> dict[str, str]:
    """By their names, in the order of applying them."""
    target = request.target
    fleet, entry = kubernetes.fleet_config_map(request), kubernetes.entry_config_map(request)
    made = {
        "10-fleet.yaml": [fleet],
        "20-cluster.yaml": [ray_cluster(request)],
        "30-start.yaml": [kubernetes.start_job(request, fleet)],
        "40-entry.yaml": [
            kubernetes.gateway_service(request),
            entry,
            kubernetes.entry_deployment(request, entry),
            kubernetes.entry_service(request),
        ],
        "50-policies.yaml": [*kubernetes.disruption_budgets(request), *kubernetes.network_policies(request)],
    }
    if request.extras:
        made["60-monitoring.yaml"] = monitoring.objects(request)
    return {name: as_yaml(target, *documents) for name, documents in made.items()}


def ray_cluster(request: RenderRequest) -> dict[str, Any]:
    """The head, and a group of workers for each market."""
    spec: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": _head(request),
        "workerGroupSpecs": [_workers(request, group) for group in request.groups],
    }
    if request.is_scaled:
        spec |= {
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "idleTimeoutSeconds": IDLE_TIMEOUT_S,
                "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            },
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": kubernetes.metadata(request, request.name, "fleet"),
        "spec": spec,
    }


def _head(request: RenderRequest) -> dict[str, Any]:
    """Without GPUs and without work: Ray's state, Serve's controller, the fleet's directory, and the drivers."""
    container = {
        "name": "ray-head",
        "image": request.image,
        "env": [
            *_common_variables(request),
            # `kervan up` runs here. Without a key the head does not start: its port is open to the whole cluster.
            kubernetes.secret_variable(request, "KERVAN_API_KEY", "api-key", is_optional=False),
        ],
        "ports": [
            {"name": "gcs-server", "containerPort": kubernetes.GCS_PORT},
            {"name": "dashboard", "containerPort": kubernetes.DASHBOARD_PORT},
            {"name": "metrics", "containerPort": kubernetes.RAY_METRICS_PORT},
        ],
        "resources": {"requests": dict(HEAD_RESOURCES), "limits": {"memory": HEAD_RESOURCES["memory"]}},
        "securityContext": kubernetes.CONTAINER_SECURITY,
        "volumeMounts": [
            *_mounts(request),
            {"name": "fleet", "mountPath": kubernetes.CONFIG_DIRECTORY, "readOnly": True},
        ],
    }
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
        "template": {
            "metadata": {
                "annotations": {
                    # Neither autoscaler of nodes may move it to save a machine.
                    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                    "karpenter.sh/do-not-disrupt": "true",
                },
            },
            "spec": {
                "securityContext": kubernetes.POD_SECURITY,
                "terminationGracePeriodSeconds": request.grace("on-demand").period_s,
                "affinity": {"nodeAffinity": _required(_market(request, is_spot=False))},
                "containers": [container],
                "volumes": [
                    *_volumes(request),
                    {"name": "fleet", "configMap": {"name": f"{request.name}-fleet"}},
                ],
            },
        },
    }


def _workers(request: RenderRequest, group: NodeGroup) -> dict[str, Any]:
    grace, is_spot = request.grace(group.market), group.market == SPOT
    machine = request.machine
    resources: dict[str, Any] = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}
    limits: dict[str, Any] = {"memory": resources["memory"]}
    if machine.gpus:
        resources["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(machine.gpus)
    # POD_IP is Ray's address of the node; kervan finds the cluster by RAY_ADDRESS, which KubeRay sets.
    drain = f'kervan drain "$POD_IP" --name {request.name} --deadline {grace.drain_s}s --address auto'
    container = {
        "name": "ray-worker",
        "image": request.image,
        "env": [
            *_common_variables(request),
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "KERVAN_NOTICES_WATCH", "value": "auto,signal"},
            # Without preStop, of a node that its kubelet ends: Ray drains itself, and kervan's watcher sees it.
            {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(grace.drain_s)},
            {"name": "KERVAN_NOTICES_SIGTERM_LEAD_S", "value": str(grace.drain_s)},
        ],
        "ports": [
            {"name": "http", "containerPort": request.fleet.port},
            {"name": "metrics", "containerPort": kubernetes.RAY_METRICS_PORT},
        ],
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", drain]}}},
        "resources": {"requests": resources, "limits": limits},
        "securityContext": kubernetes.CONTAINER_SECURITY,
        "volumeMounts": _mounts(request),
    }
    spec: dict[str, Any] = {
        "securityContext": kubernetes.POD_SECURITY,
        "terminationGracePeriodSeconds": grace.period_s,
        "affinity": {"nodeAffinity": _required([*_market(request, is_spot=is_spot), *_instance(request)])},
        "tolerations": _tolerations(request, is_spot=is_spot),
        "containers": [container],
        "volumes": _volumes(request),
    }
    if len(request.zones) > 1:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"ray.io/cluster": request.name, "ray.io/group": group.market}},
            }
        ]
    return {
        "groupName": group.market,
        "replicas": group.least,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        # KubeRay gives them to Ray; kervan's pools place replicas by them.
        "labels": {"ray.io/market-type": group.market},
        "rayStartParams": {},
        "template": {"spec": spec},
    }


def _common_variables(request: RenderRequest) -> list[dict[str, Any]]:
    return [
        {"name": "KERVAN_HOME", "value": f"{HOME}/.kervan"},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        kubernetes.secret_variable(request, "HF_TOKEN", "hf-token", is_optional=True),
    ]


def _volumes(request: RenderRequest) -> list[dict[str, Any]]:
    """Of a pod: weights, compiled code and logs. They are lost with it; a claim in place of it keeps them."""
    tls = [kubernetes.tls_volume(request)] if request.fleet.tls_certificate else []
    return [{"name": "home", "emptyDir": {}}, *tls]


def _mounts(request: RenderRequest) -> list[dict[str, Any]]:
    tls = [kubernetes.tls_mount(request)] if request.fleet.tls_certificate else []
    return [{"name": "home", "mountPath": HOME}, *tls]


def _market(request: RenderRequest, *, is_spot: bool) -> list[dict[str, Any]]:
    """Expressions about the node, of which all must hold: its market, and its zone where some are named."""
    label, value = request.cloud.spot_label
    terms: list[dict[str, Any]] = [{"key": label, "operator": "In" if is_spot else "NotIn", "values": [value]}]
    if request.zones:
        names = [zone.name for zone in request.zones]
        terms.append({"key": "topology.kubernetes.io/zone", "operator": "In", "values": names})
    return terms


def _required(terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": terms}]}}


def _instance(request: RenderRequest) -> list[dict[str, Any]]:
    if not request.machine.instance:
        return []
    return [{"key": "node.kubernetes.io/instance-type", "operator": "In", "values": [request.machine.instance]}]


def _tolerations(request: RenderRequest, *, is_spot: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if request.machine.gpus:
        found.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if is_spot and request.cloud.spot_taint is not None:
        key, value = request.cloud.spot_taint
        found.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    return found
