"""`kervan pipeline` with torch.distributed.pipelining on a CPU: results equal the unsplit model's in every schedule."""

from dataclasses import replace
from typing import Any

import pytest
from harness.rank_work import greet_in_a_v

from kervan.memory.shape import NAMED
from kervan.pipeline import bench, bubble, cut, schedules
from kervan.pipeline.plan import PipelinePlan
from kervan.ranks.start import run

pytestmark = pytest.mark.timeout(600)  # importing torch alone takes a minute on a busy machine
SHAPE = replace(NAMED["tiny"], num_layers=6, hidden=32, num_heads=2, num_kv_heads=1, intermediate=64, vocab=128)
EVERY = ("gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev")


def plan(name: str, **fields: Any) -> PipelinePlan:
    schedule = schedules.SCHEDULES[name]
    chunks = fields.pop("chunks", schedule.chunks[1])
    shape = fields.pop("shape", SHAPE)
    costs = cut.modelled(shape, 32)
    defaults: dict[str, Any] = {
        "micro_batches": (4,), "batch": 4, "seq": 32, "device": "cpu", "dtype": "fp32", "is_forward_only": False,
        "cut": cut.balanced(costs, 2 * chunks), "repeats": 1,
    }  # fmt: skip
    return PipelinePlan(shape=shape, schedule=schedule, chunks=chunks, **(defaults | fields))


@pytest.fixture(scope="module")
def results() -> dict[str, bench.Result]:
    """All plans of this module, in one start of two ranks."""
    tied = replace(SHAPE, is_tied=True)
    plans = {
        **{name: plan(name) for name in EVERY},
        "1f1b of another batch": plan("1f1b", micro_batches=(2, 8), batch=8),
        "uneven": plan("gpipe", cut=(range(5), range(5, 6))),
        "measured": plan("gpipe", cut=None),
        "tied": plan("1f1b", shape=tied),
        "tied in a V": plan("zbv", shape=tied),
        "gpipe forward": plan("gpipe", is_forward_only=True),
        "interleaved forward": plan("interleaved", is_forward_only=True),
        "zero-bubble forward": plan("zero-bubble", is_forward_only=True),
        "zero-bubble, one stage a rank": plan("zero-bubble", chunks=1),
        "bf16": plan("gpipe", dtype="bf16"),
    }
    found = list(bench.bench(tuple(plans.values()), ranks=2, for_s=550, say=lambda _: None))
    return dict(zip(plans, found, strict=True))


def test_outputs_and_gradients_equal_the_unsplit_models(results: dict[str, bench.Result]) -> None:
    off = {
        name: (row.output_error, row.gradient_error)
        for name, result in results.items()
        for row in result.rows
        if not row.equal_to_unsplit
    }
    assert off == {}
    assert all(row.output_error < 1e-5 for name in EVERY for row in results[name].rows)


def test_every_stage_does_its_work_once_for_each_micro_batch(results: dict[str, bench.Result]) -> None:
    for name, result in results.items():
        for row in result.rows:
            forward = sorted((s.work.stage, s.work.micro_batch) for s in row.spans if s.work.kind == "F")
            stages = 2 * result.plan.chunks
            assert forward == [(s, m) for s in range(stages) for m in range(row.micro_batches)], name
            assert all(0 <= value < 1 for value in (row.bubble, row.predicted, row.theory)), name
            is_inference = result.plan.is_forward_only
            assert is_inference == (not any(s.work.kind in {"B", "I"} for s in row.spans)), name


def test_zero_bubble_has_less_bubble_on_paper_only_with_backward_passes(results: dict[str, bench.Result]) -> None:
    def theory(name: str) -> float:
        return results[name].rows[0].theory

    assert theory("gpipe") == theory("1f1b") == pytest.approx(1 / 5)  # (2-1) / (4+2-1)
    assert theory("interleaved") == pytest.approx(1 / 9)  # (2-1) / (2*4+2-1)
    assert max(theory("zero-bubble"), theory("zbv")) < theory("interleaved")
    assert theory("zero-bubble forward") == pytest.approx(theory("interleaved forward"))


def test_torchs_order_of_work_has_the_bubble_of_the_formula(results: dict[str, bench.Result]) -> None:
    made = bubble.simulate(schedules.gpipe_orders(2, 4), bubble.unit_seconds)
    assert bubble.bubble(made, 2) == pytest.approx(results["gpipe"].rows[0].theory)


def test_a_measured_cut_gives_each_stage_a_layer_and_tells_its_costs(results: dict[str, bench.Result]) -> None:
    prepared = results["measured"].prepared
    assert [part.stop - part.start for part in prepared.cut] in [[n, 6 - n] for n in range(1, 6)]
    assert all(cost > 0 for cost in (*prepared.costs.layers, prepared.costs.embedding, prepared.costs.head))
    assert results["uneven"].prepared.parameters[0] > results["uneven"].prepared.parameters[1]


def test_the_fastest_number_of_micro_batches_is_named(results: dict[str, bench.Result]) -> None:
    result = results["1f1b of another batch"]
    assert result.best in {2, 8}
    assert result.best_predicted in {2, 4, 8}


def test_the_last_rank_of_a_v_sends_nothing_to_itself_which_gloo_cannot() -> None:
    sent = dict(run(greet_in_a_v, None, ranks=3, for_s=300))
    assert sent == {0: [1, 1], 1: [2, 0, 0, 2], 2: [1, 1]}
