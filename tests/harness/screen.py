"""A command in a real terminal (a pty), whose screen is what pyte makes of its output."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte

WAIT_S = 60.0


class Screen:
    """What the command shows on `columns` times `lines`; keys go to it with `press`."""

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], *, columns: int, lines: int, cwd: Path | None = None
    ) -> None:
        self._main, side = pty.openpty()
        self._side = side  # kept open, so that the modes that the command left can be read
        self.modes_before = termios.tcgetattr(side)
        self._set_size(columns, lines)
        self.output = b""
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            words, stdin=side, stdout=side, stderr=side, env=dict(env), cwd=cwd, start_new_session=True,
            preexec_fn=lambda: _take_terminal(side),  # noqa: PLW1509 - no thread of this process is in the way
        )  # fmt: skip
        self._is_over = False
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        while not self._is_over:
            if not select.select([self._main], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._main, 1 << 16)
            except OSError:
                return
            with self._changed:
                self.output += data
                # pyte takes private modes that it does not know for others
                self._stream.feed(data)
                self._changed.notify_all()

    @property
    def lines(self) -> list[str]:
        """What is shown."""
        with self._changed:
            return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def cells(self) -> list[list[Any]]:
        """pyte's characters with their colours."""
        with self._changed:
            return [[self._screen.buffer[y][x] for x in range(self._screen.columns)] for y in range(self._screen.lines)]

    def until(self, check: str | Callable[[str], object], timeout_s: float = WAIT_S) -> str:
        """The text of the screen once `check` is in it, or true of it."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._changed:
                text = "\n".join(line.rstrip() for line in self._screen.display)
                if (re.search(check, text) if isinstance(check, str) else check(text)) is not None and (
                    isinstance(check, str) or check(text)
                ):
                    return text
                assert time.monotonic() < deadline_s, f"never {check!r}:\n{text}"
                assert self.process.poll() is None or self._changed.wait(0.5), f"ended, never {check!r}:\n{text}"
                self._changed.wait(0.5)

    def press(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        with self._changed:
            self._screen.resize(lines, columns)
            self._screen.reset()
        self._set_size(columns, lines)  # which sends SIGWINCH

    def modes(self) -> list[Any]:
        """Of the terminal, now."""
        return termios.tcgetattr(self._side)

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._is_over = True
        self._reading.join()
        os.close(self._main)
        os.close(self._side)


def _take_terminal(side: int) -> None:
    fcntl.ioctl(side, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def on_screen(
    words: Sequence[str], env: Mapping[str, str], *, columns: int = 80, lines: int = 24, cwd: Path | None = None
) -> Iterator[Screen]:
    """The command runs within the block."""
    screen = Screen(words, env, columns=columns, lines=lines, cwd=cwd)
    try:
        yield screen
    finally:
        screen.close()
