"""Who can reach a fleet's gateways, in a line for whoever starts it."""

import ipaddress

from kervan.config.fleet import FleetConfig


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def described(config: FleetConfig) -> str:
    """From where clients come, and what they need; a warning where anybody may use the fleet."""
    port = config.port
    needed = "with an API key" if config.has_keys else "without a key"
    if is_loopback(config.host):
        return (
            f"port {port} answers on the nodes with a gateway alone ({config.host}), {needed}; --host 0.0.0.0 lets "
            "other machines in"
        )
    where = "every address of the nodes with a gateway" if config.host in ("0.0.0.0", "::") else config.host
    if config.has_keys:
        return f"port {port} answers on {where}, {needed}; /health, /metrics and /docs need none"
    return (
        f"warning: port {port} answers on {where}, and whoever reaches it may use the fleet: it has no API keys; "
        "kervan keys add NAME makes one, and kervan up --api-keys FILE asks for it"
    )
