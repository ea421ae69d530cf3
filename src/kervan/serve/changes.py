"""Changing a fleet that is up: what `kervan up` on a running fleet and `kervan scale` call."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kervan.config.fleet import FleetConfig, from_mapping
from kervan.errors import ConfigError, FleetError, KervanError
from kervan.facts import model as models
from kervan.facts.markets import ON_DEMAND
from kervan.serve import cluster, placement, pools
from kervan.serve.attach import attach
from kervan.serve.directory.keys import StoredKeys, read_file
from kervan.serve.readiness import wait_until_ready
from kervan.serve.start import check_port, num_gateways, validate
from kervan.serve.status import FleetStatus
from kervan.serve.versions import versions

# What a running fleet cannot change, and why.
FIXED = {
    "model": "streams cannot move to another model; start a second fleet (--name), or kervan down first",
    "engine": "streams cannot move between engines and twins; start a second fleet (--name), or kervan down first",
    "ingress": "it is fixed when Serve starts; kervan down first",
    "encrypts": "gateways and replicas could not speak to each other meanwhile; kervan down first",
    "name": "it is how the fleet is found; kervan down first",
}
HIDDEN = frozenset({"api_keys"})  # told as changed, without the values


@dataclass(frozen=True, slots=True)
class FleetChange:
    """A change of a running fleet. `lines`: what differs. `warning`: what it costs, if there is a choice.

    `file_keys`: what the file of API keys has, if the settings name one.
    """

    before: FleetConfig
    after: FleetConfig
    surges: bool
    lines: tuple[str, ...]
    warning: str = ""
    file_keys: StoredKeys | None = None


class RunningFleet:
    """Plans and carries out changes of a fleet that is up."""

    def __init__(self, name: str, address: str | None, progress: Callable[[str], None]):
        """Raises: FleetError when there is no such fleet."""
        self.progress = progress
        self._directory = attach(name, address)
        self.config = self._directory.fleet().result().config

    def plan(self, settings: Mapping[str, Any], source: str) -> FleetChange:
        """What it takes to bring in `settings`; what they do not name stays. Nothing is changed yet.

        Raises: ConfigError; CapacityError; FleetError for what a running fleet cannot change.
        """
        before = self.config
        is_here = cluster.is_one_machine()
        _check_fixed(before, settings, is_here=is_here)
        after = validate(from_mapping(merge(before, settings), source), is_here=is_here)
        if settings.get("gateways") == 0:
            after = dataclasses.replace(after, gateways=num_gateways(after))
        nodes = cluster.devices_by_node(before.device)
        after = placement.spread(after, nodes)
        warnings = []
        neighbours = _check_neighbours(before, after)
        if (before.host, before.port) != (after.host, after.port):
            if not neighbours:
                check_port(after.host, after.port)
            warnings.append(f"{before.host}:{before.port} will no longer serve requests")
        if bool(before.tls_certificate) != bool(after.tls_certificate):
            scheme = "https" if after.tls_certificate else "http"
            warnings.append(f"clients must come by {scheme} then, and meanwhile by both")
        pool_nodes = cluster.nodes_for(after)
        held = pools.held(self._directory.snapshot().result())
        taken = before.world_size * before.gpu_share
        pools.check(after, pool_nodes, {pool: count * taken for pool, count in held.items()})
        if lacking := pools.warning(after, pool_nodes):
            self.progress(lacking)
        number = sum(held.values()) if after.pools or after.max_replicas else after.replicas
        surges = not (number and _replaces_replicas(before, after)) or pools.has_room(after, pool_nodes, held)
        if not surges:
            warnings.append(_cost_without_room(before, after, number, placement.demand(after, nodes)))
        differences = _differences(json.loads(before.to_json()), json.loads(after.to_json()))
        # Another machine need not have the file of a fleet's keys.
        file_keys = read_file(after) if settings.get("api_keys_file") else None
        return FleetChange(before, after, surges, tuple(differences), "; ".join(warnings), file_keys)

    def apply(self, change: FleetChange) -> FleetStatus:
        """Carry it out; returns when all new replicas and gateways are ready and the old ones are gone.

        Raises: the KervanError of a start that failed; the fleet goes on as before then.
        """
        from kervan.serve import app, shared_port

        snapshot = self._directory.snapshot().result()
        last_failure = snapshot.failures[-1].number if snapshot.failures else 0
        nodes = cluster.devices_by_node(change.after.device)
        room = pools.placeable(change.after, cluster.nodes_for(change.after), pools.held(snapshot))
        built = app.build(change.after, nodes, surges=change.surges)  # before anybody is told: Serve may refuse it
        app.check_controller()
        self._directory.set_config(change.after, change.file_keys).result()
        try:
            app.deploy(built, change.after)
            status = wait_until_ready(
                change.after,
                self._directory,
                self.progress,
                after_failure=last_failure,
                awaited=pools.awaited(change.after, room),
            )
        except KervanError as error:
            self.progress("the change failed; restoring the old settings")
            self._directory.set_config(change.before).result()
            app.deploy(app.build(change.before, nodes, surges=change.surges), change.before)
            raise type(error)(f"{error} (the fleet keeps its old settings)") from error
        shared_port.wait_until_known(change.after, self.progress)
        return status


def _check_fixed(before: FleetConfig, settings: Mapping[str, Any], *, is_here: bool) -> None:
    """Raises: FleetError when `settings` would change what a running fleet cannot."""
    current = json.loads(before.to_json())
    for key, why in FIXED.items():
        wanted = settings.get(key, current[key])
        if key == "model" and isinstance(wanted, str):
            wanted = models.resolve(wanted, is_here=is_here)
        if wanted != current[key]:
            raise FleetError(f"{key} of fleet {before.name!r} is {current[key]!r} and cannot become {wanted!r}: {why}")


def _cost_without_room(before: FleetConfig, after: FleetConfig, number: int, demand: str) -> str:
    """What it costs that no new replica, which needs `demand`, can start beside the `number` of old ones."""
    can_move = number > 1 and before.world_size == after.world_size
    return (
        f"there is no room for {demand} beside the old replicas, so {max(1, number // 5)} of {number} replicas will "
        "stop before a new one starts; "
        + ("streams move to the others" if can_move else "streams wait until it is ready, as long as a start takes")
    )


def merge(before: FleetConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a fleet with new `settings`; what follows from others is left out, to follow again.

    Raises: ConfigError for a number of replicas where it says too little.
    """
    merged: dict[str, Any] = json.loads(before.to_json())
    if settings.get("pools"):
        if not before.pools:
            merged["pools"] = {ON_DEMAND: str(before.bounds[ON_DEMAND])}
        del merged["replicas"], merged["max_replicas"]
    elif before.pools and (
        settings.get("max_replicas") or settings.get("replicas", before.replicas) != before.replicas
    ):
        pools_now = ", ".join(f"{pool} {bounds}" for pool, bounds in before.bounds.items())
        raise ConfigError(
            f"fleet {before.name!r} has pools ({pools_now}), so {settings['replicas']} replicas could be of either; "
            f"say which: --pool {ON_DEMAND}:{settings['replicas']}"
        )
    for key, value in settings.items():
        is_mapping = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
        merged[key] = {**merged[key], **value} if is_mapping else value
    if not settings.keys().isdisjoint({"tp", "pp"}):  # these follow from the layout, unless they are given too
        merged |= {key: settings.get(key, 0) for key in ("nodes_per_replica", "gpus_per_replica")}
    return merged


