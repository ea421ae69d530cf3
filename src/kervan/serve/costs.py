"""What the replicas that are there cost, where the price of their GPU is known (`kervan.facts.prices`)."""

import functools
from collections.abc import Mapping, Sequence

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError
from kervan.facts import prices
from kervan.facts.markets import SPOT
from kervan.fleet.directory import ReplicaEntry


def usd_per_h(config: FleetConfig, replicas: Sequence[ReplicaEntry], kind_of: Mapping[str, str]) -> dict[str, float]:
    """US dollars per hour by pool, whatever state the replicas are in; a pool with a GPU of no known price is left out.

    `kind_of`: the GPU of each node, by Ray's name; a twin costs what the GPU does that it stands for.
    """
    costs: dict[str, float] = dict.fromkeys(config.bounds, 0.0)
    for replica in replicas:
        price = _gpu_usd_per_h(config.gpu or kind_of.get(replica.node, ""), replica.pool)
        if price is None:
            costs.pop(replica.pool, None)
        elif replica.pool in costs:
            costs[replica.pool] += price * config.world_size * config.gpu_share
    return costs


@functools.cache
def _gpu_usd_per_h(gpu: str, pool: str) -> float | None:
    try:
        price = prices.lookup(gpu, "spot" if pool == SPOT else "on-demand")
    except ConfigError:  # no GPU, or one that kervan does not know
        return None
    return None if price is None else price.usd_per_gpu_h
