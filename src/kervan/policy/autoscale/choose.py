"""The policy that a fleet's settings ask for."""

from collections.abc import Mapping
from typing import Any

from kervan.config.autoscale import Autoscaling
from kervan.policy.autoscale import decisions, mix
from kervan.policy.autoscale.ray_target import RayTarget
from kervan.policy.autoscale.slo import SloPolicy, SloSettings
from kervan.policy.autoscale.state import Decision, FleetState, Policy, ReplicaModel
from kervan.policy.autoscale.to_zero import IDLE_S


def policy(asked: Autoscaling, model: ReplicaModel | None = None, *, name: str = "") -> Policy:
    """`name`: another one than the settings say, to see what it would do."""
    chosen = name or asked.policy
    if chosen == "ray":
        return RayTarget(asked.ray, asked.schedule)
    if chosen == "fill":
        return Fill(asked)
    ray, given = asked.ray, asked.given
    to_zero_s = ray.downscale_to_zero_delay_s
    return SloPolicy(
        SloSettings(
            slo=asked.slo,
            schedule=asked.schedule,
            upscale_delay_s=ray.upscale_delay_s if "upscale_delay_s" in given else 0.0,
            downscale_delay_s=ray.downscale_delay_s if "downscale_delay_s" in given else None,
            to_zero_s=IDLE_S if to_zero_s is None else to_zero_s,
        ),
        model,
    )


class Fill:
    """The least on-demand, all spot that gets a node; on-demand covers what is missing. Not by load."""

    name = "fill"

    def __init__(self, asked: Autoscaling) -> None:
        self._schedule = asked.schedule

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """See `Policy`."""
        least = sum(pool.minimum for pool in state.pools)
        wanted = sum(pool.maximum if pool.name == mix.SPOT else pool.minimum for pool in state.pools)
        within = decisions.bounds(state, self._schedule)
        return decisions.decision(
            state, wanted, within, f"all spot that gets a node, {least} at least", numbers={"wanted": float(wanted)},
            memory=dict(memory),
        )  # fmt: skip
