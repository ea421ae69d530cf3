"""Asks a fleet's gateways where the time of one request went."""

import json
import urllib.request
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode

import msgspec

from kervan.direct_http import NO_RESPONSE, open_direct, reason
from kervan.errors import FleetError
from kervan.serve import cluster

TIMEOUT_S = 10.0
REQUESTS_PATH = "/kervan/requests/"


def gateway_url(name: str, address: str | None) -> str:
    """Of the fleet: as remembered on this machine, else as its directory has it.

    Raises: FleetError when there is no such fleet, or it has no gateway yet.
    """
    if address is None and (remembered := cluster.recall(name)) is not None and remembered.url:
        return remembered.url
    from kervan.serve.status import status

    if url := status(name, address).url:
        return url
    raise FleetError(f"fleet {name!r} has no gateway yet; kervan status --why shows what it waits for")


def ask(url: str, name: str, request_id: str, api_key: str | None) -> dict[str, Any]:
    """What the gateways behind `url` remember of a request.

    Raises: FleetError when they remember none of this id, want a key, or do not answer.
    """
    where = f"{url.rstrip('/')}{REQUESTS_PATH}{quote(request_id, safe='')}?{urlencode({'fleet': name})}"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with open_direct(urllib.request.Request(where, headers=headers), timeout_s=TIMEOUT_S) as response:
            body = response.read()
    except HTTPError as error:
        with error:
            said = _message(error.read())
        raise FleetError(said or f"the gateway at {url} answers {error.code}") from error
    except NO_RESPONSE as error:
        raise FleetError(f"no gateway answers at {url} ({reason(error)}); see kervan status --name {name}") from error
    from kervan.gateway.explain import RequestExplained

    try:
        msgspec.json.decode(body, type=RequestExplained)
        told: dict[str, Any] = json.loads(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise FleetError(
            f"what answers at {url} is no gateway; give the URL of one, like --url http://127.0.0.1:8000"
        ) from error
    return told


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
