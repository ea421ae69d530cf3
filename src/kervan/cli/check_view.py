"""Checks as lines: a verdict, its cause and its fix; of `kervan doctor` and `kervan comm doctor`."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from kervan.comm.check import Advice, Check

STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def counts(checks: Sequence[Check]) -> dict[str, int]:
    """How many checks have each verdict."""
    return {verdict: sum(check.verdict == verdict for check in checks) for verdict in STYLES}


def print_checks(checks: Sequence[Check], *, advice: Sequence[Advice] = (), notes: Sequence[str] = ()) -> None:
    """All of them in their order, what to set in the environment, notes, and the counts.

    Checks that are skipped for one reason, one after the other, share a line.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    width = max(len(check.name) for check in checks)
    for number, check in enumerate(checks):
        if check.verdict == "skipped" and number and _is_same(checks[number - 1], check):
            continue
        line = Text.assemble((f"{check.verdict:7}", STYLES[check.verdict]), f" {check.name:{width}}  {check.cause}")
        also = []
        for other in checks[number + 1 :] if check.verdict == "skipped" else ():
            if not _is_same(check, other):
                break
            also.append(other.name)
        if also:
            line.append(f" (also {', '.join(also)})", "dim")
        console.print(line, soft_wrap=True)
        if check.fix:
            console.print(Text(f"        {'':{width}}  fix: {check.fix}"), soft_wrap=True)
    if advice:
        print("\nrecommended environment")
    for each in advice:
        setting = f"export {each.name}={each.value}" if each.value else f"unset {each.name}"
        print(f"  {setting}  # {each.reason}")
    for note in notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts(checks).items()))


def _is_same(one: Check, other: Check) -> bool:
    return (one.verdict, one.cause) == (other.verdict, other.cause)
