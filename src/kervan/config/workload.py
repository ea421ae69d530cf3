"""What clients ask for: lengths, arrivals seen in real traces, and the service level they expect."""

import csv
import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from kervan.errors import ConfigError
from kervan.units import parse_duration_s, plural

BLOCK_TOKENS = 512  # of one prefix hash in Mooncake's traces
MAX_TOKENS = 10_000_000
MAX_HEAD = 1 << 16  # characters of a file's first line that are looked at
DEFAULT_SLO = "ttft=2s,tpot=50ms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """Bounds, in seconds, that a request must keep to count as good; None is no bound."""

    ttft_s: float | None = None
    """To the first token, from the intended arrival: a late client or a full server cannot hide behind the queue."""
    tpot_s: float | None = None
    """Per output token after the first, the mean of the request."""
    e2e_s: float | None = None
    """To the last token, from the intended arrival."""

    def is_met(self, *, ttft_s: float, tpot_s: float, e2e_s: float) -> bool:
        """Whether all bounds are kept; a bound itself is kept."""
        bounded = ((ttft_s, self.ttft_s), (tpot_s, self.tpot_s), (e2e_s, self.e2e_s))
        return all(bound is None or value <= bound for value, bound in bounded)

    def __str__(self) -> str:
        bounds = ((name, getattr(self, f"{name}_s")) for name in ("ttft", "tpot", "e2e"))
        given = ((name, bound) for name, bound in bounds if bound is not None)
        return ",".join(f"{name}={bound:g}s" if bound >= 1 else f"{name}={1000 * bound:g}ms" for name, bound in given)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedLoop:
    """What came of a closed loop of streams, each of which sends its next request when its last one has ended.

    Quantiles are over the requests. All streams start at once: TTFT has that opening burst in it.
    """

    isl: int
    """Tokens of each prompt."""
    osl: int
    """Tokens of each output."""
    concurrency: int
    """Streams."""
    num_requests: int
    """Requests that ended, of all streams."""
    out_tok_s: float
    """Output tokens per second, of all streams."""
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


def parse_slo(text: str, subject: str = "SLO") -> Slo:
    """`"ttft=1s,tpot=50ms,e2e=20s"`, any of the three.

    Raises: ConfigError, which names `subject`.
    """
    bounds: dict[str, float] = {}
    for item in text.split(","):
        key, separator, value = item.partition("=")
        key = key.strip().lower()
        if not separator or key not in ("ttft", "tpot", "e2e"):
            raise ConfigError(f"{subject} {item!r} is none of ttft=, tpot=, e2e=; write for example ttft=1s,tpot=50ms")
        if f"{key}_s" in bounds:
            raise ConfigError(f"{subject} {text!r} gives {key} twice")
        if value.strip()[-1:].isdigit():  # 50 was meant as milliseconds as often as not
            number = value.strip()
            raise ConfigError(f"{subject} {key}={number} has no unit; write {key}={number}ms or {key}={number}s")
        bounds[f"{key}_s"] = parse_duration_s(value, f"{subject} {key}")
        if bounds[f"{key}_s"] <= 0:
            raise ConfigError(f"{subject} {key}={value.strip()} can never be met; give a duration above 0")
    return Slo(**bounds)


# ---- lengths


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts."""

    text: str
    """As the user wrote it."""
    mean: float
    """Tokens; of a clipped normal or lognormal an estimate."""
    minimum: int
    """The least that is drawn."""
    maximum: int
    """The most that is drawn."""
    _draw: Callable[[random.Random], float] = dataclasses.field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Callable[[str], "Lengths"], tuple[str]]:
        """Pickled as its text: what draws is a function of this module's own."""
        return parse_lengths, (self.text,)

    def sample(self, rng: random.Random) -> int:
        """One length."""
        return min(self.maximum, max(self.minimum, round(self._draw(rng))))


LENGTHS_HELP = "64, 32..512, lognormal:median=200,sigma=1,max=4096, normal:mean=200,std=50 or 128@0.7,1024@0.3"


def parse_lengths(text: str, subject: str = "length") -> Lengths:
    """Token counts from one of four forms:

    `64` always; `32..512` uniform, ends included; `lognormal:median=200,sigma=1` or `normal:mean=200,std=50`, with
    optional `min=` and `max=`; `128@0.7,1024@0.3` with weights. `mean` of a clipped normal or lognormal is estimated
    from 20,000 seeded draws.

    Raises: ConfigError, which names `subject`.
    """
    text = text.strip()
    try:
        return _lengths(text)
    except (ValueError, KeyError, TypeError) as error:
        reason = f" ({error})" if isinstance(error, _LengthsError) else ""
        raise ConfigError(f"{subject} {text!r} is not a number of tokens{reason}; write {LENGTHS_HELP}") from error


