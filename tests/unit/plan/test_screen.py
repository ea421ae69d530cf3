"""All layouts, and what arithmetic says of them."""

import json
from typing import Any

from harness.places import MODELS

from kervan.config.workload import parse_lengths
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan.load import PlanLoad, load
from kervan.plan.request import PlanRequest
from kervan.plan.screen import screen


def loaded(name: str = "llama3-70b", **given: Any) -> PlanLoad:
    spec = parse(json.loads((MODELS / name / "config.json").read_text()), name)
    sizes: dict[str, Any] = {"isl": parse_lengths("512"), "osl": parse_lengths("32..64"), "gpus": 8}
    return load(PlanRequest(spec=spec, gpu=hardware.gpu("H200"), **(sizes | given)))


def test_screening_says_what_fits_and_by_arithmetic_how_much_it_takes() -> None:
    screened = screen(loaded(gpus=2))
    assert {str(one.layout): one.fits for one in screened} == {"2 x TP1": False, "TP2": True, "PP2": True}
    assert [one.requests_s > 0 for one in screened] == [one.fits for one in screened]
    assert all(("GiB" in one.reason) != one.fits for one in screened)


def test_a_rate_is_screened_with_as_many_copies_as_it_needs_half_and_twice() -> None:
    a_load = loaded("llama3-8b", gpus=64, rate=400.0)
    single = [one for one in screen(a_load) if one.replica.gpus_per_replica == 1]
    needed = -(-400.0 // single[0].requests_s)
    assert [one.copies for one in single] == [needed // 2, needed, 2 * needed, 64]
