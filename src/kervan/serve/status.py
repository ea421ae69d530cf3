"""A fleet as its directory sees it: `kervan status`, `kervan top`, and what is wrong with it."""

import time
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import GatewayEntry, NodeEntry, PrefixTokens, ReplicaEntry, Scaling, Snapshot
from kervan.serve import cluster, pools
from kervan.serve.attach import attach
from kervan.serve.why import explain, notice_lines

LOOK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """A fleet as `kervan status` tells it. `url` is empty while no gateway is known."""

    name: str
    url: str
    config: FleetConfig
    snapshot: Snapshot

    def to_dict(self) -> dict[str, Any]:
        """What `kervan status --json` prints; scripts rely on these keys."""
        return {
            "name": self.name,
            "complete": True,
            "url": self.url,
            "model": self.config.model,
            "layout": {
                "tp": self.config.tp,
                "pp": self.config.pp,
                "ep": self.config.ep,
                "nodes_per_replica": self.config.nodes_per_replica,
            },
            "engine": self.config.engine,
            "target_replicas": sum(self.snapshot.targets.values()) or self.config.replicas,
            "pools": {
                pool: {
                    "min": bounds.minimum,
                    "max": bounds.maximum,
                    "target": self.snapshot.targets.get(pool, bounds.minimum),
                    "ready": sum(r.state == "ready" and not r.lateness for r in pools.replicas_of(pool, self.snapshot)),
                }
                for pool, bounds in self.config.bounds.items()
            },
            "replicas": [
                {**replica_to_dict(entry), "prefix_tokens": _prefix_tokens(self.snapshot, entry.id)}
                for entry in self.snapshot.replicas
            ],
            "autoscaling": None if self.snapshot.scaling is None else scaling_to_dict(self.snapshot.scaling),
            "gateways": [gateway_to_dict(entry) for entry in self.snapshot.gateways],
            "nodes": [_node(entry) for entry in self.snapshot.nodes],
            "failed_starts": [
                {"who": f.who, "kind": f.kind, "message": f.message, "log": f.log_path} for f in self.snapshot.failures
            ],
        }


def scaling_to_dict(scaling: Scaling) -> dict[str, Any]:
    """What was decided of a fleet's replicas, as `kervan status --json` prints it."""
    return {
        "policy": scaling.policy,
        "targets": scaling.targets,
        "reason": scaling.reason,
        "numbers": scaling.numbers,
        "problem": scaling.problem,
        "since_s": scaling.since_s,
        "room": scaling.room,
        "decisions": [structs.asdict(decided) for decided in scaling.history],
    }


def replica_to_dict(entry: ReplicaEntry) -> dict[str, Any]:
    """A replica, as `kervan status --json` prints it."""
    return {
        "id": entry.id,
        "pool": entry.pool,
        "node": entry.node,
        "nodes": entry.nodes or [entry.node],
        "pid": entry.pid,
        "state": entry.state,
        "running": entry.running,
        "waiting": entry.waiting,
        "kv_cache_usage": round(entry.kv_cache_usage, 4),
        "draining": entry.state == "draining",
        "reason": entry.reason,
        "log": entry.log_path,
        "start_s": entry.start_s,
        "late": bool(entry.lateness),
        "last_heartbeat_s": entry.beat_age_s,
    }


def _prefix_tokens(snapshot: Snapshot, replica_id: str) -> dict[str, int]:
    """Of prompts sent to one replica by the gateways that are there, as they know it."""
    told = [gateway.traffic[replica_id].prefix for gateway in snapshot.gateways if replica_id in gateway.traffic]
    return {name: sum(getattr(prefix, name) for prefix in told) for name in PrefixTokens.__struct_fields__}


def gateway_to_dict(entry: GatewayEntry) -> dict[str, Any]:
    """A gateway, as `kervan status --json` prints it."""
    return {
        "id": entry.id,
        "pid": entry.pid,
        "node": entry.node,
        "ready": entry.is_ready and not entry.lateness,
        "busy": round(entry.busy, 3),
        "reason": entry.reason,
        "log": entry.log_path,
        "late": bool(entry.lateness),
        "last_heartbeat_s": entry.beat_age_s,
    }


def _node(entry: NodeEntry) -> dict[str, Any]:
    notices = [
        {
            "kind": notice.kind,
            "source": notice.source,
            "certain": notice.is_certain,
            "deadline_s": notice.deadline_s,
            "seen_s": notice.seen_s,
        }
        for notice in entry.notices
    ]
    return {
        "node": entry.node,
        "watches": entry.watches,
        "problem": entry.problem,
        "drained": entry.is_drained,
        "before": entry.before,
        "notices": notices,
    }


def fleet_status(config: FleetConfig, snapshot: Snapshot) -> FleetStatus:
    """The status of a fleet with these settings and entries."""
    url = snapshot.gateways[0].url if snapshot.gateways else ""
    return FleetStatus(config.name, url, config, snapshot)


def status(name: str, address: str | None = None) -> FleetStatus:
    """The fleet as its directory sees it now.

    Raises: FleetError when there is no such fleet, or its directory does not answer.
    """
    return FleetWatch(name, address).look()


class FleetWatch:
    """Looks at a fleet again and again."""

    def __init__(self, name: str, address: str | None = None):
        """Raises: FleetError when there is no such fleet."""
        self._directory = attach(name, address)

    def look(self) -> FleetStatus:
        """The fleet now. Raises: FleetError when its directory does not answer within 10 s."""
        config = self._directory.fleet().result(LOOK_TIMEOUT_S).config
        return fleet_status(config, self._directory.snapshot().result(LOOK_TIMEOUT_S))

    @staticmethod
    def here() -> str:
        """The address of this machine, as the fleet's nodes have theirs."""
        import ray

        return str(ray.util.get_node_ip_address())


def reasons(config: FleetConfig, snapshot: Snapshot) -> list[str]:
    """A sentence for each thing in the fleet that is not as it should be, nodes under notice first."""
    nodes, dead_nodes = cluster.nodes_for(config), cluster.dead_nodes()
    return [*notice_lines(snapshot, time.time()), *explain(config, snapshot, nodes, dead_nodes)]
