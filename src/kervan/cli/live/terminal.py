"""A terminal as a full screen: keys, size, redraws of what has changed. It is given back whatever happens.

No thread and no timer: who uses it waits in `wait`, which signals end too. Only `kill -9` leaves the terminal as it is.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Collection, Mapping, Sequence
from types import FrameType
from typing import Any

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # the other screen, no cursor, no wrapping at the right edge
LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
ESCAPE_S = 0.05  # the rest of a key's sequence comes within this; ESC alone is a key
# What keys send, in both of the modes that terminals know, and as xterm, rxvt and the Linux console have it.
SEQUENCES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left",
    "\x1bOA": "up", "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left",
    "\x1b[5~": "page up", "\x1b[6~": "page down", "\x1b[H": "home", "\x1b[F": "end", "\x1bOH": "home", "\x1bOF": "end",
    "\x1b[1~": "home", "\x1b[4~": "end", "\x1b[7~": "home", "\x1b[8~": "end", "\x1b[Z": "back tab", "\x1bOM": "enter",
    "\r": "enter", "\n": "enter", "\t": "tab", "\x1b": "escape", "\x7f": "backspace", "\x08": "backspace",
}  # fmt: skip
LONGEST = max(map(len, SEQUENCES))


def is_unicode(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the locale says that the terminal shows UTF-8; as in C, LC_ALL comes before LC_CTYPE and LANG."""
    locale = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := environ.get(name))), "C")
    return "utf" in locale.lower()


def keys(text: str) -> tuple[list[str], str]:
    """The keys of what came from a terminal, by name or character, and the beginning of one that is not whole."""
    found: list[str] = []
    while text:
        if text[0] != "\x1b":
            found.append(SEQUENCES.get(text[0], text[0]))
            text = text[1:]
            continue
        length = _sequence_length(text)
        if length == 0:
            return found, text
        if (name := SEQUENCES.get(text[:length])) is not None:
            found.append(name)
        text = text[length:]
    return found, ""


def _sequence_length(text: str) -> int:
    """Of the escape sequence that `text` begins with; 0 if it is not whole yet."""
    if len(text) == 1:
        return 0
    if text[1] == "O":
        return 3 if len(text) > 2 else 0
    if text[1] != "[":
        return 1
    for place, letter in enumerate(text[2:], 3):
        if "@" <= letter <= "~":
            return place
    return 0


class Terminal:
    """`with Terminal() as terminal:` has the screen. Keys come from stdin if that is a terminal.

    ^C, SIGTERM and the end of the connection raise KeyboardInterrupt; ^Z gives the terminal back until `fg`.
    """

    def __init__(self) -> None:
        self._out = sys.stdout.fileno()
        self._in = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._encoding = "utf-8" if is_unicode() else "ascii"
        self._saved: list[Any] | None = None
        self._before: dict[int, Any] = {}
        self._shown: list[str] = []
        self._rest = ""
        self._wake = (-1, -1)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(self._out)
            if columns and lines:
                return columns, lines
        return 80, 24  # a serial line that tells nothing

    def __enter__(self) -> "Terminal":
        self._wake = os.pipe()
        for end in self._wake:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        actions = {
            signal.SIGWINCH: self._resized,
            signal.SIGTSTP: self._suspend,
            signal.SIGCONT: self._continued,
            signal.SIGINT: _interrupt,  # also where a script that began it in the background had it ignored
            signal.SIGTERM: _interrupt,
            signal.SIGHUP: _interrupt,
        }
        for number, action in actions.items():
            self._before[number] = signal.signal(number, action)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        signal.set_wakeup_fd(-1)
        for number, action in self._before.items():
            signal.signal(number, action)
        for end in self._wake:
            os.close(end)

    def _take(self) -> None:
        if self._in is not None:
            with contextlib.suppress(termios.error):
                if self._saved is None:
                    self._saved = termios.tcgetattr(self._in)
                tty.setcbreak(self._in, termios.TCSADRAIN)
        self._write(ENTER)
        self._shown = []

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):  # it is gone
            self._write(LEAVE)
        if self._in is not None and self._saved is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSADRAIN, self._saved)
            self._saved = None

    def _suspend(self, *_: Any) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # stops here, until SIGCONT
        signal.signal(signal.SIGTSTP, self._suspend)
        self._take()  # without a shell that could continue it, it has not stopped

    def _continued(self, *_: Any) -> None:
        self._take()  # somebody has stopped it, and a shell may have changed the terminal

    def _resized(self, *_: Any) -> None:
        self._shown = []

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines of the screen's width, with their colours; only those that differ from what is there are sent."""
        parts = [] if self._shown else ["\x1b[2J"]
        for number, line in enumerate(lines):
            if number >= len(self._shown) or self._shown[number] != line:
                parts.append(f"\x1b[{number + 1};1H{line}\x1b[0m")
        parts += [f"\x1b[{number + 1};1H\x1b[2K" for number in range(len(lines), len(self._shown))]
        self._shown = list(lines)
        self._write("".join(parts))

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding, "replace")
        while data:
            data = data[os.write(self._out, data) :]

    def wait(self, timeout_s: float, also: Collection[int] = ()) -> tuple[list[str], set[int]]:
        """Until a key, a signal, something to read at one of the descriptors `also`, or the timeout.

        Returns the keys, and which of `also` can be read.
        """
        watched = [self._wake[0], *also, *([] if self._in is None else [self._in])]
        ready = select.select(watched, [], [], max(0.0, timeout_s))[0]
        if self._wake[0] in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake[0], 4096)
        found = self._keys() if self._in is not None and self._in in ready else []
        return found, set(ready) & set(also)

    def _keys(self) -> list[str]:
        assert self._in is not None
        try:
            data = os.read(self._in, 4096)
        except OSError:
            data = b""
        if not data:
            raise KeyboardInterrupt  # the connection has ended
        found, self._rest = keys(self._rest + data.decode("utf-8", "replace"))
        while self._rest and len(self._rest) <= LONGEST and select.select([self._in], [], [], ESCAPE_S)[0]:
            more = os.read(self._in, 4096)
            if not more:
                break
            rest, self._rest = keys(self._rest + more.decode("utf-8", "replace"))
            found += rest
        if self._rest == "\x1b":
            found.append("escape")
        self._rest = ""
        return found


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
