"""What went wrong in a process, from what it and its children wrote: the errors of Python and of the loader.

An engine's own exception often says only that a worker failed; the worker's is in the log, each line of it behind the
worker's name, and other processes' lines between.
"""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kervan import logs

TAIL_BYTES = 1 << 20
MAX_LINES = 6  # of one message
MAX_CHARS = 600

# vLLM's logger: "(Worker_TP0 pid=12) ERROR 11-29 19:30:03 [file.py:95] " before every line of a message.
PROCESS = re.compile(r"^\((?P<process>[\w .:-]*pid=\d+)\) ?")
LOGGED = re.compile(r"^(?:INFO|WARNING|ERROR|DEBUG|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\] ?")
OTHER_LINE = re.compile(r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d|[IWEF]\d{4} |\[rank\d+\]|\S+:\d+: \w*Warning: |Traceback )")
RAISED = re.compile(r"^(?P<type>(?:\w+\.)*[A-Za-z_]\w*)(?:: (?P<text>.*))?$")
LINKS = ("The above exception was the direct cause", "During handling of the above exception")
# Lines that are no exception of Python and end a process all the same.
NATIVE = re.compile(
    r"error while loading shared libraries: .*|Fatal Python error: .*|terminate called after throwing .*"
    r"|^\s*what\(\): .*|NCCL error.*|Segmentation fault.*|Bus error.*"
)
# vLLM's word on a worker that ended without one of its own, as by a signal.
DEATH = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: (?P<status>-?\d+)\)")
# They say that something else has failed.
CONSEQUENCES = re.compile(
    r"initialization failed|see (root cause|stack trace)|died unexpectedly|engine (process|core) .*(failed|died)"
    r"|cancelled|EngineDead",
    re.IGNORECASE,
)
CONSEQUENCE_TYPES = frozenset(
    {
        "SystemExit", "KeyboardInterrupt", "EOFError", "BrokenPipeError", "ConnectionResetError", "CancelledError",
        "ConnectionRefusedError",
    }
)  # fmt: skip


@dataclass(slots=True)
class _Reading:
    """How far one process's lines have been read. `lines`: of a message that may go on."""

    is_in_traceback: bool = False
    is_ignored: bool = False
    lines: list[str] = field(default_factory=list)


def causes(log: str) -> list[str]:
    """The errors in a log that are no consequences of others, in order: `ValueError: text`, each in one line."""
    found = [" ".join(" ".join(lines).split())[:MAX_CHARS] for lines in _messages(log)]
    return [text for text in found if not is_consequence(text)]


def death(log: str) -> str | None:
    """How the first worker of an engine ended that left no error; None if the log tells of none."""
    if (found := DEATH.search(log)) is None:
        return None
    status = int(found["status"])
    known = status < 0 and -status in set(signal.Signals)
    how = f"signal {signal.Signals(-status).name}" if known else f"exit status {status}"
    return f"a worker of the engine ended with {how}"


def is_consequence(text: str) -> bool:
    """Whether an error only says that something else has failed."""
    kind = text.partition(":")[0].rpartition(".")[2]
    return kind in CONSEQUENCE_TYPES or bool(CONSEQUENCES.search(text))


def tail(path: Path) -> str:
    """The end of a log, at most `TAIL_BYTES`; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return logs.plain(file.read().decode(errors="replace"))
    except OSError:
        return ""


def _messages(log: str) -> Iterator[list[str]]:
    readings: dict[str, _Reading] = {}
    messages: list[list[str]] = []
    for raw in log.splitlines():
        process = PROCESS.match(raw)
        line = raw[process.end() :] if process else raw
        logged = LOGGED.match(line)
        line = line[logged.end() :] if logged else line
        # What a process prints itself and what it logs are told apart, as other lines come between.
        reading = readings.setdefault(f"{process and process['process']} {bool(logged)}", _Reading())
        if (message := _read(reading, line)) is not None:
            messages.append(message)
    yield from messages


def _read(reading: _Reading, line: str) -> list[str] | None:
    """A message that begins with this line; later lines may still add to it."""
    if line.startswith("Exception ignored in"):
        reading.is_ignored = True
    elif line.startswith("Traceback (most recent call last)"):
        reading.is_in_traceback, reading.lines = True, []
    elif native := NATIVE.search(line):
        reading.is_in_traceback = False
        return [native[0]]
    elif reading.is_in_traceback:
        if not line.strip() or line[0].isspace() or line.startswith(LINKS):
            return None
        reading.is_in_traceback = False
        raised, is_ignored, reading.is_ignored = RAISED.match(line), reading.is_ignored, False
        if raised is None or is_ignored:
            return None
        reading.lines = [f"{raised['type'].rpartition('.')[2]}: {raised['text'] or ''}"]
        return reading.lines
    elif reading.lines:
        if not line.strip() or OTHER_LINE.match(line) or len(reading.lines) >= MAX_LINES:
            reading.lines = []
        else:
            reading.lines.append(line)
    return None
