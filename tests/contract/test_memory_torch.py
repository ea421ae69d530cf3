"""What `kervan memory` estimates, against what torch allocates on a CPU; training that is stopped and goes on.

Several recipes share a start of ranks: importing torch is what costs time.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kervan.errors import ConfigError
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
TWO_RANKS = ("fp32,fsdp", "bf16,fsdp", "bf16-only,fsdp,checkpoint", "bf16,fsdp,offload-params")


TIED = ("fp32", "bf16,checkpoint")
# One matrix of its attention takes 2 TiB: refused at once, on any machine.
HUGE = measure.Case(
    shape=replace(SHAPE, hidden=16, intermediate=16, num_heads=2, num_kv_heads=2, head_dim=8, vocab=64, num_layers=1),
    recipe=techniques.parse("fp32,eager"), seq=1 << 19, batch=1,
)  # fmt: skip


def cases(names: tuple[str, ...], shape: DecoderShape = SHAPE, micro_batches: int = 2) -> tuple[measure.Case, ...]:
    return tuple(
        measure.Case(shape=shape, recipe=techniques.parse(name), seq=128, batch=2, micro_batches=micro_batches)
        for name in names
    )


def measured(
    wanted: tuple[measure.Case, ...], *, ranks: int, **settings: Any
) -> tuple[list[measure.Measured], list[str]]:
    """Rows, and what is said beside them."""
    plan = measure.MeasurePlan(cases=wanted, device="cpu", steps=1, **settings)
    found = list(measure.run(plan, ranks=ranks, for_s=550))
    return [row for row in found if isinstance(row, measure.Measured)], [
        text for text in found if isinstance(text, str)
    ]


def check(rows: list[measure.Measured], names: tuple[str, ...], most: float) -> None:
    assert len(rows) == len(names)
    assert [row.problem for row in rows] == [""] * len(rows)
    off = {row.technique: round(row.error, 3) for row in rows}
    assert {name: error for name, error in off.items() if abs(error) > most} == {}


class OneRank:
    """All rows of one process: one start of ranks for them."""

    def __init__(self) -> None:
        wanted = (HUGE, *cases(ONE_RANK), *cases(TIED, replace(SHAPE, is_tied=True), micro_batches=1))
        found, self.said = measured(wanted, ranks=1)
        self.huge, self.rows, self.tied = found[0], found[1 : 1 + len(ONE_RANK)], found[1 + len(ONE_RANK) :]


@pytest.fixture(scope="module")
def one_rank() -> OneRank:
    return OneRank()


def test_the_estimated_peak_is_that_of_the_allocator_for_every_technique_of_one_process(one_rank: OneRank) -> None:
    rows = one_rank.rows
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


def test_a_tied_table_and_a_single_micro_batch_are_estimated_too(one_rank: OneRank) -> None:
    check(one_rank.tied, TIED, 0.05)


def test_a_row_that_does_not_fit_is_told_with_its_prediction(one_rank: OneRank) -> None:
    row = one_rank.huge
    assert row.is_out_of_memory, row.problem
    assert re.fullmatch(r"does not fit, as predicted: it takes \S+ GiB of the \S+ free", row.verdict), row.verdict
    assert row.to_dict()["predicted_to_fit"] is False


def test_no_technique_leaves_memory_behind(one_rank: OneRank) -> None:
    assert [text for text in one_rank.said if "new processes" in text] == []
    assert max(row.before_bytes for row in (*one_rank.rows, *one_rank.tied)) <= measure.LEFT_BYTES["cpu"]


def test_what_a_row_cannot_give_back_ends_with_its_process() -> None:
    rows, said = measured(cases(("fp32", "bf16")), ranks=1, planted_bytes=3 << 20)
    check(rows, ("fp32", "bf16"), 0.06)
    assert [row.before_bytes for row in rows] == [0, 0]
    assert "fp32 has left 3.0 MiB: the next rows run in new processes" in said


def test_the_estimated_peak_is_that_of_the_allocator_for_sharded_training() -> None:
    *rows, huge, last = measured((*cases(TWO_RANKS), HUGE, *cases(("fp32",))), ranks=2)[0]
    check(rows, TWO_RANKS, 0.10)
    assert rows[0].weights_bytes == pytest.approx(SHAPE.parameters * 4 / 2, rel=0.02)  # half of it on each rank
    assert max(row.before_bytes for row in rows) <= measure.LEFT_BYTES["cpu"]
    # a row that one of several ranks cannot run takes no other row with it
    assert huge.is_out_of_memory
    assert (last.technique, last.problem, last.before_bytes) == ("fp32", "", 0)


def test_deepspeed_is_measured_where_it_is_installed() -> None:
    pytest.importorskip("deepspeed")
    names = ("bf16,zero1", "bf16,zero2", "bf16,zero3", "bf16,zero2,offload-optimizer", "bf16,zero3")
    rows, said = measured(cases(names), ranks=2)
    check(rows, names, 0.10)
    assert max(row.before_bytes for row in rows) <= measure.LEFT_BYTES["cpu"]
    # stages 1 and 2 are freed; what stage 3 keeps ends with its processes
    assert [text.partition(" ")[0] for text in said if "new processes" in text] in ([], ["bf16,zero3"])


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
    half = tuple(replace(one, checkpoint=tmp_path / f"{i}", save_every=3) for i, one in enumerate(whole))
    found = ended((*whole, *half), ranks=1)
    uninterrupted, first = found[:2], found[2:]
    assert [one.losses for one in first] == [one.losses for one in uninterrupted]
    for one in half:
        assert one.checkpoint is not None
        newest = finetune.newest(one.checkpoint)
        assert newest is not None
        (newest / ".metadata").unlink()  # the last one is not there: back to step 3
    for again, before in zip(ended(half, ranks=1), uninterrupted, strict=True):
        assert again.resumed_from == 3
        assert finetune.furthest(list(again.losses), list(before.losses), window=1) < 1e-4
