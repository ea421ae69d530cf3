"""The one event that all clouds' notices become: this node will go (or pause, or perhaps go) at T."""

from collections.abc import Iterable
from typing import Literal

import msgspec

Kind = Literal["preemption", "rebalance", "maintenance", "pause", "sigterm", "operator"]
SourceName = Literal["aws", "gcp", "azure", "signal", "ray", "operator"]
Identity = tuple[str, str, str, str]

# Raw words of a cloud are kept for people to read; longer ones are cut.
MAX_DETAIL_CHARS = 4096
# Clouds give whole seconds and sources count from when they look: a deadline that moves by less is the same one.
SAME_DEADLINE_S = 0.5


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """A node is told that it will go.

    | kind | what happens to the node at the deadline |
    |---|---|
    | preemption | the cloud takes it back |
    | maintenance | it is stopped, restarted, moved without its memory, or deleted by its owner's scale set |
    | sigterm | its processes were told to end |
    | operator | a person, or a command, wants it empty |
    | pause | it stands still for seconds (live migration) and goes on |
    | rebalance | nothing yet: the cloud calls a preemption likely |

    `deadline_s` is Unix time (UTC), None without one. `is_certain`: the node is lost for its streams at the deadline;
    False for pause and rebalance. `event_id` is the cloud's name of the event, or what stands for one. `seen_s`: Unix
    time at which the node learned of it. `detail`: what the cloud said, word for word.
    """

    kind: Kind
    source: SourceName
    node: str
    event_id: str
    deadline_s: float | None
    seen_s: float
    is_certain: bool
    detail: str = ""

    @property
    def identity(self) -> Identity:
        """Two notices with the same identity tell of the same thing."""
        return (self.source, self.kind, self.node, self.event_id)

    def remaining_s(self, now_s: float) -> float | None:
        """Seconds from `now_s` (Unix time) to the deadline, never below 0; None without a deadline."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    def is_sooner_than(self, other: "Notice") -> bool:
        """Whether it leaves less time than `other`, by more than rounding."""
        if self.deadline_s is None:
            return False
        return other.deadline_s is None or self.deadline_s < other.deadline_s - SAME_DEADLINE_S

    def to_json(self) -> str:
        """The notice as a JSON object, for `from_json`."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Notice":
        """The notice that `to_json` wrote.

        Raises: ValueError for anything else.
        """
        return msgspec.json.decode(text, type=cls)


def cut(detail: str) -> str:
    """`detail`, at most MAX_DETAIL_CHARS long."""
    return detail if len(detail) <= MAX_DETAIL_CHARS else detail[: MAX_DETAIL_CHARS - 3] + "..."


def soonest(notices: Iterable[Notice]) -> Notice | None:
    """Of the notices after which the node is lost, the one with the earliest deadline; None when none is certain.

    A certain notice without a deadline (an operator's unhurried drain) comes after all that have one.
    """
    certain = [notice for notice in notices if notice.is_certain]
    return min(certain, key=lambda n: float("inf") if n.deadline_s is None else n.deadline_s, default=None)
