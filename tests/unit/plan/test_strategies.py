"""Data, tensor, pipeline and expert parallelism: yes or no, and a reason with its number."""

import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.config.workload import Slo, parse_lengths
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan.explain import LayoutPlan
from kervan.plan.request import PlanRequest
from kervan.plan.search import search


def plan(name: str, **given: Any) -> LayoutPlan:
    spec = parse(json.loads((MODELS / name / "config.json").read_text()), name)
    sizes: dict[str, Any] = {"isl": parse_lengths("512"), "osl": parse_lengths("32"), "gpus": 4, "concurrency": 8}
    return search(PlanRequest(spec=spec, gpu=hardware.gpu("H200"), **(sizes | given)))


@pytest.mark.parametrize(
    ("name", "given", "use", "words"),
    [
        pytest.param(
            "llama3-8b", {"concurrency": 256}, [True, False, False, False],
            ["replicas do not communicate", "of a decode step is all-reduce", "passes all stages",
             "the model has no experts"],
            id="small: copies",
        ),
        pytest.param(
            "llama3-70b", {}, [False, True, False, False],
            ["2 x TP2 delivers", "TP1 does not fit: 131.4 GiB of weights", "TP2xPP2 delivers", "no experts"],
            id="large: cut",
        ),
        pytest.param(
            "qwen3-30b-a3b", {"gpus": 1}, [False, False, False, False],
            ["the GPUs make one replica only", "no other", "one GPU", "128 of them"], id="experts on one GPU",
        ),
        pytest.param(
            "qwen3-30b-a3b", {"gpus": 2, "fixed": {"tp": 2, "ep": 2}}, [False, True, False, True],
            ["one replica", "it was asked for", "another layout was asked for", "64 whole experts per GPU"], id="given",
        ),
    ],
)  # fmt: skip
def test_each_kind_has_its_answer(name: str, given: dict[str, Any], use: list[bool], words: list[str]) -> None:
    found = plan(name, **given).strategies
    assert [one.name.split()[0] for one in found] == ["data", "tensor", "pipeline", "expert"]
    assert [one.use for one in found] == use
    for one, part in zip(found, words, strict=True):
        assert part in one.reason


def test_a_rate_that_one_replica_serves_needs_no_copies() -> None:
    best = plan("llama3-8b", concurrency=None, rate=1.0, gpus=2, slo=Slo(tpot_s=0.05))
    assert best.best.layout.dp == 1
    assert best.strategies[0].reason.startswith("one replica serves the load: a replica on one GPU has KV cache for ")
