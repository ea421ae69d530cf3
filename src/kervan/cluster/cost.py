"""What a fleet's nodes cost, on demand, spot, or both: at given prices, in the simulator's spot market. Pure.

A node of spot that goes takes its replica along; the replica starts again on a node that is free, or waits for one.
On-demand replicas cover what is missing as `policy/pools.py` decides in the live fleet. Paid is a node from when it is
asked for; it serves when its replica is ready.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kervan.config.fleet import SETTINGS, PoolBounds
from kervan.config.node_trace import NodeTrace
from kervan.policy import pools
from kervan.simulate.market import MarketModel, generate
from kervan.simulate.nodes import SpotNodes
from kervan.stats import bootstrap_interval


@dataclass(frozen=True, slots=True)
class Mix:
    """Nodes on demand and spot, with one replica each. On-demand ones above the least cover missing spot."""

    on_demand: PoolBounds
    spot: PoolBounds

    @property
    def nodes(self) -> int:
        """That serve when nothing is missing."""
        return self.on_demand.minimum + self.spot.maximum

    def __str__(self) -> str:
        parts = [f"{self.on_demand} on-demand" if self.on_demand.maximum else "", f"{self.spot} spot"]
        return " + ".join(part for part in parts if part and not part.startswith("0 "))


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars per node and hour."""

    on_demand_usd: float
    spot_usd: float

    def saving(self, usd_per_h: float, nodes: float) -> float:
        """0 to 1, against so many nodes on demand; negative for what costs more."""
        return 1 - usd_per_h / (nodes * self.on_demand_usd)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketSetup:
    """`start_s`: from a node to a ready replica. `after_s`, `hold_s`: as the fleet's `fallback_after_s` and
    `fallback_hold_s`.
    """

    market: MarketModel
    duration_s: float
    start_s: float
    after_s: float = SETTINGS["fallback_after_s"].default
    hold_s: float = SETTINGS["fallback_hold_s"].default


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one mix in the market: means over time.

    `on_demand_nodes`, `spot_nodes`: paid. `capacity`: nodes that serve, at most those of the mix, as a share of them.
    `whole_share`: of the time in which all of them serve. `losses_per_day`: replicas whose node went.
    """

    on_demand_nodes: float
    spot_nodes: float
    capacity: float
    whole_share: float
    losses_per_day: float

    def usd_per_h(self, prices: Prices) -> float:
        """Of all nodes."""
        return self.on_demand_nodes * prices.on_demand_usd + self.spot_nodes * prices.spot_usd


def undisturbed_usd_per_h(mix: Mix, prices: Prices) -> float:
    """What is paid if spot nodes are always there: the sum that people quote."""
    return mix.on_demand.minimum * prices.on_demand_usd + mix.spot.maximum * prices.spot_usd


def spot_price_for(saving: float, mix: Mix) -> float:
    """The price of spot, as a share of on-demand's, at which an undisturbed mix saves so much; below 0: at none.

    saving = spot / nodes * (1 - share), since each spot node saves (1 - share) of one of the `nodes`.
    """
    return 1 - saving * mix.nodes / mix.spot.maximum


@dataclass(slots=True)
class _Fleet:
    """The replicas at a moment: when each was begun, by its spot node; and the cover, oldest first."""

    spot_since_s: dict[str, float] = dataclasses.field(default_factory=dict)
    cover_since_s: list[float] = dataclasses.field(default_factory=list)


def run(mix: Mix, setup: MarketSetup, seed: int) -> Outcome:
    """One mix in one course of the market."""
    trace = generate(setup.market, setup.duration_s, seed)
    nodes, fleet = SpotNodes(trace), _Fleet()
    wanted = mix.spot.maximum
    history: tuple[pools.Shortage, ...] = ()
    by_time: dict[float, list[Any]] = {}
    for change in trace.changes:
        by_time.setdefault(change.at_s, []).append(change)
    moments = _moments(trace, setup)
    on_demand_s = spot_s = capacity_s = whole_s = 0.0
    lost = 0
    # The fleet was there before: what runs at the beginning is ready.
    begun_s = -setup.start_s
    for at_s, until_s in zip(moments, [*moments[1:], setup.duration_s], strict=True):
        for change in by_time.get(at_s, ()):
            if change.word == "add":
                nodes.came(change.nodes, at_s)
            else:
                lost += sum(fleet.spot_since_s.pop(node, None) is not None for node in change.nodes)
                nodes.went(change.nodes, at_s)
        while len(fleet.spot_since_s) < wanted and (node := nodes.take()) is not None:
            fleet.spot_since_s[node] = at_s if at_s else begun_s
        ready = sum(since_s + setup.start_s <= at_s for since_s in fleet.spot_since_s.values())
        state = pools.SpotState(wanted, ready, len(fleet.spot_since_s) - ready)
        decided = pools.on_demand(
            state, mix.on_demand.minimum + len(fleet.cover_since_s), mix.on_demand.minimum, mix.on_demand.maximum,
            history, now_s=at_s, after_s=setup.after_s, hold_s=setup.hold_s,
        )  # fmt: skip
        history = decided.history
        cover = decided.count - mix.on_demand.minimum
        del fleet.cover_since_s[cover:]  # the youngest leave
        fleet.cover_since_s += [at_s] * (cover - len(fleet.cover_since_s))
        ready_cover = sum(since_s + setup.start_s <= at_s for since_s in fleet.cover_since_s)
        serving = min(mix.nodes, mix.on_demand.minimum + ready + ready_cover)
        length_s = until_s - at_s
        on_demand_s += decided.count * length_s
        spot_s += len(fleet.spot_since_s) * length_s
        capacity_s += serving * length_s
        whole_s += (serving == mix.nodes) * length_s
    return Outcome(
        on_demand_nodes=on_demand_s / setup.duration_s,
        spot_nodes=spot_s / setup.duration_s,
        capacity=capacity_s / setup.duration_s / mix.nodes,
        whole_share=whole_s / setup.duration_s,
        losses_per_day=lost / (setup.duration_s / 86_400),
    )


def _moments(trace: NodeTrace, setup: MarketSetup) -> list[float]:
    """When something may change: at each change of the market, and when what follows from it is due."""
    ready_s = setup.start_s, setup.after_s + setup.start_s
    after = [0.0, setup.after_s, *ready_s, *(at_s + setup.hold_s for at_s in ready_s)]
    found = {0.0, *(change.at_s + delay_s for change in trace.changes for delay_s in after)}
    return sorted(at_s for at_s in found if at_s < setup.duration_s)


@dataclass(frozen=True, slots=True)
class Compared:
    """A mix, at one pair of prices, over several courses of the market."""

    mix: Mix
    prices: Prices
    outcomes: Sequence[Outcome]

    def mean(self, name: str) -> float:
        """Of a figure of the outcomes."""
        return _mean([getattr(outcome, name) for outcome in self.outcomes])

    @property
    def usd_per_h(self) -> float:
        """Mean."""
        return sum(outcome.usd_per_h(self.prices) for outcome in self.outcomes) / len(self.outcomes)

    @property
    def saving(self) -> float:
        """Against as many nodes on demand."""
        return self.prices.saving(self.usd_per_h, self.mix.nodes)

    @property
    def saving_served(self) -> float:
        """Against as many nodes on demand as served: nodes that are not there cost nothing, and do nothing."""
        return self.prices.saving(self.usd_per_h, self.mix.nodes * self.mean("capacity"))

    @property
    def saving_interval(self) -> tuple[float, float]:
        """95% of the mean of `saving_served`, over the courses."""
        each = [
            self.prices.saving(outcome.usd_per_h(self.prices), self.mix.nodes * outcome.capacity)
            for outcome in self.outcomes
        ]
        return bootstrap_interval(each, statistic=_mean, draws=1000)

    @property
    def undisturbed_saving(self) -> float:
        """If spot nodes were always there."""
        return self.prices.saving(undisturbed_usd_per_h(self.mix, self.prices), self.mix.nodes)

    def to_dict(self) -> dict[str, Any]:
        """For scripts."""
        low, high = self.saving_interval
        return {
            "mix": str(self.mix),
            "nodes": self.mix.nodes,
            "on_demand_usd_per_node_h": self.prices.on_demand_usd,
            "spot_usd_per_node_h": self.prices.spot_usd,
            "undisturbed_usd_per_h": undisturbed_usd_per_h(self.mix, self.prices),
            "undisturbed_saving": self.undisturbed_saving,
            "usd_per_h": self.usd_per_h,
            "saving": self.saving,
            "saving_served": self.saving_served,
            "saving_served_interval_95": [low, high],
            "capacity": self.mean("capacity"),
            "whole_share": self.mean("whole_share"),
            "losses_per_day": self.mean("losses_per_day"),
            "on_demand_nodes": self.mean("on_demand_nodes"),
            "spot_nodes": self.mean("spot_nodes"),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compare(mixes: Sequence[Mix], prices: Sequence[Prices], setup: MarketSetup, seeds: Sequence[int]) -> list[Compared]:
    """Each mix at each pair of prices; the market takes the same courses for all."""
    found = []
    for mix in mixes:
        outcomes = [run(mix, setup, seed) for seed in seeds]
        found += [Compared(mix, pair, outcomes) for pair in prices]
    return found


def around(mix: Mix) -> list[Mix]:
    """The mix and what it is to be compared with: all on demand, spot covered by on-demand, and spot alone."""
    total, none = mix.nodes, PoolBounds(0, 0)
    candidates = [
        Mix(PoolBounds(total, total), none),
        mix,
        covered(mix),
        Mix(PoolBounds(0, total), PoolBounds(0, total)),
        Mix(none, PoolBounds(0, total)),
    ]
    return list({str(each): each for each in candidates}.values())


def covered(mix: Mix) -> Mix:
    """The mix with an on-demand node for each one of spot that may be missing."""
    return Mix(PoolBounds(mix.on_demand.minimum, mix.nodes), mix.spot)


def availability_curve(
    mix: Mix, prices: Sequence[Prices], setup: MarketSetup, seeds: Sequence[int], shares: Sequence[float]
) -> list[tuple[float, list[Compared]]]:
    """The mix in markets whose zones are whole for other shares of the time, all else equal."""
    return [
        (share, compare([mix], prices, dataclasses.replace(
            setup, market=dataclasses.replace(setup.market, availability=share)
        ), seeds))
        for share in shares
    ]  # fmt: skip


def market_for(mix: Mix) -> MarketModel:
    """A market of three zones, each of which has as many nodes as are wanted."""
    return MarketModel(zones=3, nodes=max(1, mix.spot.maximum))
