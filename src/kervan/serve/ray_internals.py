"""All names of Ray that kervan uses and Ray does not promise to keep: private, experimental or undocumented.

They are of Ray 2.60; `tests/contract/test_ray_surface.py` checks each in the installed release. Ray is imported by the
functions, not with this module: `cluster.connect` must set Ray's environment first.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import psutil

logger = logging.getLogger(__name__)

KV_NAMESPACE = b"kervan"

# Ray's workers give way to everything else (nice 15); kervan's are the server itself.
NICENESS_VARIABLE = "RAY_worker_niceness"
# Serve looks at its replicas 10 times a second by default: idle work beside the gateways.
CONTROL_LOOP_VARIABLE = "RAY_SERVE_CONTROL_LOOP_INTERVAL_S"
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
# HAProxy's own ports, of its metrics and its state; fixed, so two Ray clusters on one machine need others.
HAPROXY_PORT_VARIABLES = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
# How long, at least, a replica that leaves goes on listening with HAProxy on: by default 30 s, for balancers in front.
DRAINING_VARIABLE = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
# Ray starts an idle worker per core when its first driver joins; kervan has a few actors, whatever the number of cores.
PRESTART_VARIABLE = "RAY_prestart_worker_first_driver"
# How often a node's agent looks at all processes for Ray's dashboard, in ms: every 5 s by default.
REPORTER_VARIABLE = "REPORTER_UPDATE_INTERVAL_MS"
# With it, tokens are those of Kubernetes' service accounts, and Kubernetes is asked whether one is good.
KUBERNETES_AUTH_VARIABLE = "RAY_ENABLE_K8S_TOKEN_AUTH"

# An option of `ray.init`: the directory of all that Ray writes.
TEMP_DIR_OPTION = "_temp_dir"
# Options of a Serve deployment: with it, `version` says that its code is another one, and Serve does not warn of it.
VERSION_OPTIONS = {"_internal": True}
# The method of a Serve replica that builds its ASGI app on Serve's loop.
BUILD_APP_METHOD = "__serve_build_asgi_app__"


# ---- Ray's own store, which outlives every actor


def kv_get(key: str) -> bytes | None:
    """What kervan has stored under `key`; None for nothing."""
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key.encode(), namespace=KV_NAMESPACE)
    return value


def kv_put(key: str, value: bytes) -> None:
    """Store `value` under `key`, in place of what was there."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key.encode(), value, overwrite=True, namespace=KV_NAMESPACE)


def kv_delete(key: str) -> None:
    """Forget what is stored under `key`, if anything is."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key.encode(), namespace=KV_NAMESPACE)


# ---- nodes


def found_address() -> str | None:
    """What Ray takes for the address "auto": host:port of RAY_ADDRESS, or of a cluster on this machine; None for none.

    Raises: ValueError for a RAY_ADDRESS that is not in that form.
    """
    from ray._private.services import canonicalize_bootstrap_address

    address: str | None = canonicalize_bootstrap_address("auto")
    return address


def raylets(gcs_address: str, timeout_s: float) -> list[tuple[str, int]]:
    """Where the raylets of the alive nodes listen, before this process joins.

    Raises: what Ray raises; AuthenticationError when the cluster refuses the token, or wants one.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    infos = GcsClient(address=gcs_address).get_all_node_info(timeout=timeout_s)
    return [(info.node_manager_address, info.node_manager_port) for info in infos.values() if info.state == 0]


def free_resources() -> dict[str, dict[str, float]]:
    """Of each alive node, by Ray's node id: the resources that nothing has taken."""
    from ray._private import state

    resources: dict[str, dict[str, float]] = state.available_resources_per_node()
    return resources


def draining_nodes() -> dict[str, int]:
    """Ray's ids of the nodes that are drained, with the deadline: Unix time in ms, 0 without one."""
    from ray._private import state

    deadlines_ms: dict[str, int] = state.state.get_draining_nodes()
    return deadlines_ms


def drain_node(node_id: str, deadline_ms: int) -> str:
    """Let Ray put nothing more on a node, and end it at `deadline_ms`, Unix time in ms; why it refuses, or ""."""
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    is_accepted, reason = worker.global_worker.gcs_client.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),  # cannot be refused for being busy
        "kervan drain",
        deadline_ms,
    )
    return "" if is_accepted else reason or "no reason was given"


def silence_driver() -> None:
    """Let Ray print nothing of lost nodes and workers: a driver's output is the command's, and may be JSON."""
    from ray._private import worker

    worker._worker_logs_enabled = False


