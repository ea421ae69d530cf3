"""Numbers with units as users write them, and back."""

import math
import re

from kervan.errors import ConfigError

_S, _MIN, _H = ("s", "sec", "second", "seconds"), ("min", "m", "minute", "minutes"), ("h", "hour", "hours")
_SECONDS = {
    "us": 1e-6, "ms": 1e-3, **dict.fromkeys(_S, 1.0), **dict.fromkeys(_MIN, 60.0), **dict.fromkeys(_H, 3600.0),
}  # fmt: skip
_NUMBER = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)"
_DURATION = re.compile(rf"{_NUMBER}\s*({'|'.join(sorted(_SECONDS, key=len, reverse=True))})?")
_RATE = re.compile(rf"{_NUMBER}\s*(?:(?:req|requests?)?\s*/\s*({'|'.join((*_S, *_MIN, *_H))})|rps)?")
_SHARE = re.compile(rf"{_NUMBER}\s*(%)?")
_FACTOR = re.compile(rf"{_NUMBER}\s*x?")
_BYTES = {
    "": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30, "gib": 1 << 30,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([a-z]*)")
MAX_RATE = 1e6  # requests/s


def parse_duration_s(text: str, subject: str = "duration") -> float:
    """Seconds of `"250ms"`, `"1.5s"`, `"2min"` or `"3h"`; a bare number is seconds.

    Raises: ConfigError, which names `subject`.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = math.inf if match is None else float(match[1]) * _SECONDS[match[2] or "s"]
    if match is None or math.isinf(seconds):
        raise ConfigError(
            f"{subject} {shortened(text)!r} is not a duration; write a number and us, ms, s, min or h, like 250ms"
        )
    return seconds


def find_rate_per_s(text: str) -> float:
    """Requests per second of `"5/s"`, `"300/min"`, `"5 requests/s"`, `"5 rps"` or `"5"`; NaN of anything else."""
    match = _RATE.fullmatch(text.strip())
    return math.nan if match is None else float(match[1]) / _SECONDS[match[2] or "s"]


def parse_rate_per_s(text: str, subject: str = "rate") -> float:
    """Requests per second, as `find_rate_per_s` reads them, above 0.

    Raises: ConfigError, which names `subject`.
    """
    rate = find_rate_per_s(text)
    if not 0 < rate < MAX_RATE:
        raise ConfigError(
            f"{subject} {text!r} is not a number of requests per second above 0 and below {MAX_RATE:,.0f}; write for "
            f"example {subject} 5/s, 300/min or 5"
        )
    return rate


def parse_loss_rate_per_s(text: str, subject: str = "losses") -> float:
    """Losses per second of `"0.01/h"`; a bare number is refused: nobody counts these per second.

    Raises: ConfigError, which names `subject`.
    """
    rate = find_rate_per_s(text) if "/" in text else math.nan
    if not 0 < rate < MAX_RATE:
        raise ConfigError(
            f"{subject} {text!r} is not a number above 0 and a unit of time; write for example {subject} 0.01/h"
        )
    return rate


def parse_share(text: str, subject: str = "share") -> float:
    """A share from 0 to 1, of `"0.6"` or `"60%"`.

    Raises: ConfigError, which names `subject`.
    """
    match = _SHARE.fullmatch(text.strip())
    share = math.nan if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0 <= share <= 1:
        raise ConfigError(f"{subject} {text!r} is not a share from 0 to 1; write for example {subject} 0.6 or 60%")
    return share


def parse_factor(text: str, subject: str = "factor") -> float:
    """How many times as fast, above 0, of `"2"` or `"2x"`.

    Raises: ConfigError, which names `subject`.
    """
    match = _FACTOR.fullmatch(text.strip())
    factor = math.nan if match is None else float(match[1])
    if not 0 < factor < math.inf:
        raise ConfigError(
            f"{subject} {text!r} is not a number above 0; write for example {subject} 2, for twice as fast"
        )
    return factor


def parse_count(text: str, subject: str, *, most: int) -> int:
    """A whole number from 1 to `most`.

    Raises: ConfigError, which names `subject`.
    """
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12 and 1 <= int(digits) <= most):
        raise ConfigError(
            f"{subject} {text!r} is not a whole number from 1 to {most:,}; write for example {subject} 16"
        )
    return int(digits)


def parse_bytes(text: str, subject: str = "size") -> int:
    """Bytes of `"8"`, `"64KiB"`, `"1GiB"`, `"1MB"`; K, M and G alone are powers of 1024, as in nccl-tests.

    Raises: ConfigError, which names `subject`.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    factor = None if match is None else _BYTES.get(match[2])
    if match is None or factor is None or not (size := round(float(match[1]) * factor)):
        raise ConfigError(f"{subject} {text!r} is not a number of bytes above 0; write for example 8, 64KiB or 1GiB")
    return size


def format_bytes(size: int) -> str:
    """`1048576` is `"1 MiB"`; what is no whole number of a unit has one digit behind the point."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            value = size / factor
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{size} B"


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


def shortened(text: str, most: int = 40) -> str:
    """The text as an error shows it: of a long one its beginning and its end."""
    return text if len(text) <= most else f"{text[: most - 11]}...{text[-8:]}"


def plural(count: int, noun: str) -> str:
    """`"1 replica"`, `"2 replicas"`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
