"""Training memory on paper; that it is what torch allocates is tests/contract/test_memory_torch.py's."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.errors import ConfigError
from kervan.memory.estimate import GROUPS, Estimate, estimate, state_bytes
from kervan.memory.ledger import Ledger, grouped
from kervan.memory.shape import NAMED, DecoderShape
from kervan.memory.techniques import NAMES, parse

TINY = NAMED["tiny"]


def of(technique: str, shape: DecoderShape = NAMED["8b"], **sizes: int) -> Estimate:
    return estimate(shape, parse(technique), **({"seq": 2048, "batch": 1} | sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("technique", "ranks", "expected"),
    [  # bytes of each parameter: weights, gradients, optimizer
        ("fp32", 1, (4, 4, 8)),
        ("autocast", 1, (4, 4, 8)),
        ("bf16", 1, (2, 2, 4 + 8)),
        ("bf16-only", 1, (2, 2, 4)),
        ("fp32,bf16-states", 1, (4, 4, 4)),
        ("bf16,8bit-states", 1, (2, 2, 4 + 2 + 2 * 4 / 256)),
        ("bf16,zero1", 4, (2, 2, 12 / 4)),
        ("bf16,zero2", 4, (2, 2 / 4, 12 / 4)),
        ("bf16,zero3", 4, (2 / 4, 2 / 4, 12 / 4)),
        ("bf16,fsdp", 4, (4 / 4, 4 / 4, 8 / 4)),  # the shards are the FP32 masters
        ("bf16,offload-optimizer", 1, (2, 0, 0)),
        ("bf16,zero3,offload-optimizer,offload-params", 4, (0, 0, 0)),
    ],
)
def test_states_take_what_the_zero_paper_counts(technique: str, ranks: int, expected: tuple[float, ...]) -> None:
    each = state_bytes(parse(technique), ranks)
    assert (each.weights, each.gradients, each.optimizer) == pytest.approx(expected)


def test_an_8b_model_in_mixed_precision_by_hand() -> None:
    shape, tokens = NAMED["8b"], 2048
    # 2 tables of 128256 x 4096; 32 layers of q, o: 4096 x 4096, k, v: 1024 x 4096, 3 x 14336 x 4096 and 2 norms; 1 norm
    parameters = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096) + 4096
    assert shape.parameters == parameters
    found = of("bf16")
    assert found.at_peak["weights"] == 2 * parameters
    assert found.at_peak["gradients"] == 2 * parameters
    assert found.at_peak["optimizer"] == 12 * parameters
    # a layer: x twice, normed twice, q and out (4096), k and v (1024 each), 4 x 14336; each 2 bytes a token; and FP32:
    # two norms' numbers and one for each head
    layer = tokens * (2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336) + 4 * 2 + 4 * 32)
    last = tokens * (2 * 2 * 4096 + 4) + 4 * tokens * 128256  # its input, normed; the log-softmax
    assert found.kept_bytes == 32 * layer + last
    # the highest moment: the picked log-probabilities' gradient and the logits' beside all that
    assert found.peak_phase == "backward"
    workspace, ids = 64 * 2**20, 2 * 8 * tokens
    assert found.total_bytes == 16 * parameters + 32 * layer + last + 2 * 4 * tokens * 128256 + workspace + ids


def test_json_has_the_parts_and_they_add_up() -> None:
    found = of("bf16,checkpoint").to_dict(ranks=1)
    assert list(found["gib"]) == [*GROUPS, "total"]
    assert sum(found["gib"][group] for group in GROUPS) == pytest.approx(found["gib"]["total"], abs=1e-4)
    assert found["per_gpu"] is True
    assert found["ranks"] == 1


def test_with_one_micro_batch_gradients_come_as_activations_go() -> None:
    assert of("fp32", micro_batches=1).total_bytes < of("fp32", micro_batches=2).total_bytes


def test_what_techniques_do_to_activations() -> None:
    kept = {name: of(f"bf16,{name}" if name else "bf16").kept_bytes for name in
            ("", "checkpoint", "checkpoint-selective", "checkpoint-sequential=4", "eager", "chunked-loss")}  # fmt: skip
    assert kept["checkpoint"] < kept["checkpoint-selective"] < kept[""] < kept["eager"]
    assert kept["checkpoint-sequential=4"] > kept[""] / 4  # the last of the four segments keeps everything
    assert kept["chunked-loss"] < kept[""]


def test_one_segment_is_the_last_and_checkpoints_nothing() -> None:
    assert of("bf16,checkpoint-sequential=1").total_bytes == of("bf16").total_bytes


RECIPES = st.builds(
    lambda *parts: ",".join(part for part in parts if part),
    st.sampled_from(["fp32", "autocast", "bf16", "bf16-only"]),
    st.sampled_from(["", "checkpoint", "checkpoint-selective", "checkpoint-sequential=2"]),
    st.sampled_from(["", "eager", "sdpa-math"]),
    st.sampled_from(["", "chunked-loss"]),
    st.sampled_from(["", "fsdp", "zero1", "zero2", "zero3", "bf16-states", "8bit-states", "offload-optimizer"]),
    st.sampled_from(["", "offload-activations"]),
)


@settings(max_examples=150, deadline=None)
@given(RECIPES, st.integers(1, 3), st.sampled_from([1, 2]))
def test_a_step_gives_back_all_that_it_takes_but_states(technique: str, batch: int, micro_batches: int) -> None:
    try:
        recipe = parse(technique)
    except ConfigError:
        return
    from kervan.memory.estimate import _Step

    step = _Step(TINY, recipe, 64, batch, 2, micro_batches, True)
    found = step.walk()
    left = grouped(step.ledger.now)
    assert left.get("activations", 0.0) == pytest.approx(0.0, abs=1)
    persistent = ("other:workspace", "other:tokens", "other:buckets")
    gone = {k: v for k, v in step.ledger.now.items() if k.startswith("other") and k not in persistent}
    assert sum(gone.values()) == pytest.approx(0.0, abs=1)
    assert all(size >= 0 for size in found.at_peak.values())
    assert left.get("gradients", 0.0) == pytest.approx(step.each.gradients * TINY.parameters, rel=1e-6, abs=1)
    larger = estimate(TINY, recipe, seq=64, batch=batch + 1, ranks=2, micro_batches=micro_batches)
    assert larger.total_bytes >= found.total_bytes


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3", "fsdp"])
def test_more_ranks_never_need_more(sharding: str) -> None:
    each = [of(f"bf16,{sharding}", ranks=ranks).total_bytes for ranks in (1, 2, 4, 8)]
    assert all(a > b for a, b in itertools.pairwise(each))


def test_a_ledger_tells_what_was_there_at_its_highest() -> None:
    ledger = Ledger()
    ledger.begin("a")
    ledger.take("weights", 10)
    ledger.pulse("other:x", 5)
    ledger.begin("b")
    ledger.take("activations:mlp", 3)
    ledger.free("activations:mlp", 3)
    assert (ledger.peak_bytes, ledger.peak_phase) == (15, "a")
    assert grouped(ledger.at_peak) == {"weights": 10, "other": 5}
    assert ledger.phase_peaks == {"a": 15, "b": 13}
    assert ledger.most["activations:mlp"] == 3


def test_every_name_is_understood() -> None:
    for name in NAMES:
        word = name.replace("=K", "=2")
        extra = {"offload-params": "fsdp,", "bf16-states": "", "zero1": "bf16,", "sdpa-flash": "bf16,",
                 "sdpa-cudnn": "bf16,", "flash-attn": "bf16,"}.get(name, "")  # fmt: skip
        assert parse(extra + word).text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fp33", "'fp33' is no technique"),
        ("fp32,bf16", "gives precision twice, fp32 and bf16"),
        ("checkpoint,checkpoint-selective", "gives checkpointing twice"),
        ("checkpoint-sequential", "names no number of segments; write for example checkpoint-sequential=4"),
        ("checkpoint-sequential=0", "names no number of segments"),
        ("offload-params", "add fsdp or zero3"),
        ("fsdp,offload-optimizer", "write fsdp,offload-params"),
        ("zero2,bf16-only", "write zero2,bf16"),
        ("fp32,sdpa-flash", "these kernels take 16-bit numbers"),
        ("bf16,fsdp,8bit-states", "does not shard"),
        ("", "'' is no technique"),
    ],
)
def test_what_does_not_go_together_is_told_with_its_fix(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="--technique") as told:
        parse(text)
    assert said in str(told.value)
