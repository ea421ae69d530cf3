"""Policies behind Ray Serve's autoscaling: each reads Serve's context, and lets a pure one decide."""

from typing import Any

from ray.serve.config import AutoscalingContext

from kervan.facts.fleet import FleetConfig
from kervan.policy import gateway_count

BUSY = "busy"  # a gateway's metric: the share of a core that its loop used


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
    told = (context.aggregated_metrics or {}).get(BUSY, {})
    decision = gateway_count.decide(
        [told[one] for one in context.running_replicas if one in told],
        context.target_num_replicas,
        context.capacity_adjusted_min_replicas,
        context.capacity_adjusted_max_replicas,
    )
    return decision.count, {"reason": decision.reason}
