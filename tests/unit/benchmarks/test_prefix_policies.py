"""The simulation of ways of routing: same requests for each, and figures that can be worked by hand."""

import random

import prefix_policies
import pytest

from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

# Steps of 10 ms, and 0.1 ms for each token of a prompt.
TWIN = TwinSettings(
    StepTiming(base_s=0.01, prefill_token_s=1e-4, sequence_s=0.0, context_token_s=0.0),
    TwinLimits(num_blocks=10_000, first_token=200_000, last_token=300_000),
)


def simulation(way: str, *, replicas: int = 2, gateways: int = 1) -> prefix_policies.Simulation:
    return prefix_policies.Simulation(
        prefix_policies.WAYS[way](), replicas=replicas, gateways=gateways, twin=TWIN, seed=1
    )


def talks(count: int, turns: int = 4) -> list[prefix_policies.Talk]:
    rng = random.Random(3)
    return [prefix_policies.talk(rng, f"{n}", turns=turns, isl=320, osl=32, varies=False) for n in range(count)]


def test_one_conversation_alone_is_what_arithmetic_says() -> None:
    sim = simulation("prefix", replicas=1)
    prefix_policies.closed(sim, talks(1, turns=2), 1)
    sim.run()
    first, second = sim.done
    assert first.ttft_s == pytest.approx(0.01 + 0.032)
    assert (len(second.tokens), second.possible_tokens, second.cached_tokens) == (672, 336, 336)  # 351 are computed
    assert second.ttft_s == pytest.approx(0.01 + 0.0336)


@pytest.mark.parametrize("gateways", [1, 2])
def test_each_way_gets_the_same_requests_and_prefixes_are_found_by_who_looks_for_them(gateways: int) -> None:
    figures, asked = {}, set()
    for way in ("prefix", "least-load", "hash-session"):
        sim = simulation(way, gateways=gateways)
        prefix_policies.closed(sim, talks(24), 12)
        sim.run()
        assert len(sim.done) == 96
        figures[way] = sim.figures()
        asked.add(sum(len(ask.tokens) for ask in sim.done))
    assert len(asked) == 1
    assert figures["prefix"]["of_possible"] > 0.9
    assert figures["least-load"]["of_possible"] < 0.8
    assert figures["hash-session"]["of_possible"] > 0.9
    assert figures["prefix"]["out_tok_s"] > 1.1 * figures["least-load"]["out_tok_s"]


def test_a_bounded_hash_loads_no_replica_beyond_its_bound() -> None:
    sim = simulation("hash", replicas=4)
    system = [*range(600)]
    rng = random.Random(1)
    same = [prefix_policies.talk(rng, f"{n}", turns=1, isl=64, osl=64, varies=False, system=system) for n in range(40)]
    prefix_policies.closed(sim, same, 40)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, *(replica.num_here for replica in sim.replicas))
        if most < 40 and sim.now_s < 0.2:
            sim.later(0.005, look)

    look()
    sim.run()
    assert len(sim.done) == 40
    assert most <= 1.25 * 41 / 4 + 1