def _check_neighbours(before: FleetConfig, after: FleetConfig) -> list[FleetConfig]:
    """The fleets with which the changed one will share its port.

    Raises: ConfigError when they cannot; a change that does not touch on that is not looked at.
    """
    from kervan.serve import shared_port

    fields = ("host", "port", "shared_port", "engine_args", "tls_certificate", "tls_key", "tls_client_ca")
    if all(getattr(before, field) == getattr(after, field) for field in fields):
        return []
    return shared_port.check(after, [other for other, _ in shared_port.fleets()])


def _replaces_replicas(before: FleetConfig, after: FleetConfig) -> bool:
    return versions(before).replicas != versions(after).replicas


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key} changes" if key in HIDDEN else f"{path}{key}: {before} -> {after}"


def rotate_keys(
    name: str, address: str | None, progress: Callable[[str], None], *, is_confirmed: bool = False
) -> FleetStatus:
    """Give the fleet another secret, and all replicas and gateways other keys; returns when no old one is left.

    Raises: FleetError when there is no room for new replicas beside the old ones, and that is not confirmed.
    """
    fleet = RunningFleet(name, address, progress)
    change = fleet.plan({"key_generation": fleet.config.key_generation + 1}, "kervan rotate-keys")
    if change.warning and not is_confirmed:
        raise FleetError(f"{change.warning}; add --yes to go on")
    return fleet.apply(change)


def scale(
    name: str, settings: Mapping[str, Any], address: str | None = None, progress: Callable[[str], None] = lambda _: None
) -> FleetStatus:
    """Change `replicas`, `max_replicas`, `pools`, `gateways`, `max_gateways`; returns when they are there, or gone.

    Raises: CapacityError when they do not fit; the fleet is as before then.
    """
    fleet = RunningFleet(name, address, progress)
    return fleet.apply(fleet.plan(settings, "kervan scale"))