def leave_out_parts() -> None:
    """Let `ray.init` of this process start a Ray without what a Ray of one machine has no use for.

    That is three processes, each of which imports Ray once more: what reads all logs for drivers that print them (they
    are written as ever), the autoscaler, which would ask a cloud for nodes, and the dashboard's server, of which
    `include_dashboard=False` leaves out no more than its pages. `ray.init` has no words for that, as `ray start` has
    for the first two.
    """
    from ray._private import parameter, services

    parameter.RayParams = partial(parameter.RayParams, include_log_monitor=False, no_monitor=True)
    services.start_api_server = lambda *_, **__: (None, None)  # as where it does not start: nothing needs it


# ---- Serve


class ServeProxies(NamedTuple):
    """How Serve was started on the cluster. `port`: of its proxies, if there are some."""

    are_enabled: bool
    port: int


def serve_proxies() -> ServeProxies | None:
    """What Serve's controller says of its proxies; None while Serve does not run."""
    import ray
    from ray.serve.config import ProxyLocation
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    location = ray.get(client._controller.get_proxy_location.remote())
    return ServeProxies(location not in (None, ProxyLocation.Disabled), client.http_config.port)


def serves_own_choice() -> Callable[..., Any]:
    """The method by which Serve's scheduler chooses who stops, as Ray has it."""
    from ray.serve._private.deployment_scheduler import DeploymentScheduler

    method = DeploymentScheduler._get_replicas_to_stop
    own: Callable[..., Any] = getattr(method, "serves_own", method)
    return own


def let_choose_who_stops(leaving: Callable[[str], Sequence[str]]) -> None:
    """In the process of Serve's controller: when fewer replicas are wanted, stop those that `leaving` says.

    Serve itself stops the newest (Ray 2.60), and has no way to say otherwise. `leaving`: application -> Serve's ids of
    its replicas, those first that go first. Replicas on their way that it does not name go before all others: nobody
    has heard of them. Where it says nothing, Serve chooses.
    """
    from ray.serve._private.deployment_scheduler import DeploymentScheduler

    serves_own = serves_own_choice()

    def replicas_to_stop(scheduler: Any, deployment_id: Any, max_num_to_stop: int, **gangs: Any) -> set[Any]:
        chosen: list[Any] = []
        try:
            order = leaving(deployment_id.app_name)
            coming = [*scheduler._pending_replicas[deployment_id], *scheduler._launching_replicas[deployment_id]]
            there = [*scheduler._recovering_replicas[deployment_id], *scheduler._running_replicas[deployment_id]]
            by_id = {replica_id.unique_id: replica_id for replica_id in (*coming, *there)}
            if order and gangs.get("gang_id_by_replica") is None:
                unheard = [replica_id for replica_id in coming if replica_id.unique_id not in order]
                chosen = [*unheard, *(by_id[name] for name in order if name in by_id)]
        except Exception:  # supervised: in Serve's loop, which would update nothing any more
            logger.exception("Serve chooses which replicas stop")
        if not chosen:
            own: set[Any] = serves_own(scheduler, deployment_id, max_num_to_stop, **gangs)
            return own
        stopped = set(chosen[:max_num_to_stop])
        for count in range(1, len(by_id) + 1):  # those of which the fleet has not heard yet, as Serve would
            if len(stopped) < max_num_to_stop:
                stopped |= serves_own(scheduler, deployment_id, count, **gangs)
        return stopped

    replicas_to_stop.serves_own = serves_own  # type: ignore[attr-defined]
    DeploymentScheduler._get_replicas_to_stop = replicas_to_stop


# ---- a cluster whose nodes are all processes of this one (`serve/local_nodes.py`)


class NodeCluster:
    """Ray's cluster for tests. Its methods raise what Ray raises."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()

    @property
    def address(self) -> str:
        """Of the head, which is the first node; host:port."""
        return str(self._cluster.address)

    def add(self, **options: Any) -> Any:
        """Start a node. `options`: words of `ray.init`, such as `num_cpus`."""
        return self._cluster.add_node(wait=False, include_log_monitor=False, **options)

    def wait_for(self, node: Any, timeout_s: float) -> None:
        """Wait until Ray has a node that was added."""
        self._cluster._wait_for_node(node, timeout_s)

    def processes(self, node: Any) -> Iterator[psutil.Process]:
        """All processes of a node, parents first; one that ends meanwhile is left out."""
        for part in node.live_processes():
            try:
                process = psutil.Process(part[1].pid)
                below = process.children(recursive=True)
            except psutil.Error:
                continue
            yield process
            yield from below

    def remove(self, node: Any) -> None:
        """Forget a node whose processes are gone."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()
