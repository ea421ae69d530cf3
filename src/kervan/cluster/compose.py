"""A fleet on one machine, as a service of Docker compose: kervan starts Ray in its container."""

from typing import Any

from kervan.cluster import one_machine
from kervan.cluster.fleet_file import for_cluster, settings
from kervan.cluster.monitoring import DCGM_IMAGE, DCGM_PORT
from kervan.cluster.request import RenderRequest
from kervan.cluster.text import as_yaml
from kervan.config.fleet import FleetConfig

FLEET_FILE = "/etc/kervan/fleet.yaml"
HOME = "/home/kervan"


def files(request: RenderRequest) -> dict[str, str]:
    """The compose file, and the fleet's beside it.

    Raises: ConfigError for a fleet that one machine cannot hold.
    """
    one_machine.check(request)
    fleet = for_cluster(request.fleet, gpus_per_node=request.machine.gpus, nodes=1)
    return {
        "compose.yaml": as_yaml(request.target, project(request)),
        "fleet.yaml": as_yaml(request.target, settings(fleet)),
    }


def project(request: RenderRequest) -> dict[str, Any]:
    """In the words of the Compose Specification."""
    services = {"fleet": _fleet(request)}
    if "dcgm" in request.extras:
        services["dcgm-exporter"] = {
            "image": DCGM_IMAGE,
            "restart": "unless-stopped",
            "cap_add": ["SYS_ADMIN"],
            "ports": [f"127.0.0.1:{DCGM_PORT}:{DCGM_PORT}"],
            "deploy": {"resources": {"reservations": {"devices": [_gpus("all")]}}},
        }
    return {"name": f"kervan-{request.name}", "services": services, "volumes": {"home": {}}}


def _fleet(request: RenderRequest) -> dict[str, Any]:
    port, tls = request.fleet.port, _tls_paths(request.fleet)
    service: dict[str, Any] = {
        "image": request.image,
        "command": ["kervan", "up", "--config", FLEET_FILE],
        "init": True,
        "restart": "unless-stopped",
        # SIGTERM is Ctrl-C to kervan up: it ends the fleet, whose streams get their time.
        "stop_grace_period": f"{one_machine.stop_s(request)}s",
        # What the file says of the host: this machine alone, unless it says otherwise.
        "ports": [f"{_bracketed(request.fleet.host)}:{port}:{port}"],
        "environment": {
            "KERVAN_API_KEY": "${KERVAN_API_KEY:?set KERVAN_API_KEY, in .env for example}",
            "HF_TOKEN": "${HF_TOKEN:-}",
        },
        "volumes": [
            {"type": "bind", "source": "./fleet.yaml", "target": FLEET_FILE, "read_only": True},
            *({"type": "bind", "source": path, "target": path, "read_only": True} for path in tls),
            {"type": "volume", "source": "home", "target": HOME},
        ],
        "shm_size": "16gb",
        "ulimits": {"nofile": {"soft": 65536, "hard": 65536}, "memlock": -1},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": ["CMD", *_probe(request.fleet)],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "10m",
        },
    }
    if request.machine.gpus:
        service["deploy"] = {"resources": {"reservations": {"devices": [_gpus(request.machine.gpus)]}}}
    return service


def _tls_paths(fleet: FleetConfig) -> list[str]:
    return [path for path in (fleet.tls_certificate, fleet.tls_key, fleet.tls_client_ca) if path]


def _probe(fleet: FleetConfig) -> list[str]:
    """Whether the fleet is ready. The certificate names the host by which clients come, not this machine."""
    fetch = ["wget", "--quiet", "--output-document=/dev/null"]
    if fleet.tls_certificate:
        return [*fetch, "--no-check-certificate", f"https://127.0.0.1:{fleet.port}/health/ready"]
    return [*fetch, f"http://127.0.0.1:{fleet.port}/health/ready"]


def _gpus(count: int | str) -> dict[str, Any]:
    return {"driver": "nvidia", "count": count, "capabilities": ["gpu"]}


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
