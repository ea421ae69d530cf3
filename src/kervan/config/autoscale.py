"""What a user asks of autoscaling: which policy, the SLO it keeps, minimums by the hour, and Ray Serve's parameters."""

import datetime
import difflib
import re
import zoneinfo
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kervan.config.workload import DEFAULT_SLO, Slo, parse_slo
from kervan.errors import ConfigError
from kervan.units import parse_duration_s

PolicyName = Literal["slo", "ray", "fill"]
POLICIES: tuple[str, ...] = get_args(PolicyName)
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES
MAX_S = 10**9


# ---- minimums by the hour


@dataclass(frozen=True, slots=True)
class ScheduledMinimum:
    """At least `minimum` replicas from `start_minute` on, of the days `days` (0 is Monday).

    It ends at `end_minute`, above 1440 on the next day; None: when the next one without an end begins, or with the day.
    """

    text: str
    """As the user wrote it."""
    days: tuple[int, ...]
    start_minute: int
    end_minute: int | None
    minimum: int


_ENTRY = re.compile(
    r"(?:(?P<days>[a-z*,-]+)\s+)?(?P<start>\d{1,2}:\d\d)(?:\s*-\s*(?P<end>\d{1,2}:\d\d))?\s+min\s*=\s*(?P<minimum>\d{1,5})"
)
SCHEDULE_EXAMPLE = "'mon-fri 08:00 min=4' or 'sat,sun 10:00-22:00 min=2'"


def parse_schedule(entries: Sequence[str], subject: str = "schedule") -> tuple[ScheduledMinimum, ...]:
    """`'mon-fri 08:00 min=4'`, `'sat,sun 10:00-22:00 min=2'`; `daily` or no days: every day; an end before the start is
    on the next day.

    Raises: ConfigError, which names `subject`, for anything else, and for two without an end at the same time.
    """
    parsed = tuple(_scheduled(text, subject) for text in entries)
    starts: dict[int, ScheduledMinimum] = {}
    for one in parsed:
        for day in one.days if one.end_minute is None else ():
            minute = day * DAY_MINUTES + one.start_minute
            if minute in starts:
                raise ConfigError(
                    f"{subject} {starts[minute].text!r} and {one.text!r} both begin on {DAYS[day]} at "
                    f"{_clock(one.start_minute)}; leave one of them out, or give them ends, like 08:00-18:00"
                )
            starts[minute] = one
    return parsed


def _scheduled(text: str, subject: str) -> ScheduledMinimum:
    match = _ENTRY.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{subject} {text!r} is not DAYS HH:MM min=N; write for example {SCHEDULE_EXAMPLE}")
    days = _days(match["days"] or "daily", f"{subject} {text!r}")
    start = _minute(match["start"], f"{subject} {text!r}")
    end = None if match["end"] is None else _minute(match["end"], f"{subject} {text!r}")
    if start == DAY_MINUTES:
        raise ConfigError(f"{subject} {text!r} begins at 24:00; write 00:00 of the next day")
    if end is not None and end == start:
        raise ConfigError(f"{subject} {text!r} ends when it begins; write {_clock(start)}-{_clock(start + 60)}")
    if end is not None and end < start:
        end += DAY_MINUTES
    return ScheduledMinimum(text.strip(), days, start, end, int(match["minimum"]))


