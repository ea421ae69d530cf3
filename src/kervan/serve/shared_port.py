"""Fleets of one cluster on one port: which may be there together, and how their gateways learn of each other."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.fleet.auth import relay_key
from kervan.fleet.directory import Snapshot
from kervan.gateway.shared_port import Neighbour
from kervan.serve.directory.client import StoredFleet, find_directory, fleet_names

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0
FOLLOW_S = 10.0
ANSWER_S = 10.0
KNOWN_TIMEOUT_S = 20.0
ANY_HOSTS = {"0.0.0.0", "::"}


def served_names(config: FleetConfig) -> tuple[str, ...]:
    """The names by which clients may ask for the fleet's model and the adapters of its settings.

    What vLLM will refuse as an adapter has no name here.
    """
    given = config.engine_args.get("served_model_name") or [config.model]
    names = list(given) if isinstance(given, list | tuple) else [given]
    adapters = config.engine_args.get("lora_modules") or []
    for adapter in adapters if isinstance(adapters, list | tuple) else [adapters]:
        read = adapter
        if isinstance(adapter, str) and adapter.startswith("{"):
            with contextlib.suppress(msgspec.DecodeError):
                read = msgspec.json.decode(adapter)
        if isinstance(read, Mapping) and "name" in read:
            names.append(read["name"])
        elif isinstance(read, str) and "=" in read:
            names.append(read.partition("=")[0])
    return tuple(dict.fromkeys(map(str, names)))


def meet(config: FleetConfig, other: FleetConfig) -> bool:
    """Whether both listen at one address."""
    is_same_host = config.host == other.host or not ANY_HOSTS.isdisjoint((config.host, other.host))
    return config.name != other.name and config.port == other.port and is_same_host


def tls(config: FleetConfig) -> tuple[str, str, str]:
    """The files of its certificate, key and clients' CA."""
    return config.tls_certificate, config.tls_key, config.tls_client_ca


def check(config: FleetConfig, others: Sequence[FleetConfig]) -> list[FleetConfig]:
    """Those of the `others` that will share the port with `config`.

    Raises: ConfigError when one of them keeps the port to itself, or has a model of the same name.
    """
    sharing = [other for other in others if meet(config, other)]
    for other in sharing:
        place = f"port {config.port} of {config.host}"
        if config.ingress == "serve" or other.ingress == "serve":
            raise ConfigError(
                f"{place} is taken by fleet {other.name!r}, and --ingress serve shares none; choose another --port"
            )
        if not config.shared_port:
            raise ConfigError(
                f"{place} is taken by fleet {other.name!r}; add --shared-port to share it, with requests told apart by "
                f"the requests' model; or choose another --port"
            )
        if not other.shared_port:
            raise ConfigError(
                f"fleet {other.name!r} has {place} to itself; let it share first, which loses no request: "
                f"kervan up --name {other.name} --shared-port"
            )
        if config.host != other.host:
            raise ConfigError(
                f"fleet {other.name!r} shares port {other.port} of {other.host}; give --host {other.host}"
            )
        if tls(config) != tls(other):
            raise ConfigError(
                f"fleet {other.name!r} has {place} with {' and '.join(filter(None, tls(other))) or 'no TLS'}; the "
                "kernel spreads connections over the gateways of both, so give this one the same --tls-certificate, "
                "--tls-key and --tls-client-ca, or another --port"
            )
        both = sorted(set(served_names(config)) & set(served_names(other)))
        if both:
            raise ConfigError(
                f"fleet {other.name!r} answers for model {both[0]!r} on {place} already; give this one another name: "
                "--engine-arg served_model_name=NAME"
            )
    return sharing


class Neighbourhood:
    """The other fleets on this fleet's port, as their directories tell."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._neighbours: dict[str, Neighbour] = {}
        self._followers: dict[str, asyncio.Task[None]] = {}

    def look(self) -> list[Neighbour]:
        """Ask all directories now; blocks."""
        for name in set(fleet_names()) - {self._config.name}:
            with contextlib.suppress(FleetError):
                directory = find_directory(name)
                self.take(directory.fleet().result(ANSWER_S), directory.snapshot().result(ANSWER_S))
        return self.listed()

    async def follow(self, on_change: Callable[[list[Neighbour]], None]) -> None:
        """Call `on_change` at each change, until cancelled."""
        try:
            while True:
                with contextlib.suppress(FleetError):
                    self._follow_each(await asyncio.to_thread(fleet_names), on_change)
                await asyncio.sleep(LOOK_PERIOD_S)
        finally:
            for follower in self._followers.values():
                follower.cancel()

    def _follow_each(self, names: Sequence[str], on_change: Callable[[list[Neighbour]], None]) -> None:
        for name in set(names) - {self._config.name}:
            if name not in self._followers or self._followers[name].done():
                self._followers[name] = asyncio.create_task(self._follow_one(name, on_change))
        gone = (self._followers.keys() | self._neighbours.keys()) - set(names)
        for name in gone:
            self._neighbours.pop(name, None)
            if name in self._followers:
                self._followers.pop(name).cancel()
        if gone:
            on_change(self.listed())

    async def _follow_one(self, name: str, on_change: Callable[[list[Neighbour]], None]) -> None:
        """Until its directory does not answer; a restarted or new one of this name is found by the next look."""
        version = -1
        with contextlib.suppress(FleetError):
            directory = await asyncio.to_thread(find_directory, name)
            async for snapshot in directory.follow(poll_s=FOLLOW_S):
                if snapshot.version != version:
                    version = snapshot.version
                    self.take(await directory.fleet(), snapshot)
                    on_change(self.listed())

    def take(self, fleet: StoredFleet, snapshot: Snapshot) -> None:
        """Keep what a directory tells of its fleet, if that is on this fleet's port."""
        other, secret, _ = fleet
        before = self._neighbours.pop(other.name, None)
        if not other.shared_port or (other.host, other.port) != (self._config.host, self._config.port):
            return
        key, gateways = relay_key(secret), tuple(snapshot.gateways)
        if not gateways and before is not None and before.relay_key == key:
            gateways = before.gateways  # a directory that Ray has restarted knows none before the next beats
        self._neighbours[other.name] = Neighbour(other.name, served_names(other), other.has_keys, key, gateways)

    def listed(self) -> list[Neighbour]:
        """The other fleets as they are known, by name."""
        return [self._neighbours[name] for name in sorted(self._neighbours)]


def fleets() -> list[tuple[FleetConfig, Snapshot]]:
    """All fleets of the cluster as their directories know them; one whose directory does not answer is left out."""
    answered = []
    for name in fleet_names():
        with contextlib.suppress(FleetError):
            directory = find_directory(name)
            answered.append((directory.fleet().result(ANSWER_S).config, directory.snapshot().result(ANSWER_S)))
    return answered


def wait_until_known(config: FleetConfig, progress: Callable[[str], None]) -> None:
    """Wait until the gateways of the other fleets on the port pass requests on to this one.

    Goes on after a while: a gateway that does not say so by then is on its way out.
    """
    deadline_s = time.monotonic() + KNOWN_TIMEOUT_S
    while config.shared_port:
        others = [snapshot.gateways for other, snapshot in fleets() if meet(config, other)]
        strangers = [g.id for gateways in others for g in gateways if config.name not in g.neighbours]
        if not strangers:
            return
        if time.monotonic() > deadline_s:
            progress(f"gateways of other fleets that do not know this one yet: {', '.join(strangers)}")
            return
        time.sleep(0.2)
