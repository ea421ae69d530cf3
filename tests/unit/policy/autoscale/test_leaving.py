from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.policy.autoscale.leaving import choose
from kervan.policy.autoscale.state import ReplicaState


def replica(name: str, **more: Any) -> ReplicaState:
    return ReplicaState(**{"id": name, "pool": "on-demand", "phase": "ready", "ready_for_s": 100.0} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("why", "stays", "leaves"),
    [
        ("it serves nobody yet", {"context_tokens": 0}, {"phase": "starting"}),
        ("it has earlier settings", {"context_tokens": 0}, {"is_outdated": True, "context_tokens": 90_000}),
        ("it has fewer tokens to move", {"context_tokens": 50_000}, {"context_tokens": 8_000}),
        ("prompts that wait are computed again too", {"queued_tokens": 9_000}, {"context_tokens": 5_000}),
        ("it is younger, and has less in its cache", {"ready_for_s": 500.0}, {"ready_for_s": 20.0}),
        ("of starting ones the last begun is farthest from ready", {"phase": "starting", "age_s": 60.0}, {"phase": "starting", "age_s": 5.0}),
    ],
)  # fmt: skip
def test_who_leaves_first(why: str, stays: dict[str, Any], leaves: dict[str, Any]) -> None:
    assert choose([replica("a", **stays), replica("b", **leaves)], {"on-demand": 1}) == ("b",), why
    assert choose([replica("a", **leaves), replica("b", **stays)], {"on-demand": 1}) == ("a",), why


def test_what_empties_a_node_leaves_before_what_leaves_a_hole() -> None:
    fleet = [replica("a", node="n1"), replica("b", node="n1"), replica("c", node="n2", context_tokens=30_000)]
    assert choose(fleet, {"on-demand": 2}) == ("c",)
    fleet = [replica(name, node=node) for name, node in (("a", "n1"), ("b", "n1"), ("c", "n2"), ("d", "n2"))]
    assert set(choose(fleet, {"on-demand": 2})) in ({"a", "b"}, {"c", "d"})


def test_spot_leaves_the_zone_that_has_most_of_it() -> None:
    spot = [
        replica("a", pool="spot", zone="z1", context_tokens=0),
        replica("b", pool="spot", zone="z2", context_tokens=50_000),
        replica("c", pool="spot", zone="z2", context_tokens=60_000),
    ]
    assert choose(spot, {"spot": 2}) == ("b",)


def test_pools_are_apart_and_those_that_leave_already_are_none_of_the_target() -> None:
    fleet = [
        replica("a"), replica("b", phase="draining"), replica("c", phase="unhealthy"),
        replica("s", pool="spot"), replica("t", pool="spot"),
    ]  # fmt: skip
    assert choose(fleet, {"on-demand": 1, "spot": 1}) in (("s",), ("t",))
    assert choose(fleet, {"on-demand": 1, "spot": 2}) == ()
    assert choose(fleet, {}) == ()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["starting", "ready", "draining"]), st.integers(0, 9), st.integers(0, 3))),
    st.integers(0, 5),
)
def test_as_many_leave_as_are_too_many_and_in_the_same_order_each_time(found: list[Any], target: int) -> None:
    fleet = [
        replica(f"r{n}", phase=phase, context_tokens=1000 * tokens, node=f"n{node}")
        for n, (phase, tokens, node) in enumerate(found)
    ]
    here = sum(one.phase != "draining" for one in fleet)
    chosen = choose(fleet, {"on-demand": target})
    assert len(chosen) == len(set(chosen)) == max(0, here - target)
    assert chosen == choose(fleet[::-1], {"on-demand": target})
