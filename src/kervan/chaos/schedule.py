"""Which disruption comes when, and whom it hits. Pure: the same seed and the same ready replicas give the same."""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

DisruptionKind = Literal["kill", "drain", "hang"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A disruption that is due `at_s` seconds after the start."""

    at_s: float
    kind: DisruptionKind


def moments(periods_s: Mapping[DisruptionKind, float], duration_s: float) -> list[Moment]:
    """Each kind once in its period, the first time when one has passed, before `duration_s`; in order of time.

    Raises: ValueError of a period that is not above 0.
    """
    due = []
    for kind, period_s in periods_s.items():
        if period_s <= 0:
            raise ValueError(f"period {period_s} s of {kind}")
        number = 1
        while number * period_s < duration_s:
            due.append(Moment(number * period_s, kind))
            number += 1
    return sorted(due, key=lambda moment: (moment.at_s, moment.kind))


def choose(ready: Collection[str], *, min_ready: int, seed: int, number: int) -> str | None:
    """The replica that disruption `number` hits; None when fewer than `min_ready` others would be left."""
    if not ready or len(ready) - 1 < min_ready:
        return None
    return random.Random(f"{seed} {number}").choice(sorted(ready))
