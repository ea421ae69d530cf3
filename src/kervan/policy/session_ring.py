"""Which replica a session belongs to, from its name alone: the same at every gateway, and before anything is known.

A consistent hash: each replica stands at several points of a ring, and a session belongs to the first one after its own
point. A replica that comes or goes moves only the sessions of its own part. Source: Karger et al., STOC 1997.
"""

import bisect
import hashlib
from collections.abc import Iterable

POINTS = 32  # of each replica: parts of the ring then differ by a sixth of their size
POINT_BYTES = 8


class SessionRing:
    """Of these replicas. Takes 1 us for each of their points to make, and as much to ask."""

    def __init__(self, replica_ids: Iterable[str]) -> None:
        self._ring = sorted((_point(f"{name} {n}"), name) for name in replica_ids for n in range(POINTS))

    def home(self, session: str) -> str | None:
        """The replica that a session belongs to; None without replicas."""
        if not self._ring:
            return None
        place = bisect.bisect(self._ring, (_point(session), ""))
        return self._ring[place % len(self._ring)][1]


def _point(text: str) -> bytes:
    return hashlib.blake2s(text.encode("utf-8", "surrogatepass"), digest_size=POINT_BYTES).digest()
