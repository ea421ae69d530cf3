"""Which replicas and gateways are of which settings. Pure."""

import hashlib
import json
from dataclasses import dataclass

from kervan.config.fleet import FleetConfig

# What replicas and gateways are made of; a change of anything else replaces none of them.
GATEWAY_SETTINGS = (
    "engine_args", "env", "host", "port", "shared_port", "ingress",
    "tls_certificate", "tls_key", "tls_client_ca", "key_generation",
    "max_queued_streams", "hold_timeout_s",
    "drain_timeout_s", "engine", "replay_s", "replay_max_mib", "warm_start", "routing",
    "log_format", "otlp", "remembered_requests",
)  # fmt: skip
REPLICA_SETTINGS = (
    "model", "tp", "pp", "ep", "nodes_per_replica", "gpus_per_replica", "engine", "gpu", "twin", "engine_args", "env",
    "stall_timeout_s", "drain_timeout_s", "preflight", "warm_start", "key_generation",
    "log_format", "otlp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Versions:
    """Of the replicas and gateways that a config makes."""

    replicas: str
    gateways: str


def versions(config: FleetConfig) -> Versions:
    """Digests of the settings that replicas and gateways are made of: others mean that they are replaced."""
    settings = json.loads(config.to_json())

    def digest(names: tuple[str, ...], **more: object) -> str:
        chosen = {name: settings[name] for name in names} | more
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]

    # With pools, a replica is bound to its market's nodes; Serve replaces those that were not.
    bound = {"has_pools": True} if config.pools else {}
    return Versions(digest(REPLICA_SETTINGS, **bound), digest(GATEWAY_SETTINGS))
