"""Faults of simulated replicas: what `kervan fault` calls."""

from kervan.config.fault import Fault
from kervan.errors import FleetError
from kervan.fleet.directory import Suffer
from kervan.serve.attach import attach


def suffer(name: str, replica_id: str, fault: Fault, address: str | None = None) -> None:
    """Let a twin suffer from a fault, within about a second.

    Raises: FleetError when the fleet has no such replica, or it is no twin.
    """
    directory = attach(name, address)
    if directory.fleet().result().config.engine != "twin":
        raise FleetError(f"the replicas of fleet {name!r} are real engines; faults are for --engine twin, or use kill")
    ids = [r.id for r in directory.snapshot().result().replicas]
    if replica_id not in ids:
        raise FleetError(f"fleet {name!r} has no replica {replica_id!r}; it has {', '.join(ids) or 'none'}")
    directory.order(replica_id, Suffer(fault)).result()
