"""Fleets small enough to follow by hand, and what holds of any."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from harness.simulated import EvenTimes, engine, pool, requests, setup, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.bench.arrivals import parse_stages
from kervan.config.node_trace import NodeChange, NodeTrace
from kervan.config.workload import TraceRow, parse_lengths
from kervan.errors import ConfigError
from kervan.plan import serving
from kervan.plan.serving import LoadRequest
from kervan.policy.autoscale.state import Decision, FleetState
from kervan.sim.constants import Constants
from kervan.sim.step_time import Batch
from kervan.simulate import html_report, policies
from kervan.simulate.duration import fixed
from kervan.simulate.fixed import FixedNumber
from kervan.simulate.fleet import Simulation
from kervan.simulate.setup import LoadSetup, PoolSetup


class Script:
    """Targets of the first pool from a second on; keeps the states that it was shown."""

    name = "script"

    def __init__(self, targets: Mapping[int, int], leaving: tuple[str, ...] = ()) -> None:
        self.targets = targets
        self.leaving = leaving
        self.states: list[FleetState] = []

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        self.states.append(state)
        due = [second for second in self.targets if second <= state.now_s]
        count = self.targets[max(due)] if due else state.pools[0].minimum
        targets = {one.name: one.minimum for one in state.pools} | {state.pools[0].name: count}
        return Decision(targets=targets, reason="as told", leaving=self.leaving)


def test_a_request_alone_takes_a_step_for_its_prompt_and_one_for_each_further_token() -> None:
    outcome = simulate(setup(requests((0.0, 50, 4))))
    assert outcome.ttft_s["p50"] == 1.0
    assert outcome.tpot_s["p50"] == 1.0
    assert (outcome.finished, outcome.good, outcome.broken) == (1, 1, 0)


def test_a_prompt_above_the_budget_takes_several_steps() -> None:
    assert simulate(setup(requests((0.0, 250, 2)))).ttft_s["p50"] == 3.0


def test_who_comes_during_a_step_waits_for_it_and_for_the_one_that_is_composed_already() -> None:
    # The first decodes from second 1 on. The second comes at 2.5, in the step from 2 to 3; that from 3 to 4 is composed
    # already; its prompt is in the one from 4 to 5.
    simulation = Simulation(setup(requests((0.0, 50, 20), (2.5, 50, 2))), FixedNumber(), times=EvenTimes())
    simulation.run()
    assert list(simulation.tally.ttfts_s) == [1.0, 2.5]


def test_two_replicas_share_two_requests() -> None:
    alone = simulate(setup(requests((0.0, 90, 5), (0.0, 90, 5))))
    both = simulate(setup(requests((0.0, 90, 5), (0.0, 90, 5)), [pool(2)]))
    assert alone.ttft_s["p99"] > 1.9
    assert both.ttft_s["p99"] == 1.0


def test_a_replica_is_ready_its_start_time_after_the_decision_and_is_paid_from_the_decision_on() -> None:
    policy = Script({5: 2, 30: 1})
    load = requests((0.0, 10, 60))
    outcome = simulate(setup(load, [pool(1, 2, start_s=10.0, usd_per_hour=3600.0)]), policy)
    ready = [state.count("ready") for state in policy.states]
    # Decided at 5; ready at 15, which the state of second 15 or 16 shows.
    assert ready[4:14] == [1] * 10
    assert 2 in ready[14:16]
    assert outcome.started_replicas == 2
    # One from 0 to the end, the other from 5 to 30 (it has no streams, and is gone at once).
    end_s = outcome.episode_s
    assert outcome.usd == pytest.approx(end_s + 25.0, abs=1.1)
    assert outcome.mean_replicas == pytest.approx((end_s + 25.0) / end_s, rel=0.03)


def test_a_starting_replica_that_is_not_needed_any_more_is_ended_first() -> None:
    policy = Script({2: 2, 6: 1})
    outcome = simulate(setup(requests((0.0, 10, 30)), [pool(1, 2, start_s=10.0)]), policy)
    assert max(state.count("ready") for state in policy.states) == 1
    assert outcome.moves == 0
    assert outcome.finished == 1


def test_a_drained_replica_s_streams_go_on_elsewhere_and_lose_nothing() -> None:
    # Two replicas with a stream each; the second leaves at 20, and its stream has 180 tokens to go.
    policy = Script({1: 2, 20: 1}, leaving=("on-demand-0002",))
    rows = requests((0.0, 50, 200), (0.0, 50, 200))
    outcome = simulate(setup(rows, [pool(2, 2)], slo="ttft=3s"), policy)
    assert (outcome.finished, outcome.broken, outcome.moves) == (2, 0, 1)
    assert outcome.output_tokens == 400
    assert 60 <= outcome.recomputed_tokens <= 80
    assert policy.states[-1].count("ready") == 1
    # A prefill of some 70 tokens, of 100 that fit in a step: a pause of two or three seconds in 200.
    assert outcome.tpot_s["p99"] == pytest.approx(1.0, rel=0.03)


def test_the_policy_s_own_choice_leaves_first() -> None:
    policy = Script({3: 1}, leaving=("on-demand-0001",))
    simulate(setup(requests((0.0, 10, 40), (0.0, 10, 40)), [pool(2, 2)], slo="ttft=3s"), policy)
    assert [one.id for one in policy.states[-1].replicas] == ["on-demand-0002"]


def spot_pools(trace: NodeTrace, most: int = 2) -> list[PoolSetup]:
    spot = PoolSetup(name="spot", minimum=0, maximum=most, start=fixed(5.0), nodes=trace)
    return [pool(1, 1), spot]


class Fill(Script):
    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        self.states.append(state)
        return Decision(targets={one.name: one.maximum for one in state.pools}, reason="all")


def test_a_spot_node_that_goes_without_notice_breaks_no_stream() -> None:
    trace = NodeTrace((NodeChange(0.0, "add", ("a",)), NodeChange(30.0, "remove", ("a",))), 60.0)
    rows = requests(*((8.0 + i, 50, 60) for i in range(4)))
    outcome = simulate(setup(rows, spot_pools(trace), slo="ttft=9s", notice_s=0.0), Fill({}))
    assert (outcome.finished, outcome.broken, outcome.lost_replicas) == (4, 0, 1)
    assert outcome.moves >= 1
    # Nobody knows of it for 2 s, and a stream is computed again in one or two steps.
    assert outcome.tpot_s["p99"] < 1.2


def test_with_notice_streams_are_gone_before_the_node_is() -> None:
    trace = NodeTrace((NodeChange(0.0, "add", ("a",)), NodeChange(60.0, "remove", ("a",))), 90.0)
    rows = requests(*((8.0 + i, 50, 120) for i in range(4)))
    policy = Fill({})
    outcome = simulate(setup(rows, spot_pools(trace), slo="ttft=9s", notice_s=30.0), policy)
    assert (outcome.finished, outcome.broken, outcome.lost_replicas) == (4, 0, 0)
    assert outcome.moves >= 1
    drained = [state.now_s for state in policy.states if state.count("draining")]
    assert drained == [] or min(drained) >= 30


def test_a_spot_replica_waits_for_a_node_and_costs_nothing_meanwhile() -> None:
    trace = NodeTrace((NodeChange(20.0, "add", ("a",)),), 60.0)
    policy = Fill({})
    simulation = Simulation(setup(requests((0.0, 10, 60)), spot_pools(trace, most=1)), policy, times=EvenTimes())
    outcome = simulation.run()
    assert outcome.replica_hours["spot"] * 3600 == pytest.approx(outcome.episode_s - 20, abs=1.1)
    assert min(s.now_s for s in policy.states if s.count("ready", "spot")) in (25.0, 26.0)


def test_without_a_replica_streams_are_held_and_then_answered() -> None:
    policy = Script({3: 1})
    outcome = simulate(setup(requests((0.0, 10, 5)), [pool(0, 1, start_s=10.0)]), policy)
    held = [state.demand.held for state in policy.states if state.demand]
    assert held[0] == 1
    assert outcome.ttft_s["p50"] == pytest.approx(14.0)
    assert outcome.broken == 0


def test_a_stream_that_is_held_too_long_is_broken() -> None:
    outcome = simulate(setup(requests((0.0, 10, 5)), [pool(0, 1)], hold_timeout_s=20.0), Script({}))
    assert (outcome.finished, outcome.broken) == (0, 1)


def test_what_finds_the_queue_full_is_shed() -> None:
    # 8 run and 2 may queue.
    rows = requests(*((0.0, 10, 50) for _ in range(20)))
    outcome = simulate(setup(rows, max_queued_streams=2, slo="ttft=99s"))
    assert (outcome.shed, outcome.finished, outcome.good) == (10, 10, 10)
    assert outcome.attained == 0.5


def test_a_loss_without_notice_of_an_on_demand_node_is_survived() -> None:
    rows = requests(*((float(i), 20, 40) for i in range(60)))
    outcome = simulate(setup(rows, [pool(3, 3)], slo="ttft=99s", losses_per_hour=60.0))
    assert outcome.lost_replicas > 0
    assert (outcome.finished, outcome.broken) == (60, 0)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_every_request_ends_exactly_once_whatever_the_policy_and_the_market_do(seed: int) -> None:
    import random

    rng = random.Random(seed)
    at_s, rows = 0.0, []
    for _ in range(rng.randint(1, 80)):
        at_s += rng.expovariate(1.0)
        rows.append((at_s, rng.randint(1, 300), rng.randint(1, 120)))
    names = [f"n{i}" for i in range(4)]
    changes = [NodeChange(0.0, "add", tuple(names))]
    moment = 0.0
    for name in names:
        moment += rng.uniform(5, 60)
        changes.append(NodeChange(moment, "remove", (name,)))
        changes.append(NodeChange(moment + 20, "add", (name + "b",)))
    trace = NodeTrace(tuple(sorted(changes, key=lambda c: c.at_s)), moment + 20)
    spot = PoolSetup(name="spot", minimum=0, maximum=4, start=fixed(rng.uniform(0, 20)), nodes=trace)

    class Restless:
        name = "restless"

        def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
            return Decision(targets={"on-demand": rng.randint(1, 4), "spot": rng.randint(0, 4)}, reason="any")

    fleet = setup(
        requests(*rows),
        [pool(1, 4, start_s=rng.uniform(0, 20)), spot],
        gateways=rng.randint(1, 3),
        notice_s=rng.choice([0.0, 10.0, 30.0]),
        max_queued_streams=rng.choice([0, 5, 1000]),
        hold_timeout_s=10_000.0,
    )
    times = EvenTimes(num_blocks=rng.choice([40, 1000]), step_s=0.1)
    simulation = Simulation(fleet, Restless(), seed, times=times)
    outcome = simulation.run()
    assert outcome.finished + outcome.shed + outcome.broken == outcome.requests == len(rows)
    assert outcome.broken == 0
    tally = simulation.tally
    assert (tally.num_held, tally.held_tokens, tally.num_queued, tally.queued_tokens, tally.num_running) == (0,) * 5
    for replica in simulation.replicas:
        replica.engine.scheduler.check_integrity()
        assert replica.engine.scheduler.num_running == 0
        for link in replica.links:
            assert (link.own_tokens, link.num_paying, link.load.queued_tokens) == (0, 0, 0)
    assert math.isfinite(outcome.episode_s)


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_one_replica_is_what_the_planner_s_open_loop_says(rate: float) -> None:
    facts = engine(Constants(), kv_tokens=400_000)
    load = LoadSetup(stages=parse_stages(f"{rate}@200s"), isl=parse_lengths("256..2048"), osl=parse_lengths("32..512"))
    planned = serving.open_loop(
        facts.step_time(), [LoadRequest(at_s, isl, osl) for at_s, isl, osl, _ in load.requests(3)],
        kv_tokens=facts.kv_tokens, seed=3,
    )  # fmt: skip
    outcome = Simulation(setup(load, engine=facts), FixedNumber(), 3).run()
    assert outcome.requests == len(planned.responses)
    for q in (50, 95):
        assert outcome.tpot_s[f"p{q}"] == pytest.approx(planned.tpot_s(q / 100), rel=0.03)
    times = sorted(response.ttft_s for response in planned.responses)
    assert outcome.ttft_s["p50"] == pytest.approx(times[len(times) // 2], rel=0.05)
    assert outcome.ttft_s["p95"] == pytest.approx(planned.ttft_s(0.95), rel=0.1)


def test_the_same_seed_gives_the_same_outcome_and_another_one_another() -> None:
    load = LoadSetup(stages=parse_stages("5@60s"), isl=parse_lengths("64..512"), osl=parse_lengths("8..64"))
    fleet = setup(load, [pool(2)], engine=engine(Constants()), gateways=2)
    first, again, other = (Simulation(fleet, FixedNumber(), seed).run() for seed in (1, 1, 2))
    assert (first.ttft_s, first.events, first.timeline) == (again.ttft_s, again.events, again.timeline)
    assert first.ttft_s != other.ttft_s


def test_states_count_what_clients_asked_and_got() -> None:
    policy = Script({})
    simulate(setup(requests((0.5, 50, 3), (0.6, 50, 3))), policy)
    demands = [state.demand for state in policy.states]
    assert all(demand is not None for demand in demands)
    totals = {
        name: sum(getattr(demand, name) for demand in demands)
        for name in ("arrived", "arrived_prompt_tokens", "first_tokens", "finished", "finished_output_tokens")
    }
    assert totals == {
        "arrived": 2, "arrived_prompt_tokens": 100, "first_tokens": 2, "finished": 2, "finished_output_tokens": 6,
    }  # fmt: skip
    assert sum(demand.generated_tokens for demand in demands if demand) == 6


def test_prompts_that_share_their_beginning_compute_it_once_where_they_meet() -> None:
    # 16 conversations of ten turns, each of 512 tokens more than the one before it.
    rows = []
    for turn in range(10):
        for chat in range(16):
            ids = tuple(1000 * chat + part for part in range(turn + 1))
            rows.append(TraceRow(20.0 * turn + chat, 512 * (turn + 1), 5, ids))
    load = LoadSetup(trace=tuple(rows))
    times = EvenTimes(num_blocks=20_000, max_num_batched_tokens=600, max_num_seqs=16, step_s=0.2)
    attained = {}
    for routing in ("least-load", "prefix"):
        fleet = setup(load, [pool(4)], slo="ttft=1s", routing=routing)
        attained[routing] = Simulation(fleet, FixedNumber(), times=times).run().attained
    without = Simulation(setup(load, [pool(4)], slo="ttft=1s", caches_prefixes=False), FixedNumber(), times=times).run()
    assert attained["prefix"] > attained["least-load"] > without.attained
    assert attained["prefix"] > 0.9


class SlowTimes(EvenTimes):
    """Of an engine about thirty times slower than an 8B model on an H200, which it is taken for."""

    def step_s(self, batch: Batch) -> float:
        return 0.04 + 0.0002 * batch.prefill_tokens + 0.001 * batch.sequences


def test_replicas_that_do_far_less_than_they_are_taken_for_become_more() -> None:
    stages = parse_stages("1@60s,6@240s")
    load = LoadSetup(stages=stages, process="poisson", isl=parse_lengths("256..1024"), osl=parse_lengths("32..256"))
    fleet = setup(load, [pool(1, 8)], slo="ttft=2s,tpot=120ms")
    times = SlowTimes(num_blocks=20_000, max_num_seqs=256, max_num_batched_tokens=2048)
    outcome = Simulation(fleet, policies.make("slo", fleet, 0), times=times).run()
    assert outcome.max_replicas >= 4
    assert outcome.attained > 0.6  # of one replica less than a tenth


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("oracle:x", "'x' is no number from 0.01 to 2; write for example oracle:0.8"),
        ("fixed:1.5", "'1.5' is no whole number from 0 to 10000"),
        ("spothedge", "'spothedge' is not spothedge:QPS or"),
        ("spothedge:0", "write spothedge:1.2[+]2, for"),
        ("spothedge:1+x", "is not spothedge:QPS or spothedge:QPS[+]EXTRA"),
        ("spothedge:nan", "is not spothedge:QPS or spothedge:QPS[+]EXTRA"),
    ],
)
def test_a_policy_with_a_wrong_number_says_which_are_right(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        policies.check(name)


def test_a_report_ends_when_the_last_request_has_come_and_the_last_replica_has_gone() -> None:
    load = LoadSetup(stages=parse_stages("2@60s"), isl=parse_lengths("64"), osl=parse_lengths("8"))
    stays = Simulation(setup(load, [pool(1, maximum=3)], engine=engine(Constants())), FixedNumber(), 1).run()
    assert len(stays.timeline["arrived"]) * stays.every_s > 600  # it waits for the fleet's least
    assert 50 <= html_report.shown_s([stays]) <= 130
