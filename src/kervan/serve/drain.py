"""Taking a replica, or all that is on a node, out of service: what `kervan drain` calls."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import Drain, Snapshot
from kervan.serve import cluster
from kervan.serve.attach import attach
from kervan.serve.directory.client import find_directory, fleet_names

POLL_S = 0.2
GATEWAY_BEAT_S = 1.5  # after which all gateways have told what they moved
MAX_DEADLINE_S = 10**9  # as of the config's times; Ray takes milliseconds in 64 bits
GRACE_S = 30.0  # beyond the deadline: an engine is asked to end, then killed, then forgotten


@dataclass(frozen=True, slots=True)
class Drained:
    """What has left. `moved`: streams that went on elsewhere meanwhile, as the gateways tell that are still there."""

    target: str
    replicas: tuple[str, ...]
    gateways: tuple[str, ...]
    moved: int
    took_s: float

    def to_dict(self) -> dict[str, object]:
        """What `kervan drain --json` prints; scripts rely on these keys."""
        return {
            "target": self.target,
            "replicas": list(self.replicas),
            "gateways": list(self.gateways),
            "moved": self.moved,
            "took_s": round(self.took_s, 2),
        }


def drain(
    name: str,
    target: str,
    deadline_s: float,
    address: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Drained:
    """Drain replica `target` of fleet `name`, or node `target` with the replicas and gateways of all fleets on it.

    Returns when they are gone. Serve starts others in their place, on a drained node none.

    Raises: ConfigError for a deadline above `MAX_DEADLINE_S`; FleetError when there is no such replica or node, or
    something is still there when the deadline is over.
    """
    if not 0 <= deadline_s <= MAX_DEADLINE_S:
        raise ConfigError(
            f"--deadline {deadline_s} s is outside 0..{MAX_DEADLINE_S} s; give a time in that range, like 90s"
        )
    directory = attach(name, address)
    from kervan.serve import watchers

    snapshot = directory.snapshot().result()
    if target in {replica.id for replica in snapshot.replicas}:
        return _drain(target, {name: [target]}, {}, deadline_s, progress)
    nodes = cluster.nodes()
    node_id = next((node_id for node_id, ip in nodes.items() if target in (node_id, ip)), None)
    if node_id is None:
        ids = ", ".join(replica.id for replica in snapshot.replicas) or "none"
        raise FleetError(
            f"{target!r} is neither a replica of fleet {name!r} ({ids}) nor a node of its cluster "
            f"({', '.join(nodes.values())})"
        )
    if len(nodes) == 1:
        raise FleetError(
            f"node {target} is the only one, so nothing can move; kervan down stops the fleet, a replica's id "
            f"drains that one: {', '.join(r.id for r in snapshot.replicas)}"
        )
    watchers.announce(node_id, deadline_s)  # first, so that it does not take Ray's drain for somebody else's
    cluster.drain_node(node_id, deadline_s)
    return drain_from_node(target, nodes[node_id], deadline_s, progress)


def drain_from_node(target: str, ip: str, deadline_s: float, progress: Callable[[str], None]) -> Drained:
    """Drain what all fleets have on node `ip`, which gets nothing new any more.

    `target`: how the node is called in what comes back. Raises: as `drain`.
    """
    replicas, gateways = {}, {}
    for name in fleet_names():
        snapshot = find_directory(name).snapshot().result()
        replicas[name] = [r.id for r in snapshot.replicas if ip in (r.node, *r.nodes)]
        gateways[name] = [g.id for g in snapshot.gateways if g.node == ip]
    return _drain(target, replicas, gateways, deadline_s, progress)


def _drain(
    target: str,
    replicas: dict[str, list[str]],
    gateways: dict[str, list[str]],
    deadline_s: float,
    progress: Callable[[str], None],
) -> Drained:
    """`replicas` and `gateways`: those to go, by fleet. Gateways are ended by Serve, which sees the node drain."""
    begin_s = time.monotonic()
    directories = {name: find_directory(name) for name in replicas}
    before = {name: directory.snapshot().result() for name, directory in directories.items()}
    for name, ids in replicas.items():
        if ids and not any(r.state == "ready" and r.id not in ids for r in before[name].replicas):
            progress(f"fleet {name!r} has no other ready replica: its streams stay, or wait for the next one")
        for replica_id in ids:
            directories[name].order(replica_id, Drain(deadline_s)).result()
    last_line = ""
    while True:
        now = {name: directory.snapshot().result() for name, directory in directories.items()}
        left = [
            *(f"replica {r.id}" for name, ids in replicas.items() for r in now[name].replicas if r.id in ids),
            *(f"gateway {g.id}" for name, ids in gateways.items() for g in now[name].gateways if g.id in ids),
        ]
        took_s = time.monotonic() - begin_s
        if not left:
            time.sleep(GATEWAY_BEAT_S)
            after = [directory.snapshot().result() for directory in directories.values()]
            moved = sum(map(_num_moved, after)) - sum(map(_num_moved, before.values()))
            return Drained(target, _all_ids(replicas), _all_ids(gateways), max(0, moved), took_s)
        if took_s > deadline_s + GRACE_S:
            raise FleetError(
                f"{', '.join(left)} still there {took_s:.0f} s after a drain with {deadline_s:.0f} s; see kervan status"
            )
        if (line := f"waiting for {', '.join(left)}") != last_line:
            last_line = line
            progress(line)
        time.sleep(POLL_S)


def _all_ids(ids_by_fleet: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(member_id for ids in ids_by_fleet.values() for member_id in ids)


def _num_moved(snapshot: Snapshot) -> int:
    """Streams moved by the gateways that are listed."""
    return sum(gateway.moved for gateway in snapshot.gateways)
