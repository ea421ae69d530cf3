"""A terminal as a full screen: keys, resizing, ^Z and `fg`, ^C, the end of the connection; in a real one (a pty)."""

import os
import signal
import sys
import termios
from pathlib import Path

import pytest
from harness.screen import Screen, on_screen

from kervan.cli.live.terminal import is_unicode, keys

PROGRAM = """
import sys
from kervan.cli.live.terminal import Terminal
pressed = []
with Terminal() as terminal:
    while "q" not in pressed:
        width, height = terminal.size
        lines = [f"{width}x{height}", " ".join(pressed[-6:])]
        terminal.draw([line.ljust(width) for line in lines] + ["." * width] * (height - 2))
        pressed += terminal.wait(60.0)[0]
print("bye", flush=True)
"""
WORDS = [sys.executable, "-c", PROGRAM]
ENV = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}


@pytest.mark.parametrize(
    ("text", "names", "rest"),
    [
        ("qs", ["q", "s"], ""),
        ("\x1b[A\x1bOB\x1b[5~", ["up", "down", "page up"], ""),
        ("\r\t\x1b[Z\x7f", ["enter", "tab", "back tab", "backspace"], ""),
        ("j\x1b", ["j"], "\x1b"),
        ("\x1b[6", [], "\x1b[6"),
        ("\x1b[200~q", ["q"], ""),  # a sequence that is no key is left out whole
        ("\x1b[1;5Cq", ["q"], ""),
        ("\x1bq", ["escape", "q"], ""),
    ],
)
def test_keys_of_what_a_terminal_sends(text: str, names: list[str], rest: str) -> None:
    assert keys(text) == (names, rest)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LANG": "en_US.UTF-8"}, True),
        ({"LANG": "C.utf8"}, True),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "C"}, False),
        ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, True),
        ({"LANG": "en_US.ISO-8859-1"}, False),
        ({}, False),
    ],
)
def test_the_locale_says_whether_graphs_may_be_more_than_ascii(environ: dict[str, str], expected: bool) -> None:
    assert is_unicode(environ) is expected


def is_raw(screen: Screen) -> bool:
    return not screen.modes()[3] & termios.ECHO


def test_keys_sizes_and_the_end() -> None:
    with on_screen(WORDS, ENV, columns=40, lines=10) as screen:
        screen.until("40x10")
        assert is_raw(screen)
        screen.press("a\x1b[A\x1b")
        screen.until("a up escape")
        for columns, lines in ((80, 24), (200, 60), (30, 5)):
            screen.resize(columns, lines)
            screen.until(
                lambda text, head=f"{columns}x{lines}", last="." * columns: (
                    text.startswith(head) and text.endswith(last)
                )
            )
        screen.press("q")
        screen.until("bye")
        assert screen.process.wait(10) == 0
        assert screen.modes() == screen.modes_before
        assert screen.output.rindex(b"\x1b[?1049l") > screen.output.rindex(b"\x1b[?1049h")
        assert b"\x1b[?25h" in screen.output


def test_only_lines_that_changed_are_sent() -> None:
    with on_screen(WORDS, ENV) as screen:
        screen.until("80x24")
        before = len(screen.output)
        screen.press("a")
        screen.until(lambda text: text.splitlines()[1] == "a")
        assert len(screen.output) - before < 200


def test_suspended_by_ctrl_z_it_gives_the_terminal_to_the_shell_and_fg_brings_it_back(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with on_screen(["bash", "--norc", "--noprofile", "-i"], {**ENV, "PS1": "shell> "}, cwd=tmp_path) as screen:
        screen.until("shell>")
        screen.press(f"{sys.executable} program.py\n")
        screen.until("80x24")
        screen.press("a")
        screen.until(lambda text: text.splitlines()[1] == "a")
        screen.press("\x1a")
        screen.until("Stopped")
        assert screen.output.count(b"\x1b[?1049l") == 1
        screen.press("echo in the $((20 + 22)) shell\n")
        screen.until("in the 42 shell")
        screen.press("fg\n")
        screen.until(lambda text: text.startswith("80x24") and text.endswith("." * 80))
        assert is_raw(screen)
        screen.press("b")
        screen.until(lambda text: text.splitlines()[1] == "a b")
        screen.press("q")
        screen.until("bye")
        screen.press("exit\n")
        assert screen.process.wait(10) == 0
        assert screen.modes() == screen.modes_before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_however_it_ends_the_terminal_is_as_before(number: signal.Signals) -> None:
    with on_screen(WORDS, ENV) as screen:
        screen.until("80x24")
        if number == signal.SIGINT:
            screen.press("\x03")
        else:
            screen.process.send_signal(number)
        assert screen.process.wait(10) != 0
        screen.until("KeyboardInterrupt")
        assert screen.modes() == screen.modes_before


def test_a_terminal_that_has_no_utf_8_gets_ascii() -> None:
    program = PROGRAM.replace('"." * width', '"\\u2588" * width')
    with on_screen([sys.executable, "-c", program], {**ENV, "LC_ALL": "C"}) as screen:
        screen.until("80x24")
        screen.until(lambda text: text.splitlines()[-1] == "?" * 80)
