"""Loads as users write them: what `kervan bench` takes, and `rate:duration` for a ramp of steps."""

import re
from collections.abc import Sequence

from kervan.bench.arrivals import Stage, parse_stages
from kervan.config.workload import TraceRow
from kervan.errors import ConfigError

MAX_REQUESTS = 20_000_000  # of one run: more take more than a quarter of an hour and gigabytes
MAX_DURATION_S = 35 * 86_400.0
_STEP = re.compile(r"([^@:,]+):([^@:,]+)")


def parse_ramp(text: str, subject: str = "--ramp") -> tuple[Stage, ...]:
    """The stages of `2:330s,4:360s` (requests/s, and for how long), or of what `bench --stages` takes.

    Raises: ConfigError, which names `subject`.
    """
    items = []
    for item in text.split(","):
        step = _STEP.fullmatch(item.strip())
        items.append(f"{step[1]}@{step[2]}" if step and step[1] != "burst" else item)
    try:
        stages = parse_stages(",".join(items))
    except ConfigError as error:
        raise ConfigError(f"{subject} {text!r}: {error}; or 2:330s,4:360s for steps") from error
    check_size(stages, subject)
    return stages


def check_size(stages: Sequence[Stage], subject: str) -> None:
    """Raises: ConfigError for a load that has no request, or too many, or lasts too long."""
    requests = sum(stage.expected_arrivals for stage in stages)
    duration_s = sum(stage.duration_s for stage in stages)
    if requests < 1:
        raise ConfigError(f"{subject} has {requests:.2g} requests in all; give a rate and a duration that make some")
    if requests > MAX_REQUESTS:
        raise ConfigError(
            f"{subject} has {requests:,.0f} requests, and a run takes at most {MAX_REQUESTS:,}; make it shorter by "
            f"{requests / MAX_REQUESTS:.1f} times or more"
        )
    if duration_s > MAX_DURATION_S:
        raise ConfigError(
            f"{subject} lasts {duration_s / 86_400:.3g} days, and a run takes at most {MAX_DURATION_S / 86_400:g}; "
            f"make it shorter"
        )


def check_trace(rows: Sequence[TraceRow], speed: float, subject: str) -> None:
    """Raises: ConfigError for a trace that is too long, or lasts too long at this speed."""
    duration_s = rows[-1].at_s / speed
    if len(rows) > MAX_REQUESTS or duration_s > MAX_DURATION_S:
        raise ConfigError(
            f"{subject} has {len(rows):,} requests in {duration_s / 86_400:.3g} days, and a run takes at most "
            f"{MAX_REQUESTS:,} in {MAX_DURATION_S / 86_400:g}; cut it, or give a higher --trace-speed"
        )
