"""The policies of `--policy`, by name, for a fleet that is to be simulated: the live fleet's own."""

import dataclasses
import difflib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping

from kervan.config.autoscale import Autoscaling, resolve
from kervan.errors import ConfigError
from kervan.policy.autoscale import choose, oracle
from kervan.policy.autoscale.replica_rate import ModelledRates
from kervan.policy.autoscale.state import Policy
from kervan.sim.capacity import ReplicaCapacity
from kervan.simulate.engine import EngineFacts
from kervan.simulate.fixed import FixedNumber
from kervan.simulate.setup import FleetSetup
from kervan.simulate.spot_hedge import DOWNSCALE_DELAY_S, EXTRA, UPSCALE_DELAY_S, SpotHedge

SPOT_HEDGE = "spothedge:1.2+2, for 1.2 requests/s of each replica and 2 spot replicas more"
EXAMPLES = {
    "fixed": "fixed:8, that many replicas",
    "ray": "ray:16, that many streams for each",
    "oracle": "oracle:0.8, which takes a replica for 0.8 of what its model says",
}
BOUNDS = {"fixed": (0, 10_000), "ray": (1e-3, 10_000), "oracle": (0.01, 2)}


def check(name: str) -> None:
    """Raises: ConfigError for a name that is no policy."""
    kind, colon, number = name.partition(":")
    if kind == "spothedge":
        qps, plus, extra = number.partition("+")
        if not 1e-3 <= _number(qps) <= 10_000 or (plus and not (extra.isascii() and extra.isdecimal())):
            raise ConfigError(f"--policy {name!r} is not spothedge:QPS or spothedge:QPS+EXTRA; write {SPOT_HEDGE}")
        return
    if kind in EXAMPLES and colon:
        value = _number(number)
        least, most = BOUNDS[kind]
        if not least <= value <= most or (kind == "fixed" and value != int(value)):
            what = "whole number" if kind == "fixed" else "number"
            raise ConfigError(
                f"--policy {name!r}: {number!r} is no {what} from {least:g} to {most:g}; write for example "
                f"{EXAMPLES[kind]}"
            )
        return
    if name not in MAKERS:
        near = difflib.get_close_matches(name, MAKERS, n=1)
        known = f"{', '.join(MAKERS)}, fixed:N, ray:TARGET, oracle:SHARE, spothedge:QPS"
        hint = f"did you mean {near[0]!r}?" if near else f"known: {known}"
        raise ConfigError(f"--policy {name!r} is no policy; {hint}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def make(name: str, setup: FleetSetup, seed: int) -> Policy:
    """The policy of a name that `check` has let pass, for the run with this seed."""
    kind, _, number = name.partition(":")
    return _spot_hedge(setup, number) if kind == "spothedge" else MAKERS[kind](setup, seed, number)


def _fixed(setup: FleetSetup, seed: int, number: str) -> Policy:
    return FixedNumber(int(number) if number else None)


def _slo(setup: FleetSetup, seed: int, number: str) -> Policy:
    return choose.policy(_asked(setup), capacity(setup.engine), name="slo")


def _ray(setup: FleetSetup, seed: int, number: str) -> Policy:
    asked = _asked(setup)
    if number:
        asked = dataclasses.replace(
            asked, ray=dataclasses.replace(asked.ray, target_ongoing_requests=float(number)),
            given=asked.given | {"target_ongoing_requests"},
        )  # fmt: skip
    return choose.policy(asked, name="ray")


def _fill(setup: FleetSetup, seed: int, number: str) -> Policy:
    return choose.policy(_asked(setup), name="fill")


def _oracle(setup: FleetSetup, seed: int, number: str) -> Policy:
    """It is given the arrivals of the run, and the rate of a replica at their mean lengths and variances; of that the
    share that is asked for.
    """
    rows = list(setup.load.requests(seed))
    prompts, outputs = [row[1] for row in rows], [row[2] for row in rows]
    counts = Counter(int(row[0]) for row in rows)
    end_s = rows[-1][0] if rows else 1.0
    mean = len(rows) / max(1.0, end_s)
    # From second to second: a load that rises in an hour is no burst.
    jumps = [(counts[second + 1] - counts[second]) ** 2 for second in range(int(end_s))]
    variance = statistics.fmean(jumps or [0]) / 2
    mean_prompt = statistics.fmean(prompts or [1])
    rate = ModelledRates(capacity(setup.engine), setup.slo).at(
        mean_prompt,
        statistics.fmean(outputs or [1]),
        arrivals_cv2=variance / max(mean, 1e-9),
        prompts_cv2=statistics.pvariance(prompts or [1], mean_prompt) / mean_prompt**2,
    )
    schedule = oracle.plan(
        [(at_s, 1 + rate.prompt_share * (prompt / mean_prompt - 1)) for at_s, prompt, *_ in rows],
        dataclasses.replace(rate, requests_per_s=rate.requests_per_s * float(number or 1)),
        minimum=sum(pool.minimum for pool in setup.pools),
        maximum=sum(pool.maximum for pool in setup.pools),
        start_s=max(pool.start.quantile_s(0.9) for pool in setup.pools),
        end_s=end_s,
    )
    return oracle.Oracle(schedule)


def _spot_hedge(setup: FleetSetup, number: str) -> Policy:
    """With SkyServe's delays, or with those that `--autoscaling` gives."""
    qps, _, extra = number.partition("+")
    asked = _asked(setup)
    up_s = asked.ray.upscale_delay_s if "upscale_delay_s" in asked.given else UPSCALE_DELAY_S
    down_s = asked.ray.downscale_delay_s if "downscale_delay_s" in asked.given else DOWNSCALE_DELAY_S
    return SpotHedge(float(qps), int(extra or EXTRA), upscale_delay_s=up_s, downscale_delay_s=down_s)


MAKERS: Mapping[str, Callable[[FleetSetup, int, str], Policy]] = {
    "slo": _slo,
    "ray": _ray,
    "fill": _fill,
    "fixed": _fixed,
    "oracle": _oracle,
}
"""Each is given the fleet, the seed of the run (the oracle looks at its arrivals), and what follows the colon."""


def _asked(setup: FleetSetup) -> Autoscaling:
    """The settings with the fleet's SLO."""
    asked = setup.autoscaling
    if asked is None:
        most = sum(pool.maximum for pool in setup.pools)
        asked = resolve(policy="", slo="", schedule=(), time_zone="UTC", autoscaling={}, maximum=most)
    return dataclasses.replace(asked, slo=setup.slo)


def capacity(engine: EngineFacts) -> ReplicaCapacity:
    """What the policy knows of a replica: the planner's model, with the scale that the simulated ones have."""
    return ReplicaCapacity(engine.step_time(), engine.kv_tokens, time_scale=engine.scale)
