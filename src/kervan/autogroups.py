"""Whether this Linux starves sessions for seconds: docs/serving.md, "When everything stands still for seconds"."""

import platform
import re
from pathlib import Path

SWITCH = Path("/proc/sys/kernel/sched_autogroup_enabled")
# By a report, 6.18 has the fault up to .44, which was seen here; 6.18.45 has the fix (101f3498b4bd).
SERIES, FIRST_FIXED = (6, 18), 45


def are_on() -> bool:
    """Whether Linux schedules each session as a group."""
    return SWITCH.exists() and SWITCH.read_text().strip() == "1"


def warning() -> str | None:
    """One line, if sessions may be starved here: what may happen and what to do."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", platform.release())
    if version is None or not are_on():
        return None
    major, minor, patch = map(int, version.groups())
    if (major, minor) != SERIES or patch >= FIRST_FIXED:
        return None
    return (
        f"Linux {version[0]} with autogroups on may give busy processes no CPU for seconds; turn them off before the "
        "fleet starts: sudo sysctl -w kernel.sched_autogroup_enabled=0"
    )
