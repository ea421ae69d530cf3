"""The fleet directory as a Ray actor: one per fleet, with the fleet's settings and secret too."""

import asyncio
import contextlib
import time

import msgspec
import ray

from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import Directory, GatewayEntry, NodeEntry, Order, ReplicaEntry, StartFailure
from kervan.serve import pools, ray_internals
from kervan.serve.directory.client import ACTOR_PREFIX, NAMESPACE, DirectoryClient
from kervan.serve.ray_errors import bounded

PUBLISH_PERIOD_S = 0.5


class DirectoryActor:
    """Its methods are those of `DirectoryClient`; entries, orders and snapshots travel as MessagePack.

    Ray restarts it with the arguments of its first start; a config that has changed since comes from Ray's own store.
    Who calls it meanwhile waits for it.
    """

    def __init__(self, name: str, config_json: str, secret: str) -> None:
        self._key = _key(name)
        stored = ray_internals.kv_get(self._key)
        self._config_json = stored.decode() if stored is not None else config_json
        self._targets = _targets(self._config_json)
        self._secret = secret
        self._directory = Directory(time.monotonic)
        self._changed = asyncio.Event()
        self._seen_version = self._directory.version
        self._published = pools.published(name)  # a directory that is new again must not tell that all are gone
        self._published_s = 0.0
        if self._published is None:
            self._publish_pools()

    def _publish_pools(self) -> None:
        """For a fleet with pools: tell Serve's controller, which cannot wait for an answer, how spot is."""
        if (now_s := time.monotonic()) - self._published_s < PUBLISH_PERIOD_S:
            return
        self._published_s = now_s
        config = FleetConfig.from_json(self._config_json)
        if not config.pools:
            return
        facts = pools.spot_facts(config, self._directory.snapshot())
        if facts != self._published:
            pools.publish(config.name, facts)
            self._published = facts

    def _wake_followers(self) -> None:
        if self._directory.version != self._seen_version:
            self._seen_version = self._directory.version
            self._changed.set()
            self._changed = asyncio.Event()

    async def fleet(self) -> tuple[str, str]:
        """The config as JSON, and the secret."""
        return self._config_json, self._secret

    async def node_id(self) -> str:
        """Ray's id of the node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    async def set_config(self, config_json: str) -> None:
        """Store new settings."""
        ray_internals.kv_put(self._key, config_json.encode())
        self._config_json = config_json
        self._targets = _targets(config_json)
        self._directory.version += 1  # fleets on the same port look at the config again
        self._wake_followers()
        self._published_s = 0.0
        self._publish_pools()

    async def beat_replica(self, entry: bytes) -> list[bytes]:
        """As `Directory.beat_replica`; entry and orders are MessagePack."""
        orders = self._directory.beat_replica(msgspec.msgpack.decode(entry, type=ReplicaEntry))
        self._wake_followers()
        self._publish_pools()
        return [msgspec.msgpack.encode(order) for order in orders]

    async def order(self, replica_id: str, order: bytes) -> bool:
        """Keep an order for a replica; False if it is not listed."""
        is_known = self._directory.order(replica_id, msgspec.msgpack.decode(order, type=Order))
        self._wake_followers()
        return is_known

    async def set_closing(self, is_closing: bool) -> bytes:
        """Let the gateways take no more requests, or take them again; the snapshot."""
        self._directory.set_closing(is_closing)
        self._wake_followers()
        return await self.snapshot()

    async def beat_gateway(self, entry: bytes) -> None:
        """Take a beat."""
        self._directory.beat_gateway(msgspec.msgpack.decode(entry, type=GatewayEntry))
        self._wake_followers()
        self._publish_pools()

    async def beat_node(self, entry: bytes) -> bytes:
        """Take what a node's watcher tells; the snapshot."""
        self._directory.beat_node(msgspec.msgpack.decode(entry, type=NodeEntry))
        self._wake_followers()
        return await self.snapshot()

    async def remove(self, entry_id: str) -> None:
        """List a replica or gateway no more."""
        self._directory.remove(entry_id)
        self._wake_followers()

    async def report_failure(self, failure: bytes) -> None:
        """Keep why a replica or gateway could not start."""
        self._directory.report_failure(msgspec.msgpack.decode(failure, type=StartFailure))
        self._wake_followers()

    async def snapshot(self) -> bytes:
        """Who lives where now."""
        return msgspec.msgpack.encode(msgspec.structs.replace(self._directory.snapshot(), targets=self._targets))

    async def changed(self, version: int, timeout_s: float) -> bytes:
        """The snapshot as soon as its version differs from `version`, at the latest after `timeout_s`."""
        if self._directory.snapshot().version == version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return await self.snapshot()


def create_directory(config: FleetConfig, secret: str) -> DirectoryClient:
    """A new directory for a fleet; what another one of this name has stored is forgotten."""
    forget_directory(config.name)
    ray_internals.kv_put(_key(config.name), config.to_json().encode())  # to be read while it is away
    actor = ray.remote(DirectoryActor).options(
        name=ACTOR_PREFIX + config.name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    return DirectoryClient(config.name, actor.remote(config.name, config.to_json(), secret))


def stored_config(fleet_name: str) -> FleetConfig | None:
    """A fleet's settings, read past its directory; None if there are none. Raises: FleetError when Ray is silent."""
    stored = bounded(
        f"Ray did not return the settings of fleet {fleet_name!r}", lambda: ray_internals.kv_get(_key(fleet_name))
    )
    return None if stored is None else FleetConfig.from_json(stored.decode())


def forget_directory(fleet_name: str) -> None:
    """Forget what the directory of a fleet that is no more has stored."""
    ray_internals.kv_delete(_key(fleet_name))
    pools.forget(fleet_name)


def _targets(config_json: str) -> dict[str, int]:
    return {pool: bounds.minimum for pool, bounds in FleetConfig.from_json(config_json).bounds.items()}


def _key(fleet_name: str) -> str:
    return f"config of fleet {fleet_name}"
