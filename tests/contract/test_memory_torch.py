"""What `kervan memory` estimates, against what torch allocates on a CPU; training that is stopped and goes on.

Several recipes share a start of ranks: importing torch is what costs time.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kervan.errors import ConfigError, EngineError
from kervan.memory import finetune, measure, techniques
from kervan.memory.estimate import estimate
from kervan.memory.shape import NAMED, DecoderShape
from kervan.ranks import start

pytestmark = pytest.mark.timeout(600)  # importing torch alone takes a minute on a busy machine

SHAPE = replace(
    NAMED["tiny"], hidden=128, intermediate=352, num_heads=8, num_kv_heads=2, head_dim=16, vocab=1024, num_layers=4
)
ONE_RANK = (
    "fp32", "bf16", "bf16-only", "autocast", "bf16,checkpoint", "fp32,checkpoint-selective", "checkpoint-sequential=2",
    "fp32,eager", "bf16,eager", "bf16,sdpa-math", "chunked-loss", "bf16-states", "bf16,8bit-states",
    "bf16,offload-optimizer", "bf16,offload-activations", "checkpoint,offload-activations",
)  # fmt: skip
TIED = ("fp32", "bf16,checkpoint")
TWO_RANKS = ("fp32,fsdp", "bf16,fsdp", "bf16-only,fsdp,checkpoint", "bf16,fsdp,offload-params")


def cases(names: tuple[str, ...], micro_batches: int = 2, shape: DecoderShape = SHAPE) -> tuple[measure.Case, ...]:
    return tuple(
        measure.Case(shape=shape, recipe=techniques.parse(name), seq=128, batch=2, micro_batches=micro_batches)
        for name in names
    )


def measured(*cases: measure.Case, ranks: int) -> list[Any]:
    plan = measure.MeasurePlan(cases=cases, device="cpu", steps=1)
    rows = list(start.run(measure.work, plan, ranks=ranks, for_s=550))
    return [row for row in rows if isinstance(row, measure.Measured)]


def check(rows: list[Any], names: tuple[str, ...], most: float) -> None:
    assert len(rows) == len(names)
    assert [row.problem for row in rows] == [""] * len(rows)
    off = {row.technique: round(row.error, 3) for row in rows}
    assert {name: error for name, error in off.items() if abs(error) > most} == {}


@pytest.fixture(scope="module")
def of_one_rank() -> list[Any]:
    """Each of `ONE_RANK`, then each of `TIED` with a tied table and a single micro-batch."""
    tied = cases(TIED, micro_batches=1, shape=replace(SHAPE, is_tied=True))
    return measured(*cases(ONE_RANK), *tied, ranks=1)


def test_the_estimated_peak_is_that_of_the_allocator_for_every_technique_of_one_process(of_one_rank: list[Any]) -> None:
    rows = of_one_rank[: len(ONE_RANK)]
    check(rows, ONE_RANK, 0.06)
    for row in rows:
        if "offload" in row.technique:
            continue
        # saved tensors, weights, gradients and states one by one
        assert row.kept_bytes == pytest.approx(row.estimated_kept_bytes, rel=0.03), row.technique
        paper = estimate(SHAPE, techniques.parse(row.technique), seq=128, batch=2, on_gpu=False)
        for group in ("weights", "gradients", "optimizer"):
            assert getattr(row, f"{group}_bytes") == pytest.approx(paper.most[group], rel=0.02), (row.technique, group)
    # the same training, whatever the technique: the first loss to rounding, the second after a step
    first, second = zip(*(row.losses for row in rows), strict=True)
    assert max(first) - min(first) < 0.01
    assert max(second) - min(second) < 0.02


def test_a_tied_table_and_a_single_micro_batch_are_estimated_too(of_one_rank: list[Any]) -> None:
    check(of_one_rank[len(ONE_RANK) :], TIED, 0.05)


def test_the_estimated_peak_is_that_of_the_allocator_for_sharded_training() -> None:
    rows = measured(*cases(TWO_RANKS), ranks=2)
    check(rows, TWO_RANKS, 0.10)
    assert rows[0].weights_bytes == pytest.approx(SHAPE.parameters * 4 / 2, rel=0.02)  # half of it on each rank


def test_deepspeed_is_measured_where_it_is_installed() -> None:
    pytest.importorskip("deepspeed")
    names = ("bf16,zero2", "bf16,zero3")
    check(measured(*cases(names), ranks=2), names, 0.10)


def plan(technique: str = "fp32", **fields: Any) -> finetune.FinetunePlan:
    defaults: dict[str, Any] = {"steps": 8, "batch": 4, "seq": 64, "lr": 3e-3, "device": "cpu"}
    shape = replace(NAMED["tiny"], num_layers=2, hidden=32, num_heads=2, num_kv_heads=1, intermediate=64, vocab=256)
    return finetune.FinetunePlan(shape=shape, recipe=techniques.parse(technique), **(defaults | fields))


def ended(plans: tuple[finetune.FinetunePlan, ...], *, ranks: int) -> list[finetune.Ended]:
    rows = list(start.run(finetune.work, plans, ranks=ranks, for_s=500))
    return [row for row in rows if isinstance(row, finetune.Ended)]


@pytest.fixture(scope="module")
def curves() -> dict[str, list[float]]:
    """Losses of a short training with each technique, one rank."""
    names = ("fp32", "autocast", "bf16", "checkpoint", "checkpoint-sequential=2", "eager", "chunked-loss",
             "bf16-states", "bf16,8bit-states", "bf16,offload-optimizer", "offload-activations", "fp32,fsdp")  # fmt: skip
    rows = ended(tuple(plan(name, steps=20) for name in names), ranks=1)
    return {name: list(row.losses) for name, row in zip(names, rows, strict=True)}


def test_all_techniques_learn_the_same(curves: dict[str, list[float]]) -> None:
    plain = curves["fp32"]
    assert plain[0] - plain[-1] > 0.5  # it does learn
    off = {name: finetune.furthest(losses, plain) for name, losses in curves.items()}
    exact = {name: off[name] for name in ("checkpoint", "checkpoint-sequential=2", "offload-activations", "eager")}
    assert max(exact.values()) < 2e-3, exact
    assert max(off.values()) < 0.05, off


def test_a_training_that_is_told_to_end_goes_on_with_another_number_of_ranks(
    tmp_path: Path, curves: dict[str, list[float]]
) -> None:
    one = plan("fp32,fsdp", steps=20, checkpoint=tmp_path, save_every=3)
    with start.Ranks(finetune.work, (one,), ranks=1, for_s=500) as ranks:
        rows = []
        for row in ranks:
            rows.append(row)
            if isinstance(row, finetune.StepDone) and row.step == 4:
                ranks.terminate()
    stopped = rows[-1]
    assert isinstance(stopped, finetune.Ended)
    assert stopped.is_told
    assert 4 <= stopped.steps < 20
    assert any(isinstance(row, finetune.Saved) and row.step == 3 for row in rows)
    newest = finetune.newest(tmp_path)
    assert newest is not None
    assert newest.name == f"step-{stopped.steps}"

    (resumed,) = ended((one,), ranks=2)
    assert resumed.resumed_from == stopped.steps
    assert resumed.steps == 20
    assert finetune.furthest(list(resumed.losses), curves["fp32,fsdp"], window=1) < 2e-3
    # a checkpoint whose writing was cut off is passed over
    assert finetune.newest(tmp_path) == tmp_path / "step-20"
    (tmp_path / "step-20" / ".metadata").unlink()
    assert finetune.newest(tmp_path) == tmp_path / "step-18"

    with pytest.raises(ConfigError, match="is of seq 64, and this run has 32"):
        ended((replace(one, seq=32),), ranks=1)


def test_states_of_our_own_optimizers_are_saved_and_loaded(tmp_path: Path) -> None:
    names = ("bf16", "bf16,8bit-states")
    whole = tuple(plan(name, steps=6) for name in names)
    half = tuple(replace(one, checkpoint=tmp_path / name, save_every=3) for name, one in zip(names, whole, strict=True))
    rows = ended((*whole, *half), ranks=1)
    uninterrupted, saved = rows[: len(names)], rows[len(names) :]
    assert [list(row.losses) for row in saved] == [list(row.losses) for row in uninterrupted]
    for one in half:
        assert one.checkpoint is not None
        newest = finetune.newest(one.checkpoint)
        assert newest is not None
        (newest / ".metadata").unlink()  # the last one is not there: back to step 3
    for again, expected in zip(ended(half, ranks=1), uninterrupted, strict=True):
        assert again.resumed_from == 3
        assert finetune.furthest(list(again.losses), list(expected.losses), window=1) < 1e-4


def test_a_rank_that_ends_or_raises_is_told_in_a_line() -> None:
    from harness import rank_work

    with pytest.raises(EngineError, match=r"^rank 1 of 2: ValueError: no luck \(fail_second, line \d+\)$"):
        list(start.run(rank_work.fail_second, "luck", ranks=2, for_s=100))
    with pytest.raises(EngineError, match=r"^rank 1 of 2 ended with no message"):
        list(start.run(rank_work.die_second, None, ranks=2, for_s=100))
