"""A fleet that has one machine and starts its own Ray there: what fits, and how long its end takes."""

from kervan.cluster.request import RenderRequest
from kervan.errors import ConfigError
from kervan.facts.markets import SPOT

STOP_S = 60  # for engines and Ray to end, after the streams


def check(request: RenderRequest) -> None:
    """Raises: ConfigError for a fleet with spot nodes, or of several nodes."""
    if any(group.market == SPOT for group in request.groups):
        raise ConfigError(
            f"--target {request.target} is one machine, which has one market, and the fleet has a spot pool; use "
            "--target kuberay, or --replicas in place of --pool"
        )
    if request.most_nodes > 1 and request.machine.gpus:
        raise ConfigError(
            f"--target {request.target} is one machine, and the fleet needs {request.most_nodes} with "
            f"{request.machine.gpus} GPUs each; use --target kuberay or systemd, or a larger --gpus-per-node"
        )


def stop_s(request: RenderRequest) -> int:
    """Seconds from SIGTERM until the fleet and its Ray have ended."""
    return round(request.fleet.drain_timeout_s) + STOP_S
