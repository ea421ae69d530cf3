"""What a fault during a load did to it: how deep the dip, how long until all was as before."""

import statistics
from dataclasses import dataclass

from kervan.bench.drive import Event
from kervan.bench.tally import Timeline

RECOVERED_SHARE = 0.9
SETTLED_S = 2.0  # the rate must hold for so long to count as recovered
SMOOTHED_S = 1.0


@dataclass(frozen=True, slots=True)
class Effect:
    """Of one event on output tokens/s. `recovered_after_s` None: not before the run or the next event.

    `exit_code` None: the command had not finished when the run ended, `duration_s` after it began, and was killed.

    `before` is the mean rate from the event before (or the start) to this event, `lowest` the smallest one-second mean
    after it; `longest_gap_s` the longest a stream stood still.
    """

    at_s: float
    command: str
    exit_code: int | None
    duration_s: float
    output: str
    tokens_per_s_before: float
    tokens_per_s_lowest: float
    dip: float
    recovered_after_s: float | None
    longest_gap_s: float
    errors: int


def effects(timeline: Timeline, events: list[Event], end_s: float) -> list[Effect]:
    """The effect of each event, up to the next one or `end_s`, when the load began to end."""
    measured = []
    for number, event in enumerate(events):
        begin_s = events[number - 1].at_s if number else 0.0
        until_s = events[number + 1].at_s if number + 1 < len(events) else end_s
        measured.append(_effect(timeline, event, begin_s, until_s))
    return measured


def _effect(timeline: Timeline, event: Event, begin_s: float, until_s: float) -> Effect:
    width_s = timeline.width_s
    first, last = int(event.at_s / width_s) + 1, int(until_s / width_s)
    rates = [_rate(timeline, i) for i in range(int(begin_s / width_s), int(event.at_s / width_s))]
    skip = max(1, int(SMOOTHED_S / width_s))
    rates = rates[skip:] if len(rates) > 2 * skip else rates  # the start of a load is no measure
    before = statistics.fmean(rates) if rates else 0.0
    after = [_rate(timeline, i) for i in range(first, last)]
    window = max(1, round(SMOOTHED_S / width_s))
    smooth = [statistics.fmean(after[i : i + window]) for i in range(len(after) - window + 1)]
    lowest = min(smooth, default=before)
    cells = [timeline.cells[i] for i in range(first - 1, last) if i in timeline.cells]
    return Effect(
        at_s=event.at_s,
        command=event.command,
        exit_code=event.exit_code,
        duration_s=event.duration_s,
        output=event.output,
        tokens_per_s_before=before,
        tokens_per_s_lowest=lowest,
        dip=max(0.0, 1 - lowest / before) if before else 0.0,
        recovered_after_s=_recovery_s(smooth, RECOVERED_SHARE * before, width_s),
        longest_gap_s=max((cell.gap_max_s for cell in cells), default=0.0),
        errors=sum(cell.errors for cell in cells),
    )


def _rate(timeline: Timeline, number: int) -> float:
    cell = timeline.cells.get(number)
    return cell.tokens / timeline.width_s if cell else 0.0


def _recovery_s(smooth: list[float], enough: float, width_s: float) -> float | None:
    """Seconds until the rate is enough and stays so; 0 when it never was less."""
    needed = max(1, round(SETTLED_S / width_s))
    below = [i for i, rate in enumerate(smooth) if rate < enough]
    if not below:
        return 0.0
    for i in range(below[0], len(smooth)):
        stretch = smooth[i : i + needed]
        if stretch and min(stretch) >= enough and (len(stretch) == needed or i + len(stretch) == len(smooth)):
            return i * width_s
    return None
