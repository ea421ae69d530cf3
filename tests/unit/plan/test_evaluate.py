"""Layouts under load: values in, values out, and no memory of what was evaluated before."""

import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.config.workload import Slo, parse_lengths
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan.evaluate import Simulations
from kervan.plan.load import PlanLoad, load
from kervan.plan.request import PlanRequest
from kervan.plan.screen import screen


def loaded(name: str = "llama3-70b", **given: Any) -> PlanLoad:
    spec = parse(json.loads((MODELS / name / "config.json").read_text()), name)
    sizes: dict[str, Any] = {"isl": parse_lengths("512"), "osl": parse_lengths("32..64"), "gpus": 8}
    return load(PlanRequest(spec=spec, gpu=hardware.gpu("H200"), **(sizes | given)))


@pytest.mark.parametrize(
    "how", [{"concurrency": 9}, {"rate": 5.0}, {"slo": Slo(ttft_s=2.0, tpot_s=0.05)}], ids=["closed", "rate", "no load"]
)
def test_figures_do_not_depend_on_what_was_simulated_before(how: dict[str, Any]) -> None:
    a_load = loaded(**how)
    fitting = [one for one in screen(a_load) if one.fits]
    assert len(fitting) > 3
    simulations = Simulations(a_load)
    forward = [simulations.evaluate(one, seeds=2) for one in fitting]
    backward = [Simulations(a_load).evaluate(one, seeds=2) for one in reversed(fitting)]
    assert forward == backward[::-1]
    assert [simulations.evaluate(one, seeds=2) for one in fitting] == forward
