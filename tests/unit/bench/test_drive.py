"""How a load is spread over processes, what becomes of commands, and when it ends early."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from kervan.bench import drive
from kervan.bench.counting import WorkerProgress
from kervan.bench.drive import check_file_limit
from kervan.errors import ConfigError


def test_streams_beyond_the_file_limit_are_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"ulimit -n \d+.*--processes \d+"):
        check_file_limit(10**9, 1)


def test_a_command_that_does_not_finish_is_killed_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(drive, "LAST_S", 0.05)
    started = tmp_path / "pid"
    run = drive._DriverRun({}, [drive.Action(0.0, f"sleep 1000 & echo $! > {started}; wait")], None)
    run._start_s = time.time()
    run._step()
    while not started.exists() or not started.read_text().endswith("\n"):
        time.sleep(0.005)
    run._end_actions()
    (event,) = run._events
    assert event.exit_code is None
    assert event.duration_s > 0
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(int(started.read_text())).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.005)


def progress(**counts: Any) -> WorkerProgress:
    return WorkerProgress(0, **counts)


def test_when_nothing_can_succeed() -> None:
    assert drive._is_hopeless([progress(errors=5, hopeless=5), progress(errors=3, hopeless=3)])
    assert not drive._is_hopeless([progress(errors=7, hopeless=7)])  # by chance
    assert not drive._is_hopeless([progress(ok=1, errors=99, hopeless=99)])
    assert not drive._is_hopeless([progress(errors=99, hopeless=98)])  # a server that is busy
    assert not drive._is_hopeless([progress(errors=8, hopeless=8, in_flight=8)])
