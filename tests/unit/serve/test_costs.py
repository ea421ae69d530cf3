import pytest

from kervan.config.fleet import FleetConfig
from kervan.facts import prices
from kervan.fleet.directory import ReplicaEntry
from kervan.serve.costs import usd_per_h


def replicas(*pools: str, node: str = "n") -> list[ReplicaEntry]:
    return [ReplicaEntry(f"r{number}", pool, node, 1, "ready") for number, pool in enumerate(pools)]


def price(gpu: str, market: str) -> float:
    found = prices.lookup(gpu, market)  # type: ignore[arg-type]
    assert found is not None
    return found.usd_per_gpu_h


def test_each_pool_costs_its_markets_price_for_all_gpus_of_its_replicas() -> None:
    config = FleetConfig(model="m", tp=2, replicas=1, pools={"on-demand": "1", "spot": "0..4"})
    cost = usd_per_h(config, replicas("on-demand", "spot", "spot"), {"n": "H100"})
    assert cost == pytest.approx({"on-demand": 2 * price("H100", "on-demand"), "spot": 4 * price("H100", "spot")})


def test_a_twin_costs_what_it_stands_for_and_a_share_is_a_share() -> None:
    twin = FleetConfig(model="m", engine="twin", gpu="H200")
    assert usd_per_h(twin, replicas("on-demand"), {}) == {"on-demand": price("H200", "on-demand")}
    half = FleetConfig(model="m", gpus_per_replica=0.5)
    assert usd_per_h(half, replicas("on-demand"), {"n": "H100"}) == {"on-demand": price("H100", "on-demand") / 2}


@pytest.mark.parametrize("kind", ["", "CPU", "GPU", "L5"])
def test_what_has_no_known_price_is_left_out(kind: str) -> None:
    assert usd_per_h(FleetConfig(model="m"), replicas("on-demand"), {"n": kind}) == {}
