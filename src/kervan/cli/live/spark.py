"""Small pictures of numbers in a line of text: the last values, and a share. ASCII where the terminal has no more."""

from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " .:-=+*#@"


def spark(values: Sequence[float | None], width: int, *, is_unicode: bool, top: float = 0.0) -> str:
    """The last `width` values, the latest at the right; the highest mark is `top`, or a larger value.

    None, and what was not seen yet, is a space; a value above 0 has a mark.
    """
    levels = BLOCKS if is_unicode else ASCII
    shown = list(values)[-width:] if width > 0 else []
    most = max((value for value in shown if value is not None), default=0.0)
    most = max(most, top)
    marks = [" " if value is None else _mark(value, most, levels) for value in shown]
    return "".join(marks).rjust(max(0, width))


def _mark(value: float, most: float, levels: str) -> str:
    if value <= 0 or most <= 0:
        return levels[1]
    return levels[max(1, min(len(levels) - 1, round(value / most * (len(levels) - 1))))]


def meter(share: float, width: int, *, is_unicode: bool) -> str:
    """A bar of `width` for a share of 0 to 1."""
    filled = round(max(0.0, min(1.0, share)) * width)
    full, empty = ("█", "░") if is_unicode else ("#", ".")
    return full * filled + empty * (width - filled)
