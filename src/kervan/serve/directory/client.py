"""Asking the directory of a fleet. Here are its timeouts, and what becomes of Ray's errors.

Light: Ray is imported by the first call, since `cluster.connect` must set Ray's environment before.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from kervan.config.api_keys import KeyTable
from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import GatewayEntry, NodeEntry, Order, ReplicaEntry, Snapshot, StartFailure
from kervan.fleet.usage import FleetUsage, UsageByKey
from kervan.serve.directory.keys import StoredKeys
from kervan.serve.ray_errors import ANSWER_TIMEOUT_S, as_fleet_error, bounded
from kervan.serve.scaler.observed import Observed

logger = logging.getLogger(__name__)

NAMESPACE = "kervan"
ACTOR_PREFIX = "directory-"
MIN_INTERVAL_S = 0.05  # between two snapshots of a follower: changes that come together are one

T = TypeVar("T")


class NoFleetError(FleetError):
    """The cluster answers, and has no directory of such a fleet."""


class StoredFleet(NamedTuple):
    """What the directory keeps of its fleet beside who lives where. `secret`: that of its gateways and replicas.

    `before`: the one before that, for some time after the keys were changed; else empty.
    """

    config: FleetConfig
    secret: str
    before: str = ""


class DirectoryResponse(Generic[T]):
    """A response under way, like Ray Serve's `DeploymentResponse`: await it, or block on `result`.

    Whoever does neither has told something, and does not care whether it arrives.
    """

    def __init__(self, fleet_name: str, reference: Any, decode: Callable[[Any], T]):
        self._error = f"the directory of fleet {fleet_name!r} does not answer"
        self._reference = reference
        self._decode = decode

    def result(self, timeout_s: float | None = ANSWER_TIMEOUT_S) -> T:
        """Block until it is there; None: as long as Ray takes to restart the directory.

        Raises: FleetError when it does not come in time, or the directory is gone.
        """
        import ray

        with as_fleet_error(self._error):
            try:
                response = ray.get(self._reference, timeout=timeout_s)
            except ray.exceptions.GetTimeoutError as error:
                raise TimeoutError(f"no answer for {timeout_s:.0f} s") from error
        return self._decode(response)

    def __await__(self) -> Generator[Any, None, T]:
        """As `within`, without a limit."""
        return self.within(None).__await__()

    async def within(self, timeout_s: float | None) -> T:
        """Wait until it is there.

        Raises: FleetError when it does not come in time, or the directory is gone.
        """
        with as_fleet_error(self._error):
            async with asyncio.timeout(timeout_s):
                response = await self._reference
        return self._decode(response)


class DirectoryClient:
    """The directory of one fleet. Calls return at once; their responses raise FleetError while it is away."""

    def __init__(self, fleet_name: str, actor: Any):
        """`actor`: Ray's handle of a `DirectoryActor`."""
        self.fleet_name = fleet_name
        self._actor = actor

    def fleet(self) -> DirectoryResponse[StoredFleet]:
        """The fleet's settings and secret."""
        return self._call("fleet", lambda stored: StoredFleet(FleetConfig.from_json(stored[0]), *stored[1:]))

    def set_config(self, config: FleetConfig, file_keys: StoredKeys | None = None) -> DirectoryResponse[None]:
        """Store new settings of the fleet; they outlive the directory. `file_keys`: of the file that they name."""
        encoded = None if file_keys is None else msgspec.json.encode(file_keys)
        return self._call("set_config", _nothing, config.to_json(), encoded)

    def keys(self) -> DirectoryResponse[KeyTable]:
        """The fleet's API keys."""
        return self._call("keys", lambda raw: msgspec.json.decode(raw, type=KeyTable))

    def usage(self) -> DirectoryResponse[FleetUsage]:
        """What they have used so far."""
        return self._call("usage", lambda raw: msgspec.json.decode(raw, type=FleetUsage))

    def tell_usage(self, gateway_id: str, usage: UsageByKey) -> DirectoryResponse[None]:
        """The last counts of a gateway that has left."""
        return self._call("tell_usage", _nothing, gateway_id, msgspec.json.encode(usage))

    def snapshot(self) -> DirectoryResponse[Snapshot]:
        """Who lives where now."""
        return self._call("snapshot", _snapshot)

    def changed(self, version: int, timeout_s: float) -> DirectoryResponse[Snapshot]:
        """The snapshot as soon as its version differs from `version`, at the latest after `timeout_s`."""
        return self._call("changed", _snapshot, version, timeout_s)

    def beat_replica(self, entry: ReplicaEntry) -> DirectoryResponse[list[Order]]:
        """Keep a replica listed; what has been ordered of it since its last beat."""
        return self._call("beat_replica", _orders, _encode(entry))

    def beat_gateway(self, entry: GatewayEntry) -> DirectoryResponse[None]:
        """Keep a gateway listed."""
        return self._call("beat_gateway", _nothing, _encode(entry))

    def beat_node(self, entry: NodeEntry) -> DirectoryResponse[Snapshot]:
        """Keep what the watcher of a node tells listed; the snapshot."""
        return self._call("beat_node", _snapshot, _encode(entry))

    def remove(self, entry_id: str) -> DirectoryResponse[None]:
        """List a replica or gateway no more."""
        return self._call("remove", _nothing, entry_id)

    def report_failure(self, failure: StartFailure) -> DirectoryResponse[None]:
        """Keep why a replica or gateway could not start, for whoever waits for it."""
        return self._call("report_failure", _nothing, _encode(failure))

    def order(self, replica_id: str, order: Order) -> DirectoryResponse[bool]:
        """Let a replica do something at its next beat, within about a second; whether there is such a replica."""
        return self._call("order", bool, replica_id, _encode(order))

    def observed(self) -> DirectoryResponse[Observed]:
        """What the autoscaling policy was told last, decided and kept."""
        return self._call("observed", lambda raw: msgspec.json.decode(raw, type=Observed))

    def set_closing(self, is_closing: bool) -> DirectoryResponse[Snapshot]:
        """Let the gateways take no more requests, or take them again; the snapshot."""
        return self._call("set_closing", _snapshot, is_closing)

    def node_id(self) -> DirectoryResponse[str]:
        """Ray's id of the node that the directory is on."""
        return self._call("node_id", str)

    async def follow(self, *, poll_s: float, retry_s: float | None = None) -> AsyncIterator[Snapshot]:
        """Snapshots without end: one now, one at each change of the version, and one after `poll_s` without a change.

        `retry_s`: a directory that does not answer is asked again after so long, which is logged.

        Raises: FleetError when it does not answer, without `retry_s`.
        """
        version = -1
        while True:
            try:
                snapshot = await self.changed(version, poll_s)
            except FleetError as error:
                if retry_s is None:
                    raise
                logger.warning("%s", error)
                await asyncio.sleep(retry_s)
                continue
            version = snapshot.version
            yield snapshot
            await asyncio.sleep(MIN_INTERVAL_S)

    def kill(self, *, restarts: bool) -> None:
        """End the directory's process; `restarts`: Ray starts it again, elsewhere if its node is drained.

        Raises: FleetError when Ray does not answer.
        """
        import ray

        bounded(
            f"the directory of fleet {self.fleet_name!r} could not be stopped",
            lambda: ray.kill(self._actor, no_restart=not restarts),
        )

    def _call(self, method: str, decode: Callable[[Any], T], *arguments: Any) -> DirectoryResponse[T]:
        return DirectoryResponse(self.fleet_name, getattr(self._actor, method).remote(*arguments), decode)


