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
from kervan.errors import EngineError, FleetError, KervanError
from kervan.facts.fault import Fault
from kervan.facts.fleet import FleetConfig
from kervan.fleet.directory import Snapshot, StartFailure, Suffer
from kervan.serve import cluster, pools
from kervan.serve.versions import versions
from kervan.serve.why import explain

Progress = Callable[[str], None]
POLL_S = 0.2
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
            "replicas": [
                {
                    "id": r.id,
                    "pool": r.pool,
                    "node": r.node,
                    "nodes": r.nodes or [r.node],
                    "pid": r.pid,
                    "state": r.state,
                    "running": r.running,
                    "waiting": r.waiting,
                    "kv_cache_usage": round(r.kv_cache_usage, 4),
                    "draining": r.state == "draining",
                    "reason": r.reason,
                    "log": r.log_path,
                    "start_s": r.start_s,
                }
                for r in self.snapshot.replicas
            ],
            "gateways": [
                {
                    "id": g.id,
                    "pid": g.pid,
                    "node": g.node,
                    "ready": g.is_ready,
                    "busy": round(g.busy, 3),
                    "reason": g.reason,
                    "log": g.log_path,
                }
                for g in self.snapshot.gateways
            ],
            "failed_starts": [
                {"who": f.who, "kind": f.kind, "message": f.message, "log": f.log_path} for f in self.snapshot.failures
            ],
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
    import ray

    from kervan.serve import directory

    try:
        return directory.read(ray.get(handle.snapshot.remote(), timeout=DIRECTORY_TIMEOUT_S))
    except ray.exceptions.RayError as error:
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
    return explain(config, snapshot, cluster.nodes_for(config), cluster.dead_nodes())


def stored_config(handle: Any) -> FleetConfig:
    import ray

    stored, _ = ray.get(handle.fleet.remote(), timeout=DIRECTORY_TIMEOUT_S)
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
    import ray

    if stored_config(handle).engine != "twin":
        raise FleetError(f"the replicas of fleet {name!r} are real engines; faults are for --engine twin, or use kill")
    ids = [r.id for r in snapshot_of(handle).replicas]
    if replica_id not in ids:
        raise FleetError(f"fleet {name!r} has no replica {replica_id!r}; it has {', '.join(ids) or 'none'}")
    ray.get(handle.order.remote(replica_id, msgspec.msgpack.encode(Suffer(fault))), timeout=DIRECTORY_TIMEOUT_S)


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


def end_fleet(name: str) -> None:
    """End the application, then the directory, without which the fleet is no longer listed."""
    import ray

    from kervan.serve import app, directory

    try:
        app.delete(name)
    except TimeoutError:
        pass  # a replica that waits for a GPU outlasts Serve's patience; Serve goes on ending it
    finally:
        with contextlib.suppress(FleetError):
            ray.kill(directory.find(name))
            directory.forget(name)
