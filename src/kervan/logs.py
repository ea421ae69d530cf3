"""How kervan's processes write their logs: lines of text, or JSON objects with the ids of what they are about.

A call that is about a request, a stream or a replica names it: `logger.warning("...", extra={"stream": id})`; what is
logged within `about` has its ids by itself. The format comes with the environment to processes that have no other way
to know it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import Any, Literal, get_args

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)
VARIABLE = "KERVAN_LOG_FORMAT"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What a record may be about, in this order; keys of `extra`, and of what `configure` is given.
IDS = ("fleet", "gateway", "replica", "node", "request_id", "stream", "trace_id")
Ids = Callable[[], Mapping[str, str]]
_ids_now: ContextVar[Ids | None] = ContextVar("ids_now", default=None)


class about:  # noqa: N801 - read as a word: `with logs.about(ids):`
    """Within, lines have the ids that `ids` returns; it is called for each line, and not before."""

    __slots__ = ("_ids", "_token")

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._token: Token[Ids | None] | None = None

    def __enter__(self) -> None:
        self._token = _ids_now.set(self._ids)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _ids_now.reset(self._token)


def format_of(environ: Mapping[str, str] = os.environ) -> LogFormat:
    """The format that the environment names; text if it names none."""
    return "json" if environ.get(VARIABLE, "").strip().lower() == "json" else "text"


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `logger`, `message`, the ids that are known, `exception`.

    `about`: ids of the process itself.
    """

    def __init__(self, about: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._about = dict(about or {})

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record), default=str)

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The object of a record."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        ids = _ids_now.get()
        now = ids() if ids is not None else {}
        for name in IDS:
            if value := getattr(record, name, None) or now.get(name) or self._about.get(name):
                found[name] = value
        found["pid"] = record.process
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return found


def configure(
    log_format: LogFormat | None = None, *, level: int = logging.WARNING, force: bool = False, **about: str
) -> None:
    """Set up the root logger to stderr, unless it has handlers; `force`: then too.

    `log_format`: by default what the environment names. `about`: ids of this process.
    """
    formatter: logging.Formatter = logging.Formatter(TEXT)
    if (log_format or format_of()) == "json":
        formatter = JsonFormatter(about)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level, force=force)


def plain(text: str) -> str:
    """A log in which lines that `JsonFormatter` wrote are the text that they would have been.

    For those who look for vLLM's and Python's words in it.
    """
    if '{"time": "' not in text:
        return text
    return "\n".join(map(_plain_line, text.splitlines()))


def _plain_line(line: str) -> str:
    if not line.startswith('{"time": "'):
        return line
    try:
        fields = json.loads(line)
        words = f"{fields['level']} {fields['logger']}: {fields['message']}"
    except (ValueError, KeyError, TypeError):
        return line
    return f"{words}\n{fields['exception']}" if fields.get("exception") else words
