"""How sure a plan is of an SLO: what is measured at a rate is compared with what is said of it."""

import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.config.workload import Slo, parse_lengths
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan.bands import MAX_FACTOR, Bands, bands
from kervan.plan.evaluate import CLOSE_LOOK, GLANCE, Care, Simulations
from kervan.plan.load import load
from kervan.plan.request import PlanRequest
from kervan.plan.screen import screen

SLO = Slo(ttft_s=2.0, tpot_s=0.05)


def of_one_h200(name: str, osl: str, care: Care = CLOSE_LOOK, **given: Any) -> Bands:
    spec = parse(json.loads((MODELS / name / "config.json").read_text()), name)
    sizes: dict[str, Any] = {"isl": parse_lengths("1024"), "osl": parse_lengths(osl), "gpus": 1}
    a_load = load(PlanRequest(spec=spec, gpu=hardware.gpu("H200"), **(sizes | {"slo": SLO} | given)))
    (only,) = (one for one in screen(a_load) if one.fits)
    return bands(a_load, Simulations(a_load).evaluate(only, care))


@pytest.mark.parametrize(
    ("name", "osl", "rate", "least", "most"),
    [
        ("llama3-8b", "128", 20.0, 0.99, 1.0),
        ("llama3-8b", "128", 27.0, 0.8, 0.995),
        ("llama3-8b", "128", 31.0, 0.05, 0.5),
        ("qwen3-30b-a3b", "256", 15.0, 0.5, 0.95),
        ("qwen3-30b-a3b", "256", 20.0, 0.0, 0.2),
    ],
)
def test_near_saturation_nothing_is_sure(name: str, osl: str, rate: float, least: float, most: float) -> None:
    """Measured on one H200: 8B kept it at 20 and 27 requests/s and not at 31, experts at 15 and not at 20
    (benchmarks/records/open-loop-*.json). Within a tenth of the rate at which it breaks, a plan that is sure is wrong.
    """
    assert least <= of_one_h200(name, osl, rate=rate).meets_slo <= most


def test_bands_of_times_widen_towards_saturation() -> None:
    """Of tokens/s they do not: what comes in goes out."""
    found = [of_one_h200("llama3-8b", "128", GLANCE, rate=rate).factors for rate in (5.0, 20.0, 30.0)]
    for figure in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"):
        assert found[0][figure] < found[1][figure] < found[2][figure] < MAX_FACTOR
    assert found[2]["tpot_p99_ms"] > 1.5
    assert found[0]["out_tok_s"] == found[2]["out_tok_s"]
    # Measured at 31 requests/s: 59% longer than predicted.
    assert of_one_h200("llama3-8b", "128", GLANCE, rate=31.0).factors["tpot_p99_ms"] > 1.59


def test_a_closed_loop_waits_for_its_replica() -> None:
    """It has no rate that could come too fast; so its bands are those of its calibration."""
    few, many = (of_one_h200("llama3-8b", "128", concurrency=streams) for streams in (1, 64))
    assert few.factors == many.factors
