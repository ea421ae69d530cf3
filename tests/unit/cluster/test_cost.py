"""What mixes of nodes cost, by hand and in the simulator's market."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.cluster import cost
from kervan.cluster.cost import MarketSetup, Mix, Prices
from kervan.config.fleet import PoolBounds
from kervan.simulate.market import MarketModel


def mix(on_demand: int, spot: int, most: int | None = None) -> Mix:
    return Mix(PoolBounds(on_demand, on_demand if most is None else most), PoolBounds(spot, spot))


CLAIMED = mix(2, 6)
DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("spot_usd", "usd_per_h", "saving"),
    [
        (8.0, 112.0, 0.5625),  # 2*32 + 6*8 of 8*32 = 256
        (12.0, 136.0, 0.46875),
        (0.0, 64.0, 0.75),  # spot for nothing: 6 of 8
    ],
)
def test_the_saving_that_is_quoted_by_its_own_prices(spot_usd: float, usd_per_h: float, saving: float) -> None:
    prices = Prices(32.0, spot_usd)
    assert cost.undisturbed_usd_per_h(CLAIMED, prices) == usd_per_h
    assert prices.saving(usd_per_h, CLAIMED.nodes) == pytest.approx(saving)


def test_what_spot_would_have_to_cost_for_a_saving() -> None:
    share = cost.spot_price_for(0.65, CLAIMED)  # 1 - 0.65 * 8/6
    assert share == pytest.approx(0.1333, abs=1e-4)
    prices = Prices(32.0, 32.0 * share)
    assert prices.saving(cost.undisturbed_usd_per_h(CLAIMED, prices), 8) == pytest.approx(0.65)
    assert cost.spot_price_for(0.8, CLAIMED) < 0


def test_a_market_that_is_always_whole_costs_what_is_quoted() -> None:
    setup = MarketSetup(
        market=MarketModel(zones=3, nodes=6, availability=1 - 1e-12, up_s=1e8), duration_s=DAY_S, start_s=300.0
    )
    outcome = cost.run(CLAIMED, setup, 0)
    assert dataclasses.asdict(outcome) == pytest.approx(
        {"on_demand_nodes": 2.0, "spot_nodes": 6.0, "capacity": 1.0, "whole_share": 1.0, "losses_per_day": 0.0}
    )


def setup(**changes: float) -> MarketSetup:
    market = MarketModel(zones=2, nodes=3, availability=0.7, up_s=3 * 3600.0)
    return MarketSetup(market=market, duration_s=5 * DAY_S, start_s=changes.get("start_s", 300.0))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), spot=st.integers(1, 8), on_demand=st.integers(0, 3), cover=st.integers(0, 8))
def test_bounds_hold_in_any_course_of_the_market(seed: int, spot: int, on_demand: int, cover: int) -> None:
    asked = mix(on_demand, spot, on_demand + cover)
    outcome = cost.run(asked, setup(), seed)
    rounding = 1e-9
    assert on_demand - rounding <= outcome.on_demand_nodes <= on_demand + min(cover, spot) + rounding
    assert 0 <= outcome.spot_nodes <= spot + rounding
    assert 0 <= outcome.whole_share <= outcome.capacity + rounding <= 1 + 2 * rounding
    # What serves is paid.
    assert outcome.capacity * asked.nodes <= outcome.on_demand_nodes + outcome.spot_nodes + rounding


def test_cover_costs_more_and_serves_more() -> None:
    bare, covered = cost.run(CLAIMED, setup(), 1), cost.run(cost.covered(CLAIMED), setup(), 1)
    assert covered.on_demand_nodes > bare.on_demand_nodes == 2
    assert covered.capacity > bare.capacity
    assert covered.spot_nodes == bare.spot_nodes


def test_a_slower_start_serves_less_for_the_same_money() -> None:
    fast, slow = cost.run(CLAIMED, setup(start_s=60.0), 1), cost.run(CLAIMED, setup(start_s=1800.0), 1)
    assert slow.capacity < fast.capacity
    assert slow.spot_nodes == pytest.approx(fast.spot_nodes)


def test_the_saving_for_each_node_that_served_is_the_smaller_one() -> None:
    found = cost.compare([CLAIMED], [Prices(32.0, 8.0)], setup(), range(3))
    (one,) = found
    assert one.saving_served < one.saving
    low, high = one.saving_interval
    assert low <= one.saving_served <= high
    assert one.to_dict()["undisturbed_saving"] == pytest.approx(0.5625)


def test_the_fewer_nodes_the_market_has_the_less_is_saved_with_cover() -> None:
    base = dataclasses.replace(setup(), market=MarketModel(zones=3, nodes=6, up_s=3 * 3600.0))
    curve = cost.availability_curve(cost.covered(CLAIMED), [Prices(32.0, 8.0)], base, range(3), [0.3, 0.9])
    savings = [found[0].saving for _, found in curve]
    assert savings[0] < savings[1] < 0.5625


def test_a_mix_is_compared_with_all_on_demand_and_all_spot() -> None:
    assert [str(one) for one in cost.around(CLAIMED)] == [
        "8 on-demand", "2 on-demand + 6 spot", "2..8 on-demand + 6 spot", "0..8 on-demand + 0..8 spot", "0..8 spot",
    ]  # fmt: skip
