"""A fleet as one Serve application: gateways over a pool of engine replicas."""

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.serve import autoscaling, placement, pools, ray_internals
from kervan.serve.gateway_actor import GatewayReplica, IngressGatewayReplica
from kervan.serve.placement import NodeDevices
from kervan.serve.ray_errors import as_fleet_error, bounded, wait_for
from kervan.serve.replica_actor import EngineReplica
from kervan.serve.versions import versions

HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 30.0
SURGE_PERCENT = 25
TAKEN_PORT = re.compile(r"cannot bind socket \(Address already in use\) for \[(\S+)\]")
DEPLOY_TIMEOUT_S = 60.0  # it takes a second, and longer where the machine is busy
DELETE_TIMEOUT_S = 90.0  # Serve itself gives up after 60 s
UNLIMITED = 1_000_000_000  # kervan's gateways carry the requests; Serve counts none


def app_name(fleet_name: str) -> str:
    """The name of a fleet's application in Serve."""
    return f"{autoscaling.APP_PREFIX}{fleet_name}"


def build(config: FleetConfig, nodes: Sequence[NodeDevices], *, surges: bool = True) -> Any:
    """The Serve application of a fleet on a cluster of `nodes`.

    `surges`: when replicas are replaced, new ones are ready before old ones drain, a quarter of them at a time; without
    it, a fifth of them (at least one) is stopped first.

    Raises: ConfigError for settings that Serve refuses.
    """
    try:
        return _build(config, nodes, surges=surges)
    except ValueError as error:  # pydantic's too
        raise ConfigError(f"Ray Serve refuses these settings: {' '.join(str(error).split())[:300]}") from error


def _build(config: FleetConfig, nodes: Sequence[NodeDevices], *, surges: bool) -> Any:
    current = versions(config)
    stored = config.to_json()
    common: dict[str, Any] = {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_ongoing_requests": UNLIMITED,
        **ray_internals.VERSION_OPTIONS,  # `version` is Serve's own way to say that code did not change
    }
    engines = [
        serve.deployment(EngineReplica)
        .options(
            name=pool,
            autoscaling_config=autoscaling.pool(config, pool),
            graceful_shutdown_timeout_s=config.drain_timeout_s + 15.0,
            max_replicas_per_node=pools.per_node(config, pool),
            **_place(config, nodes, pool),
            version=current.replicas,
            max_surge_percent=SURGE_PERCENT if surges else 0,
            **common,
        )
        .bind(stored, pool, current.replicas)
        for pool in _deployments(config)
    ]
    kind = next((node.accelerator for node in nodes if node.accelerator), None)
    gateway: Any = GatewayReplica if config.ingress == "direct" else serve.ingress()(IngressGatewayReplica)
    gateways = serve.deployment(gateway).options(
        name="gateway",
        autoscaling_config=autoscaling.gateways(config),
        graceful_shutdown_timeout_s=config.drain_timeout_s + 10.0,
        # vLLM's frontend needs the platform of the engines, so gateways live where such GPUs are.
        ray_actor_options={"num_cpus": 0, "resources": {kind: 0.001} if kind else {}},
        version=current.gateways,
        max_surge_percent=100,
        **common,
    )
    return gateways.bind(stored, current.gateways, *engines)


def _deployments(config: FleetConfig) -> list[str]:
    """The pools that have a deployment. Serve scales none within 0..0."""
    return [pool for pool, bounds in config.bounds.items() if bounds.maximum]


def _place(config: FleetConfig, nodes: Sequence[NodeDevices], pool: str) -> dict[str, Any]:
    """What Ray sets aside for one engine replica: GPUs of one node, or a bundle on each of several nodes."""
    selector = pools.label_selector(pool) if config.pools else None
    if config.nodes_per_replica > 1:
        count = config.nodes_per_replica
        bundle = {placement.device(config, nodes): placement.devices_per_node(config)}
        return {
            "ray_actor_options": {"num_cpus": 0},
            "placement_group_bundles": [bundle] * count,
            "placement_group_strategy": "STRICT_SPREAD",
            **({"placement_group_bundle_label_selector": [selector] * count} if selector else {}),
        }
    gpus = config.world_size * config.gpu_share if placement.is_counted(config, nodes) else 0
    bound = {"label_selector": selector} if selector else {}
    return {"ray_actor_options": {"num_cpus": 0, "num_gpus": gpus, **bound}}


