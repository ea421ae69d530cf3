import pytest

from kervan.config.autoscale import DAY_MINUTES, parse_schedule
from kervan.policy.autoscale.schedule import minimum

WEEKDAYS = parse_schedule(["mon-fri 08:00 min=4", "mon-fri 18:00 min=2", "sat 22:00-02:00 min=3"])


def at(day: int, hour: int, minute: int = 0) -> int:
    return day * DAY_MINUTES + hour * 60 + minute


@pytest.mark.parametrize(
    ("local_minute", "count"),
    [
        (at(0, 7, 59), 0),
        (at(0, 8), 4),
        (at(0, 17, 59), 4),
        (at(0, 18), 2),  # the next entry takes its place, though it is less
        (at(0, 23, 59), 2),
        (at(1, 0), 0),  # and it ends with its day
        (at(5, 12), 0),
        (at(5, 22), 3),
        (at(6, 1, 59), 3),  # over midnight
        (at(6, 2), 0),
    ],
)
def test_the_least_at_a_minute_of_the_week(local_minute: int, count: int) -> None:
    assert minimum(WEEKDAYS, local_minute)[0] == count


def test_replicas_are_there_when_their_hour_begins() -> None:
    assert minimum(WEEKDAYS, at(0, 7, 57), ahead_s=120)[0] == 0
    assert minimum(WEEKDAYS, at(0, 7, 58), ahead_s=120) == (4, "mon-fri 08:00 min=4")
    assert minimum(WEEKDAYS, at(0, 7, 59), ahead_s=1)[0] == 4
    assert minimum(WEEKDAYS, at(0, 17, 59), ahead_s=120)[0] == 4  # less begins when it begins


def test_the_week_is_a_circle_and_the_most_of_several_counts() -> None:
    monday = parse_schedule(["mon 00:00-01:00 min=2", "daily 00:30-00:40 min=5"])
    assert minimum(monday, at(6, 23, 59), ahead_s=60)[0] == 2
    assert minimum(monday, at(0, 0, 35))[0] == 5
    assert minimum((), 0, 600.0) == (0, "")