def _encode(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def _snapshot(raw: bytes) -> Snapshot:
    return msgspec.msgpack.decode(raw, type=Snapshot)


def _orders(raw: list[bytes]) -> list[Order]:
    return [msgspec.msgpack.decode(order, type=Order) for order in raw]


def _nothing(_: Any) -> None:
    return None


def find_directory(fleet_name: str) -> DirectoryClient:
    """The directory of a fleet of the cluster that this process has joined.

    Raises: NoFleetError when there is no such fleet; FleetError when Ray does not answer.
    """
    import ray

    def get() -> Any:
        return ray.get_actor(ACTOR_PREFIX + fleet_name, namespace=NAMESPACE)

    try:
        return DirectoryClient(fleet_name, bounded(f"Ray did not return the directory of fleet {fleet_name!r}", get))
    except ValueError as error:
        others = fleet_names()
        hint = f"fleets here: {', '.join(others)} (--name)" if others else "start one: kervan up MODEL"
        raise NoFleetError(f"no fleet {fleet_name!r} runs on this cluster; {hint}") from error


def fleet_names() -> list[str]:
    """The fleets of the cluster that this process has joined, sorted. Raises: FleetError when Ray does not answer."""
    return sorted(name.removeprefix(ACTOR_PREFIX) for name in actor_names(ACTOR_PREFIX))


def actor_names(prefix: str) -> list[str]:
    """The names of kervan's actors on the cluster that start so. Raises: FleetError when Ray does not answer."""
    import ray

    def get() -> Any:
        return ray.util.list_named_actors(all_namespaces=True)

    actors = bounded("Ray did not list the fleets", get)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)]
