"""Spot markets: what a trace says happens, and a model's zones are as available and as alike as asked for."""

import statistics
from collections.abc import Sequence

import pytest

from kervan.config.node_trace import NodeTrace
from kervan.errors import ConfigError
from kervan.simulate.market import MarketModel, generate, parse_market, zone_of
from kervan.simulate.nodes import SpotNodes

MONTH_S = 30 * 86_400.0


def counts(trace: NodeTrace, zone: str, every_s: float = 600.0) -> list[int]:
    """Nodes of a zone, at even distances."""
    there, found, at_s = 0, [], 0.0
    changes = iter([*trace.changes])
    following = next(changes, None)
    while at_s < trace.end_s:
        while following is not None and following.at_s <= at_s:
            number = sum(zone_of(node) == zone for node in following.nodes)
            there += number if following.word == "add" else -number
            following = next(changes, None)
        found.append(there)
        at_s += every_s
    return found


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.correlation([float(x) for x in first], [float(x) for x in second])


def test_zones_are_as_available_and_as_alike_as_asked_for() -> None:
    model = MarketModel(zones=2, nodes=8, availability=0.7, up_s=2 * 3600.0, correlation=0.43)
    shares, alike = [], []
    for seed in range(6):
        trace = generate(model, MONTH_S, seed)
        whole = [[float(n == 8) for n in counts(trace, zone)] for zone in ("a", "b")]
        shares += [statistics.fmean(zone) for zone in whole]
        alike.append(correlation(*whole))
    assert statistics.fmean(shares) == pytest.approx(0.7, abs=0.06)
    assert statistics.fmean(alike) == pytest.approx(0.43, abs=0.15)


def test_many_nodes_of_a_zone_go_at_once_and_the_young_ones_first() -> None:
    trace = generate(MarketModel(zones=1, nodes=16, up_s=3600.0), MONTH_S, 1)
    removed = [change for change in trace.changes if change.word == "remove"]
    assert statistics.fmean(len(change.nodes) for change in removed) > 4
    there: list[str] = []
    for change in trace.changes:
        if change.word == "add":
            there += change.nodes
        else:
            assert set(there[-len(change.nodes) :]) == set(change.nodes)
            there = there[: -len(change.nodes)]
        assert len(there) <= 16


def test_what_has_just_come_is_the_likeliest_to_go() -> None:
    trace = generate(MarketModel(zones=1, nodes=1, up_s=3 * 3600.0, correlation=0.0), 10 * MONTH_S, 2)
    born: dict[str, float] = {}
    ages = []
    for change in trace.changes:
        for node in change.nodes:
            if change.word == "add":
                born[node] = change.at_s
            else:
                ages.append(change.at_s - born[node])
    assert statistics.median(ages) < 0.6 * statistics.fmean(ages)


def test_a_seed_gives_one_market() -> None:
    model = MarketModel(zones=3, nodes=4)
    assert generate(model, MONTH_S, 5) == generate(model, MONTH_S, 5)
    assert generate(model, MONTH_S, 5) != generate(model, MONTH_S, 6)


def test_nodes_that_will_go_are_not_given_out() -> None:
    nodes = SpotNodes(NodeTrace((), 100.0))
    nodes.came(("a", "b"), 0.0)
    nodes.will_go(("a",))
    assert nodes.num_there == 1
    assert nodes.take() == "b"
    assert nodes.take() is None
    nodes.went(("a",), 3600.0)
    nodes.give_back("b")
    assert nodes.take() == "b"
    # One of two nodes was lost in an hour, beside what a new fleet assumes.
    assert nodes.losses_per_hour(3600.0) == pytest.approx((1 + 1) / (2 + 4))


@pytest.mark.parametrize(
    "text",
    ["zones=3", "zones=0,nodes=4", "zones=3,nodes=x", "nodes=4,availability=2", "nodes=4,availability=1", "nodes=4,up=1s",
     "nodes=4,correlation=1", "nodes=4,nodes=5", "nodes=4,price=3", "nodes"],
)  # fmt: skip
def test_a_market_that_is_none_gets_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--spot .*(write|give it once)"):
        parse_market(text)


def test_a_market_is_written_in_a_line() -> None:
    assert parse_market("zones=2,nodes=6,availability=60%,up=2h,correlation=0.3") == MarketModel(
        zones=2, nodes=6, availability=0.6, up_s=7200.0, correlation=0.3
    )
