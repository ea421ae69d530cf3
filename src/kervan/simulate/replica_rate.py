"""How many requests per second one replica takes within the SLO, and by how much its steps must be slower to take just
a given rate: a fleet of a known capacity is simulated with step times of that scale.
"""

import dataclasses
import math
from dataclasses import dataclass

from kervan.bench.arrivals import Stage
from kervan.errors import ConfigError
from kervan.simulate.duration import fixed
from kervan.simulate.fixed import FixedNumber
from kervan.simulate.fleet import Simulation
from kervan.simulate.setup import FleetSetup, PoolSetup

KEPT_SHARE = 0.99  # of the requests that keep the SLO: a rate is kept then
REQUESTS = 400
CLOSE_SHARE = 0.01
MAX_SCALE, MIN_SCALE = 1000.0, 0.01
MAX_RATE = 10_000.0
LIFETIMES = 3.0  # of a mean request, before what counts: the replica is as busy as it will be


@dataclass(frozen=True, slots=True)
class ReplicaRate:
    """`rate_per_s`: what one replica is to keep the SLO up to. `unscaled_per_s`: what the model says.
    `scale`: what step times are multiplied by.
    """

    rate_per_s: float
    unscaled_per_s: float
    scale: float


def scaled_to(setup: FleetSetup, rate_per_s: float) -> ReplicaRate:
    """The scale at which a replica of this fleet keeps its SLO up to a rate, within 1%, under requests like its load's.

    Raises: ConfigError without a bound in the SLO, and for a rate that no scale from 0.01 to 1000 brings.
    """
    slo = setup.slo
    if slo.ttft_s is None and slo.tpot_s is None and slo.e2e_s is None:
        raise ConfigError("a replica's rate is the highest within the SLO; add one, like --slo ttft=2s,tpot=50ms")
    unscaled = highest_rate(setup)
    low, high = MIN_SCALE, MAX_SCALE
    if not _keeps(setup, low, rate_per_s):
        raise ConfigError(
            f"--replica-rate {rate_per_s:g}/s: a replica keeps the SLO ({slo}) up to {unscaled:.3g} requests/s, and "
            f"not up to {rate_per_s:g} with steps {1 / low:g} times as fast: its KV cache or frontend is full; give a "
            "lower rate"
        )
    guess = 1.0
    if unscaled:  # capacity goes about with one over the scale
        guess = min(max(unscaled / rate_per_s, low), high)
    step = 1.3
    if _keeps(setup, guess, rate_per_s):
        low = guess
        while low * step < high and _keeps(setup, low * step, rate_per_s):
            low *= step
        high = low * step
    else:
        high = guess
        while high / step > low and not _keeps(setup, high / step, rate_per_s):
            high /= step
        low = max(low, high / step)
    while high / low > 1 + CLOSE_SHARE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _keeps(setup, middle, rate_per_s) else (low, middle)
    return ReplicaRate(rate_per_s, unscaled, low)


def highest_rate(setup: FleetSetup) -> float:
    """Requests per second that one replica takes while `KEPT_SHARE` of them keep the SLO, within 1%; 0: not a few."""
    low, high = 0.0, 0.5
    while high < MAX_RATE and _keeps(setup, setup.engine.scale, high):
        low, high = high, 2 * high
    if not low:
        while high > 1e-3 and not _keeps(setup, setup.engine.scale, high):
            low, high = 0.0, high / 2
        if high <= 1e-3:
            return 0.0
        low, high = high, 2 * high
    while high / low > 1 + CLOSE_SHARE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _keeps(setup, setup.engine.scale, middle) else (low, middle)
    return low


def _keeps(setup: FleetSetup, scale: float, rate_per_s: float) -> bool:
    """Whether one replica, busy at this rate for a while, keeps the SLO for the next requests."""
    slo = setup.slo
    osl = setup.load.mean_output_tokens
    token_s = slo.tpot_s if slo.tpot_s is not None else 0.1
    life_s = (slo.ttft_s or 0.0) + osl * token_s
    if slo.e2e_s is not None:
        life_s = min(life_s, slo.e2e_s)
    warm_s = LIFETIMES * life_s
    measured_s = max(REQUESTS / rate_per_s, life_s)
    pool = PoolSetup(name="on-demand", minimum=1, maximum=1, start=fixed(0.0))
    load = dataclasses.replace(
        setup.load.at_rate(Stage(rate_per_s, rate_per_s, warm_s + measured_s)), counts_from_s=warm_s
    )
    alone = dataclasses.replace(
        setup, engine=setup.engine.scaled(scale), pools=(pool,), load=load, initial=None, losses_per_hour=0.0,
        max_queued_streams=10**9,
    )  # fmt: skip
    outcome = Simulation(alone, FixedNumber(), seed=0, gives_up_below=KEPT_SHARE).run()
    return outcome.counted > 0 and outcome.counted_good >= KEPT_SHARE * outcome.counted


def words(rate: ReplicaRate, slo: object) -> str:
    """For people."""
    return (
        f"step times are multiplied by {rate.scale:.3g}, so that one replica keeps the SLO ({slo}) up to "
        f"{rate.rate_per_s:g} requests/s; unscaled, the model gives {rate.unscaled_per_s:.3g}"
    )