class _LengthsError(ValueError):
    pass


@functools.lru_cache(maxsize=64)  # a mean is estimated from many draws
def _lengths(text: str) -> Lengths:
    if ".." in text:
        low, high = (int(part) for part in text.split(".."))
        if low > high:
            raise _LengthsError(f"{low} is above {high}")
        return _checked(Lengths(text, (low + high) / 2, low, high, lambda rng: rng.randint(low, high)))
    if "@" in text:
        pairs = [part.split("@") for part in text.split(",")]
        lengths, weights = [int(length) for length, _ in pairs], [float(weight) for _, weight in pairs]
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise _LengthsError("weights must be 0 or more, not all 0")
        mean = sum(n * w for n, w in zip(lengths, weights, strict=True)) / sum(weights)
        return _checked(Lengths(text, mean, min(lengths), max(lengths), lambda rng: rng.choices(lengths, weights)[0]))
    kind, separator, rest = text.partition(":")
    if not separator:
        return _checked(Lengths(text, int(text), int(text), int(text), lambda _: int(text)))
    numbers = {key.strip(): float(value) for key, _, value in (part.partition("=") for part in rest.split(","))}
    low, high = int(numbers.pop("min", 1)), int(numbers.pop("max", MAX_TOKENS))
    draw: Callable[[random.Random], float]
    if kind == "lognormal":
        mu, sigma = math.log(numbers.pop("median")), numbers.pop("sigma")
        draw = lambda rng: rng.lognormvariate(mu, sigma)  # noqa: E731
    elif kind == "normal":
        center, std = numbers.pop("mean"), numbers.pop("std")
        draw = lambda rng: rng.gauss(center, std)  # noqa: E731
    else:
        raise _LengthsError(f"{kind!r} is neither normal nor lognormal")
    if numbers:
        raise _LengthsError(f"{kind} has no {', '.join(numbers)}")
    rough = _checked(Lengths(text, 0.0, low, high, draw))
    rng = random.Random(0)
    return dataclasses.replace(rough, mean=sum(rough.sample(rng) for _ in range(20_000)) / 20_000)


def _checked(lengths: Lengths) -> Lengths:
    if not 1 <= lengths.minimum <= lengths.maximum <= MAX_TOKENS:
        raise _LengthsError(f"lengths must be in 1..{MAX_TOKENS}")
    return lengths


# ---- traces


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    at_s: float
    """Its arrival, from the first row's."""
    input_tokens: int
    """Of its prompt, at least 1."""
    output_tokens: int
    """At least 0."""
    hash_ids: tuple[int, ...] = ()
    """One number per block of 512 prompt tokens, the last one shorter; equal numbers: equal blocks. () if unknown."""
    line: int = dataclasses.field(default=0, compare=False)
    """Of the file, from 1; 0 if it is of none."""