def deploy(app: Any, config: FleetConfig) -> None:
    """Hand the application to Serve; returns before it runs."""
    _quiet()
    route = None if config.ingress == "direct" else "/"
    target = serve.RunTarget(target=app, name=app_name(config.name), route_prefix=route)
    bounded(
        f"Serve's controller did not take the new settings of fleet {config.name!r}",
        lambda: serve.run_many(
            [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        ),
        DEPLOY_TIMEOUT_S,
    )


def check_controller() -> None:
    """Before anything is changed: whether Serve's controller answers. Raises: FleetError when it does not."""
    bounded("Serve's controller does not answer", ray_internals.serve_proxies)


@dataclass(frozen=True, slots=True)
class ServedDeployment:
    """What Serve says of the gateways or of a pool. `replicas`: their number by Serve's states, such as RUNNING."""

    name: str
    status: str
    message: str
    replicas: dict[str, int]


def served(fleet_name: str, timeout_s: float) -> list[ServedDeployment] | None:
    """What Serve runs of a fleet; None when it has no application of it. Raises: FleetError when Serve is silent."""
    status = bounded("Serve's controller does not answer", serve.status, timeout_s)
    application = status.applications.get(app_name(fleet_name))
    if application is None:
        return None
    return [
        ServedDeployment(name, found.status.value, found.message, dict(found.replica_states))
        for name, found in sorted(application.deployments.items())
    ]


def _quiet() -> None:
    """Serve's driver-side log repeats what kervan says; importing Serve sets its level."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def start_serve(config: FleetConfig) -> None:
    """Start Serve's controller, unless it runs; with direct ingress, without a proxy.

    Raises: FleetError when its proxies do not start, or when Serve runs already and they do not listen where the fleet
    wants them.
    """
    _quiet()
    proxies = bounded("Serve's controller does not answer", ray_internals.serve_proxies)
    if proxies is None:
        if config.ingress == "direct":
            serve.start(proxy_location="Disabled")
        else:
            try:
                serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=config.host, port=config.port))
            except (RayError, TimeoutError) as error:
                raise FleetError(proxy_failure(str(error))) from error
    elif config.ingress == "serve":  # Serve keeps the proxies of its first start
        if not proxies.are_enabled:
            raise FleetError(
                "--ingress serve needs Serve's proxies, and Serve was started on this cluster without them; "
                "use --ingress direct, or `serve shutdown` on the cluster first"
            )
        if proxies.port != config.port:
            raise FleetError(
                f"Serve listens on port {proxies.port} of this cluster already, not on {config.port}; "
                f"use --port {proxies.port}, or --ingress direct"
            )


def proxy_failure(said: str) -> str:
    """Why Serve's proxies did not start, from what Ray says of it: a traceback with HAProxy's output."""
    if taken := TAKEN_PORT.findall(said):
        places, variables = " and ".join(dict.fromkeys(taken)), " and ".join(ray_internals.HAPROXY_PORT_VARIABLES)
        return (
            f"Serve's HTTP proxy did not start: {places} of a node is taken, perhaps by the "
            f"proxy of another Ray cluster there; set {variables} for Ray on all nodes to free ports, or use another "
            "--port or --ingress direct"
        )
    last_line = said.strip().rpartition("\n")[2][:300] or "Ray says nothing of it"
    return f"Serve's HTTP proxy did not start: {last_line}; use --ingress direct, or see the logs of Ray on its nodes"


def delete(fleet_name: str) -> None:
    """End the application: gateways and replicas drain, then leave.

    Returns when they are gone, or after a minute: a replica that waits for a GPU outlasts Serve's patience, and Serve
    goes on ending it. Raises: FleetError when Serve's controller does not answer, before anything is ended.
    """
    _quiet()
    check_controller()
    with as_fleet_error(f"Serve did not end fleet {fleet_name!r}"), contextlib.suppress(TimeoutError):
        wait_for(lambda: serve.delete(app_name(fleet_name)), DELETE_TIMEOUT_S)
