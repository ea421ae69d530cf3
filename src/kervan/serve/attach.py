"""A fleet found from the command line."""

from kervan.errors import FleetError
from kervan.serve import cluster
from kervan.serve.directory.client import DirectoryClient, find_directory


def attach(name: str, address: str | None) -> DirectoryClient:
    """Connect to the cluster of fleet `name`; its directory.

    Raises: FleetError when there is no such fleet.
    """
    if address is None:
        remembered = cluster.recall(name)
        local = cluster.find_local_ray()
        if remembered is not None:
            address = remembered.address
        elif local is not None:
            address = local.address
        else:
            others = [fleet.name for fleet in cluster.remembered()]
            hint = f"fleets started here: {', '.join(others)} (--name)" if others else "start one: kervan up MODEL"
            raise FleetError(f"no fleet {name!r} was started from this machine; {hint}, or give --address")
    cluster.connect(address)
    return find_directory(name)


def is_up(name: str, address: str | None) -> bool:
    """Whether a fleet of this name runs where `kervan up` would start it."""
    if address is None and (cluster.find_local_ray() is None or cluster.recall(name) is None):
        return False
    try:
        attach(name, address)
    except FleetError:
        return False
    return True
