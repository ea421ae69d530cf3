"""Cuts, schedules' rules, bubbles and timelines."""

import itertools
import json
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.errors import ConfigError, KervanError
from kervan.memory.shape import NAMED
from kervan.pipeline import bubble, cut, schedules, timeline
from kervan.pipeline.bubble import Span
from kervan.pipeline.cut import Costs
from kervan.pipeline.schedules import SCHEDULES, Work

COSTS = st.builds(
    Costs,
    st.lists(st.floats(0.1, 10), min_size=1, max_size=8).map(tuple),
    st.floats(0, 20),
    st.floats(0, 20),
)


@settings(max_examples=100, deadline=None)
@given(COSTS, st.integers(1, 4))
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: Costs, stages: int) -> None:
    count = len(costs.layers)
    if stages > count:
        with pytest.raises(ConfigError, match=f"give at most {count}"):
            cut.balanced(costs, stages)
        return
    found = cut.balanced(costs, stages)
    assert [layer for part in found for layer in part] == list(range(count))
    assert len(found) == stages
    assert all(found)

    def dearest(ends: tuple[int, ...]) -> float:
        bounds = (0, *ends, count)
        return max(costs.of(range(a, b)) for a, b in itertools.pairwise(bounds))

    best = min(dearest(ends) for ends in itertools.combinations(range(1, count), stages - 1))
    assert max(costs.of(part) for part in found) == pytest.approx(best)


def test_a_large_head_takes_layers_from_the_last_stage() -> None:
    one_b = cut.modelled(NAMED["1b"], 2048)  # 16 layers; the head of 128256 words is worth four of them
    assert 3.5 < one_b.head / one_b.layers[0] < 4.5
    parts = cut.balanced(one_b, 4)
    assert [len(part) for part in parts] == [5, 5, 5, 1]
    assert cut.imbalance(one_b, parts) < 0.01


@pytest.mark.parametrize(
    ("text", "said"),
    [("7,8", "gives 2 stages 15 layers"), ("4,x", "no list of layer counts"), ("0,16", "no list of layer counts")],
)
def test_a_given_cut_has_to_add_up(text: str, said: str) -> None:
    assert cut.given("10,6", 16, 2) == (range(10), range(10, 16))
    with pytest.raises(ConfigError, match=said) as told:
        cut.given(text, 16, 2)
    assert "--cut 8,8" in str(told.value)


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "micro_batches", "said"),
    [
        ("1f1b", 4, 1, 3, "--micro-batches 4 or more, or --schedule gpipe"),
        ("gpipe", 2, 2, 4, "exactly 1 stage"),
        ("zbv", 2, 3, 8, "exactly 2 stage"),
        ("dualpipev", 2, 2, 3, "--micro-batches 4 or more"),
        ("interleaved", 2, 2, 7, "7 is no multiple of 3"),
        ("interleaved", 2, 1, 8, "2 to 64 stage"),
    ],
)
def test_rules_of_schedules_are_told_with_a_number_that_works(
    name: str, ranks: int, chunks: int, micro_batches: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        schedules.check(SCHEDULES[name], ranks=ranks, chunks=chunks, micro_batches=micro_batches)


@given(st.integers(1, 8), st.integers(1, 40))
def test_the_number_that_an_interleaved_schedule_is_told_works(ranks: int, micro_batches: int) -> None:
    schedule = SCHEDULES["interleaved"]
    try:
        schedules.check(schedule, ranks=ranks, chunks=2, micro_batches=micro_batches)
    except ConfigError as error:
        better = int(str(error).rpartition(" ")[2])
        schedules.check(schedule, ranks=ranks, chunks=2, micro_batches=better)


def test_forward_only_has_no_schedule_in_a_v() -> None:
    with pytest.raises(ConfigError, match="which forward only has none of"):
        schedules.check(SCHEDULES["zbv"], ranks=2, chunks=2, micro_batches=4, is_forward_only=True)
    with pytest.raises(ConfigError, match="gpipe, 1f1b, interleaved"):
        schedules.find("pipedream")


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.1, 4))
def test_gpipe_and_1f1b_have_the_same_bubble_and_it_is_the_formulas(ranks: int, extra: int, backward: float) -> None:
    micro_batches = ranks + extra - 1

    def seconds(work: Work) -> float:
        return 1.0 if work.kind == "F" else backward

    expected = (ranks - 1) / (micro_batches + ranks - 1)
    for orders in (schedules.gpipe_orders, schedules.one_f_one_b_orders):
        spans = bubble.simulate(orders(ranks, micro_batches), seconds)
        assert bubble.bubble(spans, ranks) == pytest.approx(expected)
    forward = bubble.simulate(schedules.forward_only(schedules.gpipe_orders(ranks, micro_batches)), seconds)
    assert bubble.bubble(forward, ranks) == pytest.approx(expected)
    formula = bubble.formula(SCHEDULES["1f1b"], ranks=ranks, chunks=1, micro_batches=micro_batches)
    assert formula == pytest.approx(expected)


