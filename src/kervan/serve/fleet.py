"""Up, down, scale and status of a fleet: what the command line calls."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from kervan import errors
from kervan.errors import ConfigError, EngineError, FleetError, KervanError
from kervan.facts import model as models
from kervan.facts.fault import Fault
from kervan.facts.fleet import FleetConfig, from_mapping
from kervan.fleet.directory import Snapshot, StartFailure
from kervan.fleet.vllm import argument_names
from kervan.serve import cluster, placement
from kervan.serve.why import explain
from kervan.twin import settings as twins

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
                {"id": g.id, "pid": g.pid, "node": g.node, "ready": g.is_ready, "reason": g.reason, "log": g.log_path}
                for g in self.snapshot.gateways
            ],
            "failed_starts": [
                {"who": f.who, "kind": f.kind, "message": f.message, "log": f.log_path} for f in self.snapshot.failures
            ],
        }


def validate(config: FleetConfig) -> FleetConfig:
    """The config with its model resolved, after every check that needs no cluster.

    Raises: ConfigError.
    """
    config = dataclasses.replace(config, model=models.resolve(config.model))
    argument_names.check(config.engine_args)
    models.check_layout(models.read_config(config.model), tp=config.tp, pp=config.pp, ep=config.ep)
    if config.engine == "twin":
        twins.settings(config)
    return config


def on_cpu(config: FleetConfig, cores: int) -> FleetConfig:
    """The config for a machine without GPUs: its replicas share the cores, unless the user says how.

    Left alone, each vLLM engine binds its threads to the same first cores.
    """
    if config.engine == "twin" or config.replicas < 2 or "VLLM_CPU_OMP_THREADS_BIND" in {**os.environ, **config.env}:
        return config
    share = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, cores // config.replicas))}
    return dataclasses.replace(config, env={**share, **config.env})


def check_port(host: str, port: int) -> None:
    """Raises: ConfigError when something listens on the port already, or the host is not this machine.

    Gateways share their port (SO_REUSEPORT), so two fleets of one user could share it without an error.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError(
                    f"host {host!r} is no address of this machine ({error.strerror}); "
                    "use 127.0.0.1, or 0.0.0.0 for all (--host)"
                ) from error
            other = port + 1 if 1024 <= port < 65535 else 8000
            raise ConfigError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another, for example --port {other}"
            ) from error


