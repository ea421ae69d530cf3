"""How busy a gateway's loop is."""

import time
from pathlib import Path

from kervan.gateway.program import active_s


def test_a_loop_that_waits_for_a_core_is_busy_too(tmp_path: Path) -> None:
    schedstat = tmp_path / "schedstat"
    schedstat.write_text("1500000000 250000000 7\n")
    assert active_s(schedstat) == 1.75


def test_where_the_kernel_counts_no_waits_it_is_cpu_time(tmp_path: Path) -> None:
    for schedstat in (tmp_path / "none", tmp_path):
        before_s = time.thread_time()
        assert before_s <= active_s(schedstat) <= time.thread_time()
