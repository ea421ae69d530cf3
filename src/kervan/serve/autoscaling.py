"""Policies behind Ray Serve's autoscaling: each reads Serve's context, and lets a pure one decide."""

from typing import Any

from ray.serve.config import AutoscalingContext

from kervan.config.fleet import FleetConfig
from kervan.facts.markets import SPOT
from kervan.policy import gateway_count
from kervan.policy import pools as pool_sizes
from kervan.serve import pools

APP_PREFIX = "kervan-"  # of a fleet's application in Serve
BUSY = "busy"  # a gateway's metric: the share of the time in which its loop ran, or waited for a core
READ_PERIOD_S = 0.5  # Serve asks ten times a second


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
    """Serve's autoscaling of one of a fleet's pools. What to wait for is the policy's to know, so Serve waits for none.

    Without `initial_replicas`, a change of other settings leaves the number as it is. Spot may always go to none: what
    Serve cannot place would hold up changes of the rest.
    """
    bounds = config.bounds[name]
    function = "count_spot" if name == SPOT else "count_on_demand"
    return {
        "min_replicas": 0 if name == SPOT else bounds.minimum,
        "max_replicas": bounds.maximum,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {"policy_function": f"{__name__}:{function}"},
    }


def count_on_demand(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The floor, and cover for missing spot replicas."""
    facts, state = _spot_facts(context)
    minimum, maximum = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    if facts is None:
        return max(context.target_num_replicas, minimum), state
    decision = pool_sizes.on_demand(
        pool_sizes.SpotState(facts.wanted, facts.ready, facts.starting, facts.outdated),
        context.target_num_replicas,
        minimum,
        maximum,
        state.get("history", ()),
        now_s=context.current_time,
        after_s=facts.fallback_after_s,
        hold_s=facts.fallback_hold_s,
    )
    return decision.count, {**state, "history": decision.history, "reason": decision.reason}


def count_spot(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """All that are wanted, or as many as a change of settings can go on with."""
    facts, state = _spot_facts(context)
    if facts is None:
        return context.target_num_replicas, state
    decision = pool_sizes.spot(
        pool_sizes.SpotState(facts.wanted, facts.ready, facts.starting, facts.outdated),
        state.get("rollout"),
        now_s=context.current_time,
    )
    return decision.count, {**state, "rollout": decision.rollout, "reason": decision.reason}


def _spot_facts(context: AutoscalingContext) -> tuple[pools.SpotFacts | None, dict[str, Any]]:
    """What the directory told last, and this policy's state."""
    state = dict(context.policy_state)
    if context.current_time - state.get("read_s", 0.0) >= READ_PERIOD_S:
        state |= {"read_s": context.current_time, "facts": pools.published(context.app_name.removeprefix(APP_PREFIX))}
    return state["facts"], state
