"""A recording of a command for the docs: an SVG in which its lines appear as they did, some times faster.

    python benchmarks/recording.py docs/images/autoscale.svg --speed 8 -- kervan demo autoscale

It needs no script and no player: the motion is CSS. Who asks for less motion sees the end.
"""

import argparse
import html
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COLUMNS, LINES = 118, 26
CHARACTER, LINE, EDGE, BAR = 7.2, 17.0, 14.0, 30.0
HOLD_S = 6.0  # at the end, before it begins again
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def record(command: Sequence[str]) -> list[tuple[float, str]]:
    """Run it; its lines, with seconds from its start. Raises: SystemExit when it fails."""
    begin_s, lines = time.monotonic(), []
    env = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": str(COLUMNS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append((time.monotonic() - begin_s, MOVES.sub("", line).rstrip()))
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return lines


def wrapped(lines: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Lines as a terminal of `COLUMNS` breaks them."""
    return [(at_s, text[n : n + COLUMNS]) for at_s, text in lines for n in range(0, max(1, len(text)), COLUMNS)]


def picture(title: str, lines: Sequence[tuple[float, str]], speed: float) -> str:
    """The recording as SVG."""
    shown = wrapped(lines)
    total_s = shown[-1][0] / speed + HOLD_S
    height = BAR + LINES * LINE + EDGE
    width = COLUMNS * CHARACTER + 2 * EDGE
    rules, texts, scroll = [], [], ["0% { transform: translateY(0) }"]
    for number, (at_s, text) in enumerate(shown):
        percent = min(99.9, 100 * at_s / speed / total_s)
        hidden, shown_from = f"0%, {percent:.2f}%", f"{percent + 0.01:.2f}%, 100%"
        rules.append(f"@keyframes l{number} {{ {hidden} {{ opacity: 0 }} {shown_from} {{ opacity: 1 }} }}")
        if number >= LINES:
            scroll.append(f"{percent:.2f}% {{ transform: translateY({-(number + 1 - LINES) * LINE:g}px) }}")
        if text:
            texts.append(
                f'<text y="{(number + 1) * LINE - 4:g}" style="animation: l{number} {total_s:.2f}s step-end infinite">'
                f"{html.escape(text)}</text>"
            )
    end = -max(0, len(shown) - LINES) * LINE
    scroll.append(f"100% {{ transform: translateY({end:g}px) }}")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">
<title>{html.escape(title)}, {speed:g} times as fast</title>
<style>
text {{ font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #d5dbe3; white-space: pre }}
.bar {{ fill: #98a2b0 }}
.all {{ transform: translateY({end:g}px); animation: scroll {total_s:.2f}s step-end infinite }}
@keyframes scroll {{ {" ".join(scroll)} }}
{chr(10).join(rules)}
@media (prefers-reduced-motion: reduce) {{ .all, .all text {{ animation: none !important }} }}
</style>
<rect width="{width:g}" height="{height:g}" rx="8" fill="#1b222c"/>
<text class="bar" x="{EDGE:g}" y="20">$ {html.escape(title)}</text>
<text class="bar" x="{width - EDGE:g}" y="20" text-anchor="end">{speed:g}x</text>
<svg x="{EDGE:g}" y="{BAR:g}" width="{width - 2 * EDGE:g}" height="{LINES * LINE:g}"><g class="all">
{chr(10).join(texts)}
</g></svg>
</svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--speed", type=float, default=8.0, help="times as fast")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    title = " ".join([Path(given.command[0]).name, *given.command[1:]])
    given.svg.write_text(picture(title, record(given.command), given.speed))
    print(given.svg)


if __name__ == "__main__":
    main()
