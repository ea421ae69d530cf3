"""The directory of a fleet, found from the command line."""

from typing import Any

import msgspec

from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import Order, Snapshot
from kervan.serve import cluster

DIRECTORY_TIMEOUT_S = 30.0


def attach(name: str, address: str | None) -> Any:
    """Connect to the cluster of fleet `name`; its directory.

    Raises: FleetError when there is no such fleet.
    """
    import logging

    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is None:
        known = cluster.recall(name)
        local = cluster.find_local_ray()
        if known is not None:
            address = known.address
        elif local is not None:
            address = local.address
        else:
            others = [fleet.name for fleet in cluster.remembered()]
            hint = f"fleets started here: {', '.join(others)} (--name)" if others else "start one: kervan up MODEL"
            raise FleetError(f"no fleet {name!r} was started from this machine; {hint}, or give --address")
    cluster.connect(address)
    from kervan.serve import directory

    return directory.find(name)


def is_up(name: str, address: str | None) -> bool:
    """Whether a fleet of this name runs where `kervan up` would start it."""
    if address is None and (cluster.find_local_ray() is None or cluster.recall(name) is None):
        return False
    try:
        attach(name, address)
    except FleetError:
        return False
    return True


def snapshot_of(handle: Any) -> Snapshot:
    from kervan.serve import directory

    return directory.read(told_by(handle.snapshot.remote()))


def next_snapshot(handle: Any, version: int, timeout_s: float) -> Snapshot:
    """The fleet as soon as its version differs from `version`, at the latest after `timeout_s`."""
    from kervan.serve import directory

    return directory.read(told_by(handle.wait.remote(version, timeout_s)))


def store_config(handle: Any, config: FleetConfig) -> None:
    """Let the directory have new settings of the fleet. Raises: FleetError."""
    told_by(handle.set_config.remote(config.to_json()))


def order(handle: Any, replica_id: str, what: Order) -> bool:
    """Order something of a replica, which obeys within about a second; whether there is such a replica."""
    return bool(told_by(handle.order.remote(replica_id, msgspec.msgpack.encode(what))))


def told_by(asked: Any) -> Any:
    """A directory's answer. Raises: FleetError."""
    import ray

    try:
        return ray.get(asked, timeout=DIRECTORY_TIMEOUT_S)
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:  # the latter two while Ray itself is away
        raise FleetError(
            f"the fleet's directory does not answer ({type(error).__name__}); try again in a few seconds"
        ) from error


def stored_config(handle: Any) -> FleetConfig:
    """The settings of the fleet as its directory has them. Raises: FleetError."""
    stored, _ = told_by(handle.fleet.remote())
    return FleetConfig.from_json(stored)
