"""Minimums by the hour: how many replicas the schedule wants at a minute of the week."""

from collections.abc import Sequence

from kervan.config.autoscale import DAY_MINUTES, WEEK_MINUTES, ScheduledMinimum


def minimum(schedule: Sequence[ScheduledMinimum], local_minute: int, ahead_s: float = 0.0) -> tuple[int, str]:
    """(the least at any minute from `local_minute` to `ahead_s` later, the entry that wants it).

    `ahead_s`: as long as a start takes, so that replicas are there when their hour begins.
    """
    most, source = 0, ""
    for later in {0, *range(0, int(ahead_s // 60) + 1, 1), int(-(-ahead_s // 60))} if schedule else ():
        count, text = _at(schedule, (local_minute + later) % WEEK_MINUTES)
        if count > most:
            most, source = count, text
    return most, source


def _at(schedule: Sequence[ScheduledMinimum], minute: int) -> tuple[int, str]:
    most, source = 0, ""
    day, of_day = divmod(minute, DAY_MINUTES)
    latest = None
    for one in schedule:
        if one.end_minute is not None:
            today = day in one.days and one.start_minute <= of_day < one.end_minute
            since_yesterday = (day - 1) % 7 in one.days and of_day + DAY_MINUTES < one.end_minute
            if (today or since_yesterday) and one.minimum > most:
                most, source = one.minimum, one.text
        elif (
            day in one.days
            and one.start_minute <= of_day
            and (latest is None or one.start_minute > latest.start_minute)
        ):
            latest = one
    if latest is not None and latest.minimum > most:
        most, source = latest.minimum, latest.text
    return most, source
