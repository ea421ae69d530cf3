"""What an option of each kind may say: one grammar for all commands.

A value that is none is a ConfigError, with the option's name and what to write instead.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kervan.config.fleet import NAME_PATTERN
from kervan.config.workload import parse_lengths, parse_slo
from kervan.errors import ConfigError
from kervan.facts.layout import parse_layout
from kervan.units import (
    parse_bytes,
    parse_count,
    parse_duration_s,
    parse_factor,
    parse_loss_rate_per_s,
    parse_rate_per_s,
    parse_share,
    shortened,
)

MAX_STREAMS = 65_536
MAX_GPUS = 65_536
MAX_DURATION_S = 10 * 365 * 86_400.0
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")


class Parsed(click.ParamType):  # type: ignore[type-arg]
    """Text, and what `parse(text, option)` makes of it. `name` is what the help shows for the value."""

    def __init__(self, name: str, parse: Callable[[str, str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value. Raises: ConfigError for text that has none."""
        if not isinstance(value, str):
            return value  # a default that is no text
        return self.parse(value, self.name if param is None else param.opts[0])


class _Number(click.types.FloatParamType):
    """A number, and neither nan nor inf, which all comparisons of a range let pass, or those of an open one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; click ends the command for what is none."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number that can be counted with", param, ctx)
        return number


class NumberRange(_Number, click.FloatRange):
    """A number in a range."""

    name = "float range"


class Sweep(Parsed):
    """One or several values of another type, joined by commas; the value is their list."""

    def __init__(self, each: Parsed) -> None:
        super().__init__(
            f"{each.name},...", lambda text, option: [each.parse(part, option) for part in text.split(",")]
        )
        self.each = each


class FilePath(click.Path):
    """A file or a directory; not the empty text of a variable that is not set, which would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Raises: ConfigError for an empty one."""
        if value == "" and param is not None:
            name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.strip("[]")
            raise ConfigError(f"{name} '' is empty; give a path, or . for the current directory")
        return super().convert(value, param, ctx)


def _duration(text: str, option: str) -> float:
    seconds = parse_duration_s(text, option)
    if seconds > MAX_DURATION_S:
        raise ConfigError(f"{option} {shortened(text)!r} is more than 10 years; write a shorter one, like 1h")
    return seconds


def _gpu(text: str, option: str) -> str:
    """A GPU of the table by its name there, or `local`."""
    from kervan.facts import hardware

    return "local" if text.strip().lower() == "local" else hardware.gpu(text.strip()).name


def _durations(text: str, option: str) -> Any:
    from kervan.simulate.duration import parse_durations

    return parse_durations(text, option)


MAX_SIZES = 64


def _sizes(text: str, option: str) -> tuple[int, ...]:
    """Each of 8,1MiB, or the powers of two times the first of 8..1GiB, up to the second."""
    sizes: list[int] = []
    for part in text.split(","):
        least, dots, most = part.partition("..")
        size, end = parse_bytes(least, option), parse_bytes(most if dots else least, option)
        if end < size:
            raise ConfigError(f"{option} {part!r} goes from {size} down to {end} bytes; write {option} {most}..{least}")
        while size <= end:
            sizes.append(size)
            size *= 2
    if len(sizes) > MAX_SIZES:
        raise ConfigError(f"{option} {text!r} names {len(sizes)} sizes, more than {MAX_SIZES}; give fewer")
    return tuple(dict.fromkeys(sizes))


def _rendezvous(text: str, option: str) -> str:
    """HOST:PORT."""
    if not _is_host_and_port(text.strip()):
        meant = text.partition("://")[2].partition("/")[0]
        example = f"{option} {meant}" if _is_host_and_port(meant) else f"for example {option} 10.0.0.1:29400"
        raise ConfigError(f"{option} {shortened(text)!r} is not HOST:PORT; write {example}")
    return text.strip()


def _is_host_and_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return _is_port(port) and HOST.fullmatch(host) is not None


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536


def _address(text: str, option: str) -> str:
    """HOST:PORT of a Ray cluster, or auto."""
    host, _, port = text.strip().rpartition(":")
    if text.strip() != "auto" and not (host and _is_port(port) and not set(host) & set("/ \t\n")):
        raise ConfigError(
            f"{option} {text!r} is not HOST:PORT; give that of the cluster's head, like {option} 10.0.0.1:6379"
        )
    return text.strip()


def _fleet_name(text: str, option: str) -> str:
    if not NAME_PATTERN.fullmatch(text):
        raise ConfigError(
            f"{option} {text!r} is no fleet's name; use 1 to 40 lower-case letters, digits and hyphens, such as chat"
        )
    return text


def choices(of: Sequence[str]) -> "Parsed":
    """One or several of these words, joined by commas."""

    def parse(text: str, option: str) -> tuple[str, ...]:
        words = [word.strip().lower().replace("-", "_") for word in text.split(",")]
        if wrong := [word for word in words if word not in of]:
            raise ConfigError(f"{option} {wrong[0]!r} is none of {', '.join(of)}; write for example {option} {of[0]}")
        return tuple(dict.fromkeys(words))

    return Parsed(f"{of[0]},...", parse)


DURATION = Parsed("duration", _duration)
"""Seconds of 250ms, 1.5s, 2min, 3h or, in seconds, 90; at most 10 years."""
DURATIONS = Parsed("durations", _durations)
"""A `DurationDistribution`."""
RATE = Parsed("rate", parse_rate_per_s)
"""Requests per second of 5/s, 300/min or, per second, 5."""
LOSS_RATE = Parsed("rate", parse_loss_rate_per_s)
"""Losses per second of 0.01/h."""
LENGTHS = Parsed("tokens", parse_lengths)
"""A `Lengths`."""
SLO = Parsed("slo", parse_slo)
"""An `Slo`."""
LAYOUT = Parsed("layout", lambda text, option: parse_layout(text))
"""The sizes that tp=2,pp=2 or TP2xPP2 names."""
GPU = Parsed("gpu", _gpu)
SHARE = Parsed("share", parse_share)
"""0 to 1, of 0.6 or 60%."""
FACTOR = Parsed("factor", parse_factor)
"""Of 2 or 2x."""
STREAMS = Parsed("streams", functools.partial(parse_count, most=MAX_STREAMS))
ADDRESS = Parsed("text", _address)
"""Of a Ray cluster: HOST:PORT, or auto."""
FLEET_NAME = Parsed("text", _fleet_name)
GPUS = click.IntRange(1, MAX_GPUS)
NUMBER = _Number()
SIZES = Parsed("sizes", _sizes)
"""Bytes of 8..1GiB (doubled from one to the next), or of 8,1MiB."""
RENDEZVOUS = Parsed("host:port", _rendezvous)
FILE = FilePath(path_type=Path)
