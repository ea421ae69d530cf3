"""Data, tensor, pipeline and expert parallelism: yes or no, and a reason with its number."""

import dataclasses
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
from kervan.plan.strategies import strategies


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


def test_data_parallel_attention_is_told_and_not_recommended() -> None:
    """Latent attention on 8 GPUs: 8 KV caches in place of one; the plan is still one that `kervan up` starts."""
    found = plan("deepseek-v3", gpus=8, isl=parse_lengths("1024"), osl=parse_lengths("64"), concurrency=256)
    other = found.better_elsewhere
    assert found.best.layout.starts_with == "kervan up"
    assert other is not None and str(other.layout) == "ADP8xEP8"
    assert other.out_tok_s > 1.3 * found.best.out_tok_s
    assert other.memory.kv_tokens > 3 * found.best.memory.kv_tokens
    assert not other.is_rough
    words = found.strategies[3].reason
    assert (
        f"attention data-parallel with EP8: ADP8xEP8 delivers {other.out_tok_s / found.best.out_tok_s - 1:.0%} more"
        in words
    )
    assert f", at {other.out_tok_s:,.0f} tok/s, with 3.5 times the KV cache; kervan up does not start it: " in words
    assert words.endswith("vllm serve MODEL --data-parallel-size 8 --enable-expert-parallel")


def test_where_data_parallel_attention_is_worse_that_is_all() -> None:
    found = plan("qwen3-30b-a3b", gpus=2, concurrency=1)
    assert found.better_elsewhere is None
    assert "; attention data-parallel with EP2: ADP2xEP2 delivers " in found.strategies[3].reason
    assert found.strategies[3].reason.endswith("% fewer tokens/s per GPU")


@pytest.mark.parametrize(
    ("best", "other", "words", "is_told"),
    [
        ({}, {"tpot_p50_ms": 45.0}, "takes 25% less time per token", True),
        ({}, {"tpot_p50_ms": 58.0}, "cannot be told apart, within the prediction's band", False),
        ({"meets_slo": 0.1}, {"meets_slo": 0.9, "tpot_p50_ms": 59.0}, "keeps the SLO", True),
        ({"served_share": 0.8, "meets_slo": 0.0}, {}, "serves all of the load", True),
        ({}, {"served_share": 0.8, "meets_slo": 0.0}, "serves 80% of the load", False),
    ],
)
def test_data_parallel_attention_is_compared_by_what_differs(
    best: dict[str, Any], other: dict[str, Any], words: str, is_told: bool
) -> None:
    """Of one open loop, whose tokens per second are the same."""
    found = plan("deepseek-v3", gpus=8, concurrency=8)
    ranks = next(c for c in found.layouts if c.layout.attention_dp > 1)
    request = dataclasses.replace(found.request, concurrency=None, rate=5.0)
    load = dataclasses.replace(found.load, request=request)
    same = {"tpot_p50_ms": 60.0, "out_tok_s": 1280.0, "score": 160.0}
    ranked = [dataclasses.replace(found.best, **same | best), dataclasses.replace(ranks, **same | other)]
    reason = strategies(load, ranked)[3].reason.partition("attention data-parallel with EP8: ADP8xEP8 ")[2]
    assert reason.startswith(words)
    assert reason.endswith("--enable-expert-parallel") is is_told
