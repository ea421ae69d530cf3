"""What Serve's controller asks when it scales: gateways by their load, replicas as the scaler wants them.

The functions run in the controller's loop, which does nothing else meanwhile: they read what a thread has brought, and
raise nothing, since a policy that does stops its application, and all after it, from being updated (Ray 2.60). Serve
pickles this module by value, so nothing of it may keep anything.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

from kervan.config.fleet import FleetConfig
from kervan.policy import gateway_count
from kervan.serve import ray_internals
from kervan.serve.scaler import wanted

APP_PREFIX = wanted.APP_PREFIX
BUSY = "busy"  # a gateway's metric: the share of the time in which its loop ran, or waited for a core


def gateways(config: FleetConfig) -> dict[str, Any]:
    """Serve's autoscaling of a fleet's gateways.

    A fixed number has it too, with that number as both bounds: a Serve replica that starts without it does not begin
    to report when it comes (Ray 2.60), and gateways are not replaced for that.
    """
    return {
        "min_replicas": config.gateways,
        "initial_replicas": config.gateways,
        "max_replicas": config.max_gateways or config.gateways,
        "look_back_period_s": 20.0,  # two reports of each gateway; Serve collects them every 10 s
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
        "policy": {"policy_function": f"{__name__}:count_gateways"},
    }


def count_gateways(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Called by Serve's controller. It bounds the result and waits before it acts."""
    busy = (context.aggregated_metrics or {}).get(BUSY, {})
    decision = gateway_count.decide(
        [busy[replica_id] for replica_id in context.running_replicas if replica_id in busy],
        context.target_num_replicas,
        context.capacity_adjusted_min_replicas,
        context.capacity_adjusted_max_replicas,
    )
    return decision.count, {"reason": decision.reason}


def pool(config: FleetConfig, name: str) -> dict[str, Any]:
    """Serve's autoscaling of one of a fleet's pools. What to wait for is the scaler's to know, so Serve waits for none.

    Without `initial_replicas`, a change of other settings leaves the number as it is. A pool with a choice may always
    go to none, as far as Serve is concerned: what it cannot place would hold up changes of the rest.
    """
    bounds = config.bounds[name]
    return {
        "min_replicas": bounds.minimum if bounds.minimum == bounds.maximum else 0,
        "max_replicas": bounds.maximum,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {"policy_function": f"{__name__}:count_replicas"},
    }


def count_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many as the scaler wants; as many as there are to be while it has said nothing."""
    ray_internals.let_choose_who_stops(wanted.leaving)
    found = wanted.latest(context.app_name.removeprefix(APP_PREFIX))
    return found.targets.get(context.deployment_name, context.target_num_replicas), {}
