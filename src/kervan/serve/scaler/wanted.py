"""What the scaler writes and Serve's controller reads, in Ray's own store: neither may wait for the other."""

import msgspec

from kervan.serve import ray_internals


class Wanted(msgspec.Struct, frozen=True):
    """Replicas that each pool is to have; and Serve's ids of all that are there, those first that go first."""

    targets: dict[str, int]
    leaving: list[str] = []


def _key(fleet_name: str) -> str:
    return f"wanted of fleet {fleet_name}"


def publish(fleet_name: str, wanted: Wanted) -> None:
    """Let Serve's controller know. Raises: what Ray raises."""
    ray_internals.kv_put(_key(fleet_name), msgspec.json.encode(wanted))


def published(fleet_name: str) -> Wanted | None:
    """What was published last, None for nothing. Raises: what Ray raises."""
    stored = ray_internals.kv_get(_key(fleet_name))
    return None if stored is None else msgspec.json.decode(stored, type=Wanted)


def forget(fleet_name: str) -> None:
    """Forget what was published of a fleet that is no more."""
    ray_internals.kv_delete(_key(fleet_name))
