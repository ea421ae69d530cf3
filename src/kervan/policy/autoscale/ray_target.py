"""Ray Serve's target policy, as Ray 2.60 computes it, over requests that kervan counts.

It is there as a baseline, and for those who give its parameters.

    desired = ongoing requests / target_ongoing_requests
    scaled  = ceil(running + factor * (desired - running))

and the target becomes that when it has been above the target all the time of `upscale_delay_s`, or below it all the
time of `downscale_delay_s`. With none there, the first request starts `upscaling_factor` replicas at once.

Ongoing requests are averaged over `look_back_period_s`. Source: ray 2.60, `serve/autoscaling_policy.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kervan.config.autoscale import RaySettings, ScheduledMinimum
from kervan.policy.autoscale import decisions
from kervan.policy.autoscale.state import Decision, FleetState

NEWS_S = 15.0
EPSILON_S = 1e-6  # of the delays, as in Ray


class RayTarget:
    """See the module."""

    name = "ray"

    def __init__(self, settings: RaySettings, schedule: tuple[ScheduledMinimum, ...] = ()) -> None:
        self._settings = settings
        self._schedule = schedule

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """See `Policy`."""
        s, demand = self._settings, state.demand
        if demand is None or state.demand_age_s > NEWS_S:
            return decisions.kept(state, memory, f"no news from the gateways for {state.demand_age_s:.0f} s")
        remembered: dict[str, Any] = dict(memory)
        within = decisions.bounds(state, self._schedule)
        ongoing = demand.held + demand.queued + demand.running
        seen = _seen(memory.get("seen", ()), state.now_s, ongoing, s)
        remembered["seen"] = seen
        average = aggregated([count for _, count in seen], s.aggregation_function)
        current, running = decisions.asked(state, memory), state.count("ready")
        desired = wanted(average, running, current, s)
        total, why = self._delayed(desired, current, average, remembered, state.now_s)
        # Ray bounds after the delays, as `decision` does.
        numbers = {
            "ongoing_requests": round(average, 3), "ready": float(running), "wanted": float(desired),
            "target_ongoing_requests": s.target_ongoing_requests,
        }  # fmt: skip
        if total == 0 and average > 0:
            total = 1
        return decisions.decision(state, total, within, why, numbers=numbers, memory=remembered)

    def _delayed(
        self, desired: int, current: int, average: float, memory: dict[str, Any], now_s: float
    ) -> tuple[int, str]:
        s = self._settings
        why = f"{average:.3g} ongoing requests, of which {s.target_ongoing_requests:g} are the target of a replica"
        if current == 0 and average > 0:
            memory.pop("since", None)
            return max(1, math.ceil(s.upscaling_factor)), f"{why}; the first starts at once"
        direction = (desired > current) - (desired < current)
        if not direction:
            memory.pop("since", None)
            return current, why
        before, since_s = memory.get("since", (0, now_s))
        if before != direction:
            since_s = now_s
        memory["since"] = (direction, since_s)
        if direction > 0:
            delay_s = s.upscale_delay_s
        elif current == 1 and s.downscale_to_zero_delay_s is not None:
            delay_s = s.downscale_to_zero_delay_s
        else:
            delay_s = s.downscale_delay_s
        if direction < 0 and current > 1:
            desired = max(1, desired)
        waited_s = now_s - since_s
        if waited_s + EPSILON_S >= delay_s:
            memory.pop("since", None)
            return desired, why
        return current, f"keeps {current}: {desired} are wanted since {waited_s:.0f} of {delay_s:g} s; {why}"


def wanted(average: float, running: int, target: int, settings: RaySettings) -> int:
    """Before delays and bounds. `running`: replicas that are ready; without one, the `target` stays."""
    if running == 0:
        return target
    exact = average / settings.target_ongoing_requests
    factor = settings.upscaling_factor if exact > running else settings.downscaling_factor
    count = math.ceil(running + factor * (exact - running) - 1e-9)
    if math.ceil(exact) < running and count == running:  # a factor below 1 would never let the last one go
        count -= 1
    return max(0, count)


def aggregated(counts: Sequence[float], function: str) -> float:
    """Over the look-back period."""
    if not counts:
        return 0.0
    return {"mean": sum(counts) / len(counts), "max": max(counts), "min": min(counts)}[function]


def _seen(
    before: Sequence[tuple[float, float]], now_s: float, ongoing: int, settings: RaySettings
) -> tuple[tuple[float, float], ...]:
    """(when, ongoing requests), one per `metrics_interval_s`, of the look-back period."""
    kept = tuple((at_s, count) for at_s, count in before if now_s - at_s < settings.look_back_period_s)
    if kept and now_s - kept[-1][0] < settings.metrics_interval_s:
        return kept
    return (*kept, (now_s, float(ongoing)))
