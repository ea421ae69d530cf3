"""Numbers with units as users write them, and back."""

import re

from kervan.errors import ConfigError

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(us|ms|s|min|m|h)?")


def parse_duration_s(text: str, subject: str = "duration") -> float:
    """Seconds of `"250ms"`, `"1.5s"`, `"2min"` or `"3h"`; a bare number is seconds.

    Raises: ConfigError, which names `subject`.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{subject} {text!r} is not a duration; write a number and us, ms, s, min or h, like 250ms")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def format_duration(seconds: float) -> str:
    """Three significant digits in the unit that fits: `0.0234` is `"23.4 ms"`."""
    size = abs(seconds)
    if size >= 99.95:
        return f"{seconds:.0f} s"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if size >= factor * 0.9995 or unit == "us":
            value = seconds / factor
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("not reached")


def plural(count: int, noun: str) -> str:
    """`"1 replica"`, `"2 replicas"`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
