import heapq
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy import routing
from kervan.policy.prefix import Match
from kervan.policy.routing import (
    OUTPUT_CAP_TOKENS,
    PREFIX_BOUND,
    ROOM_TOKENS,
    SIMILAR,
    YOUNG_S,
    FleetLoad,
    ReplicaLoad,
)

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


class Owners(dict[int, int]):
    """Which replicas, by their bits, have a span, where spans are numbers: those that have more than that."""

    def __init__(self, num_spans: dict[int, int]) -> None:
        super().__init__()
        self.num_spans = num_spans

    def get(self, span: int, default: int | None = None) -> int:  # type: ignore[override]
        return sum(bit for bit, most in self.num_spans.items() if most > span)


def having(loads: list[ReplicaLoad], cached_tokens: dict[str, int], max_tokens: int = 10**6) -> Match:
    """A match in which the replicas have so many tokens of the prompt, in spans of one token."""
    bits = {load.replica_id: 1 << n for n, load in enumerate(loads)}
    most = max(cached_tokens.values(), default=0)
    owners = Owners({bits[name]: tokens for name, tokens in cached_tokens.items()})
    return Match(range(most), most, 1, max_tokens, owners, bits, [load.replica_id for load in loads])


def prefix_choice(loads: list[ReplicaLoad], cached_tokens: dict[str, int], prompt_tokens: int = 1000) -> str:
    chosen = next(r for r in loads if r.replica_id == routing.decide(loads).replica_id)
    placement = routing.for_prefix(
        FleetLoad(loads),
        chosen,
        having(loads, cached_tokens),
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=10_000,
    )
    if placement is None:
        return chosen.replica_id
    assert f"has {cached_tokens[str(placement.replica_id)]} of {prompt_tokens} prompt tokens" in placement.reason
    return str(placement.replica_id)


def busy(name: str, tokens: int, queued: int, streams: int = 0, flags: str = "") -> ReplicaLoad:
    """With so many streams, whose prompts are computed, but `queued` tokens."""
    made = load(name, tokens, flags)
    made.queued_tokens, made.own_streams, made.num_streams = queued, streams, streams
    return made


@pytest.mark.parametrize(
    ("replicas", "cached_tokens", "expected"),
    [
        # name, outstanding and, of them, queued tokens; a prompt of 1,000 costs 1.25 times what is not cached of it
        pytest.param([("a", 0, 0), ("b", 500, 0)], {}, "a", id="nobody has any of it: the fewest tokens"),
        pytest.param([("a", 0, 0), ("b", 500, 0)], {"b": 800}, "b", id="250 against 1,250 tokens to compute"),
        pytest.param([("a", 0, 0), ("b", 900, 900)], {"b": 800}, "b", id="900 + 250 against 1,250"),
        pytest.param([("a", 0, 0), ("b", 1100, 1100)], {"b": 800}, "a", id="1,100 + 250 against 1,250"),
        pytest.param([("a", 0, 0), ("b", 500, 0)], {"a": 800, "b": 800}, "a", id="both: the fewest tokens"),
        pytest.param([("a", 0, 0), ("b", 500, 0)], {"a": 900, "b": 800}, "a", id="the better one is the emptier one"),
        pytest.param([("a", 0, 0), ("b", 500, 0)], {"a": 700, "b": 800}, "b", id="the fuller one has more"),
        pytest.param([("a", 0, 0), ("b", 500, 0), ("c", 400, 0)], {"b": 800, "c": 800}, "c", id="a tie: less to do"),
        pytest.param([("a", 0, 0), ("b", 500, 0), ("c", 600, 0)], {"b": 800, "c": 900}, "c", id="the most of it"),
        pytest.param([("a", 0, 0), ("b", 9, 0), ("c", 500, 500)], {"b": 700, "c": 900}, "b", id="375 against 625"),
        # streams: 2 + 1.5 sqrt(mean) above 1.25 times the mean, or below the mean / 1.25
        pytest.param([("a", 0, 0, 16), ("b", 9, 0, 28)], {"b": 800}, "b", id="mean 22: up to 36.5"),
        pytest.param([("a", 0, 0, 5), ("c", 9, 0, 5), ("b", 9, 0, 26)], {"b": 800}, "a", id="mean 12: up to 22.2"),
        pytest.param([("a", 0, 0, 0), ("b", 9, 0, 5)], {"b": 800}, "b", id="mean 2.5: up to 7.5"),
        pytest.param([("a", 0, 0, 60), *((n, 9, 0, 102) for n in "bcd")], {"b": 800}, "b", id="mean 91.5: from 56.9"),
        pytest.param([("a", 0, 0, 50), *((n, 9, 0, 102) for n in "bcd")], {"b": 800}, "a", id="a new one is filled"),
        pytest.param([("a", 0, 0), ("b", 1000, 0, 0, "d")], {"b": 800}, "a", id="it drains"),
        pytest.param([("a", 0, 0), ("b", 1000, 0, 0, "x")], {"b": 800}, "a", id="it stands still"),
    ],
)
def test_a_prefix_draws_a_prompt_to_where_it_is_computed_soonest(
    replicas: list[tuple], cached_tokens: dict[str, int], expected: str
) -> None:
    assert prefix_choice([busy(*one) for one in replicas], cached_tokens) == expected


