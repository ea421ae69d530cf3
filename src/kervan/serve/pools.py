"""Pools on the cluster: where their replicas may be, how many can be, and what the autoscaling is told of them."""

import dataclasses
from collections.abc import Mapping, Sequence

from kervan.config.fleet import FleetConfig
from kervan.errors import CapacityError
from kervan.facts.markets import ON_DEMAND, SPOT
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.serve import cluster, placement
from kervan.serve.placement import NodeDevices
from kervan.serve.versions import versions

MARKET_LABEL = cluster.MARKET_LABEL


def label_selector(pool: str) -> dict[str, str]:
    """Where Ray may place a replica of this pool. Nodes without the label are on-demand ones."""
    return {MARKET_LABEL: SPOT if pool == SPOT else f"!{SPOT}"}


def of_pool(pool: str, nodes: Sequence[NodeDevices]) -> list[NodeDevices]:
    """The nodes on which replicas of this pool may be."""
    return [node for node in nodes if node.is_spot == (pool == SPOT)]


def per_node(config: FleetConfig, pool: str) -> int | None:
    """How many replicas of this pool a node takes, where not what they need decides that; None for any number."""
    if pool != SPOT:
        return None
    from kervan.twin.settings import spot_per_node  # with the planner below it; most commands do without

    return spot_per_node(config) or None


def replicas_of(pool: str, snapshot: Snapshot) -> list[ReplicaEntry]:
    """The listed replicas of a pool, in whatever state."""
    return [replica for replica in snapshot.replicas if replica.pool == pool]


def placeable(config: FleetConfig, nodes: Sequence[NodeDevices], held: Mapping[str, int]) -> dict[str, int]:
    """How many replicas of each pool there can be on these nodes, none beyond its bounds.

    `held`: replicas that are there now, by pool; what they take is not free.
    """
    rooms = {}
    for pool, bounds in config.bounds.items():
        own = of_pool(pool, nodes) if config.pools else list(nodes)
        if placement.is_counted(config, nodes):
            room = held.get(pool, 0) + placement.places(config, own)
        else:
            room = bounds.maximum if own or not config.pools else 0
            if (most := per_node(config, pool)) is not None:
                room = len(own) * most
        rooms[pool] = max(min(bounds.maximum, room), 0)
    return rooms


def allowed(config: FleetConfig, nodes: Sequence[NodeDevices], held: Mapping[str, int]) -> dict[str, int]:
    """How many replicas of each pool may be asked for: as `placeable`, or all where the cluster adds nodes for them."""
    if config.adds_nodes:
        return {pool: bounds.maximum for pool, bounds in config.bounds.items()}
    return placeable(config, nodes, held)


def check(config: FleetConfig, nodes: Sequence[NodeDevices], held: Mapping[str, float]) -> None:
    """Refuse what cannot be placed now: the least of each pool. `held`: devices that this fleet already has, by pool.

    Where the cluster adds nodes, nothing is refused.

    Raises: CapacityError.
    """
    if config.adds_nodes:
        return
    if not config.pools:
        placement.check(config, nodes, held=sum(held.values()))
        return
    for pool, bounds in config.bounds.items():
        own = of_pool(pool, nodes)
        if not own and bounds.minimum and pool == SPOT:
            raise CapacityError(
                f"{bounds.minimum} replicas of pool {SPOT} at least, and no node has the label {MARKET_LABEL}={SPOT}; "
                f"start such nodes with `ray start --labels {MARKET_LABEL}={SPOT}`, or use "
                f"--pool {SPOT}:0..{bounds.maximum} to start without them"
            )
        if (most := per_node(config, pool)) is not None and bounds.minimum > (room := len(own) * most):
            raise CapacityError(
                f"{bounds.minimum} replicas of pool {pool} at least, and {len(own)} spot nodes take {most} each "
                f"(twin setting spot_per_node), {room} in all; use --pool {pool}:{room}..{bounds.maximum}"
            )
        part = dataclasses.replace(config, pools={}, replicas=bounds.minimum, policy="", schedule=())
        placement.check(part, own, held=held.get(pool, 0), pool=pool)