def test_a_slow_stage_and_handing_over_make_more_bubble() -> None:
    orders = schedules.gpipe_orders(2, 4)
    even = bubble.bubble(bubble.simulate(orders, bubble.unit_seconds), 2)
    assert even == pytest.approx(0.2)
    slow = bubble.simulate(orders, lambda work: bubble.unit_seconds(work) * (2 if work.stage else 1))
    # stage 1: F of 4 x 2 from 1 to 9, B of 4 x 4 to 25; stage 0's last B ends at 27: busy 12 + 24 of 2 x 27
    assert bubble.bubble(slow, 2) == pytest.approx(1 - 36 / 54)
    late = bubble.simulate(orders, bubble.unit_seconds, hand_over_s=0.5)
    assert bubble.bubble(late, 2) > even


def test_an_order_that_waits_for_itself_is_an_error() -> None:
    with pytest.raises(KervanError, match="never ends"):
        bubble.simulate([[Work("B", 0, 0), Work("F", 0, 0)]], bubble.unit_seconds)
    assert bubble.bubble([], 2) == 0.0


def test_the_planners_pipeline_has_the_bubble_of_a_forward_pass() -> None:
    """The planner: a batch through all stages, then one for each time of the slowest stage."""
    from harness.places import REPOSITORY

    from kervan.facts import hardware
    from kervan.facts.architecture import parse
    from kervan.facts.layout import Layout
    from kervan.sim.constants import Constants
    from kervan.sim.limits import EngineLimits
    from kervan.sim.step_time import Batch, StepTime

    config = json.loads((REPOSITORY / "benchmarks/models/llama3-70b/config.json").read_text())
    limits = EngineLimits(max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=8192)
    time = StepTime(parse(config, "llama3-70b"), Layout(tp=1, pp=4), hardware.gpu("H200"), limits, Constants())
    batch = Batch(prefill_tokens=2048, prefill_pairs=2048**2 / 2, samples=1)
    stages_s, hand_over_s, count = time.stages_s(batch), time.hand_over_s(batch), 16
    whole_s, slowest_s, _ = time.pass_s(batch)
    orders = schedules.forward_only(schedules.gpipe_orders(4, count))
    spans = bubble.simulate(orders, lambda work: stages_s[work.stage], hand_over_s=hand_over_s)
    planned_s = whole_s + (count - 1) * slowest_s
    assert max(span.end_s for span in spans) == pytest.approx(planned_s, rel=0.02)
    planned_bubble = 1 - count * sum(stages_s) / (4 * planned_s)
    assert planned_bubble == pytest.approx(bubble.bubble(spans, 4), abs=0.02)
    assert planned_bubble == pytest.approx(3 / (count + 3), abs=0.06)  # stages are not quite equal


def test_a_rank_is_busy_as_long_as_its_work_takes() -> None:
    assert bubble.busy_s(SPANS, 3) == 3.0  # rank 0: 1 s and 2 s


SPANS = [Span(0, Work("F", 0, 0), 1.0, 2.0), Span(1, Work("F", 1, 0), 2.0, 3.0), Span(0, Work("B", 0, 0), 3.0, 5.0)]


def test_a_timeline_is_a_picture_with_a_box_for_each_piece() -> None:
    tree = ET.fromstring(timeline.svg(SPANS, 2, "a < b"))
    titles = [node.text or "" for node in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3
    assert titles[2].startswith("backward of micro-batch 0, stage 0: 2e+03 ms")
    assert "a < b" in [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_a_trace_for_perfetto_has_each_piece_in_microseconds_on_its_rank() -> None:
    events = timeline.perfetto(SPANS, 2)["traceEvents"]
    pieces = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert pieces == [(0, "F0", 0.0, 1e6), (1, "F0", 1e6, 1e6), (0, "B0", 2e6, 2e6)]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 0", "rank 1"]
    json.dumps(events)
