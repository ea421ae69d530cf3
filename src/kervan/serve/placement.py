"""Where the replicas of a fleet fit: whole pipeline stages on whole nodes. Pure."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kervan.config.fleet import Device, FleetConfig
from kervan.errors import CapacityError

ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class NodeDevices:
    """GPUs of an alive node, or its CPU cores in a cluster without GPUs: all, and not taken by others.

    `accelerator`: Ray's resource name for the kind of GPU, like `accelerator_type:H200`, if Ray knows it. `is_spot`: so
    its labels say.
    """

    node: str
    total: int
    free: float
    accelerator: str | None = None
    device: Device = "GPU"
    is_spot: bool = False


def has_gpus(nodes: Sequence[NodeDevices]) -> bool:
    """Whether any of the nodes has a GPU."""
    return any(node.device == "GPU" for node in nodes)


def device(config: FleetConfig, nodes: Sequence[NodeDevices]) -> Device:
    """What the fleet's replicas run on: decided at its first start, by what the cluster has."""
    return config.device or ("GPU" if has_gpus(nodes) else "CPU")


def devices_per_node(config: FleetConfig) -> float:
    """What one replica takes of each of its nodes."""
    if config.world_size > 1:
        return config.world_size // max(1, config.nodes_per_replica)
    # Replicas that take 0.4 of a GPU each are two to a GPU, as those that take 0.5.
    return 1 / math.floor(1 / config.gpus_per_replica + ROUNDING) if config.gpus_per_replica else 1


def spread(config: FleetConfig, nodes: Sequence[NodeDevices]) -> FleetConfig:
    """The config with `device` and `nodes_per_replica` decided: what is given, or as few nodes as can hold a replica.

    Tensor-parallel groups are never cut: they meet twice in every layer. Only a node's size counts here, not what is
    free; where the cluster adds nodes, a replica that fits on none of those that are there is taken to fit on one of
    those that come.

    Raises: CapacityError when no number of nodes will do.
    """
    if config.engine == "twin":
        return dataclasses.replace(config, nodes_per_replica=1)
    if config.adds_nodes and not (config.device or has_gpus(nodes)):
        raise CapacityError(
            "no node has a GPU now, and the cluster adds nodes: say what replicas run on, with --device GPU or "
            "--device CPU (device: in a configuration file)"
        )
    if not nodes:
        return dataclasses.replace(config, nodes_per_replica=config.nodes_per_replica or 1)
    sizes = sorted((node.total for node in nodes), reverse=True)
    stages = f"tp*pp={config.tp}*{config.pp}={config.world_size} {_plural(config, nodes, config.world_size)}"
    for count in [config.nodes_per_replica] if config.nodes_per_replica else range(1, config.pp + 1):
        each = config.world_size // count
        if config.pp % count == 0 and len([size for size in sizes if size >= each]) >= count:
            return dataclasses.replace(config, nodes_per_replica=count, device=device(config, nodes))
    if config.adds_nodes:
        return dataclasses.replace(config, nodes_per_replica=config.nodes_per_replica or 1)
    largest = max(nodes, key=lambda node: node.total)
    if config.tp > largest.total:
        fix = f"use --tp {max(1, largest.total)}" + (" and a larger --pp" if has_gpus(nodes) else " --pp 1")
        raise CapacityError(
            f"{stages}: the tp={config.tp} that share each layer must be on one node; "
            f"the largest node has {largest.total} ({largest.node}); {fix}"
        )
    have = ", ".join(f"{node.node}: {node.total}" for node in nodes)
    if config.nodes_per_replica:
        each = config.world_size // config.nodes_per_replica
        raise CapacityError(
            f"{stages} on {config.nodes_per_replica} nodes need {each} on each; the cluster has {have}; "
            "leave --nodes-per-replica out"
        )
    raise CapacityError(
        f"{stages}, stages of {config.tp} whole on a node; the cluster has {have}; "
        f"use --tp and --pp with a smaller product, or add nodes"
    )


def places(config: FleetConfig, nodes: Sequence[NodeDevices]) -> int:
    """How many more replicas can be placed. Without GPUs only replicas over several nodes are counted."""
    slots = [int((node.free + ROUNDING) // devices_per_node(config)) for node in nodes]
    count = max(1, config.nodes_per_replica)
    room = sum(slots) // count
    while room and sum(min(slot, room) for slot in slots) < room * count:  # a replica takes each node once
        room -= 1
    return room


def is_counted(config: FleetConfig, nodes: Sequence[NodeDevices]) -> bool:
    """Whether Ray sets anything aside for a replica: GPUs, or CPU cores on several nodes."""
    if config.engine == "twin" or not (nodes or config.device):
        return False
    return device(config, nodes) == "GPU" or config.nodes_per_replica > 1


def check(config: FleetConfig, nodes: Sequence[NodeDevices], *, held: float = 0, pool: str = "") -> None:
    """Refuse what cannot be placed now, with the arithmetic. `held`: devices that this fleet already has.

    `pool`: the one that these replicas and nodes are of, where a fleet says so.

    Raises: CapacityError.
    """
    if not is_counted(config, nodes):
        return
    need = devices_per_node(config)
    count = max(1, config.nodes_per_replica)
    room = places(config, nodes) + int((held + ROUNDING) // (need * count))
    if config.replicas <= room:
        return
    free = ", ".join(f"{node.node}: {node.free:g} of {node.total}" for node in nodes)
    of_pool, option = (f" of pool {pool}", f"--pool {pool}:{room}") if pool else ("", f"--replicas {room}")
    raise CapacityError(
        f"{config.replicas} replicas{of_pool}, each with {demand(config, nodes)}, do not fit; "
        f"free are {free or 'none'}; room for {room}: use {option}"
        + ("" if room else ", after another fleet has made room")
    )


def has_room(config: FleetConfig, nodes: Sequence[NodeDevices]) -> bool:
    """Whether one more replica can be placed."""
    return not is_counted(config, nodes) or places(config, nodes) > 0


def demand(config: FleetConfig, nodes: Sequence[NodeDevices]) -> str:
    """What one replica needs: "4 GPUs on one node", "4 GPUs on each of 2 nodes"."""
    need, count = devices_per_node(config), max(1, config.nodes_per_replica)
    each = f"{need:g} {_plural(config, nodes, need)}"
    if count > 1:
        return f"{each} on each of {count} nodes"
    return each + (" on one node" if need > 1 else "")


def _plural(config: FleetConfig, nodes: Sequence[NodeDevices], count: float) -> str:
    word = "GPU" if device(config, nodes) == "GPU" else "CPU core"
    return f"{word}s" if count > 1 else word
