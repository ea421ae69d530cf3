"""What `kervan calibrate` asks of torch and transformers, on CPU in small: importing them takes longer than a unit test."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from kervan.calibrate import kernels, measure_host, measurements, shapes
from kervan.calibrate.measurements import Attention, Measurements
from kervan.comm import collectives

TINY = kernels.Sizes(
    copy_bytes=(4096,),
    matmul_m=(1, 3),
    matmul_nk=((16, 8),),
    prefill_tokens=(16,),
    decode_batches=(1, 4),
    decode_tokens=(8, 32),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_kv_bytes=8192,
)


def test_kernels_and_collectives_are_measured_on_cpu_and_kept(tmp_path: Path) -> None:
    states: list[Measurements] = []
    said: list[str] = []
    blank = Measurements(gpu="CPU", num_gpus=0, hardware={}, versions={}, date="2026-11-25T12:00:00+00:00")
    found = measure_host.MeasurementLog(blank, states.append)
    parts = measure_host.Parts(measure_host.Settings(), found, said.append, end_s=time.monotonic() + 240)
    parts.kernels("cpu", TINY)
    parts.collectives(2, collectives.CollectivesPlan(on_gpu=False, bytes=(64, 4096)))

    value = found.value
    assert value.notes == ()
    assert [c.bytes for c in value.copy] == [8192]  # 4096 read and 4096 written
    assert [(p.m, p.n, p.k) for p in value.matmul] == [(1, 16, 8), (3, 16, 8)]
    # 4 sequences of 32 tokens would hold 2 * 2 * 4 * 32 * 2 * 8 = 8192 bytes, which is still allowed
    decodes = [(a.batch, a.tokens) for a in value.attention if a.phase == "decode"]
    assert decodes == [(1, 8), (1, 32), (4, 8), (4, 32)]
    assert [(a.batch, a.tokens) for a in value.attention if a.phase == "prefill"] == [(1, 16)]
    assert [f.name for f in value.floors] == ["eager_kernel"]  # no graphs on a CPU
    kinds = [(c.op, c.ranks, c.bytes, c.in_graph, c.backend) for c in value.collectives]
    assert kinds == [(op, 2, size, False, "gloo") for op in ("all_reduce", "send_recv") for size in (64, 4096)]
    timed = (*value.copy, *value.matmul, *value.attention, *value.collectives, *value.floors)
    assert all(0 < row.seconds < 5 for row in timed)
    assert len(states) == len(timed)
    assert states[-1] == value

    measurements.write(tmp_path / "new" / "file.json", value)
    assert measurements.read(tmp_path / "new" / "file.json") == value


def test_decode_batches_that_need_too_much_memory_are_left_out() -> None:
    small = dataclasses.replace(TINY, max_kv_bytes=2048)  # 64 bytes a token: 32 tokens
    rows = [row for row in kernels.measure("cpu", small) if isinstance(row, Attention) and row.phase == "decode"]
    assert [(row.batch, row.tokens) for row in rows] == [(1, 8), (1, 32), (4, 8)]


@pytest.mark.parametrize(
    ("ids", "begin", "end"),
    [
        ({}, 0, 1),
        ({"bos_token_id": None, "eos_token_id": [300, 301]}, 0, 300),
        ({"bos_token_id": 300, "eos_token_id": 300}, 300, 300),
        ({"bos_token_id": 99_999}, 0, 1),
    ],
)
def test_the_tokenizer_has_as_many_ids_as_the_model(tmp_path: Path, ids: dict[str, Any], begin: int, end: int) -> None:
    from transformers import AutoTokenizer

    shapes.write_model({"model_type": "llama", "vocab_size": 400, **ids}, tmp_path / "m")
    made = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (len(made), made.bos_token_id, made.eos_token_id) == (400, begin, end)
