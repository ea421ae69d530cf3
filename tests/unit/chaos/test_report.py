"""The report of a run of chaos."""

import pytest

from kervan.chaos.effects import Disruption
from kervan.chaos.plans import DisruptionPlan
from kervan.chaos.report import ChaosReport
from kervan.chaos.verify import Difference


def report(**more: object) -> ChaosReport:
    words: dict[str, object] = {
        "plan": DisruptionPlan(periods_s={"kill": 10.0}), "engine": "twin", "target_replicas": 2, "wall_s": 60.0, "disruptions": [], "skipped": {"kill": 0},
        "streams": 10, "unfinished": 0, "tokens": 100, "broken": 0, "difference": Difference(), "errors": {},
        "messages": {}, "moves": 0, "longest_s": [],
    }  # fmt: skip
    return ChaosReport(**(words | more))  # type: ignore[arg-type]


def test_the_report_has_the_keys_that_scripts_rely_on() -> None:
    whole = Disruption(0, "kill", "a", 10.0, 3, 10.5, 12.5)  # 2 s
    later = Disruption(1, "drain", "b", 20.0, 3, 20.0, 26.0)  # 6 s
    found = report(
        disruptions=[whole, later], skipped={"kill": 1, "drain": 0}, moves=3, longest_s=[0.5, 0.1, 0.3, 0.02, 0.2]
    ).to_dict()
    assert found["disruptions"] == 2
    assert found["recover_s"] == {"p50": 4.0, "max": 6.0}  # halfway between 2 and 6
    # the three longest: 0.2, 0.3, 0.5; p99 is 98% of the way from 0.3 to 0.5
    assert found["gap_s"] == {"p50": 0.3, "p99": 0.496, "max": 0.5}
    assert found["kinds"]["kill"] == {"disruptions": 1, "skipped": 1, "recover_s": {"p50": 2.0, "max": 2.0}}
    assert (found["skipped"], found["moves"], found["streams"]) == (1, 3, 10)
    needed = {"disruptions", "streams", "broken", "tokens_lost", "tokens_doubled", "moves", "gap_s", "recover_s"}
    assert needed <= found.keys()


def test_without_moves_and_disruptions_there_are_no_times() -> None:
    found = report().to_dict()
    assert found["gap_s"] == {"p50": None, "p99": None, "max": None}
    assert found["recover_s"] == {"p50": None, "max": None}


@pytest.mark.parametrize(
    ("more", "is_good"),
    [
        ({}, True),
        ({"broken": 1}, False),
        ({"difference": Difference(lost=1)}, False),
        ({"difference": Difference(doubled=1)}, False),
        ({"difference": Difference(wrong=1)}, False),
        ({"streams": 0}, False),
        ({"disruptions": [Disruption(0, "kill", "a", 10.0, felt_s=11.0)]}, False),
        ({"disruptions": [Disruption(0, "kill", "a", 10.0, felt_s=11.0)], "was_interrupted": True}, True),
        ({"unfinished": 5, "was_interrupted": True}, True),
    ],
    ids=str,
)
def test_what_is_good(more: dict[str, object], is_good: bool) -> None:
    assert report(**more).is_good is is_good