def _days(text: str, subject: str) -> tuple[int, ...]:
    if text in ("daily", "*"):
        return tuple(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        names = (first, last) if dash else (first, first)
        for name in names:
            if name not in DAYS:
                near = difflib.get_close_matches(name, DAYS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"write {', '.join(DAYS)} or daily, like mon-fri"
                raise ConfigError(f"{subject}: {name!r} is no day; {hint}")
        begin, end = (DAYS.index(name) for name in names)
        found |= {day % 7 for day in range(begin, (end if end >= begin else end + 7) + 1)}
    return tuple(sorted(found))


def _minute(text: str, subject: str) -> int:
    hours, minutes = (int(part) for part in text.split(":"))
    if minutes > 59 or hours * 60 + minutes > DAY_MINUTES:
        raise ConfigError(f"{subject}: {text} is no time of the day; write 00:00 to 23:59")
    return hours * 60 + minutes


def _clock(minute: int) -> str:
    return f"{minute // 60 % 24:02d}:{minute % 60:02d}"


def parse_time_zone(name: str, subject: str = "time_zone") -> zoneinfo.ZoneInfo:
    """The zone of a name like Europe/Berlin.

    Raises: ConfigError for one that the zone database does not have.
    """
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        known = zoneinfo.available_timezones() | {"UTC"}
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "write for example UTC or Europe/Berlin"
        raise ConfigError(f"{subject} {name!r} is no time zone; {hint}") from error


def local_minute(unix_s: float, zone: zoneinfo.ZoneInfo) -> int:
    """The minute of the week there, Monday 0:00 is 0: what a `FleetState` has for schedules."""
    at = datetime.datetime.fromtimestamp(unix_s, zone)
    return at.weekday() * DAY_MINUTES + at.hour * 60 + at.minute


# ---- Ray Serve's parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """Ray Serve's `AutoscalingConfig`, of 2.60: its names, defaults and meaning."""

    target_ongoing_requests: float = 2.0
    """Streams per replica, queued ones too."""
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    downscale_to_zero_delay_s: float | None = None
    """From 1 to 0; None: `downscale_delay_s`."""
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    aggregation_function: str = "mean"
    metrics_interval_s: float = 10.0
    """Demand is looked at so often."""


# Each with what it became; source: ray 2.60, serve/config.py, and the release notes of 2.10 and 2.23.
OLD_NAMES: Mapping[str, tuple[str, ...]] = {
    "target_num_ongoing_requests": ("target_ongoing_requests",),
    "target_num_ongoing_requests_per_replica": ("target_ongoing_requests",),
    "upscale_smoothing_factor": ("upscaling_factor",),
    "downscale_smoothing_factor": ("downscaling_factor",),
    "smoothing_factor": ("upscaling_factor", "downscaling_factor"),
}
ELSEWHERE: Mapping[str, str] = {
    "min_replicas": "the bounds of replicas: write replicas: MIN..MAX",
    "max_replicas": "the bounds of replicas: write replicas: MIN..MAX",
    "initial_replicas": "not needed: a fleet begins with the least of replicas: MIN..MAX, and changes keep its number",
    "policy": f"a setting of its own: write policy: {', '.join(POLICIES[:-1])} or {POLICIES[-1]}",
}
AGGREGATIONS = ("mean", "max", "min")
# Parameters that the SLO policy has a use for.
SLO_PARAMETERS = ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")
_LEAST = {
    "target_ongoing_requests": (0.0, False),
    "look_back_period_s": (0.0, False),
    "upscaling_factor": (0.0, False),
    "downscaling_factor": (0.0, False),
    "metrics_interval_s": (0.0, False),
    "upscale_delay_s": (0.0, True),
    "downscale_delay_s": (0.0, True),
    "downscale_to_zero_delay_s": (0.0, True),
}


def parse_ray(given: Mapping[str, Any], subject: str = "autoscaling") -> tuple[RaySettings, tuple[str, ...]]:
    """Ray Serve's parameters, and a warning for each that has another name today.

    Raises: ConfigError for an unknown name, a value that is none, and for one parameter that is given under two names.
    """
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    warnings = []
    known = [field.name for field in fields(RaySettings)]
    for name, value in given.items():
        if name in ELSEWHERE:
            raise ConfigError(f"{subject}: {name} is {ELSEWHERE[name]}")
        names = OLD_NAMES.get(name, (name,))
        if name in OLD_NAMES:
            warnings.append(f"{subject}: {name} is now {' and '.join(names)}; {name}={value} is taken as that")
        for new in names:
            if new not in known:
                near = difflib.get_close_matches(name, [*known, *OLD_NAMES, *ELSEWHERE], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ConfigError(f"{subject} has unknown parameter {name!r}; {hint}")
            if new in values and name != "smoothing_factor" and source[new] != "smoothing_factor":
                raise ConfigError(f"{subject} gives {new} twice, as {source[new]} and as {name}; give it once")
            if new in values and name == "smoothing_factor":
                continue  # the one that says which direction it is for wins, as in Ray
            values[new], source[new] = _ray_value(new, value, f"{subject}: {name}"), name
    return RaySettings(**values), tuple(warnings)


def _ray_value(name: str, value: Any, subject: str) -> Any:
    if name == "aggregation_function":
        if value not in AGGREGATIONS:
            raise ConfigError(f"{subject}={value!r} is none of {', '.join(AGGREGATIONS)}")
        return value
    if value is None and name == "downscale_to_zero_delay_s":
        return None
    if isinstance(value, str) and name.endswith("_s"):
        value = parse_duration_s(value, subject)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise ConfigError(f"{subject}={value!r} is not a number; write for example {name}: 2") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{subject}={value!r} is not a number; write for example {name}: 2")
    least, is_allowed = _LEAST[name]
    if not (least <= value <= MAX_S) or (value == least and not is_allowed):
        raise ConfigError(
            f"{subject}={value:g} is not {'at least' if is_allowed else 'above'} {least:g}; write {name}: 2"
        )
    return float(value)


# ---- all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """What autoscaling of a fleet is to do. `given`: which of Ray's parameters the user gave, under today's names."""

    policy: PolicyName
    slo: Slo
    schedule: tuple[ScheduledMinimum, ...]
    time_zone: zoneinfo.ZoneInfo
    ray: RaySettings
    given: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    """For the user, one line each."""


def resolve(
    *, policy: str, slo: str, schedule: Sequence[str], time_zone: str, autoscaling: Mapping[str, Any], maximum: int
) -> Autoscaling:
    """The settings of these names put together. `maximum`: replicas of the fleet.

    Raises: ConfigError for values that are wrong or contradict each other.
    """
    ray, warnings = parse_ray(autoscaling)
    given = frozenset(new for name in autoscaling for new in OLD_NAMES.get(name, (name,)))
    chosen = policy or ("ray" if "target_ongoing_requests" in given else "slo")
    minimums = parse_schedule(schedule)
    for one in minimums:
        if one.minimum > maximum > 0:  # none at all is refused where fleets are
            raise ConfigError(
                f"schedule {one.text!r} wants {one.minimum} replicas, and the most is {maximum}; write min={maximum}, "
                f"or raise the most, like --replicas 1..{one.minimum}"
            )
    if chosen != "ray":
        useful = SLO_PARAMETERS if chosen == "slo" else ()
        warnings += tuple(
            f"autoscaling: {name} has no effect with policy {chosen}; leave it out, or add policy: ray"
            for name in sorted(given.difference(useful))
        )
    if slo and chosen != "slo":
        warnings += (
            f"slo={slo} decides nothing with policy {chosen}, and is for the metrics only; for more use policy slo",
        )
    return Autoscaling(
        policy=chosen,  # type: ignore[arg-type]  # one of POLICIES: the field of the fleet's settings is checked
        slo=parse_slo(slo or DEFAULT_SLO, "slo"),
        schedule=minimums,
        time_zone=parse_time_zone(time_zone),
        ray=ray,
        given=given,
        warnings=warnings,
    )
