"""Google Cloud: `preempted` and `maintenance-event` of the metadata server, which answers when they change.

Source: https://cloud.google.com/compute/docs/instances/create-use-preemptible (`instance/preempted` is TRUE once the
preemption has begun; a spot VM then has 30 s), https://cloud.google.com/compute/docs/metadata/querying-metadata
(`wait_for_change`, `timeout_sec`, `last_etag`, HTTP 503 for moments of maintenance),
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice (`maintenance-event` changes 60 s before;
it is set for VMs that migrate, and for those with GPUs, which are stopped).
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

from kervan.notices.events import Kind, Notice, cut
from kervan.notices.metadata import Metadata, SourceError, unexpected

HEADERS = {"Metadata-Flavor": "Google"}
ROOT = "/computeMetadata/v1/"
PREEMPTED = "instance/preempted"
MAINTENANCE = "instance/maintenance-event"
LEAD_S = 30.0
MAINTENANCE_LEAD_S = 60.0
# How much longer than the server may wait, and how long without waiting, before it counts as silent.
TIMEOUT_S = 5.0
# The second spelling is that of Google's older sample code.
STOPS = ("TERMINATE_ON_HOST_MAINTENANCE", "SHUTDOWN_ON_HOST_MAINTENANCE")
MIGRATES = "MIGRATE_ON_HOST_MAINTENANCE"

Key = Literal["instance/preempted", "instance/maintenance-event"]


class GcpSource:
    """One key of the metadata server, followed by long polls. `lead_s`: from its change to the node's end.

    `wait_s`: how long the server may wait for a change. `period_s` keeps the polls apart should it not wait at all.
    """

    polls_to_withdraw = 1

    def __init__(
        self,
        metadata: Metadata,
        *,
        key: Key,
        url: str,
        node: str,
        lead_s: float,
        wait_s: float = 10.0,
        period_s: float = 1.0,
        timeout_s: float = TIMEOUT_S,
        wall: Callable[[], float] = time.time,
    ):
        self.name = f"gcp {key.removeprefix('instance/')}"
        self.period_s = period_s
        self._metadata = metadata
        self._key = key
        self._url = url + ROOT + key
        self._node = node
        self._lead_s = lead_s
        self._wait_s = wait_s
        self._timeout_s = timeout_s
        self._wall = wall
        self._etag: str | None = None
        self._knows_value = False
        self._value = ""
        self._since_s = 0.0

    async def poll(self) -> Sequence[Notice]:
        """Pending notices: at once the first time and after a failure, then when the key changes."""
        params, timeout_s = {}, self._timeout_s
        if self._knows_value:
            params = {"wait_for_change": "true", "timeout_sec": f"{max(1.0, self._wait_s):.0f}"}
            timeout_s += self._wait_s
            if self._etag is not None:
                params["last_etag"] = self._etag  # without it, a change between two polls would be missed
        self._knows_value = False
        response = await self._metadata.request("GET", self._url, headers=HEADERS, timeout_s=timeout_s, params=params)
        if response.status == 404 and self._key == MAINTENANCE:
            self._value = ""
            return []
        if response.status != 200:
            raise unexpected(f"GET {self._key}", response)
        value = response.text.strip()
        now_s = self._wall()
        kind = meaning(self._key, value)
        if value != self._value:
            self._value, self._since_s = value, now_s
        self._etag = response.headers.get("etag")
        self._knows_value = True
        if kind is None:
            return []
        return [
            Notice(
                kind=kind,
                source="gcp",
                node=self._node,
                event_id=self._key,
                deadline_s=self._since_s + self._lead_s,
                seen_s=self._since_s,
                is_certain=kind != "pause",
                detail=cut(value),
            )
        ]

    async def acknowledge(self, notice: Notice) -> bool:
        return False


def meaning(key: Key, value: str) -> Kind | None:
    """The kind of notice that a key's value stands for, None for none.

    Raises: SourceError for a value that is not documented.
    """
    if key == PREEMPTED:
        if value in ("TRUE", "FALSE"):
            return "preemption" if value == "TRUE" else None
        raise SourceError(f"{key}: neither TRUE nor FALSE")
    if value in STOPS:
        return "maintenance"
    if value == MIGRATES:
        return "pause"
    if value == "NONE":
        return None
    raise SourceError(f"{key}: none of NONE, {MIGRATES}, {', '.join(STOPS)}")
