"""What the API keys of a fleet have used, added up by its directory and stored with Ray, so that it outlives it."""

import asyncio
import time

import msgspec

from kervan.fleet.usage import FleetUsage, Ledger
from kervan.serve import ray_internals

STORE_PERIOD_S = 5.0


def read_ledger(fleet_name: str) -> Ledger:
    """The ledger that the directory before this one has stored, or a new one."""
    stored = ray_internals.kv_get(store_key(fleet_name))
    usage = FleetUsage(time.time()) if stored is None else msgspec.json.decode(stored, type=FleetUsage)
    return Ledger(usage)


async def store_now(fleet_name: str, ledger: Ledger) -> None:
    """Store what has changed since it was stored last."""
    if ledger.is_changed:
        ledger.is_changed = False
        encoded = msgspec.json.encode(ledger.usage)
        await asyncio.to_thread(ray_internals.kv_put, store_key(fleet_name), encoded)


def store_key(fleet_name: str) -> str:
    """The name in Ray's store."""
    return f"usage of fleet {fleet_name}"
