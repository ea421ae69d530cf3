import heapq
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy import routing
from kervan.policy.routing import OUTPUT_CAP_TOKENS, ROOM_TOKENS, SIMILAR, YOUNG_S, ReplicaLoad

LOADS = st.lists(
    st.builds(
        ReplicaLoad,
        st.text("abcdef", min_size=1, max_size=3),
        st.integers(0, 5),
        st.booleans(),
        st.integers(0, 1),
        own_tokens=st.integers(0, 1),
        is_stalled=st.booleans(),
        is_on_trial=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda load: load.replica_id,
)


@pytest.mark.parametrize(
    ("replicas", "is_suspect", "chosen", "reason"),
    [
        pytest.param([], False, None, "no live replica", id="no replica"),
        pytest.param([("a", 900), ("b", 300)], False, "b", "(300) of 2", id="fewest tokens"),
        pytest.param([("a", 7), ("b", 7)], False, "a", "(7) of 2", id="tie: the first"),
        pytest.param([("a", 0, True), ("b", 500)], False, "b", "(500) of 2", id="idle but draining"),
        pytest.param([("a", 0, True)], False, None, "not draining", id="all drain"),
        pytest.param([("a", 1, False, 1), ("b", 9)], False, "a", "(1) of 2", id="a suspect keeps nobody else away"),
        pytest.param([("a", 1, False, 1), ("b", 9)], True, "b", "(9) of 2", id="suspects do not meet"),
        pytest.param([("a", 1, False, 1), ("b", 9, True)], True, None, "each of 1 replicas", id="suspect waits"),
        pytest.param([("a", 1, True)], True, None, "not draining", id="suspect, all drain"),
    ],
)
def test_placement_table(replicas: list[tuple], is_suspect: bool, chosen: str | None, reason: str) -> None:
    placement = routing.decide([ReplicaLoad(*replica) for replica in replicas], is_suspect=is_suspect)
    assert placement.replica_id == chosen
    assert reason in placement.reason


@given(LOADS, st.booleans())
def test_the_least_loaded_that_may_take_it_takes_it(loads: list[ReplicaLoad], is_suspect: bool) -> None:
    placement = routing.decide(loads, is_suspect=is_suspect)
    able = [r for r in loads if not r.is_draining and not (is_suspect and r.num_suspects)]
    able = [r for r in able if not (r.is_stalled or (r.is_on_trial and r.own_tokens))] or able
    if not able:
        assert placement.replica_id is None
        return
    chosen = next(r for r in loads if r.replica_id == placement.replica_id)
    assert chosen in able
    assert chosen.outstanding_tokens == min(r.outstanding_tokens for r in able)
    assert chosen is next(r for r in able if r.outstanding_tokens == chosen.outstanding_tokens)


@pytest.mark.parametrize(
    ("prompt_tokens", "remaining_output_tokens", "cost_tokens"),
    [
        (0, 0, 1),  # nothing to do still holds a place
        (100, 28, 128),
        (100, 1024, 1124),
        (100, 131_072, 1124),  # no max_tokens: remaining output is capped at 1,024
        (131_072, 0, 131_072),  # prompts are not
    ],
)
def test_cost_of_a_stream(prompt_tokens: int, remaining_output_tokens: int, cost_tokens: int) -> None:
    assert OUTPUT_CAP_TOKENS == 1024
    assert routing.cost_tokens(prompt_tokens, remaining_output_tokens) == cost_tokens


def test_a_gateway_expects_the_others_to_do_as_it_does_until_it_hears_of_them() -> None:
    load = ReplicaLoad("a", 0)
    load.add(100)
    assert (load.own_tokens, load.outstanding_tokens) == (100, 100)  # alone: exact
    load.hear(other_tokens=900, num_gateways=4)
    assert load.outstanding_tokens == 1000
    load.add(50)
    assert (load.own_tokens, load.outstanding_tokens) == (150, 1200)  # the other three: 150 more
    load.add(-150)
    assert (load.own_tokens, load.outstanding_tokens) == (0, 600)
    load.hear(other_tokens=0, num_gateways=1)
    assert load.outstanding_tokens == 0


def mean_difference(num_gateways: int, num_replicas: int, streams_each: int, *, seed: int) -> float:
    """Streams between the fullest and the emptiest replica, over a minute of a closed loop of equal requests.

    Gateways hear of each other every half second; a request takes 3.5 s on an evenly loaded replica, of which 0.3 s
    are its prompt, and longer on a fuller one.
    """
    rng = random.Random(seed)
    prompt, output, period_s = 1024, 256, 0.5
    loads = [[ReplicaLoad(f"r{r}", 0) for r in range(num_replicas)] for _ in range(num_gateways)]
    told = [[0] * num_replicas for _ in range(num_gateways)]
    running = [0] * num_replicas
    events: list[tuple[float, int, str, tuple[int, ...]]] = []

    def plan(at_s: float, what: str, *about: int) -> None:
        heapq.heappush(events, (at_s, rng.getrandbits(60), what, about))

    for stream in range(num_replicas * streams_each):
        plan(rng.uniform(0, 0.05), "begin", stream)
    for g in range(num_gateways):
        for r in range(num_replicas):
            plan(rng.uniform(0, period_s), "ping", g, r)
    plan(5.0, "look")
    differences = []
    while events[0][0] < 60:
        now_s, _, what, about = heapq.heappop(events)
        if what == "begin":
            g = about[0] % num_gateways
            r = int(str(routing.decide(loads[g]).replica_id)[1:])
            loads[g][r].add(prompt + output)
            running[r] += 1
            plan(now_s + 0.3, "first token", g, r)
            plan(now_s + 3.5 * (running[r] / streams_each) ** 0.4 * rng.uniform(0.97, 1.03), "end", about[0], r)
        elif what == "first token":
            loads[about[0]][about[1]].add(-prompt)
        elif what == "end":
            loads[about[0] % num_gateways][about[1]].add(-output)
            running[about[1]] -= 1
            plan(now_s, "begin", about[0])
        elif what == "ping":
            g, r = about
            told[g][r] = loads[g][r].own_tokens
            loads[g][r].hear(sum(told[other][r] for other in range(num_gateways) if other != g), num_gateways)
            plan(now_s + period_s, "ping", g, r)
        else:
            differences.append(max(running) - min(running))
            plan(now_s + 0.1, "look")
    return statistics.mean(differences)


@pytest.mark.parametrize(("num_gateways", "num_replicas", "at_most"), [(1, 2, 2), (2, 4, 4), (4, 2, 3), (4, 4, 5)])
def test_gateways_do_not_rush_to_the_same_replica(num_gateways: int, num_replicas: int, at_most: float) -> None:
    found = [mean_difference(num_gateways, num_replicas, 64, seed=seed) for seed in range(3)]
    assert max(found) < at_most


def load(name: str, tokens: int, flags: str = "") -> ReplicaLoad:
    """`flags`: r for risky, d for draining, s for one that tries a suspect, x for one that stands still."""
    return ReplicaLoad(name, tokens, "d" in flags, int("s" in flags), is_risky="r" in flags, is_stalled="x" in flags)


@pytest.mark.parametrize(
    ("others", "chosen_tokens", "is_suspect", "expected"),
    [
        pytest.param([], 0, False, None, id="no other"),
        pytest.param([("b", 500)], 0, False, "b", id="some work more"),
        pytest.param([("b", 2048)], 0, False, "b", id="two streams more"),
        pytest.param([("b", 2049)], 0, False, None, id="more than two streams"),
        pytest.param([("b", 13_047)], 10_000, False, "b", id="1.1 * 10,000 + 2,048 = 13,048"),
        pytest.param([("b", 13_049)], 10_000, False, None, id="and one more"),
        pytest.param([("b", 9, "r"), ("c", 99)], 0, False, "c", id="another risky one is no help"),
        pytest.param([("b", 9, "d"), ("c", 99)], 0, False, "c", id="nor a draining one"),
        pytest.param([("b", 9, "x"), ("c", 99)], 0, False, "c", id="nor one that stands still"),
        pytest.param([("b", 9, "s"), ("c", 99)], 0, True, "c", id="nor, for a suspect, one with a suspect"),
        pytest.param([("b", 9, "s"), ("c", 99)], 0, False, "b", id="which harms no other"),
        pytest.param([("b", 99), ("c", 9)], 0, False, "c", id="the one with the least to do"),
    ],
)
def test_a_long_answer_passes_a_risky_replica_over(
    others: list[tuple], chosen_tokens: int, is_suspect: bool, expected: str | None
) -> None:
    chosen = load("a", chosen_tokens, "r")
    placement = routing.safer([chosen, *(load(*other) for other in others)], chosen, is_suspect=is_suspect)
    assert (placement and placement.replica_id) == expected
    if placement is not None:
        assert "a long answer, and a" in placement.reason


@given(st.lists(st.tuples(st.integers(0, 9000), st.sampled_from(["", "r", "d", "s", "rs"])), max_size=6), st.booleans())
def test_passing_over_never_costs_much(others: list[tuple[int, str]], is_suspect: bool) -> None:
    chosen = load("chosen", 1000, "r")
    loads = [chosen, *(load(f"r{i}", *other) for i, other in enumerate(others))]
    placement = routing.safer(loads, chosen, is_suspect=is_suspect)
    able = [r for r in loads if not (r.is_risky or r.is_draining or (is_suspect and r.num_suspects))]
    within = [r for r in able if r.outstanding_tokens <= SIMILAR * 1000 + ROOM_TOKENS]
    assert (placement is None) == (not within)
    if placement is not None:
        assert placement.replica_id in {r.replica_id for r in within}


@pytest.mark.parametrize(
    ("is_spot", "age_s", "is_called_likely", "expected_s"),
    [
        (False, 0.0, False, 0.0),
        (True, 0.0, False, YOUNG_S),
        (True, YOUNG_S - 60, False, 60.0),
        (True, YOUNG_S + 60, False, 0.0),
        (True, 10 * YOUNG_S, True, float("inf")),  # a rebalance notice
        (False, 0.0, True, float("inf")),
    ],
)
def test_for_how_long_a_replica_is_risky(
    is_spot: bool, age_s: float, is_called_likely: bool, expected_s: float
) -> None:
    assert routing.risky_for_s(is_spot=is_spot, age_s=age_s, is_called_likely=is_called_likely) == expected_s
