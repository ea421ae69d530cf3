"""What GPUs cost: a dated file of prices with their sources (`prices.yaml`), and a user's own in the same form."""

import dataclasses
import datetime
import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.markets import MARKETS
from kervan.facts.markup import broken

Market = Literal["on-demand", "spot"]
LARGE_PROVIDERS = ("AWS", "Azure", "Google Cloud")
STALE_AFTER_DAYS = 180
MAX_USD_PER_H = 10_000
# In Python it takes a plan's tenth of a second. For kervan's own file alone: in C, one nested too deeply is a crash.
_ShippedLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
OPTIONAL = ("provider", "instance", "source", "note")
USD_PER_H = re.compile(r"\$?\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(?:/\s*(?:gpu\s*[-/]?\s*)?h(?:our)?)?", re.I)


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What one GPU costs per hour, as read on `date`."""

    gpu: str
    market: Market
    usd_per_gpu_h: float
    date: datetime.date
    provider: str = ""
    instance: str = ""
    source: str = ""
    note: str = ""

    def age_days(self, today: datetime.date) -> int:
        """Days from when the price was read to `today`; negative for a date to come."""
        return (today - self.date).days

    def warning(self, today: datetime.date) -> str:
        """A warning for the user if the price is older than `STALE_AFTER_DAYS`; else empty."""
        age = self.age_days(today)
        if age <= STALE_AFTER_DAYS:
            return ""
        return (
            f"the price of {self.gpu} ({self.usd_per_gpu_h:g} USD/h, {self}) is {age} days old, more than "
            f"{STALE_AFTER_DAYS}; give today's with --price or --prices FILE"
        )

    def __str__(self) -> str:
        """Where the price is from: `AWS p5.48xlarge, on-demand, 2026-11-09`."""
        where = " ".join(word for word in (self.provider, self.instance) if word)
        return ", ".join(word for word in (where, self.market, self.date.isoformat()) if word)


EXAMPLE = "write for example prices: [{gpu: H100, market: on-demand, usd_per_gpu_h: 3.40, date: 2026-11-25}]"


def load(path: Path | None = None) -> tuple[Price, ...]:
    """kervan's prices; with a user's file, its rows in place of kervan's for the GPUs and markets that it names.

    Raises: ConfigError for a file that is missing, unreadable, or has a row that makes no sense.
    """
    shipped = _shipped()
    if path is None:
        return shipped
    subject = f"price file {path}"
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{subject} does not exist; check the path given to --prices") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{subject} cannot be read: {' '.join(str(error).split())}") from error
    own = _read(text, subject, yaml.SafeLoader)
    replaced = {(price.gpu, price.market) for price in own}
    return own + tuple(price for price in shipped if (price.gpu, price.market) not in replaced)


@functools.cache
def _shipped() -> tuple[Price, ...]:
    text = resources.files("kervan.facts").joinpath("prices.yaml").read_text()
    return _read(text, "kervan's price file", _ShippedLoader)


def lookup(gpu: str, market: Market = "on-demand", prices: Sequence[Price] | None = None) -> Price | None:
    """The price to plan with: the cheapest of AWS, Azure and Google Cloud, else the cheapest of all; None without one.

    Markets of private hosts are far cheaper than the large clouds and promise less, so they count only where nobody
    else has the GPU. `prices`: what `load` returned; None for kervan's own.

    Raises: ConfigError for a GPU that is not in the table of GPUs.
    """
    name = hardware.gpu(gpu).name
    rows = [row for row in (load() if prices is None else prices) if (row.gpu, row.market) == (name, market)]
    large = [row for row in rows if row.provider in LARGE_PROVIDERS]
    return min(large or rows, key=lambda row: (row.usd_per_gpu_h, -row.date.toordinal()), default=None)


def parse_price_usd_per_h(text: str) -> float:
    """US dollars per GPU and hour of `"3.40/h"`, `"$3.40/h"` or `"3.40"`.

    Raises: ConfigError for anything else, and for 0.
    """
    match = USD_PER_H.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"price {text!r} is not an amount of US dollars per GPU and hour; write for example --price 3.40/h"
        )
    usd = float(match[1])
    if not 0 < usd <= MAX_USD_PER_H:
        raise ConfigError(
            f"price {text!r} is not above 0 and at most {MAX_USD_PER_H} USD/h; write for example --price 3.40/h"
        )
    return usd


def _read(text: str, subject: str, loader: Any) -> tuple[Price, ...]:
    try:
        data = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a day that does not exist
        raise ConfigError(f"{subject} {broken(error, text)}; {EXAMPLE}") from error
    rows = data.get("prices") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows or set(data) != {"prices"}:
        raise ConfigError(f"{subject} has no list 'prices:' alone; {EXAMPLE}")
    return tuple(_price(row, f"{subject}, row {number}") for number, row in enumerate(rows, 1))


def _price(row: Any, subject: str) -> Price:
    if not isinstance(row, dict):
        raise ConfigError(f"{subject}: {row!r} is {type(row).__name__}; give gpu, market, usd_per_gpu_h and date")
    fields = [field.name for field in dataclasses.fields(Price)]
    for key in row:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"{subject} has unknown key {key!r}; {hint}")
    missing = [key for key in fields if key not in row and key not in OPTIONAL]
    if missing:
        raise ConfigError(f"{subject} has no {', '.join(missing)}; give gpu, market, usd_per_gpu_h and date")
    if row["market"] not in MARKETS:
        raise ConfigError(f"{subject}: market {row['market']!r} is not one of {', '.join(MARKETS)}")
    usd, date = row["usd_per_gpu_h"], row["date"]
    if isinstance(usd, bool) or not isinstance(usd, int | float):
        raise ConfigError(
            f"{subject}: usd_per_gpu_h={usd!r} is not a number; give US dollars per GPU and hour, like 3.40"
        )
    if not 0 < usd <= MAX_USD_PER_H:  # nor is nan
        raise ConfigError(f"{subject}: usd_per_gpu_h={usd!r} is outside 0..{MAX_USD_PER_H}; give the price of one GPU")
    if not isinstance(date, datetime.date) or isinstance(date, datetime.datetime):
        raise ConfigError(f"{subject}: date {date!r} is not a date; write for example date: 2026-11-25, without quotes")
    try:
        gpu = hardware.gpu(str(row["gpu"])).name
    except ConfigError as error:
        raise ConfigError(f"{subject}: {str(error).removesuffix(' (--gpu)')}") from error
    optional = {key: str(row[key]) for key in OPTIONAL if key in row}
    return Price(gpu=gpu, market=row["market"], usd_per_gpu_h=float(usd), date=date, **optional)
