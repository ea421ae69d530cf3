"""SkyServe's rule by hand: at a target of 4 and 2 more, 6 on spot, and on-demand for what is missing, at most 4."""

import json
from typing import Any

import pytest
from harness.simulated import pool, setup

from kervan.bench.arrivals import parse_stages
from kervan.config.autoscale import resolve
from kervan.config.workload import parse_lengths
from kervan.policy.autoscale.state import Demand, FleetState, PoolState, ReplicaState
from kervan.simulate import policies
from kervan.simulate.setup import LoadSetup
from kervan.simulate.spot_hedge import SpotHedge


class Asked:
    """A fleet under a steady load that gets as many spot replicas as `spot` says, at once."""

    def __init__(self, policy: SpotHedge, *, on_demand: tuple[int, int] = (0, 8), spot: int = 6) -> None:
        self.policy, self.on_demand, self.spot = policy, on_demand, spot
        self.memory: Any = {}
        self.now_s = 0.0

    def seconds(self, count: int, arrived: int) -> tuple[int, int]:
        for _ in range(count):
            self.now_s += 1
            pools = (
                PoolState(name="on-demand", minimum=self.on_demand[0], maximum=self.on_demand[1], target=1),
                PoolState(name="spot", minimum=0, maximum=12, target=0),
            )
            there = tuple(ReplicaState(id=f"s{n}", pool="spot", phase="ready") for n in range(self.spot))
            demand = Demand(window_s=1.0, arrived=arrived)
            now = FleetState(now_s=self.now_s, local_minute=0, pools=pools, replicas=there, demand=demand)
            decision = self.policy.decide(now, self.memory)
            self.memory = json.loads(json.dumps(decision.memory))
        return decision.targets["on-demand"], decision.targets["spot"]


@pytest.mark.parametrize(
    ("ready", "on_demand"),
    [(6, 0), (5, 1), (3, 3), (2, 4), (0, 4)],
)
def test_on_demand_is_what_spot_lacks_of_target_and_extra(ready: int, on_demand: int) -> None:
    fleet = Asked(SpotHedge(2.0, 2, upscale_delay_s=0.0), spot=ready)
    assert fleet.seconds(61, 8) == (on_demand, 6)  # 8 requests/s, 2 for each of 4


def test_replicas_that_are_always_there_are_of_the_target() -> None:
    fleet = Asked(SpotHedge(2.0, 2, upscale_delay_s=0.0), on_demand=(1, 8), spot=5)
    assert fleet.seconds(61, 8) == (1, 5)
    fleet.spot = 0
    assert fleet.seconds(1, 8) == (4, 5)


def test_the_target_follows_after_its_delays() -> None:
    fleet = Asked(SpotHedge(2.0, 0, upscale_delay_s=300.0, downscale_delay_s=1200.0), on_demand=(1, 8))
    # The average of a minute is above 2 requests/s in second 16, and so is wanted from then on.
    assert fleet.seconds(15 + 300, 8)[1] == 0
    assert fleet.seconds(1, 8)[1] != 0
    fleet.seconds(600, 8)
    # 40 seconds of 8 and 20 of 2 are 6 requests/s on average, of which three replicas are enough.
    assert fleet.seconds(19 + 1200, 2)[1] == 3
    assert fleet.seconds(1, 2)[1] == 0


def test_a_pool_alone_has_the_target_and_the_most_bounds_it() -> None:
    policy = SpotHedge(0.001, upscale_delay_s=0.0)
    one = PoolState(name="on-demand", minimum=1, maximum=5, target=1)
    state = FleetState(now_s=1.0, local_minute=0, pools=(one,), replicas=(), demand=Demand(window_s=1.0, arrived=9))
    assert policy.decide(state, {}).targets == {"on-demand": 5}


def test_the_name_says_the_rate_and_what_is_more_and_autoscaling_the_delays() -> None:
    load = LoadSetup(stages=parse_stages("1@60s"), isl=parse_lengths("100"), osl=parse_lengths("10"))
    fleet = setup(load, [pool(1, 8)])
    policies.check("spothedge:1.5+3")
    made = policies.make("spothedge:1.5+3", fleet, 0)
    assert made.name == "spothedge:1.5+3"
    assert policies.make("spothedge:2", fleet, 0).name == "spothedge:2+2"
    asked = resolve(policy="", slo="", schedule=(), time_zone="UTC", autoscaling={"upscale_delay_s": 30}, maximum=8)
    quick = policies.make("spothedge:2", setup(load, [pool(1, 8)], autoscaling=asked), 0)
    assert isinstance(quick, SpotHedge) and isinstance(made, SpotHedge)
    assert (quick._delays_s, made._delays_s) == ((30.0, 1200.0), (300.0, 1200.0))
