"""The scaler with a clock of the test, and policies that do what the test says."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from kervan.config.fleet import FleetConfig, from_mapping
from kervan.fleet.directory import DemandCounts, GatewayEntry, ReplicaEntry, Snapshot
from kervan.policy.autoscale.state import Decision, FleetState
from kervan.serve.scaler.scaler import MAX_HISTORY, Scaler


class Wants:
    """A policy that wants what `number` says of the state."""

    name = "wants"

    def __init__(self, number: Callable[[FleetState], Any]) -> None:
        self.number = number
        self.seen: list[FleetState] = []
        self.memories: list[Mapping[str, Any]] = []

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        self.seen.append(state)
        self.memories.append(memory)
        wanted = self.number(state)
        return Decision(
            targets={pool.name: wanted for pool in state.pools}, reason=f"{wanted} are wanted",
            numbers={"wanted": float(wanted)}, memory={"asked": memory.get("asked", 0) + 1},
        )  # fmt: skip


class Bench:
    """A scaler, its clocks, and its fleet: replicas r0, r1, ... that are ready, and one gateway."""

    def __init__(self, policy: Wants | None, bounds: tuple[int, int] = (1, 8), stored: bytes | None = None) -> None:
        self.s, self.unix_s = 100.0, 1_700_000_000.0
        self.config = from_mapping({"model": "m", "replicas": bounds[0], "max_replicas": bounds[1]}, "a test")
        self.policy = policy
        self.scaler = Scaler(
            self.config, stored, clock=lambda: self.s, unix=lambda: self.unix_s, make=lambda *_: self.policy
        )
        self.replicas = 1
        self.is_heard = True

    def snapshot(self) -> Snapshot:
        replicas = [
            ReplicaEntry(f"r{n}", "on-demand", f"n{n}", 1, "ready", serve_id=f"s{n}", ready_for_s=100.0 - n)
            for n in range(self.replicas)
        ]
        age_s = 0.0 if self.is_heard else 6.0
        gateway = GatewayEntry(
            "g", "n", 1, "", "", True, beat_age_s=age_s, demand=DemandCounts(window_s=1.0, arrived=2)
        )
        if self.is_heard:
            self.scaler.beat(gateway)
        return Snapshot(1, replicas, [gateway], [])

    def decide(self, after_s: float = 1.0) -> int:
        """The target after one more decision."""
        self.s += after_s
        self.unix_s += after_s
        self.scaler.decide(self.snapshot())
        return self.scaler.wanted.targets["on-demand"]


def stored_by(bench: Bench) -> bytes:
    bench.s += 10.0
    stored = bench.scaler.to_store()
    assert stored is not None
    return stored


def test_a_decision_is_published_with_its_reason_and_remembered() -> None:
    bench = Bench(Wants(lambda _: 3))
    assert bench.decide() == 3
    scaling = bench.scaler.scaling
    assert (scaling.policy, scaling.targets, scaling.reason, scaling.numbers) == (
        "wants", {"on-demand": 3}, "3 are wanted", {"wanted": 3.0},
    )  # fmt: skip
    (entry,) = scaling.history
    assert (entry.before, entry.targets, entry.reason, entry.at_s) == (
        {"on-demand": 1}, {"on-demand": 3}, "3 are wanted", bench.unix_s,
    )  # fmt: skip
    bench.decide()
    assert len(bench.scaler.scaling.history) == 1
    assert [memory.get("asked") for memory in bench.policy.memories] == [None, 1]  # type: ignore[union-attr]


def test_twenty_changes_are_kept() -> None:
    wanted = iter([2, 3] * 20)
    bench = Bench(Wants(lambda _: next(wanted)))
    for _ in range(30):
        bench.decide()
    assert len(bench.scaler.scaling.history) == MAX_HISTORY == 20


@pytest.mark.parametrize(("wanted", "target"), [(0, 1), (9, 8), (10**9, 8), (-3, 1)])
def test_no_policy_leaves_the_bounds(wanted: int, target: int) -> None:
    assert Bench(Wants(lambda _: wanted)).decide() == target


def test_a_policy_that_raises_changes_no_number_and_is_told_of_once() -> None:
    wanted: list[Any] = [4]
    bench = Bench(Wants(lambda _: wanted[0] if wanted[0] else 1 / 0))
    bench.decide()
    wanted[0] = 0
    assert [bench.decide() for _ in range(5)] == [4] * 5
    scaling = bench.scaler.scaling
    assert scaling.problem == "policy wants failed (ZeroDivisionError: division by zero); the numbers stay"
    assert [entry.reason for entry in scaling.history] == ["4 are wanted", scaling.problem]
    wanted[0] = 2
    assert bench.decide() == 2
    assert bench.scaler.scaling.problem == ""


@pytest.mark.parametrize(
    "answer",
    [
        Decision(targets={}, reason=""),
        Decision(targets={"on-demand": None}, reason=""),  # type: ignore[dict-item]
        Decision(targets={"on-demand": 2}, reason="", memory={"no JSON": object()}),
        Decision(targets={"on-demand": 2}, reason="", numbers={"n": "many"}),  # type: ignore[dict-item]
        None,
    ],
)
def test_nonsense_of_a_policy_changes_no_number(answer: Any) -> None:
    policy = Wants(lambda _: 1)
    bench = Bench(policy)
    policy.number = lambda _: 3
    bench.decide()
    policy.decide = lambda state, memory: answer  # type: ignore[method-assign]
    assert bench.decide() == 3
    assert "policy wants failed" in bench.scaler.scaling.problem


def test_a_policy_that_cannot_be_made_stops_nothing() -> None:
    def make(config: FleetConfig, kinds: Sequence[str]) -> None:
        raise RuntimeError("no such model")

    bench = Bench(None)
    bench.scaler = Scaler(bench.config, stored_by(Bench(Wants(lambda _: 1))), make=make)
    assert bench.decide() == 1
    assert "there is no policy (RuntimeError: no such model)" in bench.scaler.scaling.problem


def test_silence_is_told_and_the_policy_hears_of_it() -> None:
    bench = Bench(Wants(lambda state: state.pools[0].target if state.demand is None else 4))
    bench.decide()
    bench.is_heard = False
    assert bench.decide(6.0) == 4
    assert bench.scaler.scaling.problem == "no gateway has told anything for 6 s; the numbers stay"
    bench.is_heard = True
    bench.decide()
    assert bench.scaler.scaling.problem == ""


def test_more_than_there_is_room_for_is_told_and_not_asked_for() -> None:
    bench = Bench(Wants(lambda _: 6))
    bench.scaler.look({"on-demand": 3}, {"on-demand": ["H200"]}, {"n0": "H200"})
    assert bench.decide() == 3
    assert bench.scaler.scaling.problem == "6 replicas are wanted, and the cluster has room for 3"
    assert bench.scaler.scaling.room == {"on-demand": 3}
    bench.scaler.look({"on-demand": 8}, {"on-demand": ["H200"]}, {"n0": "H200"})
    assert bench.decide() == 6
    assert bench.scaler.scaling.problem == ""


@pytest.mark.parametrize("name", ["needed", "wanted"])
def test_a_policy_that_knows_the_room_is_told_for_too(name: str) -> None:
    """It asks for no more than can be placed, and its numbers say what the load needs."""
    policy = Wants(lambda _: 3)
    bench = Bench(policy)
    policy.decide = lambda state, memory: Decision(  # type: ignore[method-assign]
        targets={"on-demand": 3}, reason="", numbers={name: 5.0}
    )
    bench.scaler.look({"on-demand": 3}, {}, {})
    bench.decide()
    assert bench.scaler.scaling.problem == "5 replicas are wanted, and the cluster has room for 3"


def test_replicas_that_are_there_do_not_leave_for_want_of_room() -> None:
    bench = Bench(Wants(lambda _: 4))
    bench.replicas = 4
    bench.decide()
    bench.scaler.look({"on-demand": 2}, {}, {})
    assert bench.decide() == 4


def test_a_fixed_number_needs_no_policy() -> None:
    bench = Bench(None, bounds=(3, 0))
    assert bench.decide() == 3
    assert (bench.scaler.scaling.policy, bench.scaler.scaling.problem) == ("fixed", "")


def test_who_leaves_is_told_by_serves_ids_whatever_the_number() -> None:
    """Nothing runs anywhere, so that the youngest goes first."""
    bench = Bench(Wants(lambda _: 3))
    bench.replicas = 3
    bench.decide()
    assert bench.scaler.wanted.leaving == ["s2", "s1", "s0"]


def test_what_the_policy_says_of_who_leaves_comes_first() -> None:
    policy = Wants(lambda _: 2)
    bench = Bench(policy)
    bench.replicas = 3
    policy.decide = lambda state, memory: Decision(  # type: ignore[method-assign]
        targets={"on-demand": 2}, reason="", leaving=("r0",)
    )
    bench.decide()
    assert bench.scaler.wanted.leaving == ["s0", "s2", "s1"]


def test_another_process_goes_on_where_one_ended() -> None:
    bench = Bench(Wants(lambda _: 5))
    bench.decide()
    stored = stored_by(bench)
    before_s = bench.scaler.now_s
    again = Bench(Wants(lambda state: state.pools[0].target), stored=stored)
    again.unix_s = bench.unix_s
    assert again.scaler.scaling.targets == {"on-demand": 5}
    assert [entry.targets for entry in again.scaler.scaling.history] == [{"on-demand": 5}]
    assert again.scaler.has_just_decided  # until all replicas have told that they are there
    assert again.decide(5.0) == 5
    assert again.policy.memories == [{"asked": 1}]  # type: ignore[union-attr]
    assert again.scaler.now_s >= before_s


@pytest.mark.parametrize("jump_s", [-86_400.0, -1.0, 3600.0])
def test_a_machine_whose_clock_jumps_has_an_even_clock_for_policies(jump_s: float) -> None:
    bench = Bench(Wants(lambda _: 2))
    bench.decide()
    bench.unix_s += jump_s
    bench.decide()
    first, second = (state.now_s for state in bench.policy.seen)  # type: ignore[union-attr]
    assert second - first == pytest.approx(1.0)
    stored = stored_by(bench)
    again = Bench(Wants(lambda _: 2), stored=stored)
    again.unix_s = bench.unix_s
    again.decide()
    assert again.policy.seen[0].now_s > second  # type: ignore[union-attr]


def test_what_cannot_be_read_is_forgotten() -> None:
    assert Bench(Wants(lambda _: 2), stored=b"{}").decide() == 2
    assert Bench(Wants(lambda _: 2), stored=b"\xff").decide() == 2


def test_another_policy_begins_with_an_empty_memory() -> None:
    bench = Bench(Wants(lambda _: 2))
    bench.decide()
    bench.policy = other = Wants(lambda _: 3)
    other.name = "other"
    bench.scaler.set_config(bench.config)
    bench.decide()
    assert other.memories == [{}]


@pytest.mark.parametrize(("bounds", "target"), [((1, 3), 3), ((6, 8), 6), ((2, 8), 5)])
def test_new_settings_leave_the_number_as_it_is_where_they_can(bounds: tuple[int, int], target: int) -> None:
    bench = Bench(Wants(lambda state: state.pools[0].target))
    bench.policy.number = lambda _: 5  # type: ignore[union-attr]
    bench.decide()
    bench.policy.number = lambda state: state.pools[0].target  # type: ignore[union-attr]
    config = from_mapping({"model": "m", "replicas": bounds[0], "max_replicas": bounds[1]}, "a test")
    bench.scaler.set_config(config)
    assert bench.decide() == target


def test_a_decision_waits_for_all_gateways_but_not_for_long() -> None:
    bench = Bench(Wants(lambda _: 2))
    bench.decide()
    heard = GatewayEntry("g", "n", 1, "", "", True, demand=DemandCounts(window_s=1.0))
    other = GatewayEntry("h", "n", 1, "", "", True, demand=DemandCounts(window_s=1.0))
    bench.s += 1.0
    assert not bench.scaler.is_due([heard, other])
    bench.scaler.beat(heard)
    assert not bench.scaler.is_due([heard, other])
    bench.scaler.beat(other)
    assert bench.scaler.is_due([heard, other])
    bench.decide(0.0)
    bench.s += 1.6
    assert bench.scaler.is_due([heard, other])


def test_what_is_stored_is_small_and_json() -> None:
    bench = Bench(Wants(lambda _: 2))
    bench.decide()
    stored = stored_by(bench)
    assert json.loads(stored)["targets"] == {"on-demand": 2}
    assert bench.scaler.to_store() is None  # not again at once
    assert len(stored) < 2000
    assert msgspec.json.decode(stored)
