"""The autoscaling policy that a fleet's settings ask for."""

from collections.abc import Mapping
from typing import Any

from kervan.config.fleet import FleetConfig
from kervan.policy.autoscale.state import Decision, FleetState, Policy
from kervan.serve.scaler.starts import PRIOR_S


class StreamsPolicy:
    name = "streams"

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        pool = state.pools[0]
        if state.demand is None:
            return Decision(targets={pool.name: pool.target}, reason="no news", memory=memory)
        streams = state.demand.held + state.demand.queued + state.demand.running
        wanted = -(-streams // 4)
        last = memory.get("low_s", state.now_s)
        if wanted < pool.target and state.now_s - last < 5:
            return Decision(targets={pool.name: pool.target}, reason="waits", memory={"low_s": last})
        return Decision(
            targets={pool.name: wanted},
            reason=f"{streams} streams, 4 each",
            numbers={"streams": streams},
            memory={"low_s": state.now_s} if wanted >= pool.target else {"low_s": last},
        )


def of_fleet(config: FleetConfig) -> Policy | None:
    """None where its settings leave no choice."""
    if config.autoscaler is None:
        return None
    return StreamsPolicy()


def start_prior_s(config: FleetConfig) -> float:
    """How long a replica takes to start, before one has."""
    return PRIOR_S


def leaving(state: FleetState) -> list[str]:
    """All replicas, those first that go first."""
    order = {"unhealthy": 0, "draining": 0, "starting": 1, "ready": 2}
    return [
        r.id
        for r in sorted(
            state.replicas,
            key=lambda r: (order[r.phase], not r.is_outdated, r.context_tokens + r.queued_tokens, r.ready_for_s),
        )
    ]
