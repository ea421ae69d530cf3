"""A fleet that is up: its status, what is wrong with it, waiting for it, and its end."""

import contextlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from kervan import errors
from kervan.config.fault import Fault
from kervan.config.fleet import FleetConfig
from kervan.errors import EngineError, FleetError, KervanError
from kervan.fleet.directory import GatewayEntry, NodeEntry, Order, ReplicaEntry, Snapshot, StartFailure, Suffer
from kervan.serve import cluster, pools
from kervan.serve.versions import versions
from kervan.serve.why import explain, notice_lines

Progress = Callable[[str], None]
POLL_S = 0.2
HEARD_S = 2.5  # after which all gateways have heard of a change, and all counts are newer
PATIENCE_S = 15.0
DIRECTORY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """A fleet as `kervan status` tells it. `url` is empty while no gateway is known."""

    name: str
    url: str
    config: FleetConfig
    snapshot: Snapshot

    def to_dict(self) -> dict[str, Any]:
        """What `kervan status --json` prints; scripts rely on these keys."""
        return {
            "name": self.name,
            "url": self.url,
            "model": self.config.model,
            "layout": {
                "tp": self.config.tp,
                "pp": self.config.pp,
                "ep": self.config.ep,
                "nodes_per_replica": self.config.nodes_per_replica,
            },
            "engine": self.config.engine,
            "target_replicas": self.config.replicas,
            "pools": {
                pool: {
                    "min": bounds.minimum,
                    "max": bounds.maximum,
                    "ready": sum(r.state == "ready" for r in pools.replicas_of(pool, self.snapshot)),
                }
                for pool, bounds in self.config.bounds.items()
            },
            "replicas": [_replica(entry) for entry in self.snapshot.replicas],
            "gateways": [_gateway(entry) for entry in self.snapshot.gateways],
            "nodes": [_node(entry) for entry in self.snapshot.nodes],
            "failed_starts": [
                {"who": f.who, "kind": f.kind, "message": f.message, "log": f.log_path} for f in self.snapshot.failures
            ],
        }


def _replica(entry: ReplicaEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "pool": entry.pool,
        "node": entry.node,
        "nodes": entry.nodes or [entry.node],
        "pid": entry.pid,
        "state": entry.state,
        "running": entry.running,
        "waiting": entry.waiting,
        "kv_cache_usage": round(entry.kv_cache_usage, 4),
        "draining": entry.state == "draining",
        "reason": entry.reason,
        "log": entry.log_path,
        "start_s": entry.start_s,
    }


def _gateway(entry: GatewayEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "pid": entry.pid,
        "node": entry.node,
        "ready": entry.is_ready,
        "busy": round(entry.busy, 3),
        "reason": entry.reason,
        "log": entry.log_path,
    }


def _node(entry: NodeEntry) -> dict[str, Any]:
    notices = [
        {
            "kind": notice.kind,
            "source": notice.source,
            "certain": notice.is_certain,
            "deadline_s": notice.deadline_s,
            "seen_s": notice.seen_s,
        }
        for notice in entry.notices
    ]
    return {
        "node": entry.node,
        "watches": entry.watches,
        "problem": entry.problem,
        "drained": entry.is_drained,
        "before": entry.before,
        "notices": notices,
    }


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def wait_until_ready(
    config: FleetConfig, handle: Any, progress: Progress, *, after_failure: int = 0, awaited: Mapping[str, int]
) -> FleetStatus:
    """Wait for all replicas and gateways of this config, and until those of an earlier one are gone.

    `awaited`: replicas by pool; of a fleet with pools, there may be more. Waits as long as it takes, but not for spot
    replicas whose nodes have gone meanwhile; tells why when nothing has changed for `PATIENCE_S`.

    Raises: the KervanError that a replica or gateway reported with a number above `after_failure`.
    """
    from kervan.serve import directory

    made = versions(config)
    told = ""
    changed_s, explained = time.monotonic(), set[str]()
    while True:
        try:
            snapshot = snapshot_of(handle)
        except FleetError as error:
            directory.find(config.name)  # raises when it is gone for good; else what was asked for is under way
            progress(str(error))
            time.sleep(POLL_S)
            continue
        for failure in snapshot.failures:
            if failure.number > after_failure:
                raise _raised(failure)
        ready = sum(r.state == "ready" and r.version == made.replicas for r in snapshot.replicas)
        answering = sum(g.is_ready and g.version == made.gateways for g in snapshot.gateways)
        present = sum(g.version == made.gateways for g in snapshot.gateways)
        words = f"{ready}/{sum(awaited.values())} replicas and {answering}/{config.gateways} gateways ready"
        old = len(snapshot.replicas) - sum(r.version == made.replicas for r in snapshot.replicas)
        old_gateways = len(snapshot.gateways) - present
        if old or old_gateways:
            words += f", {plural(old, 'replica')} and {plural(old_gateways, 'gateway')} to go"
        if words != told:
            told, changed_s = words, time.monotonic()
            progress(words)
        elif time.monotonic() - changed_s > PATIENCE_S:
            changed_s = time.monotonic()
            if config.pools:
                now = pools.placeable(config, cluster.nodes_for(config), pools.held(snapshot))
                awaited = {pool: min(count, pools.awaited(config, now)[pool]) for pool, count in awaited.items()}
            for reason in _reasons(config, snapshot):
                if (kind := re.sub(r"\d+ s\b", "", reason)) not in explained:  # not again with another time
                    explained.add(kind)
                    progress(reason)
        is_settled = pools.are_settled(config, snapshot, awaited)
        is_settled &= config.gateways <= len(snapshot.gateways) <= max(config.gateways, config.max_gateways)
        if is_settled and not (old or old_gateways) and (answering == present or not any(awaited.values())):
            return _status(config, snapshot)
        time.sleep(POLL_S)


