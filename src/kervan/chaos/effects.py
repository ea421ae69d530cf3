"""What disruptions did: how long streams waited for a token around them, and when the fleet was whole again. Pure.

Times are seconds of one clock.
"""

import heapq
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from kervan.chaos.schedule import DisruptionKind


@dataclass(slots=True)
class Disruption:
    """One that was ordered. `felt_s`: its replica was no longer ready; `whole_s`: from then all were, for once."""

    number: int
    kind: DisruptionKind
    replica: str
    ordered_s: float
    streams: int = 0
    felt_s: float | None = None
    whole_s: float | None = None

    @property
    def recover_s(self) -> float | None:
        """Seconds until the fleet was whole; None until it is.

        A kill counts from the death, not from the order, which takes up to 1 s.
        """
        if self.whole_s is None or self.felt_s is None:
            return None
        return self.whole_s - (self.felt_s if self.kind == "kill" else self.ordered_s)


def follow(disruptions: Iterable[Disruption], ready: Set[str], target: int, at_s: float) -> list[Disruption]:
    """Note what the ready replicas at `at_s` say of each disruption; those that the fleet has recovered from now.

    A replica that was hit and looks ready does not count as such. None is recovered from before it was felt, even where
    more replicas than that are ready.
    """
    waiting = [disruption for disruption in disruptions if disruption.whole_s is None]
    for disruption in waiting:
        if disruption.felt_s is None and disruption.replica not in ready:
            disruption.felt_s = at_s
    fit = ready - {disruption.replica for disruption in waiting}
    if len(fit) < target:
        return []
    recovered = [disruption for disruption in waiting if disruption.felt_s is not None]
    for disruption in recovered:
        disruption.whole_s = at_s
    return recovered


def longest_gaps_s(sent_s: float, tokens_s: Sequence[float], disruptions: Sequence[Disruption]) -> list[float]:
    """One stream's longest wait for a token after each disruption (until the next one) that it lived through.

    `tokens_s`: when its tokens came. The wait for the first one counts only if the stream was there before the last
    disruption was felt: else it is the time to a first token as ever. `disruptions` are in order of time.
    """
    if not disruptions or not tokens_s or tokens_s[-1] < disruptions[0].ordered_s:
        return []
    longest: dict[int, float] = {}
    window = -1
    before_s = sent_s
    for number, at_s in enumerate(tokens_s):
        while window + 1 < len(disruptions) and disruptions[window + 1].ordered_s <= at_s:
            window += 1
        if window >= 0:
            past = disruptions[: window + 1]
            if number or any(other.felt_s is None or sent_s <= other.felt_s for other in past):
                longest[window] = max(longest.get(window, 0.0), at_s - before_s)
        before_s = at_s
    return list(longest.values())


def moved_gaps_s(longest_s: Iterable[float], num_moves: int) -> list[float]:
    """The gaps of the streams that were moved, longest first, none of them taken too short.

    A client does not see which streams were moved, and the gateways count them. So these are the longest of all:
    each quantile is at least that of the moved ones.
    """
    return heapq.nlargest(num_moves, longest_s)
