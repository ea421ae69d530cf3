"""An operator's word as a notice: empty this node, by then or without hurry."""

import time
import uuid
from collections.abc import Callable

from kervan.errors import ConfigError
from kervan.notices.events import Notice, cut
from kervan.notices.source import PushSource


class OperatorSource(PushSource):
    """Notices that a command gives, and may take back."""

    name = "operator"

    def __init__(self, *, node: str, wall: Callable[[], float] = time.time):
        super().__init__(node, wall=wall)

    def announce(self, *, remaining_s: float | None = None, why: str = "", event_id: str = "") -> Notice:
        """Say that the node goes in `remaining_s` seconds, None for a drain without hurry; the notice that this is.

        `event_id` of an earlier announcement changes that one: a deadline can only come nearer.

        Raises: ConfigError for a time that is negative.
        """
        if remaining_s is not None and not 0 <= remaining_s < float("inf"):
            raise ConfigError(f"remaining_s={remaining_s} is not a time of 0 s or more; leave it out for no deadline")
        now_s = self.wall()
        notice = Notice(
            kind="operator",
            source="operator",
            node=self.node,
            event_id=event_id or uuid.uuid4().hex,
            deadline_s=None if remaining_s is None else now_s + remaining_s,
            seen_s=now_s,
            is_certain=True,
            detail=cut(why),
        )
        self.put(notice)
        return notice

    def withdraw(self, event_id: str) -> bool:
        """Take an announcement back; False when there was none."""
        return self.drop(event_id)