def slowest_start(snapshot: Snapshot) -> str:
    """The seconds and the parts of the longest start among the replicas; empty without any."""
    starts = [r.start_s for r in snapshot.replicas if r.start_s]
    if not starts:
        return ""
    parts = max(starts, key=lambda start: sum(start.values()))
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
    return f"{sum(parts.values()):.1f} s: {told}"


def _raised(failure: StartFailure) -> KervanError:
    known: type[KervanError] = getattr(errors, failure.kind, EngineError)
    where = f" (log: {failure.log_path})" if failure.log_path and Path(failure.log_path).exists() else ""
    if failure.kind in ("ConfigError", "CapacityError"):
        where = ""
    return known(f"{failure.message}{where}")


def snapshot_of(handle: Any) -> Snapshot:
    from kervan.serve import directory

    return directory.read(_told(handle.snapshot.remote()))


def next_snapshot(handle: Any, version: int, timeout_s: float) -> Snapshot:
    """The fleet as soon as its version differs from `version`, at the latest after `timeout_s`."""
    from kervan.serve import directory

    return directory.read(_told(handle.wait.remote(version, timeout_s)))


def store_config(handle: Any, config: FleetConfig) -> None:
    """Let the directory have new settings of the fleet. Raises: FleetError."""
    _told(handle.set_config.remote(config.to_json()))


def order(handle: Any, replica_id: str, what: Order) -> bool:
    """Order something of a replica, which obeys within about a second; whether there is such a replica."""
    return bool(_told(handle.order.remote(replica_id, msgspec.msgpack.encode(what))))


def _told(asked: Any) -> Any:
    """A directory's answer. Raises: FleetError."""
    import ray

    try:
        return ray.get(asked, timeout=DIRECTORY_TIMEOUT_S)
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:  # the latter two while Ray itself is away
        raise FleetError(
            f"the fleet's directory does not answer ({type(error).__name__}); try again in a few seconds"
        ) from error


def _status(config: FleetConfig, snapshot: Snapshot) -> FleetStatus:
    url = snapshot.gateways[0].url if snapshot.gateways else ""
    return FleetStatus(config.name, url, config, snapshot)


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


def status(name: str, address: str | None = None) -> FleetStatus:
    """The fleet as its directory sees it now."""
    return Watch(name, address).look()


class Watch:
    """Looks at a fleet again and again."""

    def __init__(self, name: str, address: str | None = None):
        """Raises: FleetError when there is no such fleet."""
        self._handle = attach(name, address)

    def look(self) -> FleetStatus:
        return _status(stored_config(self._handle), snapshot_of(self._handle))


def why(name: str, address: str | None = None) -> tuple[FleetStatus, list[str]]:
    """The fleet, and a sentence for each thing in it that is not as it should be."""
    found = Watch(name, address).look()
    return found, _reasons(found.config, found.snapshot)


