"""What the benchmark with simulated engines makes of its samples. Nothing is started."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import meters
import numpy as np
import pytest
import twins

from kervan.bench.tally import Timeline


def test_each_number_of_gateways_gets_its_share_of_streams_and_then_all() -> None:
    assert list(twins.loads([1, 2, 4], 1024)) == [(4, 1024), (2, 512), (2, 1024), (1, 256), (1, 1024)]
    assert list(twins.loads([2], 64)) == [(2, 64)]


def test_a_window_has_whole_cells_only() -> None:
    timeline = Timeline(width_s=0.125)
    at_s = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.9])  # cells 0, 1, 2, 3, 4, 7
    timeline.add_tokens(at_s, np.zeros(6))
    assert meters.window(timeline, 0.2, 0.8) == (0.25, 0.75, 3)  # cells 2 to 5


def test_cpu_time_is_interpolated_between_samples() -> None:
    sampler = meters.Sampler([1])
    sampler._at_s = [100.0, 100.5, 101.0]
    sampler._seen = [{1: 2.0}, {1: 2.1}, {1: 2.5}]
    assert [sampler.cpu_s(1, at_s) for at_s in (100.0, 100.25, 100.5, 100.75, 101.0)] == pytest.approx(
        [2.0, 2.05, 2.1, 2.3, 2.5]
    )


def test_a_sampler_sees_what_this_process_uses() -> None:
    own, gone = os.getpid(), 2**22 + 1  # no Linux process has this id
    with meters.Sampler([own, gone]) as sampler:
        begin_s = time.time()
        until_s = time.process_time() + 0.3
        while time.process_time() < until_s:
            pass
        end_s = time.time()
    assert sampler.cpu_s(own, end_s) - sampler.cpu_s(own, begin_s) > 0.0
    with pytest.raises(KeyError):
        sampler.cpu_s(gone, end_s)


def a_run(gateways: int, streams: int, us: float) -> dict[str, Any]:
    return {
        "gateways": gateways, "streams": streams, "tok_s": 10_000.0, "twins_offer_tok_s": 10_240.0,
        "tokens_per_chunk": 1.0, "gateway_us_per_token": us, "tok_s_per_gateway_core": 1e6 / us,
        "gateway_core_shares": [0.25] * gateways, "twin_us_per_token": 9.0, "client_core_share": 0.2,
        "errors": {"timeout": 2}, "streams_moved": 0.0,
    }  # fmt: skip


def test_kervans_own_cpu_is_that_of_as_many_streams_alone() -> None:
    found = {
        "client": [{"streams": 512, "client_us_per_token": 8.0}],
        "runs": [a_run(2, 1024, 60.0), a_run(1, 256, 70.0)],
        "skipped": ["1 gateways, 1024 streams: no time is left"],
    }
    head, first, second, skipped = twins.scaling_table(found).splitlines()
    cells = [dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in (first, second)]
    assert [(row["gateway us/tok"], row["kervan us/tok"], row["frontend us/tok"]) for row in cells] == [
        ("70.0", "-", "-"),
        ("60.0", "8.0", "52.0"),
    ]
    assert cells[1]["gateway cores"] == "0.50"
    assert skipped == found["skipped"][0]


def test_parts_gather_in_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "twins.json", tmp_path / "models" / "llama3-8b"
    words = ["--model", str(model), "--record", str(path)]
    for part in ("fleet-16", "fleet-64"):
        monkeypatch.setattr(sys, "argv", ["twins.py", "fleet", *words, "--part", part])
        twins.Record(argparse.Namespace(record=path, model=model, logs=None, part=part, what="fleet")).save({"x": part})
    parts = json.loads(path.read_text())["parts"]
    assert [parts[part]["x"] for part in ("fleet-16", "fleet-64")] == ["fleet-16", "fleet-64"]
    assert str(tmp_path) not in path.read_text()
    assert parts["fleet-64"]["command"].endswith("--model llama3-8b --record twins.json --part fleet-64")


def test_a_new_record_in_a_folder_is_written_again_and_again(tmp_path: Path) -> None:
    record = twins.Record(argparse.Namespace(record=tmp_path, model=None, logs=None, part=None, what="client"))
    record.save({"runs": [1]})
    record.save({"runs": [1, 2]})
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["parts"]["client"]["runs"] == [1, 2]
