"""AWS: a spot instance's interruption notice and rebalance recommendation, from its instance metadata (IMDSv2).

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html (the item is absent,
HTTP 404, until two minutes before; hibernation begins at once; look every 5 s),
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html,
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from kervan.notices.events import Notice, cut
from kervan.notices.metadata import Metadata, MetadataResponse, SourceError, unexpected

TOKEN_PATH = "/latest/api/token"
ACTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"
TOKEN_TTL_S = 21600  # six hours, the longest
# A token is renewed when this share of its time is over.
RENEW_SHARE = 0.9
TIMEOUT_S = 2.0
# A notice comes two minutes before the end. If the node's clock says that more are left, it is the clock that is late.
LEAD_S = 120.0
# EC2 may fail to end an instance, and leaves the item with its time in the past.
STALE_S = 3600.0
ACTIONS = ("terminate", "stop", "hibernate")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")


class AwsSource:
    """Both items of one instance. `url`: the metadata server's root; `node`: what the notices call the node."""

    name = "aws"
    polls_to_withdraw = 2

    def __init__(
        self,
        metadata: Metadata,
        *,
        url: str,
        node: str,
        period_s: float = 5.0,
        timeout_s: float = TIMEOUT_S,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.period_s = period_s
        self._node = node
        self._wall = wall
        self._imds = Imds(metadata, url=url, timeout_s=timeout_s, monotonic=monotonic)

    async def poll(self) -> Sequence[Notice]:
        """Pending notices. What is wrong with one item does not hide the other."""
        notices: list[Notice] = []
        problem: SourceError | None = None
        for path, parse in ((ACTION_PATH, parse_action), (REBALANCE_PATH, parse_rebalance)):
            try:
                text = await self._imds.get(path)
                notice = None if text is None else parse(text, node=self._node, now_s=self._wall())
            except SourceError as error:
                problem = problem or error
            else:
                notices += [] if notice is None else [notice]
        if problem is not None and not notices:
            raise problem
        return notices

    async def acknowledge(self, notice: Notice) -> bool:
        return False


class Imds:
    """Instance metadata with a token that is renewed before it expires, and when the server calls it invalid (401)."""

    def __init__(
        self,
        metadata: Metadata,
        *,
        url: str,
        timeout_s: float = TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self._metadata = metadata
        self._url = url
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        self._token = ""
        self._renew_at_s = 0.0

    async def get(self, path: str) -> str | None:
        """The item's text, None when it is absent (404).

        Raises: SourceError.
        """
        response = await self._request(path)
        if response.status == 401:
            self._token = ""
            response = await self._request(path)
        if response.status == 404:
            return None
        if response.status != 200:
            raise unexpected(f"GET {path}", response)
        return response.text

    async def _request(self, path: str) -> MetadataResponse:
        if not self._token or self._monotonic() >= self._renew_at_s:
            await self._renew()
        return await self._metadata.request(
            "GET", self._url + path, headers={TOKEN_HEADER: self._token}, timeout_s=self._timeout_s
        )

    async def _renew(self) -> None:
        requested_s = self._monotonic()
        try:
            response = await self._metadata.request(
                "PUT", self._url + TOKEN_PATH, headers={TTL_HEADER: str(TOKEN_TTL_S)}, timeout_s=self._timeout_s
            )
        except SourceError as error:
            # The answer to PUT has an IP hop limit, 1 by default: it does not reach a container's own network.
            raise SourceError(
                f"{error}; in a container, let the instance answer over two hops "
                "(aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2)"
            ) from error
        token = response.text.strip()
        # What is no header value is no token either.
        if response.status != 200 or not token or not token.isascii() or not token.isprintable():
            raise unexpected(f"PUT {TOKEN_PATH}", response)
        self._token = token
        self._renew_at_s = requested_s + RENEW_SHARE * _ttl_s(response.headers)


def _ttl_s(headers: Mapping[str, str]) -> float:
    text = headers.get(TTL_HEADER.lower(), "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else float(TOKEN_TTL_S)


def parse_action(text: str, *, node: str, now_s: float) -> Notice | None:
    """The notice in `spot/instance-action`, seen at `now_s` (Unix time); None for one that is long past.

    Older mock servers write the key `instance-action` for `action`.

    Raises: SourceError for anything that is no notice.
    """
    document = _document(text, ACTION_PATH)
    action = document.get("action", document.get("instance-action"))
    if action not in ACTIONS:
        raise SourceError(f"{ACTION_PATH}: the action is none of {', '.join(ACTIONS)}")
    at_s = _time_s(document.get("time"), ACTION_PATH)
    if at_s < now_s - STALE_S:
        return None
    return Notice(
        kind="preemption",
        source="aws",
        node=node,
        event_id="spot/instance-action",
        deadline_s=min(at_s, now_s) if action == "hibernate" else min(at_s, now_s + LEAD_S),
        seen_s=now_s,
        is_certain=True,
        detail=cut(text),
    )


def parse_rebalance(text: str, *, node: str, now_s: float) -> Notice:
    """The recommendation in `events/recommendations/rebalance`; it has no deadline.

    Raises: SourceError for anything that is none.
    """
    _time_s(_document(text, REBALANCE_PATH).get("noticeTime"), REBALANCE_PATH)
    return Notice(
        kind="rebalance",
        source="aws",
        node=node,
        event_id="events/recommendations/rebalance",
        deadline_s=None,
        seen_s=now_s,
        is_certain=False,
        detail=cut(text),
    )


def _document(text: str, path: str) -> Mapping[str, object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: no JSON") from error
    if not isinstance(document, dict):
        raise SourceError(f"{path}: no JSON object")
    return document


def _time_s(value: object, path: str) -> float:
    """Unix time of a time in ISO 8601 with its offset from UTC."""
    if isinstance(value, str) and _TIME.fullmatch(value):
        try:
            return datetime.fromisoformat(value).astimezone(UTC).timestamp()
        except (ValueError, OverflowError):
            pass
    raise SourceError(f"{path}: no time in UTC like 2017-09-18T08:22:00Z")
