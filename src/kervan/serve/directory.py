"""The fleet directory as a Ray actor, and how to find it."""

import asyncio
import contextlib
import time
from typing import Any

import msgspec
import ray

from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import Directory, GatewayEntry, NodeEntry, Order, ReplicaEntry, Snapshot, StartFailure
from kervan.serve import pools, ray_internals

NAMESPACE = "kervan"
_PREFIX = "directory-"
PUBLISH_PERIOD_S = 0.5


def _key(name: str) -> str:
    return f"config of fleet {name}"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, lifetime="detached")
class DirectoryActor:
    """One per fleet. Holds the fleet's config and secret too.

    Ray restarts it with the arguments of its first start; a config that has changed since comes from Ray's own store.
    Who calls it meanwhile waits for it.
    """

    def __init__(self, name: str, config_json: str, secret: str) -> None:
        self._key = _key(name)
        stored = ray_internals.kv_get(self._key)
        self._config_json = stored.decode() if stored is not None else config_json
        self._secret = secret
        self._directory = Directory(time.monotonic)
        self._changed = asyncio.Event()
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

    def _touch(self, before: int) -> None:
        if self._directory.version != before:
            self._changed.set()
            self._changed = asyncio.Event()

    async def fleet(self) -> tuple[str, str]:
        """The config as JSON, and the secret."""
        return self._config_json, self._secret

    async def node_id(self) -> str:
        """Ray's id of the node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    async def set_config(self, config_json: str) -> None:
        ray_internals.kv_put(self._key, config_json.encode())
        self._config_json = config_json
        before = self._directory.version
        self._directory.version += 1  # fleets on the same port look at the config again
        self._touch(before)
        self._published_s = 0.0
        self._publish_pools()

    async def beat_replica(self, entry: bytes) -> list[bytes]:
        """Take a beat; what has been ordered of the replica since the last one."""
        before = self._directory.version
        orders = self._directory.beat_replica(msgspec.msgpack.decode(entry, type=ReplicaEntry))
        self._touch(before)
        self._publish_pools()
        return [msgspec.msgpack.encode(order) for order in orders]

    async def order(self, replica_id: str, order: bytes) -> bool:
        """Let a replica do something at its next beat, within about a second; whether there is such a replica."""
        before = self._directory.version
        is_known = self._directory.order(replica_id, msgspec.msgpack.decode(order, type=Order))
        self._touch(before)
        return is_known

    async def close(self, is_closing: bool) -> bytes:
        """Let the gateways take no more requests, or take them again; the snapshot."""
        before = self._directory.version
        self._directory.close(is_closing=is_closing)
        self._touch(before)
        return await self.snapshot()

    async def beat_gateway(self, entry: bytes) -> None:
        before = self._directory.version
        self._directory.beat_gateway(msgspec.msgpack.decode(entry, type=GatewayEntry))
        self._touch(before)
        self._publish_pools()

    async def beat_node(self, entry: bytes) -> bytes:
        """Take what a node's watcher tells; the snapshot."""
        before = self._directory.version
        self._directory.beat_node(msgspec.msgpack.decode(entry, type=NodeEntry))
        self._touch(before)
        return await self.snapshot()

    async def remove(self, entry_id: str) -> None:
        before = self._directory.version
        self._directory.remove(entry_id)
        self._touch(before)

    async def fail(self, failure: bytes) -> None:
        before = self._directory.version
        self._directory.fail(msgspec.msgpack.decode(failure, type=StartFailure))
        self._touch(before)

    async def snapshot(self) -> bytes:
        return msgspec.msgpack.encode(self._directory.snapshot())

    async def wait(self, version: int, timeout_s: float) -> bytes:
        """The snapshot as soon as its version differs from `version`, at the latest after `timeout_s`."""
        if self._directory.snapshot().version == version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return await self.snapshot()


def create(name: str, config_json: str, secret: str) -> Any:
    """A new directory for fleet `name`."""
    actor: Any = DirectoryActor  # Ray's decorator changed its type
    forget(name)
    return actor.options(name=_PREFIX + name, namespace=NAMESPACE).remote(name, config_json, secret)


def forget(name: str) -> None:
    """Forget the stored config of a fleet that is no more."""
    ray_internals.kv_delete(_key(name))
    pools.forget(name)


def find(name: str) -> Any:
    """The directory of fleet `name`.

    Raises: FleetError when there is no such fleet on this cluster.
    """
    try:
        return ray.get_actor(_PREFIX + name, namespace=NAMESPACE)
    except ValueError as error:
        others = names()
        hint = f"fleets here: {', '.join(others)} (--name)" if others else "start one: kervan up MODEL"
        raise FleetError(f"no fleet {name!r} runs on this cluster; {hint}") from error


def names() -> list[str]:
    """The fleets on this cluster."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        a["name"][len(_PREFIX) :] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(_PREFIX)
    )


def read(raw: bytes) -> Snapshot:
    return msgspec.msgpack.decode(raw, type=Snapshot)
