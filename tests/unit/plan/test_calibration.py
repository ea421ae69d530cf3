"""Predictions against measurements, and constants fitted to them."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from harness.places import MODELS

from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan import calibration
from kervan.plan.calibration import PRIOR, MeasuredPoint


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


GPU = hardware.gpu("H200")
LINES = (MODELS.parent / "records/bare-h200-2026-11-22.jsonl").read_text().splitlines()
POINTS = [MeasuredPoint(**json.loads(line)) for line in LINES]
SPECS = {name: parse(config(name), name) for name in {point.model for point in POINTS}}


def test_the_calibration_set_is_within_its_bars() -> None:
    left = [calibration.residual(point, SPECS[point.model], GPU, PRIOR.constants).errors for point in POINTS]
    mean = {key: statistics.fmean(abs(errors[key]) for errors in left) for key in left[0]}
    assert mean["out_tok_s"] < 0.03
    assert mean["tpot_p50_s"] < 0.03
    assert mean["ttft_p50_s"] < 0.12


def test_a_fit_finds_back_what_made_the_points() -> None:
    truth = dataclasses.replace(PRIOR.constants, bandwidth_share=PRIOR.constants.bandwidth_share * 0.9)
    small = [p for p in POINTS if p.model == "llama3-8b" and p.concurrency <= 16]
    points = [dataclasses.replace(p, **calibration.predict(p, SPECS[p.model], GPU, truth)) for p in small]
    found = calibration.fit(points, SPECS, GPU, free=("bandwidth_share",), rounds=3)
    assert found.bandwidth_share == pytest.approx(truth.bandwidth_share, rel=0.02)
    with pytest.raises(ConfigError, match="needs measured points"):
        calibration.fit([], SPECS, GPU)


def test_a_calibration_is_stored_and_read(tmp_path: Path) -> None:
    calibration.save(PRIOR, tmp_path / "c.json")
    assert calibration.load(tmp_path / "c.json").constants == PRIOR.constants


@pytest.mark.parametrize(
    "changed", [{"format": 9}, {"constants": dataclasses.replace(PRIOR.constants, layer_s=0.0)}], ids=["format", "zero"]
)
def test_calibrations_that_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    calibration.save(dataclasses.replace(PRIOR, **changed), tmp_path / "c.json")
    with pytest.raises(ConfigError, match="calibrate again"):
        calibration.load(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": "\\u0000"}'])
def test_files_that_are_no_calibration(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match="make one with kervan calibrate"):
        calibration.load(tmp_path / "c.json")
