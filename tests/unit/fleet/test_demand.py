"""What a client counts for the scaler, over real links to toy replicas, and how counts of gateways add up."""

import pytest
from harness.live import until
from harness.toy_fleet import Bench

from kervan.config.workload import Slo
from kervan.fleet.demand import bin_of, quantile_s, total
from kervan.fleet.directory import DemandCounts

pytestmark = pytest.mark.usefixtures("quick")


async def test_a_stream_is_counted_once_on_its_way(bench: Bench) -> None:
    """5 tokens of prompt; held, then queued, then it generates 6 tokens and ends."""
    bench.client.demand.slo = Slo(ttft_s=60.0, tpot_s=60.0)
    await bench.add("s", prompt=[1] * 5)
    told = bench.client.take_demand()
    assert (told.arrived, told.arrived_prompt_tokens, told.held, told.held_tokens, told.queued) == (1, 5, 1, 5, 0)
    a = await bench.start("a")
    await bench.placed(a, "s")
    told = bench.client.take_demand()
    assert (told.arrived, told.held, told.queued, told.queued_tokens, told.running) == (0, 0, 1, 5, 0)
    await bench.steps(a, 2)
    told = bench.client.take_demand()
    assert (told.first_tokens, told.first_tokens_good, told.generated_tokens, sum(told.ttfts.values())) == (1, 1, 2, 1)
    assert (told.running, told.running_context_tokens, told.queued, told.queued_tokens) == (1, 7, 0, 0)
    assert told.replicas["a"].streams == 1
    assert told.replicas["a"].context_tokens == 7
    await bench.finished("s")
    told = bench.client.take_demand()
    assert (told.finished, told.finished_output_tokens, told.finished_good, told.first_tokens) == (1, 6, 1, 0)
    assert (told.running, told.generated_tokens) == (0, 4)


async def test_a_moved_stream_neither_arrives_nor_begins_again(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    bench.client.take_demand()
    await bench.start("b")
    await bench.kill(a)
    await bench.finished("s")
    told = bench.client.take_demand()
    assert (told.arrived, told.first_tokens, told.finished, told.finished_output_tokens) == (0, 0, 1, 6)


async def test_what_breaks_the_slo_is_not_good(bench: Bench) -> None:
    bench.client.demand.slo = Slo(ttft_s=1e-9)
    await bench.start("a")
    await bench.add("s")
    await bench.finished("s")
    told = bench.client.take_demand()
    assert (told.first_tokens, told.first_tokens_good, told.finished, told.finished_good) == (1, 0, 1, 0)


async def test_refused_requests_have_been_asked_for_too(bench: Bench) -> None:
    bench.client.demand.shed(3)
    told = bench.client.take_demand()
    assert (told.arrived, told.shed) == (3, 3)
    await until(lambda: bench.client.take_demand().window_s > 0)


@pytest.mark.parametrize("value_s", [1e-4, 0.013, 0.5, 1.0, 77.0])
def test_a_bin_is_within_a_few_percent(value_s: float) -> None:
    assert quantile_s({bin_of(value_s): 1}, 0.5) == pytest.approx(value_s, rel=0.026)


def test_quantiles_are_of_all_gateways_together() -> None:
    """Of 0.1 s 90 times and 3 s ten times, half are at most 0.1 s, and 95 of 100 at most 3 s."""
    fast = DemandCounts(window_s=1.0, arrived=4, ttfts={bin_of(0.1): 90}, tpots={bin_of(0.02): 5}, running=5)
    slow = DemandCounts(window_s=1.0, arrived=2, ttfts={bin_of(3.0): 10}, tpots={bin_of(0.2): 5}, running=7)
    demand = total([fast, slow], [fast, slow], 1.0)
    assert (demand.arrived, demand.running) == (6, 12)
    assert demand.ttft_p50_s == pytest.approx(0.1, rel=0.03)
    assert demand.ttft_p95_s == pytest.approx(3.0, rel=0.03)
    assert demand.tpot_p95_s == pytest.approx(0.2, rel=0.03)
    nothing = total([], [], 1.0)
    assert (nothing.ttft_p50_s, nothing.tpot_p95_s) == (None, None)


def test_tokens_that_a_cache_had_never_make_a_window_negative() -> None:
    """They are known when the stream is placed, which may be in a later window."""
    assert total([DemandCounts(window_s=1.0, arrived_prompt_tokens=-30)], [], 1.0).arrived_prompt_tokens == 0


def test_gauges_are_of_the_last_beat_and_counts_of_all() -> None:
    beats = [DemandCounts(window_s=1.0, arrived=1, held=5), DemandCounts(window_s=1.0, arrived=2, held=1)]
    demand = total(beats, beats[1:], 2.0)
    assert (demand.arrived, demand.held, demand.window_s) == (3, 1, 2.0)
