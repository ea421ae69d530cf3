"""The fleet behind a URL: who is ready there, and orders to its replicas, on whichever node they are."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from kervan.bench.endpoint import STATUS_PATH, RequestError, get_text
from kervan.bench.load import Endpoint
from kervan.chaos.schedule import DisruptionKind
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import Drain, Snapshot, Strike
from kervan.serve import cluster
from kervan.serve.attach import attach
from kervan.serve.directory.client import DirectoryClient, find_directory, fleet_names


class FleetUnderTest(Protocol):
    """What a run needs of a fleet."""

    def look(self, version: int, timeout_s: float) -> Snapshot:
        """The fleet as soon as its version differs from `version`, at the latest after `timeout_s`.

        Raises: FleetError when its directory does not answer.
        """

    def strike(self, kind: DisruptionKind, replica_id: str, deadline_s: float) -> bool:
        """Order a disruption, obeyed within about a second; whether there is such a replica.

        Raises: FleetError when the directory does not answer.
        """


@dataclass(frozen=True, slots=True)
class FleetOnRay:
    """A fleet on Ray."""

    name: str
    config: FleetConfig
    models: tuple[str, ...]
    _directory: DirectoryClient

    def look(self, version: int, timeout_s: float) -> Snapshot:
        """As `FleetUnderTest.look`."""
        return self._directory.changed(version, timeout_s).result()

    def strike(self, kind: DisruptionKind, replica_id: str, deadline_s: float) -> bool:
        """As `FleetUnderTest.strike`."""
        return self._directory.order(replica_id, Drain(deadline_s) if kind == "drain" else Strike(kind)).result()


def find(url: str, *, headers: Iterable[tuple[str, str]], name: str | None, address: str | None) -> FleetOnRay:
    """The fleet whose gateway answers at `url`.

    Raises: ConfigError when no kervan gateway answers there; FleetError when its fleet cannot be found from here.
    """
    gateway = _gateway(url, headers, name)
    if name is None and address is not None:
        cluster.connect(address)
    else:
        attach(name or _remembered(url), address)
    for candidate in [name] if name else fleet_names():
        directory = find_directory(candidate)
        snapshot = directory.snapshot().result()
        entry = next((entry for entry in snapshot.gateways if entry.id == gateway), None)
        if entry is not None:
            return FleetOnRay(candidate, directory.fleet().result().config, entry.models, directory)
    looked = f"fleet {name!r}" if name else f"the fleets of its cluster ({', '.join(fleet_names())})"
    raise FleetError(f"{url} is answered by gateway {gateway}, which is not of {looked}; give its --name or --address")


def _gateway(url: str, headers: Iterable[tuple[str, str]], name: str | None) -> str:
    """The id of the gateway that answers."""
    path = STATUS_PATH + (f"?fleet={name}" if name else "")
    try:
        status = json.loads(get_text(Endpoint(url=url, headers=tuple(headers)), path))
        return str(status["gateway"])
    except RequestError as error:
        if "401" in str(error):
            raise ConfigError(f"{url} wants an API key ({error}); give --api-key, or set KERVAN_API_KEY") from error
        reason = str(error)
    except (ValueError, KeyError, TypeError):
        reason = f"GET {path} is not answered as a gateway would"
    raise ConfigError(f"{url} is not a kervan fleet: {reason}; give the URL that `kervan status` shows")


def _remembered(url: str) -> str:
    """The name of the fleet that was started from here at this URL's port."""
    port = urlsplit(url).port
    names = [fleet.name for fleet in cluster.remembered() if urlsplit(fleet.url).port == port]
    return names[0] if names else "default"
