"""The fleet directory as a Ray actor: one per fleet, with the fleet's settings and secret too."""

import asyncio
import contextlib
import logging
import secrets
import time

import msgspec
import ray

from kervan import logs
from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import Directory, GatewayEntry, NodeEntry, Order, ReplicaEntry, Snapshot, StartFailure
from kervan.fleet.usage import UsageByKey
from kervan.serve import cluster, costs, pools, ray_internals
from kervan.serve.directory import keys, usage
from kervan.serve.directory.client import ACTOR_PREFIX, NAMESPACE, DirectoryClient
from kervan.serve.ray_errors import bounded
from kervan.serve.scaler import wanted
from kervan.serve.scaler.observed import Observed
from kervan.serve.scaler.scaler import Scaler

logger = logging.getLogger(__name__)

TICK_S = 0.1
LOOK_PERIOD_S = 2.0
CHANGE_S = 3600.0  # what is started so long after a change of keys is not told the ones before


class _Secrets(msgspec.Struct, frozen=True):
    """By generation of keys: the present one's, and that of the one before. `changed_s`: Unix time of the change."""

    of: dict[int, str]
    changed_s: float = 0.0

    def next(self, before: int, generation: int, now_s: float) -> "_Secrets":
        """With one for `generation` beside that of `before`."""
        return _Secrets({before: self.of[before], generation: secrets.token_hex(32)}, now_s)

    def told(self, generation: int, now_s: float) -> tuple[str, str]:
        """The one of `generation`, and the other one, which is empty when it counts no more."""
        others = [secret for number, secret in self.of.items() if number != generation]
        return self.of[generation], others[0] if others and now_s - self.changed_s < CHANGE_S else ""


