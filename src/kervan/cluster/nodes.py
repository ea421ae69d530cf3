"""How many nodes of each market a fleet's replicas need, by whole stages on whole nodes. Pure."""

import math
from dataclasses import dataclass

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError

ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one market, from `least` to `most`."""

    market: str
    least: int
    most: int


def groups(fleet: FleetConfig, gpus_per_node: int) -> tuple[NodeGroup, ...]:
    """The nodes of each pool that may have a replica; without GPUs (0) a replica has a node of its own.

    Raises: ConfigError for a layout that no number of such nodes can hold.
    """
    return tuple(
        NodeGroup(market, count(fleet, gpus_per_node, bounds.minimum), count(fleet, gpus_per_node, bounds.maximum))
        for market, bounds in fleet.bounds.items()
        if bounds.maximum
    )


def count(fleet: FleetConfig, gpus_per_node: int, replicas: int) -> int:
    """The nodes that so many replicas need. Raises: as `groups`."""
    if not gpus_per_node:
        return replicas
    nodes, gpus = spread(fleet, gpus_per_node)
    places = math.floor(gpus_per_node / gpus + ROUNDING)
    return max(nodes, math.ceil(replicas * nodes / places)) if replicas else 0


def spread(fleet: FleetConfig, gpus_per_node: int) -> tuple[int, float]:
    """The nodes of one replica, and its GPUs on each: as few nodes as its stages can be cut over, or as many as asked.

    Raises: as `groups`.
    """
    if fleet.gpu_share < 1:
        # Replicas that take 0.4 of a GPU each are two to a GPU, as those that take 0.5.
        return 1, 1 / math.floor(1 / fleet.gpu_share + ROUNDING)
    stages = f"tp*pp={fleet.tp}*{fleet.pp}={fleet.world_size} GPUs"
    for nodes in [fleet.nodes_per_replica] if fleet.nodes_per_replica else range(1, fleet.pp + 1):
        if fleet.pp % nodes == 0 and fleet.world_size // nodes <= gpus_per_node:
            return nodes, fleet.world_size // nodes
    if fleet.tp > gpus_per_node:
        raise ConfigError(
            f"{stages}: the tp={fleet.tp} that share each layer must be on one node, and a node has {gpus_per_node}; "
            f"use --gpus-per-node {fleet.tp}, or --tp {gpus_per_node}"
        )
    raise ConfigError(
        f"{stages} on {fleet.nodes_per_replica} nodes are {fleet.world_size // fleet.nodes_per_replica} on each, and a "
        f"node has {gpus_per_node}; leave nodes_per_replica out, or use --gpus-per-node "
        f"{fleet.world_size // fleet.nodes_per_replica}"
    )