def num_gateways(config: FleetConfig) -> int:
    """The configured number, or one per 8 cores of this machine, 1 to 4."""
    return config.gateways or min(4, max(1, (os.cpu_count() or 1) // 8))


class Startup:
    """A fleet on its way up; `cancel` undoes whatever has been started."""

    def __init__(self, config: FleetConfig, address: str | None, progress: Progress):
        self.config = config
        self.progress = progress
        self._address = address
        self._started_ray: cluster.StartingRay | None = None
        self._directory: Any = None

    def run(self) -> FleetStatus:
        """Start the fleet and wait until every replica has given a token.

        Raises: ConfigError, CapacityError, EngineError, FleetError. Undone on every exception, Ctrl-C too.
        """
        try:
            return self._run()
        except BaseException:
            with _uninterrupted():
                self.cancel()
            raise

    def _run(self) -> FleetStatus:
        self.config = validate(self.config)
        is_here = self._address is None
        if is_here and cluster.find_local_ray() is None:
            check_port(self.config.host, self.config.port)
        address = self._reach_ray()
        from kervan.serve import app, directory, shared_port

        nodes = cluster.devices_by_node()
        if not placement.has_gpus(nodes):
            self.config = on_cpu(self.config, os.cpu_count() or 1)
        config = self.config = placement.spread(self.config, nodes)
        if config.name in directory.names():
            raise FleetError(
                f"fleet {config.name!r} is already up; use another --name, kervan scale, or kervan down first"
            )
        if not shared_port.check(config, [other for other, _ in shared_port.fleets()]) and is_here:
            check_port(config.host, config.port)
        placement.check(config, nodes)
        if config.ingress == "serve":
            _check_entry_is_free()
        config = self.config = dataclasses.replace(config, gateways=num_gateways(config))
        self._directory = directory.create(config.name, config.to_json(), secrets.token_hex(16))
        app.start_serve(config)
        self.progress(f"starting {_plural(config.replicas, 'replica')} and {_plural(config.gateways, 'gateway')}")
        app.deploy(app.build(config, nodes), config)
        status = wait_until_ready(config, self._directory, self.progress)
        shared_port.wait_until_known(config, self.progress)
        if parts := slowest_start(status.snapshot):
            self.progress(f"the slowest engine took {parts}")
        cluster.remember(cluster.Remembered(config.name, address, status.url))
        return status

    def _reach_ray(self) -> str:
        needs_haproxy = self.config.ingress == "serve"
        if self._address is not None:
            if needs_haproxy and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
                raise FleetError(
                    "--ingress serve needs HAProxy on the cluster: RAY_SERVE_ENABLE_HA_PROXY=1 in the environment of "
                    "Ray on all nodes and of kervan up; or use --ingress direct"
                )
            cluster.connect(self._address)
            return self._address
        local = cluster.find_local_ray()
        if local is None:
            self.progress("starting Ray on this machine")
            self._started_ray = cluster.start_local_ray(has_haproxy=needs_haproxy)
            local = self._started_ray.local
        elif needs_haproxy and not local.has_haproxy:
            raise FleetError(
                "the Ray that runs on this machine was started without HAProxy; "
                "end its fleets first (kervan down), or use --ingress direct"
            )
        cluster.connect(local.address)
        return local.address

    def keep(self) -> None:
        """Let the fleet outlive this process."""
        if self._started_ray is not None:
            self._started_ray.keep()

    def cancel(self) -> None:
        """End what has been started."""
        if self._started_ray is not None:
            cluster.stop_local_ray(self._started_ray.local)
            cluster.forget(self.config.name)
        elif self._directory is not None:
            with contextlib.suppress(Exception):
                _end_fleet(self.config.name)


def _check_entry_is_free() -> None:
    """Serve has one entry for a whole cluster, and a fleet needs all of its paths."""
    from kervan.serve import directory

    for name in directory.names():
        other = _stored_config(directory.find(name))
        if other.ingress == "serve":
            raise FleetError(
                f"fleet {name!r} has the one entry of Serve on this cluster (port {other.port}); use --ingress direct"
            )


@contextlib.contextmanager
def _uninterrupted() -> Any:
    """Ignore further Ctrl-C while cleaning up."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def wait_until_ready(config: FleetConfig, handle: Any, progress: Progress, *, after_failure: int = 0) -> FleetStatus:
    """Wait for all replicas and gateways of this config, and until those of an earlier one are gone.

    Waits as long as it takes; tells why when nothing has changed for `PATIENCE_S`.

    Raises: the KervanError that a replica or gateway reported with a number above `after_failure`.
    """
    from kervan.serve import app, directory

    made = app.versions(config)
    told = ""
    changed_s, explained = time.monotonic(), set[str]()
    while True:
        try:
            snapshot = _snapshot(handle)
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
        words = f"{ready}/{config.replicas} replicas and {answering}/{config.gateways} gateways ready"
        old = len(snapshot.replicas) - sum(r.version == made.replicas for r in snapshot.replicas)
        old_gateways = len(snapshot.gateways) - present
        if old or old_gateways:
            words += f", {_plural(old, 'replica')} and {_plural(old_gateways, 'gateway')} to go"
        if words != told:
            told, changed_s = words, time.monotonic()
            progress(words)
        elif time.monotonic() - changed_s > PATIENCE_S:
            changed_s = time.monotonic()
            for reason in _reasons(config, snapshot):
                if (kind := re.sub(r"\d+ s\b", "", reason)) not in explained:  # not again with another time
                    explained.add(kind)
                    progress(reason)
        is_settled = len(snapshot.replicas) == ready == config.replicas and len(snapshot.gateways) == config.gateways
        if is_settled and not old_gateways and (answering == present or config.replicas == 0):
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


def _snapshot(handle: Any) -> Snapshot:
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
        return _status(_stored_config(self._handle), _snapshot(self._handle))


def why(name: str, address: str | None = None) -> tuple[FleetStatus, list[str]]:
    """The fleet, and a sentence for each thing in it that is not as it should be."""
    found = Watch(name, address).look()
    return found, _reasons(found.config, found.snapshot)


def _reasons(config: FleetConfig, snapshot: Snapshot) -> list[str]:
    return explain(config, snapshot, cluster.devices_by_node(), cluster.dead_nodes())


def _stored_config(handle: Any) -> FleetConfig:
    import ray

    stored, _ = ray.get(handle.fleet.remote(), timeout=DIRECTORY_TIMEOUT_S)
    return FleetConfig.from_json(stored)


# What a running fleet cannot change, and why.
FIXED = {
    "model": "streams cannot move to another model; start a second fleet (--name), or kervan down first",
    "engine": "streams cannot move between engines and twins; start a second fleet (--name), or kervan down first",
    "ingress": "it belongs to Serve's start; kervan down first",
    "name": "it is how the fleet is found; kervan down first",
}
HIDDEN = frozenset({"api_keys"})  # told as changed, without the values


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a running fleet. `lines`: what differs. `warning`: what it costs, if there is a choice."""

    before: FleetConfig
    after: FleetConfig
    surges: bool
    lines: tuple[str, ...]
    warning: str = ""


class RunningFleet:
    """A fleet that is up, to be changed."""

    def __init__(self, name: str, address: str | None, progress: Progress):
        """Raises: FleetError when there is no such fleet."""
        self.progress = progress
        self._handle = attach(name, address)
        self._config = _stored_config(self._handle)

    def plan(self, words: Mapping[str, Any], source: str) -> Change:
        """What it takes to bring in `words`; what they do not name stays. Nothing is changed yet.

        Raises: ConfigError; CapacityError; FleetError for what a running fleet cannot change.
        """
        before = self._config
        merged = json.loads(before.to_json())
        for key, why in FIXED.items():
            wanted = words.get(key, merged[key])
            if key == "model" and isinstance(wanted, str):
                wanted = models.resolve(wanted)
            if wanted != merged[key]:
                raise FleetError(
                    f"{key} of fleet {before.name!r} is {merged[key]!r} and cannot become {wanted!r}: {why}"
                )
        for key, value in words.items():
            is_mapping = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
            merged[key] = {**merged[key], **value} if is_mapping else value
        if not words.keys().isdisjoint({"tp", "pp"}):  # these follow from the layout, unless they are given too
            merged |= {key: words.get(key, 0) for key in ("nodes_per_replica", "gpus_per_replica")}
        after = validate(from_mapping(merged, source))
        if words.get("gateways") == 0:
            after = dataclasses.replace(after, gateways=num_gateways(after))
        nodes = cluster.devices_by_node()
        after = placement.spread(after, nodes)
        warnings = []
        neighbours = _check_neighbours(before, after)
        if (before.host, before.port) != (after.host, after.port):
            if not neighbours:
                check_port(after.host, after.port)
            warnings.append(f"nothing will answer at {before.host}:{before.port} any more")
        live = sum(r.state in ("starting", "ready") for r in _snapshot(self._handle).replicas)
        same_size = before.world_size == after.world_size
        held = live * before.world_size * before.gpu_share
        placement.check(after, nodes, held=held)
        surges = True
        if _replaces_replicas(before, after) and after.replicas and not placement.has_room(after, nodes):
            surges = False
            warnings.append(
                f"there is no room for {placement.demand(after, nodes)} beside the old replicas, so "
                f"{max(1, after.replicas // 5)} of {after.replicas} replicas will stop before a new one starts; "
                + (
                    "streams move to the others"
                    if after.replicas > 1 and same_size
                    else "streams wait until it is ready, as long as a start takes"
                )
            )
        return Change(
            before,
            after,
            surges,
            tuple(_differences(json.loads(before.to_json()), json.loads(after.to_json()))),
            "; ".join(warnings),
        )

    def apply(self, change: Change) -> FleetStatus:
        """Carry it out; returns when all new replicas and gateways are ready and the old ones are gone.

        Raises: the KervanError of a start that failed; the fleet goes on as before then.
        """
        import ray

        from kervan.serve import app, shared_port

        snapshot = _snapshot(self._handle)
        known = snapshot.failures[-1].number if snapshot.failures else 0
        nodes = cluster.devices_by_node()
        ray.get(self._handle.set_config.remote(change.after.to_json()))
        app.deploy(app.build(change.after, nodes, surges=change.surges), change.after)
        try:
            status = wait_until_ready(change.after, self._handle, self.progress, after_failure=known)
        except KervanError as error:
            self.progress("it failed; going back")
            ray.get(self._handle.set_config.remote(change.before.to_json()))
            app.deploy(app.build(change.before, nodes, surges=change.surges), change.before)
            raise type(error)(f"{error} (the fleet goes on as before)") from error
        shared_port.wait_until_known(change.after, self.progress)
        return status


def _check_neighbours(before: FleetConfig, after: FleetConfig) -> list[FleetConfig]:
    """The fleets with which the changed one will share its port.

    Raises: ConfigError when they cannot; a change that does not touch on that is not looked at.
    """
    from kervan.serve import shared_port

    words = ("host", "port", "shared_port", "engine_args")
    if all(getattr(before, word) == getattr(after, word) for word in words):
        return []
    return shared_port.check(after, [other for other, _ in shared_port.fleets()])


def _replaces_replicas(before: FleetConfig, after: FleetConfig) -> bool:
    from kervan.serve import app

    return app.versions(before).replicas != app.versions(after).replicas


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key} changes" if key in HIDDEN else f"{path}{key}: {before} -> {after}"


def is_up(name: str, address: str | None) -> bool:
    """Whether a fleet of this name runs where `kervan up` would start it."""
    if address is None and (cluster.find_local_ray() is None or cluster.recall(name) is None):
        return False
    try:
        attach(name, address)
    except FleetError:
        return False
    return True


def scale(
    name: str,
    replicas: int | None = None,
    gateways: int | None = None,
    address: str | None = None,
    progress: Progress = lambda _: None,
) -> FleetStatus:
    """Change the number of replicas or gateways; returns when they are there, or gone.

    Raises: CapacityError when they do not fit; the fleet is as before then.
    """
    fleet = RunningFleet(name, address, progress)
    words = {"replicas": replicas, "gateways": gateways}
    return fleet.apply(fleet.plan({key: n for key, n in words.items() if n is not None}, "kervan scale"))


def suffer(name: str, replica_id: str, fault: Fault, address: str | None = None) -> None:
    """Let a twin suffer from a fault, within about a second.

    Raises: FleetError when the fleet has no such replica, or it is no twin.
    """
    handle = attach(name, address)
    import ray

    if _stored_config(handle).engine != "twin":
        raise FleetError(f"the replicas of fleet {name!r} are real engines; faults are for --engine twin, or use kill")
    ids = [r.id for r in _snapshot(handle).replicas]
    if replica_id not in ids:
        raise FleetError(f"fleet {name!r} has no replica {replica_id!r}; it has {', '.join(ids) or 'none'}")
    ray.get(handle.order.remote(replica_id, msgspec.msgpack.encode(fault)), timeout=DIRECTORY_TIMEOUT_S)


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
            _end_fleet(name)
        cluster.forget(name)
        return "stopped"
    attach(name, address)
    _end_fleet(name)
    cluster.forget(name)
    from kervan.serve import directory

    is_local = local is not None and (address or (known.address if known else local.address)) == local.address
    if local is not None and is_local and not directory.names():
        import ray

        ray.shutdown()
        cluster.stop_local_ray(local)
        return "stopped with Ray"
    return "stopped"


def _end_fleet(name: str) -> None:
    """End the application, then the directory, without which the fleet is no longer listed."""
    import ray

    from kervan.serve import app, directory

    try:
        app.delete(name)
    except TimeoutError:
        pass  # a replica that is still starting outlasts Serve's patience; Serve goes on ending it
    finally:
        with contextlib.suppress(FleetError):
            ray.kill(directory.find(name))
            directory.forget(name)
