"""SkyServe's policy on spot nodes, SpotHedge, as its paper describes it and SkyPilot sets it: to compare others with.

    target    = requests/s over the last minute / target requests/s of a replica, rounded up
    spot      = target + extra
    on-demand = target + extra - ready spot replicas, at most target

The target changes when another one was wanted all the time of a delay: 300 s up, 1,200 s down unless told otherwise.
On-demand replicas that are always there (the least of their pool) count for the target.

Which zone a spot replica goes to is not its choice here: it gets a node of those that are there. Its replicas' streams
move as kervan's do, where SkyServe's clients have to try again.

Source: Mao et al., SkyServe: Serving AI Models across Regions and Clouds with Spot Instances, EuroSys 2025,
arXiv 2411.01438; defaults of SkyPilot's `sky/serve/constants.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

from kervan.policy.autoscale import mix
from kervan.policy.autoscale.state import Decision, FleetState

WINDOW_S = 60.0
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 300.0, 1200.0
EXTRA = 2


class SpotHedge:
    """See the module. `target_qps`: requests/s that one replica is to take."""

    def __init__(
        self,
        target_qps: float,
        extra: int = EXTRA,
        *,
        upscale_delay_s: float = UPSCALE_DELAY_S,
        downscale_delay_s: float = DOWNSCALE_DELAY_S,
    ) -> None:
        self.name = f"spothedge:{target_qps:g}+{extra}"
        self._target_qps = target_qps
        self._extra = extra
        self._delays_s = (upscale_delay_s, downscale_delay_s)

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """See `Policy`. A fleet without a spot pool has the target in its only one."""
        demand = state.demand
        arrived = 0.0 if demand is None else float(demand.arrived)
        seen = [(at_s, count) for at_s, count in memory.get("seen", ()) if state.now_s - at_s < WINDOW_S]
        seen.append((state.now_s, arrived))
        rate = sum(count for _, count in seen) / WINDOW_S
        least = sum(pool.minimum for pool in state.pools)
        most = max(pool.maximum for pool in state.pools)
        wanted = min(most, max(least, math.ceil(rate / self._target_qps)))
        before = memory.get("target", sum(pool.target for pool in state.pools))  # at first, what was asked for
        target, since = self._delayed(wanted, int(before), memory.get("since"), state.now_s)
        remembered = {"seen": tuple(seen), "target": target, "since": since}
        reason = f"{rate:.3g} requests/s in the last minute, {self._target_qps:g} for each of {target} replicas"
        if len(state.pools) == 1:
            return Decision(targets={state.pools[0].name: target}, reason=reason, memory=remembered)
        on_demand, spot = mix.by_market(state)
        on_spot = max(0, target - on_demand.minimum)
        ready = state.count("ready", spot.name)
        fallback = max(0, min(on_spot, on_spot + self._extra - ready))
        targets = {
            spot.name: min(spot.maximum, max(spot.minimum, on_spot + self._extra)),
            on_demand.name: min(on_demand.maximum, on_demand.minimum + fallback),
        }
        return Decision(targets=targets, reason=f"{reason}; {ready} spot replicas are ready", memory=remembered)

    def _delayed(
        self, wanted: int, target: int, since: tuple[int, float] | None, now_s: float
    ) -> tuple[int, tuple[int, float] | None]:
        """The target, and since when another one is wanted in which direction."""
        direction = (wanted > target) - (wanted < target)
        if not direction:
            return target, None
        since_s = since[1] if since is not None and since[0] == direction else now_s
        if now_s - since_s >= self._delays_s[direction < 0]:
            return wanted, None
        return target, (direction, since_s)
