"""`kervan memory finetune` on a node that goes: SIGTERM, then a cloud's notice; each leaves a checkpoint to go on from."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from harness.clouds import Aws, serving_beside

pytestmark = pytest.mark.timeout(600)  # importing torch alone takes a minute on a busy machine

STEPS = 1_000_000  # far more than are done here


class Training:
    """A `kervan memory finetune` that trains; `lines`: what it has said."""

    def __init__(self, folder: Path, ranks: int, env: dict[str, str]) -> None:
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.record = folder / f"record-{ranks}.json"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kervan", "memory", "finetune", "tiny", "--device", "cpu", "--ranks", str(ranks),
             "--technique", "fp32,fsdp", "--batch", "2", "--seq", "32", "--steps", str(STEPS),
             "--checkpoint", str(folder / "checkpoints"), "--record", str(self.record)],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
        )  # fmt: skip
        self.lines: list[str] = []
        self.trains = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if re.search(r"step \d+: loss", line):
                self.trains.set()
        self.trains.set()

    def until_it_trains(self) -> None:
        assert self.trains.wait(300)
        assert self.process.poll() is None, self.lines

    def ended(self) -> dict[str, Any]:
        """Its one run, as recorded."""
        self._reader.join(300)
        assert self.process.wait(60) == 0, self.lines
        (run,) = json.loads(self.record.read_text())["runs"]
        return dict(run)


@contextmanager
def training(folder: Path, *, ranks: int, env: dict[str, str]) -> Iterator[Training]:
    started = Training(folder, ranks, env)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def test_a_node_that_goes_leaves_a_checkpoint_and_another_goes_on(tmp_path: Path) -> None:
    with training(tmp_path, ranks=2, env={"KERVAN_NOTICES_WATCH": "signal"}) as first:
        first.until_it_trains()
        first.process.send_signal(signal.SIGTERM)
        run = first.ended()
    assert (run["stopped_early"], run["ended_by"], run["resumed_from"]) == (True, "SIGTERM", 0)
    assert run["checkpoint"] == str(tmp_path / "checkpoints" / f"step-{run['steps']}")
    assert len(run["losses"]) == run["steps"] < STEPS

    cloud = Aws()
    with serving_beside(cloud) as server:
        notices = {"KERVAN_NOTICES_WATCH": "aws", "KERVAN_NOTICES_AWS_URL": server.url,
                   "KERVAN_NOTICES_AWS_PERIOD_S": "0.2"}  # fmt: skip
        with training(tmp_path, ranks=1, env=notices) as second:
            cloud.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": _utc(0)})
            second.until_it_trains()  # a recommendation ends nothing
            cloud.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": _utc(120)})
            again = second.ended()
    assert (again["ended_by"], again["resumed_from"]) == ("preemption notice of aws", run["steps"])
    assert again["steps"] > run["steps"]
    assert again["losses"][: run["steps"]] == run["losses"]
    assert (Path(again["checkpoint"]) / ".metadata").is_file()


def _utc(in_s: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=in_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_setting_of_notices_that_is_wrong_is_told_before_anything_trains() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kervan", "memory", "finetune", "tiny", "--device", "cpu", "--steps", "1"],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "KERVAN_NOTICES_WATCH": "moon"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "watch names 'moon'" in done.stderr
    assert "Traceback" not in done.stderr