@pytest.mark.parametrize(
    ("queued_each", "at_home", "expected"),
    [
        # 1,000 tokens of which home has 800. Queued requests of 400 tokens: 0, 1 and 2 at each replica on average.
        # Computed elsewhere, 800 tokens more take time from 0, 2 and 4 others, beside the quarter that always counts.
        (0, 980, "b"),  # 980 + 1.25 * 200 = 1,230 < 1,250
        (0, 1020, "a"),
        (1, 2580, "b"),  # 2,580 + 3.25 * 200 = 3,230 < 3.25 * 1,000
        (1, 2620, "a"),
        (2, 4180, "b"),  # 4,180 + 5.25 * 200 = 5,230 < 5.25 * 1,000
        (2, 4220, "a"),
    ],
)
def test_the_more_requests_wait_in_the_fleet_the_longer_a_prompt_waits_for_its_prefix(
    queued_each: int, at_home: int, expected: str
) -> None:
    loads = [busy("a", 0, 0), busy("b", 10, at_home)]
    for one in loads:
        one.num_queued = queued_each
    assert prefix_choice(loads, {"b": 800}) == expected


def test_sums_over_the_fleet_follow_its_replicas() -> None:
    loads = [ReplicaLoad(name, 0) for name in "ab"]
    fleet = FleetLoad(loads)
    rng = random.Random(5)
    sent: list[tuple[ReplicaLoad, int]] = []
    for _ in range(300):
        one = rng.choice(loads)
        match rng.randrange(3):
            case 0:
                one.take(100)
                sent.append((one, 100))
            case 1 if sent:
                gone, tokens = sent.pop(rng.randrange(len(sent)))
                gone.prefilled(tokens)
                gone.release()
            case _:
                one.hear(0, rng.randint(1, 3), one.own_streams + rng.randrange(4))
        assert fleet.num_streams == sum(load.num_streams for load in loads)
        assert fleet.num_queued == len(sent) == sum(load.own_streams for load in loads)
        assert all(load.num_streams >= load.own_streams for load in loads)
    assert FleetLoad(loads).num_streams == fleet.num_streams


def test_a_prefix_counts_less_where_the_cache_had_less_than_expected() -> None:
    loads = [load("a", 0), load("b", 100)]
    loads[1].queued_tokens = 100
    assert prefix_choice(loads, {"b": 500}) == "b"
    for _ in range(100):
        loads[1].see_cached(0, 500)
    assert loads[1].prefix_trust < 0.01
    assert prefix_choice(loads, {"b": 500}) == "a"
    for _ in range(20):
        loads[1].see_cached(500, 500)
    assert prefix_choice(loads, {"b": 500}) == "b"


def test_a_faster_replica_needs_less_of_the_prefix() -> None:
    loads = [load("a", 0), load("b", 10)]
    assert prefix_choice(loads, {"a": 100, "b": 90}) == "a"
    loads[0].prefill_tokens_per_s, loads[1].prefill_tokens_per_s = 5_000, 20_000
    loads[
        0
    ].outstanding_tokens = 20  # so that `decide` takes b, and a has more of it: 900 at 5,000 beside 910 at 20,000
    assert prefix_choice(loads, {"a": 100, "b": 90}) == "b"


def test_a_long_answer_does_not_go_to_a_risky_replica_for_a_prefix() -> None:
    loads = [load("a", 0), load("b", 0, "r")]
    choices = [
        routing.for_prefix(
            FleetLoad(loads),
            loads[0],
            having(loads, {"b": 900}),
            prompt_tokens=1000,
            prefill_tokens_per_s=10_000,
            avoids_risky=avoids_risky,
        )
        for avoids_risky in (True, False)
    ]
    assert choices[0] is None
    assert choices[1] is not None


