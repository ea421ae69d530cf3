"""Requests that a server refuses: which refusals no later request mends, and how long to wait before the next one.

Pure.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 1.0
MAX_RETRY_AFTER_S = 60.0  # that a stream of a load without a duration waits for
ENOUGH_FAILURES = 8  # of a load in which nothing has succeeded: one odd prompt proves nothing

# The server says so of each request, until someone changes the server or the command.
_HOPELESS = {"refused", "no_stream", "garbage"}
_HOPELESS_STATUSES = {400, 401, 403, 404, 405, 406, 410, 411, 413, 414, 415, 422, 426, 501, 505}

_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")  # whole ones by the standard; some servers send parts too


def is_hopeless(kind: str) -> bool:
    """Whether a failure of this kind (of `Exchange.error`) says that the next request like it fails too."""
    status = kind.removeprefix("http_")
    return kind in _HOPELESS or (status.isdecimal() and (int(status) in _HOPELESS_STATUSES or 300 <= int(status) < 400))


def is_refusal(kind: str) -> bool:
    """Whether the server took no work for it: a status of an error, or no connection."""
    return kind == "refused" or kind.startswith("http_")


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds from `now_s` (Unix time) that the header Retry-After asks to wait; None without one that can be read.

    Source: RFC 9110, 10.2.3: seconds, or a date.
    """
    text = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, IndexError, TypeError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.fromtimestamp(now_s, UTC)).total_seconds())


def pause_s(failures: int, retry_after_s: float | None) -> float:
    """Seconds that a stream waits after `failures` in a row (1 or more): doubling, at least what the server asks."""
    grown_s = min(MAX_PAUSE_S, math.ldexp(FIRST_PAUSE_S, min(failures, 16) - 1))
    return max(grown_s, retry_after_s or 0.0)
