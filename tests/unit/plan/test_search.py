"""Layouts ranked, and what is said when none fits."""

import dataclasses
import json
from typing import Any

import pytest
from harness.places import MODELS

from kervan.config.workload import Slo, parse_lengths
from kervan.errors import CapacityError, ConfigError
from kervan.facts import hardware
from kervan.facts.architecture import parse
from kervan.plan import explain
from kervan.plan.request import PlanRequest
from kervan.plan.search import search
from kervan.sim import limits as engine
from kervan.vendor.vllm_names import COUNTED_ARGUMENTS


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


H200 = hardware.gpu("H200")


def plan_request(name: str = "llama3-8b", *, gpu: hardware.Gpu = H200, **given: Any) -> PlanRequest:
    given = {"isl": parse_lengths("512"), "osl": parse_lengths("32"), "gpus": 2, "concurrency": 4} | given
    return PlanRequest(spec=parse(config(name), name), gpu=gpu, **given)


def test_those_that_keep_the_slo_come_first() -> None:
    plan = search(plan_request("llama3-70b", gpus=4, concurrency=8, slo=Slo(tpot_s=0.021)))
    likely = [c.meets_slo >= 0.5 for c in plan.layouts if c.fits]
    assert likely == sorted(likely, reverse=True)
    assert [c.fits for c in plan.layouts] == sorted((c.fits for c in plan.layouts), reverse=True)
    assert plan.best.layout.tp == 4
    assert any(not c.fits and c.reason for c in plan.layouts)  # 70B on one GPU


def test_where_none_keeps_the_slo_the_nearest_comes_first() -> None:
    plan = search(plan_request("llama3-70b", gpus=4, concurrency=8, slo=Slo(tpot_s=0.005)))
    excesses = [round(c.tpot_p99_ms / 5, 2) for c in plan.layouts if c.fits]
    assert excesses == sorted(excesses)
    assert plan.verdict.startswith("No layout keeps the SLO (tpot=5ms): TP4 comes nearest, with TPOT p99 of ")
    assert "times the bound of 5 ms" in plan.verdict
    assert any(note.startswith("what would keep it: ") and "--slo tpot=" in note for note in plan.notes)
    assert not plan.keeps_slo


@pytest.mark.parametrize("goal", ["cost", "throughput", "latency"])
def test_the_best_is_that_of_the_goal(goal: Any) -> None:
    plan = search(plan_request(goal=goal, usd_per_gpu_h=2.0))
    figures = {
        "cost": lambda c: -c.usd_per_mtok, "throughput": lambda c: c.out_tok_s, "latency": lambda c: -c.tpot_p50_ms
    }  # fmt: skip
    assert plan.best == max(plan.layouts, key=figures[goal])


def test_two_that_are_alike_are_told() -> None:
    plan = search(plan_request(gpus=2, goal="throughput"))
    spread = dict.fromkeys(plan.request.calibration.spread, 1.0)
    vague = dataclasses.replace(plan.request.calibration, spread=spread)
    assert any("cannot be told apart" in note for note in search(plan_request(calibration=vague)).notes)


def test_a_gpu_that_vllm_does_not_serve_is_told() -> None:
    def told(gpu: str) -> bool:
        plan = search(plan_request(gpu=hardware.gpu(gpu), gpus=2))
        return any(f"does not serve {gpu}: its wheels have no kernels" in note for note in plan.notes)

    assert told("V100-32") and not told("T4")


def test_rough_figures_are_told_and_no_few_gpus_have_them() -> None:
    """Long pipelines far behind the best are looked at shortly; of what is measured on a few GPUs nothing is."""
    note = "the rest briefly: their figures, marked ~, are rough"
    assert any(note in told for told in search(plan_request("llama3-70b", gpus=32, concurrency=32)).notes)
    assert not any(note in told for told in search(plan_request("llama3-70b", gpus=4, concurrency=32)).notes)
    pipeline = search(plan_request("llama3-70b", gpus=32, concurrency=32, fixed={"pp": 32}))
    assert not any(note in told for told in pipeline.notes)


def test_what_fits_nowhere_says_what_would_do() -> None:
    with pytest.raises(CapacityError, match=r"GiB more than the .* use --gpus 4 or the weights in"):
        search(plan_request("llama3-70b", gpu=hardware.gpu("L40S"), gpus=2))
    with pytest.raises(ConfigError, match="longer than max_model_len=8192"):
        search(plan_request(isl=parse_lengths("9000")))


def test_one_layout() -> None:
    plan = search(plan_request(gpus=4, fixed={"tp": 2, "pp": 2}))
    assert [str(c.layout) for c in plan.layouts] == ["TP2xPP2"]
    with pytest.raises(ConfigError, match="needs 8 GPUs, and there are 4"):
        search(plan_request(gpus=4, fixed={"tp": 2, "dp": 4}))


