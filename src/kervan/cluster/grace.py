"""How long a node's end may take: the drain, then the processes' end, all within the notice of its cloud. Pure."""

from dataclasses import dataclass

from kervan.cluster.clouds import MARGIN_S, Cloud

AFTER_DRAIN_S = 15.0  # for engines to end, Ray to leave the cluster, and the container to stop
LEAST_DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Grace:
    """`drain_s`: the deadline that streams get to move; `period_s`: from the first signal until the node is killed."""

    drain_s: int
    period_s: int


def on_demand(drain_timeout_s: float) -> Grace:
    """Of a node whose end nobody hurries: the fleet's own `drain_timeout_s`, and what comes after."""
    drain_s = max(LEAST_DRAIN_S, drain_timeout_s)
    return Grace(round(drain_s), round(drain_s + AFTER_DRAIN_S))


def spot(drain_timeout_s: float, cloud: Cloud) -> Grace:
    """The same of a spot node, cut so that the end comes `MARGIN_S` before the cloud's."""
    whole = on_demand(drain_timeout_s)
    period_s = min(whole.period_s, round(cloud.usable_s - MARGIN_S))
    return Grace(max(round(LEAST_DRAIN_S), period_s - round(AFTER_DRAIN_S)), period_s)


def of(market: str, drain_timeout_s: float, cloud: Cloud) -> Grace:
    """Of a node of this market."""
    return spot(drain_timeout_s, cloud) if market == "spot" else on_demand(drain_timeout_s)