def test_equal_prompts_of_a_burst_go_together_as_far_as_the_bound_allows() -> None:
    loads = [load(name, 0) for name in "abcd"]
    cached: dict[str, int] = {}
    went = []
    for _ in range(16):
        name = prefix_choice(loads, cached, prompt_tokens=5000)
        uncached = 5000 - cached.get(name, 0)
        chosen = next(r for r in loads if r.replica_id == name)
        chosen.add(uncached + 256)
        chosen.take(uncached)
        cached[name] = 4992
        went.append(name)
    assert went[:4] == ["a"] * 4
    assert len(set(went)) == 2  # each computes the prompt once; two do, and not four


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 4000), st.integers(0, 99)), min_size=1, max_size=6),
    st.lists(st.integers(0, 4000), min_size=6, max_size=6),
)
def test_no_replica_is_loaded_beyond_the_bound_for_a_prefix(
    replicas: list[tuple[int, int, int]], cached: list[int]
) -> None:
    loads = [busy(f"r{n}", *one) for n, one in enumerate(replicas)]
    least = str(routing.decide(loads).replica_id)
    has = {made.replica_id: tokens for made, tokens in zip(loads, cached, strict=False)}
    name = prefix_choice(loads, has, prompt_tokens=4001)
    if name != least:
        chosen = next(r for r in loads if r.replica_id == name)
        mean = sum(r.num_streams for r in loads) / len(loads)
        assert has[name] > has[least]
        assert chosen.num_streams <= routing.stream_bounds(mean)[1]
        assert routing.stream_bounds(mean)[1] == pytest.approx(PREFIX_BOUND * mean + 1.5 * mean**0.5 + 2)


@pytest.mark.parametrize("seed", range(3))
def test_one_prompt_that_all_begin_with_loads_no_replica_beyond_the_mean(seed: int) -> None:
    rng = random.Random(seed)
    loads = [load(f"r{n}", 0) for n in range(8)]
    cached: dict[str, int] = {}
    running: list[tuple[ReplicaLoad, int]] = []
    worst = 0.0
    for number in range(1200):
        name = prefix_choice(loads, cached, prompt_tokens=3100)
        at = next(r for r in loads if r.replica_id == name)
        uncached = 3100 - cached.get(name, 0)
        at.add(uncached + 300)
        at.take(uncached)
        running.append((at, uncached + 300))
        cached[name] = 3000
        if len(running) > 4:  # of those before, the prompts are computed
            done, _ = running[-5]
            done.prefilled(done.queued_tokens // done.num_queued)
        if len(running) > 256:
            at, tokens = running.pop(rng.randrange(len(running) - 5))
            at.add(-tokens)
            at.release()
        mean = sum(r.num_streams for r in loads) / len(loads)
        assert max(r.num_streams for r in loads) <= routing.stream_bounds(mean)[1] + 1
        if number > 800:  # all have it since long
            worst = max(worst, max(r.num_streams for r in loads) / mean)
    assert len(cached) == 8
    assert worst < PREFIX_BOUND


@pytest.mark.parametrize(
    ("home", "chosen", "goes_home"),
    [
        # (streams, queued tokens, flags) of the session's home and of the replica with the fewest tokens; 1,000 tokens
        pytest.param((0, 0), (0, 0), True, id="both idle"),
        pytest.param((8, 500), (8, 0), True, id="half of the prompt waits there"),
        pytest.param((8, 501), (8, 0), False, id="more waits there"),
        pytest.param((8, 900), (8, 400), True, id="more than elsewhere is what counts"),
        pytest.param((17, 0), (1, 0), True, id="mean 9: up to 17.75"),
        pytest.param((19, 0), (1, 0), False, id="mean 10: up to 19.2, but the other one is below 1.26"),
        pytest.param((8, 0, "d"), (8, 0), False, id="it drains"),
        pytest.param((8, 0, "x"), (8, 0), False, id="it stands still"),
        pytest.param((100, 0), (20, 0), False, id="the other one is new, and is filled"),
    ],
)
def test_a_session_goes_home_where_nothing_else_is_known_and_load_allows(
    home: tuple, chosen: tuple, goes_home: bool
) -> None:
    names = {True: "a", False: "b"}
    ring = FleetLoad([load("a", 0), load("b", 0)]).ring
    session = next(f"s{n}" for n in range(99) if ring.home(f"s{n}") == "a")
    loads = [
        busy(names[is_home], 0, queued, streams, *flags)
        for is_home, (streams, queued, *flags) in ((True, home), (False, chosen))
    ]
    placement = routing.for_session(FleetLoad(loads), loads[1], session, prompt_tokens=1000)
    assert (placement is not None) == goes_home
    if placement is not None:
        assert placement.replica_id == "a"
