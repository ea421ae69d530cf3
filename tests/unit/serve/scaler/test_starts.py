"""How long replicas take to start, learned from those that did."""

import pytest

from kervan.fleet.directory import ReplicaEntry
from kervan.serve.scaler.starts import Starts


def replica(name: str, state: str, *, age_s: float, ready_for_s: float = 0.0, node: str = "n") -> ReplicaEntry:
    return ReplicaEntry(name, "on-demand", node, 1, state, age_s=age_s, ready_for_s=ready_for_s)  # type: ignore[arg-type]


def test_nothing_is_known_before_the_first_one() -> None:
    assert Starts(prior_s=90).expected_s(["H200"]) == 90


def test_a_start_counts_from_when_it_was_wanted() -> None:
    """Wanted at 100, its process began at 104, ready at 134: 34 s."""
    starts = Starts(prior_s=90)
    starts.look([replica("a", "ready", age_s=10, ready_for_s=10)], {"n": "H200"}, 99)
    starts.wanted("on-demand", 100)
    starts.look([replica("b", "starting", age_s=1)], {"n": "H200"}, 105)
    starts.look([replica("b", "ready", age_s=32, ready_for_s=2)], {"n": "H200"}, 136)
    starts.look([replica("b", "ready", age_s=33, ready_for_s=3)], {"n": "H200"}, 137)
    assert starts.known == {"H200": [34.0]}


def test_waiting_for_room_is_no_part_of_a_start() -> None:
    starts = Starts()
    starts.look([replica("a", "ready", age_s=10, ready_for_s=10)], {}, 0)
    starts.wanted("on-demand", 0)
    starts.look([replica("b", "starting", age_s=0)], {"n": "H200"}, 500)
    starts.look([replica("b", "ready", age_s=40, ready_for_s=0)], {"n": "H200"}, 540)
    assert starts.expected_s(["H200"]) == 40


def test_what_is_ready_when_it_looks_for_the_first_time_has_started_too() -> None:
    starts = Starts()
    starts.look([replica("a", "ready", age_s=70, ready_for_s=20)], {"n": "A100"}, 5)
    assert starts.expected_s(["A100"]) == 50


def test_a_replica_that_never_was_ready_teaches_nothing() -> None:
    starts = Starts(prior_s=7)
    starts.look([replica("b", "starting", age_s=0)], {}, 1)
    starts.look([], {}, 2)
    assert starts.known == {}
    assert starts.expected_s([]) == 7


@pytest.mark.parametrize(("kinds", "expected_s"), [(["slow"], 99.0), (["fast"], 10.0), (["new"], 99.0)])
def test_nine_of_ten_starts_are_no_longer(kinds: list[str], expected_s: float) -> None:
    """Of 10, the longest; a kind that is not known is taken to be like all."""
    starts = Starts({"slow": [90.0, 99.0], "fast": [10.0] * 8})
    assert starts.expected_s(kinds) == expected_s


def test_the_latest_count() -> None:
    starts = Starts({"k": [float(n) for n in range(100)]})
    starts.look([replica("a", "ready", age_s=5.5, ready_for_s=0.5)], {"n": "k"}, 0)
    assert (len(starts.known["k"]), starts.known["k"][-1]) == (32, 5.0)
