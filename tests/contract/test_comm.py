"""Collectives over real ranks on CPU: results, planted errors, a rank that hangs, two nodes; torch and gloo underneath.

The ranks of one start serve several tests, as starting them takes longer than all that they do.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.rank_work import plans

from kervan.comm import examine, preflight
from kervan.comm.collectives import OPS, CollectivesPlan, Timing
from kervan.errors import EngineError
from kervan.ports import free_port
from kervan.ranks import start

SIZES = (8, 1000, 1 << 18)
RIGHT = CollectivesPlan(on_gpu=False, ops=OPS, bytes=SIZES)
PLANTED = CollectivesPlan(on_gpu=False, ops=OPS, bytes=(1000,), planted_rank=1)
HANGS = CollectivesPlan(on_gpu=False, ops=(), sleeping_rank=1, limit_s=8.0)


class Group:
    """What two ranks found, and how they ended."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Timing]] = {}
        self.problem = ""


@pytest.fixture(scope="module")
def group() -> Group:
    found = Group()
    try:
        for name, row in start.run(plans, {"right": RIGHT, "planted": PLANTED, "hangs": HANGS}, ranks=2, for_s=240):
            found.rows.setdefault(name, []).append(row)
    except EngineError as error:
        found.problem = str(error)
    return found


def test_every_operation_gives_the_exact_result_at_every_size(group: Group) -> None:
    rows = group.rows["right"]
    assert [(row.op, row.num_wrong) for row in rows] == [(op, 0) for op in OPS for _ in SIZES]
    assert all(row.bytes <= size for row, size in zip(rows, SIZES * len(OPS), strict=True))
    assert {(row.mode, row.backend, row.ranks) for row in rows} == {("eager", "gloo", 2)}


def test_times_have_a_spread_and_the_slowest_rank_a_name(group: Group) -> None:
    for row in group.rows["right"]:
        assert 0 < row.min_us <= row.time_us <= row.max_us
        assert len(row.rank_us) == 2
        assert row.rank_us[row.slowest_rank] == max(row.rank_us)
        assert row.slowest_host


def test_a_wrong_result_of_any_operation_is_seen(group: Group) -> None:
    assert [(row.op, row.is_correct) for row in group.rows["planted"]] == [(op, False) for op in OPS]


def test_a_rank_that_sleeps_in_a_collective_is_named_and_the_others_are_not_blamed(group: Group) -> None:
    assert "2 of 2 ranks made no progress: all_reduce that one rank sleeps in takes too long" in group.problem
    hang = re.search(
        r"a collective hangs: rank 1 \(pid \d+\) is in _hang \(collectives.py:\d+\); rank 0 waits for it", group.problem
    )
    assert hang, group.problem


def test_a_host_with_a_wrong_result_is_refused_in_one_line() -> None:
    plan = examine.ExaminePlan(on_gpu=False, bytes=(64,), planted_rank=0)
    with pytest.raises(EngineError) as refusal:
        preflight.run(num_ranks=2, on_gpu=False, plan=plan, for_s=240)
    line = str(refusal.value)
    assert re.match(r"host \S+ fails the preflight: results: data arrives wrong: all-reduce of 64 bytes: 1 wrong", line)
    assert line.endswith("--no-preflight starts all the same")
    assert "\n" not in line


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    import os

    yield {**os.environ, "KERVAN_HOME": str(tmp_path)}


def kervan(*arguments: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "kervan", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def test_the_doctor_finds_a_healthy_cpu_host_healthy_and_writes_a_record(
    environment: dict[str, str], tmp_path: Path
) -> None:
    process = kervan("comm", "doctor", "--device", "cpu", "--json", env=environment)
    out, err = process.communicate(timeout=240)
    report: dict[str, Any] = json.loads(out)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts["measurement"] == verdicts["results"] == verdicts["versions"] == "pass", report["checks"]
    assert verdicts["bandwidth"] == "skipped"
    assert process.returncode == int("fail" in verdicts.values())
    (record,) = (tmp_path / "comm").iterdir()
    assert str(record) in err
    stored = json.loads(record.read_text())
    assert (stored["what"], stored["checks"]) == ("comm-doctor", report["checks"])
    assert stored["versions"]["torch"]


@pytest.mark.exhaustive
def test_two_nodes_meet_and_both_have_the_rows(environment: dict[str, str], tmp_path: Path) -> None:
    common = ("comm", "bench", "--device", "cpu", "--ranks", "1", "--op", "all-reduce", "--bytes", "8,1KiB", "--json",
              "--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}")  # fmt: skip
    nodes = [kervan(*common, "--node-rank", str(number), env=environment) for number in range(2)]
    try:
        results = [json.loads(node.communicate(timeout=280)[0])["rows"] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert results[0] == results[1]
    assert [(row["bytes"], row["ranks"], row["correct"]) for row in results[0]] == [(8, 2, True), (1024, 2, True)]