def has_room(config: FleetConfig, nodes: Sequence[NodeDevices], held: Mapping[str, int]) -> bool:
    """Whether one more replica can be placed in each pool that has some."""
    if not config.pools:
        return placement.has_room(config, nodes)
    return all(_has_room(config, pool, count, of_pool(pool, nodes)) for pool, count in held.items() if count)


def _has_room(config: FleetConfig, pool: str, there: int, own: Sequence[NodeDevices]) -> bool:
    """Whether one more replica can be on the pool's own nodes, beside those that are there."""
    most = per_node(config, pool)
    return placement.has_room(config, own) and (most is None or there < len(own) * most)


def held(snapshot: Snapshot) -> dict[str, int]:
    """Replicas that have a node, by pool."""
    there = [replica.pool for replica in snapshot.replicas if replica.state in ("starting", "ready")]
    return {pool: there.count(pool) for pool in set(there)}


def awaited(config: FleetConfig, can_be: Mapping[str, int]) -> dict[str, int]:
    """Replicas that a start or a change waits for: the least of each pool, and of spot all that are to be placed."""
    return {
        pool: max(bounds.minimum, can_be.get(pool, 0)) if pool == SPOT and fills_spot(config) else bounds.minimum
        for pool, bounds in config.bounds.items()
    }


def fills_spot(config: FleetConfig) -> bool:
    """Whether all spot replicas that get a node are wanted, whatever the load."""
    return config.autoscaler is not None and config.autoscaler.policy == "fill"


def are_settled(config: FleetConfig, snapshot: Snapshot, awaited: Mapping[str, int]) -> bool:
    """Whether so many replicas are ready, and none is there beyond what the pools may have."""
    version = versions(config).replicas
    bounds = config.bounds
    for pool in {*bounds, *(replica.pool for replica in snapshot.replicas)}:
        there = replicas_of(pool, snapshot)
        ready = sum(replica.state == "ready" and replica.version == version for replica in there)
        if len(there) > (bounds[pool].maximum if pool in bounds else 0) or ready < awaited.get(pool, 0):
            return False
    return True


def warning(config: FleetConfig, nodes: Sequence[NodeDevices]) -> str:
    """What is wrong with the cluster for this fleet's pools; empty for nothing."""
    if SPOT not in config.bounds or not config.bounds[SPOT].maximum or of_pool(SPOT, nodes) or config.adds_nodes:
        return ""
    covered = config.bounds[ON_DEMAND]
    return (
        f"no node has the label {MARKET_LABEL}={SPOT}, so no replica of pool {SPOT} can be placed; start such nodes "
        f"with `ray start --labels {MARKET_LABEL}={SPOT}`"
        + (f"; meanwhile up to {covered.maximum} on-demand replicas" if covered.maximum > covered.minimum else "")
    )


def explain(config: FleetConfig, snapshot: Snapshot, nodes: Sequence[NodeDevices]) -> list[str]:
    """What is not as it is wanted between the pools, in sentences."""
    sentences = []
    wanted = snapshot.targets.get(SPOT, config.bounds[SPOT].minimum if SPOT in config.bounds else 0)
    present = len(replicas_of(SPOT, snapshot))
    if present < wanted:
        missing = f"{wanted - present} of {wanted} replicas"
        own = of_pool(SPOT, nodes)
        if not own:
            why = f"wait for a spot node, one with the label {MARKET_LABEL}={SPOT}"
        elif _has_room(config, SPOT, present, own):
            why = "are on their way: there is room on a spot node"
        elif (most := per_node(config, SPOT)) is not None:
            why = f"wait for another spot node: each of {len(own)} takes {most} (twin setting spot_per_node)"
        else:
            why = f"wait for a spot node with {placement.demand(config, own)} free"
        sentences.append(f"pool {SPOT}: {missing} {why}")
    extra = len(replicas_of(ON_DEMAND, snapshot)) - config.bounds[ON_DEMAND].minimum
    if extra > 0 and fills_spot(config):
        sentences.append(f"pool {ON_DEMAND}: {extra} above its minimum cover for missing spot replicas")
    return sentences