def read_trace(path: Path) -> Iterator[TraceRow]:
    """The rows of an Azure LLM inference trace (CSV) or a Mooncake trace (JSONL), in order of time.

    Raises: ConfigError, with the line and the column, for a missing file, an unknown format or a broken row.
    Source: https://github.com/Azure/AzurePublicDataset, https://github.com/kvcache-ai/Mooncake.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline(MAX_HEAD)
            file.seek(0)
            if head.startswith("TIMESTAMP,"):
                yield from _ordered(path, _AZURE_COLUMNS, _azure(path, file))
            elif head.startswith("{"):
                yield from _ordered(path, _MOONCAKE_COLUMNS, _mooncake(path, file))
            else:
                raise ConfigError(
                    f"trace {path} begins with {head[:40]!r}; known are Azure's CSV (TIMESTAMP,ContextTokens,"
                    f"GeneratedTokens) and Mooncake's JSONL (timestamp, input_length, output_length, hash_ids)"
                )
    except FileNotFoundError as error:
        raise ConfigError(f"trace {path} does not exist; check the path given to --trace") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"trace {path} is not a text file (byte {error.object[error.start]:#04x} is no UTF-8); unpack it, "
            "or save it as CSV or JSONL"
        ) from error
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read ({error.strerror}); give a CSV or JSONL file") from error


# Time, prompt and output, as each format names them.
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE_COLUMNS = ("timestamp", "input_length", "output_length")
_AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,12}))?(?:\+00:00|Z)?", re.ASCII)


def _ordered(path: Path, columns: tuple[str, str, str], rows: Iterator[TraceRow]) -> Iterator[TraceRow]:
    before, first = -math.inf, None
    time, prompt, output = columns
    for row in rows:
        place = f"trace {path}, line {row.line}"
        first = row.at_s if first is None else first
        if row.at_s < before:
            raise ConfigError(
                f"{place}: its {time} is {before - row.at_s:.3f} s before that of the row above; sort the rows by "
                f"{time}"
            )
        for column, tokens, least in ((prompt, row.input_tokens, 1), (output, row.output_tokens, 0)):
            if not least <= tokens <= MAX_TOKENS:
                raise ConfigError(
                    f"{place}: {column} {tokens} is not from {least} to {MAX_TOKENS:,} tokens; correct the row, "
                    "or leave it out"
                )
        before = row.at_s
        yield dataclasses.replace(row, at_s=row.at_s - first)
    if first is None:
        raise ConfigError(f"trace {path} has no rows below its first line; give one with at least one request")


def _azure(path: Path, lines: Iterator[str]) -> Iterator[TraceRow]:
    reader = csv.reader(lines)
    place = f"trace {path}, line 1"
    try:
        header = [name.strip() for name in next(reader)]
        if missing := [name for name in _AZURE_COLUMNS if name not in header]:
            raise ConfigError(f"{place}: no column {missing[0]}; Azure's columns are {','.join(_AZURE_COLUMNS)}")
        indices = [header.index(name) for name in _AZURE_COLUMNS]
        for cells in reader:
            if not cells:
                continue
            place = f"trace {path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise ConfigError(
                    f"{place}: {plural(len(cells), 'cell')} for {len(header)} columns; write {','.join(header)}, and "
                    "numbers without thousands separators"
                )
            time, prompt, output = (cells[index].strip() for index in indices)
            yield TraceRow(
                _azure_s(time, place),
                _tokens(prompt, f"{place}: ContextTokens"),
                _tokens(output, f"{place}: GeneratedTokens"),
                line=reader.line_num,
            )
    except csv.Error as error:
        raise ConfigError(f"trace {path}, line {reader.line_num}: {error}; save the file as plain CSV") from error


def _azure_s(text: str, place: str) -> float:
    """Seconds of a time in UTC; it has seven decimals, and Python's datetime takes six."""
    found = _AZURE_TIME.fullmatch(text)
    try:
        return datetime.fromisoformat(f"{found[1]}+00:00").timestamp() + float(f"0.{found[2] or 0}")  # type: ignore[index]
    except (TypeError, ValueError) as error:  # no match; a day that does not exist
        what = f"{text[:40]!r} is not a time" if text else "is empty"
        raise ConfigError(f"{place}: TIMESTAMP {what}; write one like 2023-11-16 18:15:46.6805900") from error


def _tokens(text: str, subject: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        what = f"{text[:40]!r} is not a whole number" if text else "is empty"
        raise ConfigError(f"{subject} {what}; write a number of tokens like 1024, or leave the row out") from error


class _MooncakeRow(msgspec.Struct):
    """What is read of a line; `timestamp` is in milliseconds."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


_mooncake_decoder = msgspec.json.Decoder(_MooncakeRow)


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"trace {path}, line {number}"
        try:
            row = _mooncake_decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(
                f'{place}: {_mooncake_fault(error)}; write lines like {{"timestamp": 0, "input_length": 1024, '
                '"output_length": 128}'
            ) from error
        num_blocks = math.ceil(row.input_length / BLOCK_TOKENS)
        if row.hash_ids and len(row.hash_ids) != num_blocks:
            raise ConfigError(
                f"{place}: {len(row.hash_ids)} hash_ids for input_length {row.input_length}, which is {num_blocks} "
                f"blocks of {BLOCK_TOKENS} tokens; give one for each block, or leave hash_ids out"
            )
        yield TraceRow(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids, line=number)


def _mooncake_fault(error: Exception) -> str:
    """What is wrong with a line, with the field in front: msgspec has it at the end."""
    text = str(error)
    if missing := re.search(r"missing required field `(\w+)`", text):
        return f"{missing[1]} is missing"
    if wrong := re.fullmatch(r"Expected `(\w+)`.*, got `(\w+)` - at `\$\.(\w+)(.*)`", text):
        kind = {"int": "a whole number", "float": "a number", "array": "a list"}.get(wrong[1], wrong[1])
        given = {"null": "empty (null)", "str": "text"}.get(wrong[2], wrong[2])
        return f"{wrong[3]}{wrong[4]} is {given}, not {kind}"
    return "no valid JSON object"
