"""Who takes part; ranks that fail, end early, hang or are told to end, and which of several failures is the cause.

No torch: what these ranks do takes no time, so each start costs a rank's imports of kervan alone.
"""

import re
from typing import Any

import pytest
from harness import rank_work

from kervan.errors import ConfigError, EngineError
from kervan.ranks import start
from kervan.ranks.rank import Nodes, Work


@pytest.mark.parametrize(
    ("count", "number", "rendezvous", "said"),
    [
        (2, 2, "host:29500", "--node-rank 2 is not within 0 to 1, and --nodes is 2; number the nodes from 0 to 1"),
        (1, -1, "", "--node-rank -1 is not within 0 to 0"),
        (2, 0, "", "--nodes 2 needs --rendezvous HOST:PORT"),
        (2, 0, "host:99999", "needs --rendezvous HOST:PORT"),
        (2, 0, ":29500", "needs --rendezvous HOST:PORT"),
    ],
)
def test_nodes_that_cannot_meet_are_refused(count: int, number: int, rendezvous: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Nodes(count, number, rendezvous)


def test_nodes_that_can() -> None:
    assert Nodes() == Nodes(1, 0, "")
    assert Nodes(2, 1, "10.0.0.1:29500").count == 2


def told(work: Work, arguments: Any, *, ranks: int, error: type[Exception] = EngineError) -> str:
    with pytest.raises(error) as found:
        list(start.run(work, arguments, ranks=ranks, for_s=60))
    assert type(found.value) is error
    return str(found.value)


def test_a_rank_that_raises_is_told_in_a_line_whatever_the_others_do() -> None:
    line = told(rank_work.fail_second, "luck", ranks=2)
    assert re.fullmatch(r"rank 1 of 2: ValueError: no luck \(fail_second, line \d+\)", line), line


def test_a_rank_that_is_gone_is_the_cause_and_not_the_one_that_missed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "CAUSES_S", 60.0)  # however late the other one starts on a busy machine
    line = told(rank_work.die_second, None, ranks=2)
    assert re.fullmatch(r"rank 1 of 2 exited with status 9 without a message; its last line: bye", line), line


def test_a_rank_that_only_missed_another_is_told_when_no_cause_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "CAUSES_S", 0.2)
    monkeypatch.setattr(start, "STACKS_S", 20.0)  # at most: until the stacks are there
    line = told(rank_work.miss_another, None, ranks=2)
    assert line.startswith("rank 0 of 2: RuntimeError: Connection reset by peer (miss_another, line ")
    assert re.search(r"; meanwhile rank 1 \(pid \d+\) is in miss_another \(rank_work.py:\d+\)$", line), line


def test_wrong_arguments_are_a_users_error() -> None:
    assert told(rank_work.refuse, "--seq 3", ranks=1, error=ConfigError) == "--seq 3 is odd"


def test_ranks_that_do_not_end_in_time_are_told_with_what_they_do() -> None:
    with pytest.raises(EngineError, match=r"1 of 1 ranks had not ended after 2 s( \(|, and 1 had not joined)"):
        list(start.run(rank_work.sleep, None, for_s=1.5))


@pytest.mark.parametrize("when", ["at once", "at the first row"])
def test_ranks_that_are_told_to_end_may_still_report(when: str) -> None:
    """Also one that is told before its work has begun, or before it is there."""
    with start.Ranks(rank_work.save_when_told, None, ranks=2, for_s=60) as ranks:
        if when == "at once":
            ranks.terminate()
        rows = []
        for row in ranks:
            rows.append(row)
            if when != "at once":
                ranks.terminate()
    assert sorted(row for row in rows if row.startswith("saved")) == ["saved 0", "saved 1"]


def test_the_environment_of_ranks_is_ours_and_what_is_given() -> None:
    rows = list(start.run(rank_work.environment, ("KERVAN_TEST_GIVEN", "LOCAL_RANK"), ranks=2, for_s=60,
                          env={"KERVAN_TEST_GIVEN": "yes"}))  # fmt: skip
    assert sorted(rows) == [("yes", "0"), ("yes", "1")]


def test_nothing_is_left_of_ranks_that_are_given_up() -> None:
    with start.Ranks(rank_work.sleep, None, ranks=2, for_s=60) as ranks:
        iter_rows = iter(ranks)
        assert next(iter_rows) == "here"
        processes = ranks._processes
    assert all(process.poll() is not None for process in processes)
