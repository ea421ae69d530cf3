import os
import subprocess
import sys
from pathlib import Path

from kervan.fleet.log_files import MAX_LOGS, new_log, open_log


def test_old_logs_go_but_not_those_of_living_processes(tmp_path: Path) -> None:
    for number in range(MAX_LOGS + 5):
        path = tmp_path / f"{number:03}.log"
        path.write_text("")
        os.utime(path, (number, number))
    quiet = tmp_path / "001.log"  # among the oldest, and its process lives
    with open_log(quiet) as log:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    try:
        assert new_log(tmp_path, "new") == tmp_path / "new.log"
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {f"{number:03}.log" for number in (1, *range(6, MAX_LOGS + 5))}
    finally:
        process.communicate(b"\n")
    new_log(tmp_path, "new")
    assert not quiet.exists()