class DirectoryActor:
    """Its methods are those of `DirectoryClient`; entries, orders and snapshots travel as MessagePack.

    Ray restarts it with the arguments of its first start; a config that has changed since comes from Ray's own store.
    Who calls it meanwhile waits for it.
    """

    # Ray awaits it: the scaler's tasks need the loop.
    async def __init__(self, name: str, config_json: str, secret: str) -> None:  # type: ignore[misc]
        self._name = name
        self._key = _key(name)
        stored = ray_internals.kv_get(self._key)
        self._config = FleetConfig.from_json(stored.decode() if stored is not None else config_json)
        logs.configure(self._config.log_format, fleet=name)
        kept = ray_internals.kv_get(_secrets_key(name))
        self._secrets = msgspec.json.decode(kept, type=_Secrets) if kept is not None else _Secrets(
            {self._config.key_generation: secret}
        )  # fmt: skip
        self._directory = Directory(time.monotonic)
        self._changed = asyncio.Event()
        self._seen_version = self._directory.version
        self._kind_of: dict[str, str] = {}  # of each node, its GPU
        self._keys = keys.FleetKeys(self._config, keys.read_stored(name), self._keys_changed)
        self._ledger = usage.read_ledger(name)
        self._scaler = Scaler(self._config, ray_internals.kv_get(_scaler_key(name)))
        # One that is new again goes on from there, and must not tell that fewer are wanted before it has looked.
        self._wanted = wanted.published(name)
        jobs = (self._scale_forever(), self._look_forever(), self._keys.follow(), self._store_usage_forever())
        self._tasks = [asyncio.create_task(job) for job in jobs]

    def _keys_changed(self) -> None:
        self._directory.version += 1
        self._wake_followers()

    async def _store_usage_forever(self) -> None:
        while True:
            await asyncio.sleep(usage.STORE_PERIOD_S)
            try:
                await self._store_usage()
            except Exception:  # supervised: it is stored the next time
                logger.exception("the usage of API keys was not stored")

    async def _store_usage(self) -> None:
        self._ledger.look(time.monotonic(), {gateway.id for gateway in self._directory.snapshot().gateways})
        await usage.store_now(self._name, self._ledger)

    async def _scale_forever(self) -> None:
        """Decide again and again, and let Serve's controller know, which cannot wait for an answer."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._scale()
            except Exception:  # supervised: whatever is wrong now, the next second may be better
                logger.exception("nothing was decided")
                await asyncio.sleep(LOOK_PERIOD_S)

    async def _scale(self) -> None:
        if self._scaler.has_just_decided:
            return
        snapshot = self._directory.snapshot()
        if not self._scaler.is_due(snapshot.gateways):
            return
        self._scaler.decide(snapshot)
        self._wake_followers()
        if self._scaler.wanted != self._wanted:
            await asyncio.to_thread(wanted.publish, self._name, self._scaler.wanted)
            self._wanted = self._scaler.wanted
        if (stored := self._scaler.to_store()) is not None:
            await asyncio.to_thread(ray_internals.kv_put, _scaler_key(self._name), stored)

    async def _look_forever(self) -> None:
        """Look at what the cluster has room for."""
        while True:
            try:
                held = pools.held(self._directory.snapshot())
                nodes = await asyncio.to_thread(cluster.nodes_for, self._config)
                of_pools = {
                    pool: pools.of_pool(pool, nodes) if self._config.pools else nodes for pool in self._config.bounds
                }
                self._kind_of = kind_of = {node.node: node.accelerator or node.device for node in nodes}
                kinds = {pool: [kind_of[node.node] for node in own] for pool, own in of_pools.items()}
                self._scaler.look(pools.allowed(self._config, nodes, held), kinds, kind_of)
            except Exception:  # supervised: what was seen last holds
                logger.exception("the cluster does not tell what it has")
            await asyncio.sleep(LOOK_PERIOD_S)

    def _wake_followers(self) -> None:
        if self._directory.version != self._seen_version:
            self._seen_version = self._directory.version
            self._changed.set()
            self._changed = asyncio.Event()

    async def fleet(self) -> tuple[str, str, str]:
        """The config as JSON, the secret, and the one before, if the keys were changed lately."""
        return self._config.to_json(), *self._secrets.told(self._config.key_generation, time.time())

    async def keys(self) -> bytes:
        """The table of API keys, as JSON."""
        return msgspec.json.encode(self._keys.table)

    async def usage(self) -> bytes:
        """What the keys have used so far: a `FleetUsage` as JSON."""
        self._ledger.look(time.monotonic(), {gateway.id for gateway in self._directory.snapshot().gateways})
        return msgspec.json.encode(self._ledger.usage)

    async def tell_usage(self, gateway_id: str, told: bytes) -> None:
        """The last counts of a gateway that has left."""
        self._ledger.tell(gateway_id, msgspec.json.decode(told, type=UsageByKey), time.monotonic())

    async def node_id(self) -> str:
        """Ray's id of the node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    async def set_config(self, config_json: str, file_keys: bytes | None = None) -> None:
        """Store new settings; draws a secret for a generation of keys that has none. `file_keys`: what was read of the
        file of their API keys, if it was.
        """
        before = self._config
        ray_internals.kv_put(self._key, config_json.encode())
        self._config = FleetConfig.from_json(config_json)
        if self._config.key_generation not in self._secrets.of:
            self._secrets = self._secrets.next(before.key_generation, self._config.key_generation, time.time())
            ray_internals.kv_put(_secrets_key(self._name), msgspec.json.encode(self._secrets))
        read = None if file_keys is None else msgspec.json.decode(file_keys, type=keys.StoredKeys)
        self._keys.set_config(self._config, read)
        self._scaler.set_config(self._config)
        self._directory.version += 1  # fleets on the same port look at the config again
        self._wake_followers()

    async def beat_replica(self, entry: bytes) -> list[bytes]:
        """As `Directory.beat_replica`; entry and orders are MessagePack."""
        orders = self._directory.beat_replica(msgspec.msgpack.decode(entry, type=ReplicaEntry))
        self._wake_followers()
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
        gateway = msgspec.msgpack.decode(entry, type=GatewayEntry)
        self._ledger.tell(gateway.id, gateway.usage, time.monotonic())
        self._directory.beat_gateway(msgspec.structs.replace(gateway, usage={}))
        self._scaler.beat(gateway)
        self._wake_followers()

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
        return msgspec.msgpack.encode(self._snapshot())

    def _snapshot(self) -> Snapshot:
        scaling, bounds = self._scaler.scaling, self._config.bounds
        snapshot = self._directory.snapshot()
        return msgspec.structs.replace(
            snapshot,
            targets=scaling.targets,
            scaling=scaling,
            slo=self._config.kept_slo,
            may_sleep=not any(pool.minimum for pool in bounds.values()),
            bounds={name: (pool.minimum, pool.maximum) for name, pool in bounds.items()},
            keys_problem=self._keys.problem,
            usd_per_h=costs.usd_per_h(self._config, snapshot.replicas, self._kind_of),
        )

    async def observed(self) -> bytes:
        """What the autoscaling policy was told last, and has kept: an `Observed` as JSON."""
        scaler = self._scaler
        return msgspec.json.encode(Observed(scaler.state, scaler.scaling, dict(scaler.memory), scaler.kinds))

    async def changed(self, version: int, timeout_s: float) -> bytes:
        """The snapshot as soon as its version differs from `version`, at the latest after `timeout_s`."""
        if self._directory.snapshot().version == version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return msgspec.msgpack.encode(msgspec.structs.replace(self._snapshot(), keys=self._keys.table))


def create_directory(config: FleetConfig, secret: str, file_keys: keys.StoredKeys | None = None) -> DirectoryClient:
    """A new directory for a fleet; what another one of this name has stored is forgotten.

    `file_keys`: what was read of the file of API keys that the settings name.
    """
    forget_directory(config.name)
    if file_keys is not None:
        ray_internals.kv_put(keys.store_key(config.name), msgspec.json.encode(file_keys))
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
    wanted.forget(fleet_name)
    ray_internals.kv_delete(_scaler_key(fleet_name))
    ray_internals.kv_delete(_secrets_key(fleet_name))
    ray_internals.kv_delete(keys.store_key(fleet_name))
    ray_internals.kv_delete(usage.store_key(fleet_name))


def _key(fleet_name: str) -> str:
    return f"config of fleet {fleet_name}"


def _secrets_key(fleet_name: str) -> str:
    return f"secrets of fleet {fleet_name}"


def _scaler_key(fleet_name: str) -> str:
    return f"scaler of fleet {fleet_name}"
