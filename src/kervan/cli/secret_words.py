"""Takes API keys out of what others see of a command: its line in `ps`, and in Ray's list of jobs."""

import sys
from collections.abc import Sequence
from pathlib import Path

OPTIONS = ("--api-key",)
HIDDEN = "***"


def without(words: Sequence[str]) -> list[str]:
    """A command line with its keys replaced."""
    shown: list[str] = []
    for word in words:
        option, equals, _ = word.partition("=")
        if shown and shown[-1] in OPTIONS:
            shown.append(HIDDEN)
        elif equals and option in OPTIONS:
            shown.append(f"{option}={HIDDEN}")
        else:
            shown.append(word)
    return shown


def hide() -> None:
    """Take them out of this process's line; where that cannot be, say so. Until here, about 0.1 s, they were seen."""
    if not any(word.partition("=")[0] in OPTIONS for word in sys.argv[1:]):
        return
    try:
        from setproctitle import setproctitle

        words = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except (ImportError, OSError):
        print("warning: ps shows the key of --api-key to all users here; set KERVAN_API_KEY instead", file=sys.stderr)
        return
    setproctitle(" ".join(without(words)))
