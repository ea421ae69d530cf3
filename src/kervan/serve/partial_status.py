"""What is known of a fleet whose directory, or whose Ray, does not answer: from Serve, and from a gateway.

Gateways go on serving then, with what the directory told them last.
"""

import json
import sys
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import msgspec

from kervan.config.fleet import FleetConfig
from kervan.direct_http import NO_RESPONSE, open_direct, reason
from kervan.errors import FleetError
from kervan.fleet.directory import Snapshot
from kervan.serve import cluster
from kervan.serve.status import gateway_to_dict, replica_to_dict

if TYPE_CHECKING:
    from kervan.serve.app import ServedDeployment

SERVE_TIMEOUT_S = 10.0
GATEWAY_TIMEOUT_S = 3.0
STATUS_PATH = "/kervan/status"


@dataclass(slots=True)
class PartialStatus:
    """`problem`: why it is not whole. `unknown`: what could not be asked either, a sentence each.

    `deployments`: what Serve says. `snapshot`: what gateway `gateway` heard of the directory `heard_s` ago.
    """

    name: str
    problem: str
    url: str = ""
    config: FleetConfig | None = None
    deployments: "list[ServedDeployment] | None" = None
    gateway: str = ""
    snapshot: Snapshot | None = None
    heard_s: float | None = None
    streams: int = 0
    held: int = 0
    unknown: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is known of such a fleet."""
        return self.deployments is None and self.snapshot is None

    def to_dict(self) -> dict[str, Any]:
        """What `kervan status --json` prints then; `complete` is false, and keys whose values are unknown are null."""
        snapshot = self.snapshot
        return {
            "name": self.name,
            "complete": False,
            "missing": [self.problem, *self.unknown],
            "url": self.url,
            "model": self.config.model if self.config else None,
            "target_replicas": self.config.replicas if self.config else None,
            "serve": None
            if self.deployments is None
            else {d.name: {"status": d.status, "message": d.message, "replicas": d.replicas} for d in self.deployments},
            "told_by": self.gateway or None,
            "told_s_ago": self.heard_s,
            "replicas": None if snapshot is None else [replica_to_dict(entry) for entry in snapshot.replicas],
            "gateways": None if snapshot is None else [gateway_to_dict(entry) for entry in snapshot.gateways],
        }


def partial_status(name: str, problem: FleetError, api_key: str | None) -> PartialStatus:
    """All that can be known of fleet `name` in about a quarter of a minute. `api_key`: for a gateway that wants one."""
    status = PartialStatus(name, str(problem))
    remembered = cluster.recall(name)
    if remembered is not None:
        status.url = remembered.url
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        _ask_ray(status)
    elif remembered is None:
        return status
    else:
        status.unknown.append("Serve was not asked: this process could not join the Ray cluster")
    _ask_gateway(status, api_key)
    return status


def _ask_ray(status: PartialStatus) -> None:
    from kervan.serve import app  # with Ray, which most commands that fail here do without
    from kervan.serve.directory.actor import stored_config

    try:
        status.config = stored_config(status.name)
        status.deployments = app.served(status.name, SERVE_TIMEOUT_S)
    except FleetError as error:
        status.unknown.append(str(error))
    else:
        if status.deployments is None:
            status.unknown.append(f"Serve runs no application of fleet {status.name!r}")
    if status.config is not None and not status.url:
        host = "127.0.0.1" if status.config.host in ("0.0.0.0", "::") else status.config.host
        scheme = "https" if status.config.tls_certificate else "http"
        status.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{status.config.port}"


def _ask_gateway(status: PartialStatus, api_key: str | None) -> None:
    if not status.url:
        status.unknown.append("no gateway was asked: the address of none is known here")
        return
    key = api_key or ""
    request = urllib.request.Request(
        f"{status.url}{STATUS_PATH}?fleet={status.name}", headers={"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        with open_direct(request, timeout_s=GATEWAY_TIMEOUT_S) as response:
            told = json.loads(response.read())
            if told["fleet"] != status.name:
                status.unknown.append(f"what answers at {status.url} is a gateway of fleet {told['fleet']!r}")
                return
            status.snapshot = msgspec.convert(told["directory"], Snapshot)
            status.gateway, status.heard_s = str(told["gateway"]), told["directory_heard_s"]
            status.streams, status.held = int(told["streams"]), int(told["held"])
    except HTTPError as error:
        hint = "; set KERVAN_API_KEY to one of its keys" if error.code == 401 else ""
        status.unknown.append(f"the gateway at {status.url} answers {error.code}{hint}")
    except (*NO_RESPONSE, KeyError, TypeError, msgspec.ValidationError) as error:
        status.unknown.append(f"no gateway answers at {status.url} ({reason(error)})")