def _reasons(config: FleetConfig, snapshot: Snapshot) -> list[str]:
    found = explain(config, snapshot, cluster.nodes_for(config), cluster.dead_nodes())
    return [*notice_lines(snapshot, time.time()), *found]


def stored_config(handle: Any) -> FleetConfig:
    """The settings of the fleet as its directory has them. Raises: FleetError."""
    stored, _ = _told(handle.fleet.remote())
    return FleetConfig.from_json(stored)


def is_up(name: str, address: str | None) -> bool:
    """Whether a fleet of this name runs where `kervan up` would start it."""
    if address is None and (cluster.find_local_ray() is None or cluster.recall(name) is None):
        return False
    try:
        attach(name, address)
    except FleetError:
        return False
    return True


def suffer(name: str, replica_id: str, fault: Fault, address: str | None = None) -> None:
    """Let a twin suffer from a fault, within about a second.

    Raises: FleetError when the fleet has no such replica, or it is no twin.
    """
    handle = attach(name, address)
    if stored_config(handle).engine != "twin":
        raise FleetError(f"the replicas of fleet {name!r} are real engines; faults are for --engine twin, or use kill")
    ids = [r.id for r in snapshot_of(handle).replicas]
    if replica_id not in ids:
        raise FleetError(f"fleet {name!r} has no replica {replica_id!r}; it has {', '.join(ids) or 'none'}")
    order(handle, replica_id, Suffer(fault))


def down(name: str, address: str | None = None) -> Literal["stopped", "stopped with Ray"]:
    """End a fleet, and with the last fleet the Ray that kervan started.

    Raises: FleetError when there is no such fleet.
    """
    local = cluster.find_local_ray()
    known = cluster.recall(name)
    if known is not None and address is None and local is None:
        # The local Ray is gone (a reboot, a kill): nothing is left to end but the memory of it.
        with contextlib.suppress(KervanError):
            attach(name, address)
            end_fleet(name)
        cluster.forget(name)
        return "stopped"
    attach(name, address)
    end_fleet(name)
    cluster.forget(name)
    from kervan.serve import directory

    is_local = local is not None and (address or (known.address if known else local.address)) == local.address
    if local is not None and is_local and not directory.names():
        import ray

        ray.shutdown()
        cluster.stop_local_ray(local)
        return "stopped with Ray"
    return "stopped"


def let_streams_end(
    name: str, deadline_s: float, address: str | None = None, progress: Progress = lambda _: None
) -> None:
    """Let a fleet's gateways take no more requests, and wait until all streams have ended.

    Raises: FleetError when some are left after `deadline_s`; the gateways take requests again then, as they do when the
    wait is given up (Ctrl-C).
    """
    handle = attach(name, address)
    begin_s = time.monotonic()
    told = ""
    is_over = False
    try:
        while True:
            # Asked again and again: a directory that was started anew knows nothing of it.
            snapshot = msgspec.msgpack.decode(_told(handle.close.remote(True)), type=Snapshot)
            at_gateways = sum(gateway.streams for gateway in snapshot.gateways)
            streams = max(at_gateways, sum(replica.running + replica.waiting for replica in snapshot.replicas))
            waited_s = time.monotonic() - begin_s
            if waited_s > HEARD_S and not streams:
                is_over = True
                return
            what = f"waiting for {streams} stream{'s' if streams != 1 else ''}"
            if waited_s > deadline_s:
                raise FleetError(
                    f"{what} after {waited_s:.0f} s, and --deadline was {deadline_s:.0f} s; fleet {name!r} takes "
                    "requests again; give it longer, or leave --graceful out to cut them"
                )
            if streams and what != told:
                told = what
                progress(what)
            time.sleep(POLL_S)
    finally:
        if not is_over:
            _told(handle.close.remote(False))


def end_fleet(name: str) -> None:
    """End the application, then the directory, without which the fleet is no longer listed."""
    import ray

    from kervan.serve import app, directory, watchers

    try:
        app.delete(name)
    except TimeoutError:
        pass  # a replica that waits for a GPU outlasts Serve's patience; Serve goes on ending it
    finally:
        with contextlib.suppress(FleetError):
            ray.kill(directory.find(name))
            directory.forget(name)
        if not directory.names():
            watchers.end_all()
