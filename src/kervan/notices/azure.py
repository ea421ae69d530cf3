"""Azure: Scheduled Events of the metadata service.

Source: https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events (api-version 2020-07-01: the
first answer may take two minutes; look every second; Preempt comes 30 s before, Freeze and Reboot 15 min, Redeploy
10 min, Terminate 5 to 15 min; NotBefore is blank once the event has started; an approval holds for all VMs that the
event names; events of all VMs of an availability set or a placement group are shown to each of them) and
https://learn.microsoft.com/en-us/azure/virtual-machines/instance-metadata-service (`compute/name`).

Not read: the preview of rebalance recommendations (Spot Plus), whose api-version is not published.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

from kervan.notices.events import Kind, Notice, cut
from kervan.notices.metadata import Metadata, SourceError, unexpected

HEADERS = {"Metadata": "true"}
EVENTS_PATH = "/metadata/scheduledevents"
EVENTS_PARAMS = {"api-version": "2020-07-01"}
COMPUTE_PATH = "/metadata/instance/compute"
COMPUTE_PARAMS = {"api-version": "2021-02-01", "format": "json"}
TIMEOUT_S = 10.0
# The service is switched on by the first question, and again after a day without one; that answer is slow.
FIRST_TIMEOUT_S = 150.0
KINDS: Mapping[str, Kind] = {
    "Preempt": "preemption",
    "Terminate": "maintenance",
    "Reboot": "maintenance",
    "Redeploy": "maintenance",
    "Freeze": "pause",
}
# For an event that is scheduled but does not say when: the shortest notice that Azure gives.
LEAD_S = 30.0


class AzureSource:
    """Scheduled events that name this VM. `vm_name` empty: asked of the metadata service."""

    name = "azure"
    polls_to_withdraw = 2

    def __init__(
        self,
        metadata: Metadata,
        *,
        url: str,
        node: str,
        vm_name: str = "",
        period_s: float = 1.0,
        timeout_s: float = TIMEOUT_S,
        first_timeout_s: float = FIRST_TIMEOUT_S,
        wall: Callable[[], float] = time.time,
    ):
        self.period_s = period_s
        self._metadata = metadata
        self._url = url
        self._node = node
        self._vm_name = vm_name
        self._timeout_s = timeout_s
        self._first_timeout_s = first_timeout_s
        self._wall = wall
        self._is_warm = False
        self._seen: dict[str, Notice] = {}

    async def poll(self) -> Sequence[Notice]:
        """Pending notices of this VM. An entry that cannot be read hides no other, but is told when nothing else is.

        `DocumentIncarnation` rises with each change; the events are read whatever it says, because a document is small
        and a number that stands still would hide one.
        """
        if not self._vm_name:
            self._vm_name = await self._fetch_name()
        timeout_s = self._timeout_s if self._is_warm else self._first_timeout_s
        self._is_warm = False
        response = await self._metadata.request(
            "GET", self._url + EVENTS_PATH, headers=HEADERS, params=EVENTS_PARAMS, timeout_s=timeout_s
        )
        if response.status != 200:
            self._is_warm = True  # it answers, if badly
            raise unexpected(f"GET {EVENTS_PATH}", response)
        self._is_warm = True
        notices, problems = parse_events(response.text, vm_name=self._vm_name, node=self._node, now_s=self._wall())
        if problems and not notices:
            raise SourceError(problems[0])
        # An event that has started has no time any more: it keeps the moment at which that was first seen.
        self._seen = {
            notice.event_id: self._seen[notice.event_id]
            if notice.event_id in self._seen and not notice.is_sooner_than(self._seen[notice.event_id])
            else notice
            for notice in notices
        }
        return list(self._seen.values())

    async def acknowledge(self, notice: Notice) -> bool:
        """Approve the event, so that it may start before its time; True when Azure took it.

        Only for an event that names no other VM: an approval would hold for them too, and they may not be empty.
        """
        if len(_resources(_entry(notice.detail))) != 1:
            return False
        body = json.dumps({"StartRequests": [{"EventId": notice.event_id}]}).encode()
        response = await self._metadata.request(
            "POST",
            self._url + EVENTS_PATH,
            headers={**HEADERS, "Content-Type": "application/json"},
            params=EVENTS_PARAMS,
            timeout_s=self._timeout_s,
            body=body,
        )
        if response.status != 200:
            raise unexpected(f"POST {EVENTS_PATH}", response)
        return True

    async def _fetch_name(self) -> str:
        compute = await fetch_compute(self._metadata, url=self._url, timeout_s=self._timeout_s)
        name = compute.get("name")
        if not isinstance(name, str) or not name:
            raise SourceError(f"GET {COMPUTE_PATH}: no name of this VM; set KERVAN_NOTICES_AZURE_VM_NAME")
        return name


async def fetch_compute(metadata: Metadata, *, url: str, timeout_s: float) -> Mapping[str, object]:
    """What the metadata service says of this VM (`compute`).

    Raises: SourceError.
    """
    response = await metadata.request(
        "GET", url + COMPUTE_PATH, headers=HEADERS, params=COMPUTE_PARAMS, timeout_s=timeout_s
    )
    if response.status != 200:
        raise unexpected(f"GET {COMPUTE_PATH}", response)
    compute = _json(response.text)
    if not isinstance(compute, dict):
        raise SourceError(f"GET {COMPUTE_PATH}: no JSON object")
    return compute


def parse_events(text: str, *, vm_name: str, node: str, now_s: float) -> tuple[list[Notice], list[str]]:
    """The notices for `vm_name` in a document of scheduled events, and what could not be read of it.

    Raises: SourceError for what is no such document.
    """
    document = _json(text)
    if not isinstance(document, dict) or not isinstance(document.get("Events"), list):
        raise SourceError(f"{EVENTS_PATH}: no list of Events")
    notices: list[Notice] = []
    problems: list[str] = []
    for entry in document["Events"]:
        if not isinstance(entry, dict):
            problems.append(f"{EVENTS_PATH}: an event is no object")
        elif vm_name.lower() in _resources(entry):  # Azure's names ignore case
            try:
                notices.append(_notice(entry, node=node, now_s=now_s))
            except SourceError as error:
                problems.append(str(error))
    return notices, problems


def _notice(entry: Mapping[str, object], *, node: str, now_s: float) -> Notice:
    event_id, event_type, status = entry.get("EventId"), entry.get("EventType"), entry.get("EventStatus")
    if not isinstance(event_id, str) or not event_id:
        raise SourceError(f"{EVENTS_PATH}: an event without EventId")
    if not isinstance(event_type, str) or event_type not in KINDS:
        raise SourceError(f"{EVENTS_PATH}: an EventType that is none of {', '.join(KINDS)}")
    if status not in ("Scheduled", "Started"):
        raise SourceError(f"{EVENTS_PATH}: an EventStatus that is neither Scheduled nor Started")
    deadline_s = now_s if status == "Started" else _time_s(entry.get("NotBefore"))
    kind = KINDS[event_type]
    return Notice(
        kind=kind,
        source="azure",
        node=node,
        event_id=event_id,
        deadline_s=now_s + LEAD_S if deadline_s is None else deadline_s,
        seen_s=now_s,
        is_certain=kind != "pause",
        detail=cut(json.dumps(entry)),
    )


def _resources(entry: Mapping[str, object]) -> set[str]:
    resources = entry.get("Resources")
    return {name.lower() for name in resources if isinstance(name, str)} if isinstance(resources, list) else set()


def _entry(detail: str) -> Mapping[str, object]:
    try:
        entry = _json(detail)
    except SourceError:  # cut short: too many resources to be this VM's alone
        return {}
    return entry if isinstance(entry, dict) else {}


def _time_s(value: object) -> float | None:
    """Unix time of a date like `Mon, 19 Sep 2016 18:29:47 GMT`; None for a blank or unreadable one."""
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        moment = parsedate_to_datetime(value)
        return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).timestamp()
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{EVENTS_PATH}: no JSON") from error
