"""What a client counts for its metrics, over real links to toy replicas."""

import pytest
from harness.toy_fleet import Bench

from kervan.config.workload import Slo
from kervan.fleet.histogram import TPOT_BOUNDS_S, TTFT_BOUNDS_S, Histogram, bounds_with

pytestmark = pytest.mark.usefixtures("quick")


async def test_streams_are_counted_by_how_they_end(bench: Bench) -> None:
    """One within the SLO, one beyond it, one whose client leaves."""
    a = await bench.start("a")
    bench.client.set_slo(Slo(ttft_s=60.0))
    await bench.add("good")
    await bench.finished("good")
    bench.client.set_slo(Slo(ttft_s=1e-9))
    await bench.add("slow")
    await bench.finished("slow")
    await bench.add("left")
    await bench.placed(a, "left")
    await bench.client.abort(["left", "unknown"])
    counts = bench.client.counts
    assert counts.started == 3
    assert counts.ended == {"good": 1, "slow": 1, "broken": 0, "refused": 0, "left": 1}


async def test_a_stream_that_is_given_up_is_broken_and_says_why(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[1, 2], is_resumable=True)  # cannot move
    await bench.placed(a, "s")
    await bench.kill(a)
    await bench.ended("s")
    assert bench.client.counts.ended["broken"] == bench.client.counts.broken["given_up"] == 1


async def test_what_waits_is_told_by_what_for(bench: Bench) -> None:
    await bench.add("s")
    assert bench.client.queued() == {"no_replica": 1, "lost_replica": 0, "bulk_turn": 0, "first_token": 0}
    a = await bench.start("a")
    await bench.placed(a, "s")
    assert bench.client.queued() == {"no_replica": 0, "lost_replica": 0, "bulk_turn": 0, "first_token": 1}
    await bench.steps(a, 1)
    assert not any(bench.client.queued().values())
    await bench.finished("s")


async def test_tokens_and_times_count_at_the_replica_they_came_from(bench: Bench) -> None:
    """3 tokens of prompt and 2 more at a; b prefills these 5 again, and gives the other 4."""
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await bench.start("b")
    await bench.kill(a)
    await bench.finished("s")
    client, tallies = bench.client, bench.client.tallies
    assert {name: client.generated_tokens(name) for name in "ab"} == {"a": 2, "b": 4}
    assert {name: tallies[name].prefilled_tokens for name in "ab"} == {"a": 3, "b": 5}
    assert client.counts.moved_tokens == 5
    assert {name: sum(tallies[name].tpot.counts) for name in "ab"} == {"a": 1, "b": 1}
    client.traffic()  # the beat that takes what came since the last one changes no sum
    assert {name: client.generated_tokens(name) for name in "ab"} == {"a": 2, "b": 4}
    assert client.generated_tokens("unknown") == 0


async def test_the_slos_bounds_are_buckets_and_new_ones_begin_anew(bench: Bench) -> None:
    await bench.start("a")
    bench.client.set_slo(Slo(ttft_s=1.7, tpot_s=0.033))
    await bench.add("s")
    await bench.finished("s")
    tally = bench.client.tallies["a"]
    assert tally.ttft.bounds == tuple(sorted({*TTFT_BOUNDS_S, 1.7}))
    assert tally.tpot.bounds == tuple(sorted({*TPOT_BOUNDS_S, 0.033}))
    assert sum(tally.ttft.counts) == 1
    bench.client.set_slo(Slo(ttft_s=1.7, tpot_s=0.033))
    assert sum(tally.ttft.counts) == 1
    bench.client.set_slo(Slo(ttft_s=1.8))
    assert (1.8 in tally.ttft.bounds, sum(tally.ttft.counts), tally.tpot.bounds) == (True, 0, TPOT_BOUNDS_S)


def test_a_bound_that_is_there_already_is_there_once() -> None:
    assert bounds_with((0.1, 1.0), 1.0) == bounds_with((0.1, 1.0), None) == (0.1, 1.0)
    assert bounds_with((0.1, 1.0), 0.5) == (0.1, 0.5, 1.0)
    assert Histogram((0.1,), [2, 3], 4.0).buckets() == [("0.1", 2.0), ("+Inf", 5.0)]
