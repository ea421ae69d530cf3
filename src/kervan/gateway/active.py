"""How busy a thread is."""

import time
from pathlib import Path

SCHEDSTAT = Path("/proc/thread-self/schedstat")


def active_s(schedstat: Path = SCHEDSTAT) -> float:
    """Seconds for which this thread ran or waited for a core.

    CPU time alone would make a loop that has to share its core look idle. Where the kernel does not count waits
    (CONFIG_SCHED_INFO), it is the CPU time.
    """
    try:
        ran_ns, waited_ns, _ = schedstat.read_text().split()
    except (OSError, ValueError):
        return time.thread_time()
    return (int(ran_ns) + int(waited_ns)) / 1e9