def test_a_rate_above_capacity_is_said() -> None:
    plan = search(plan_request(gpus=1, concurrency=None, rate=10_000.0, slo=Slo(ttft_s=1.0)))
    assert plan.best.meets_slo == 0.0
    assert "overloaded: 10,000 requests/s come in, and " in plan.best.reason
    assert "No layout serves the load" in plan.verdict


def test_without_a_load_the_best_keeps_the_slo() -> None:
    plan = search(plan_request("llama3-70b", gpus=4, nodes=2, concurrency=None, slo=Slo(ttft_s=2.0, tpot_s=0.05)))
    assert plan.best.meets_slo > 0.5
    assert plan.best.tpot_p99_ms <= 50
    assert {c.layout.gpus for c in plan.layouts} == {4}


def test_an_unknown_architecture_is_said() -> None:
    spec = parse(config("llama3-8b") | {"model_type": "new", "architectures": ["NewForCausalLM"]}, "new")
    plan = search(dataclasses.replace(plan_request(gpus=1), spec=spec))
    assert any(
        "kervan does not know NewForCausalLM (model_type 'new'): memory and speed are counted" in note
        for note in plan.notes
    )
    known = search(plan_request(gpus=1)).best.bands
    assert all(plan.best.bands[figure] == pytest.approx(band**2) for figure, band in known.items())


def test_stages_that_take_turns_are_told() -> None:
    told = {name: search(plan_request(name)).notes for name in ("llama3-8b", "qwen25-14b")}
    assert [note for note in told["llama3-8b"] if "turns" in note] == []
    (note,) = (note for note in told["qwen25-14b"] if "turns" in note)
    assert note.startswith("vLLM 0.24 serves Qwen2ForCausalLM with its model runner V1: pipeline stages take turns")
    assert not any("turns" in note for note in search(plan_request("qwen25-14b", fixed={"tp": 2})).notes)


def test_engine_arguments_that_no_figure_depends_on_are_told() -> None:
    (told,) = (
        note
        for note in search(plan_request(arguments={"max_num_seqs": 32, "load_format": "dummy", "seed": 1})).notes
        if "engine argument" in note
    )
    assert "load_format, seed; kervan up hands it to vLLM" in told
    assert not any("engine argument" in note for note in search(plan_request(arguments={"max_num_seqs": 32})).notes)


def test_engine_arguments_that_count_are_those_that_are_read() -> None:
    read: set[str] = set()

    class Recorded(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
            read.add(name)
            return super().get(name, default)

    spec, arguments = parse(config("llama3-8b"), "8b"), Recorded()
    engine.check_counted(spec, arguments)
    engine.as_served(spec, arguments)
    engine.limits(spec, H200, arguments)
    plan_request(arguments=arguments, prefix_hit=0.5)
    assert read == COUNTED_ARGUMENTS


@pytest.mark.parametrize(
    "arguments",
    [{"max_num_seqs": "abc"}, {"max_num_seqs": "nan"}, {"max_num_batched_tokens": 1}, {"kv_cache_dtype": "int3"},
     {"max_num_seqs": 9000}],
)  # fmt: skip
def test_engine_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="engine argument"):
        search(plan_request(arguments=arguments))


@pytest.mark.parametrize(("prefix_hit", "binding"), [(0.0, "compute"), (0.9, "weights bandwidth")])
def test_cached_tokens_of_prompts_bind_nothing(prefix_hit: float, binding: str) -> None:
    """Prompts of 4,096 tokens take most of the time, but not when nine of ten of these are not computed."""
    isl, osl = parse_lengths("4096"), parse_lengths("64")
    plan = search(plan_request(gpus=1, concurrency=8, prefix_hit=prefix_hit, isl=isl, osl=osl))
    assert plan.best.binding == binding


def test_a_full_prefill_step_attends_to_cached_tokens() -> None:
    """With half of each prompt cached, a token looks at 256 cached ones and at 128 of its own: 384, where 256 were. The
    kernel is somewhat faster with more of them.
    """
    attention_ms = []
    for prefix_hit in (0.0, 0.5):
        plan = search(plan_request(gpus=1, prefix_hit=prefix_hit))
        attention_ms += [ms for name, _, ms in explain.step_terms(plan, plan.best) if name == "prefill_attention"]
    assert 1.1 * attention_ms[0] < attention_ms[1] < 1.5 * attention_ms[0]


def test_the_gpus_that_are_advised_for_a_load_keep_it() -> None:
    """Two of them serve 50 of 60 requests/s, which shows after seconds only."""
    given = {"concurrency": None, "rate": 60.0, "isl": parse_lengths("1024"), "osl": parse_lengths("256")}
    slo = Slo(ttft_s=2.0)
    (note,) = (n for n in search(plan_request(gpus=1, slo=slo, **given)).notes if n.startswith("what would keep it: "))
    assert "--gpus 4" in note.split("; ")[-1]
    assert search(plan_request(gpus=4, slo=slo, **given)).keeps_slo
