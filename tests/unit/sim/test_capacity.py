"""The model of a replica for policies, against a simulation of each of its steps."""

import functools
import math
from collections.abc import Callable

import pytest
from harness.places import REPOSITORY

from kervan.config.workload import Slo, parse_lengths
from kervan.plan import load, screen
from kervan.plan.serving import open_loop, poisson
from kervan.sim.capacity import ReplicaCapacity
from kervan.sim.step_time import StepTime


@functools.cache
def replica(model: str, gpu: str, tp: int) -> tuple[StepTime, int]:
    from kervan.cli.plan import plan_request

    request = plan_request(
        str(REPOSITORY / "benchmarks/models" / model), gpu=gpu, gpus=tp, fixed={"tp": tp}, isl=parse_lengths("1024"),
        osl=parse_lengths("256"), rate=1.0, engine_args={},
    )  # fmt: skip
    found = screen.screen(load.load(request))[0]
    return found.step_time, found.memory.kv_tokens


def highest(keeps: Callable[[float], bool], low: float, high: float, close: float) -> float:
    while high / low > close:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


@pytest.mark.parametrize(
    ("model", "tp", "isl", "osl", "slo"),
    [
        ("llama3-8b", 1, 1024, 256, Slo(ttft_s=1.0, tpot_s=0.03)),
        ("llama3-8b", 1, 4000, 1000, Slo(ttft_s=3.0, tpot_s=0.1)),  # its KV cache is what it has least of
        ("llama3-70b", 4, 1024, 256, Slo(ttft_s=1.0, tpot_s=0.03)),
    ],
)
def test_the_highest_rate_within_an_slo_is_that_of_the_simulation_within_10_percent(
    model: str, tp: int, isl: int, osl: int, slo: Slo
) -> None:
    step_time, kv_tokens = replica(model, "H200", tp)
    capacity = ReplicaCapacity(step_time, kv_tokens)
    assert slo.ttft_s is not None
    assert slo.tpot_s is not None

    def predicted(rate: float) -> bool:
        seen = capacity.predict(requests_per_s=rate, prompt_tokens=isl, output_tokens=osl)
        return seen.ttft_s <= slo.ttft_s and seen.tpot_s <= slo.tpot_s  # type: ignore[operator]

    def simulated(rate: float) -> bool:
        before = max(50, int(rate * osl * slo.tpot_s * 1.5))  # type: ignore[operator]
        count = max(400, int(rate * 30))
        run = open_loop(
            step_time, poisson(count + 2 * before, rate, isl, osl, seed=1), kv_tokens=kv_tokens,
            measured=range(before, before + count),
        )  # fmt: skip
        return run.is_stable and run.ttft_s(0.99) <= slo.ttft_s and run.tpot_s(0.99) <= slo.tpot_s  # type: ignore[operator]

    ours = highest(predicted, 0.01, 500.0, 1.002)
    assert simulated(0.9 * ours)
    assert not simulated(1.12 * ours)


@pytest.fixture
def capacity() -> ReplicaCapacity:
    return ReplicaCapacity(*replica("llama3-8b", "H200", 1))


def test_more_load_is_slower_and_fuller(capacity: ReplicaCapacity) -> None:
    seen = [capacity.predict(requests_per_s=rate, prompt_tokens=1024, output_tokens=256) for rate in (0.1, 5, 15, 25)]
    for name in ("ttft_s", "tpot_s", "utilization", "kv_share", "in_flight"):
        values = [getattr(one, name) for one in seen]
        assert values == sorted(values), name


def test_overload_is_infinite_and_has_a_utilization_above_one(capacity: ReplicaCapacity) -> None:
    seen = capacity.predict(requests_per_s=1000.0, prompt_tokens=1024, output_tokens=256)
    assert seen.ttft_s == math.inf
    assert seen.utilization > 1


def test_an_empty_replica_takes_a_step_and_its_prompt(capacity: ReplicaCapacity) -> None:
    seen = capacity.predict(requests_per_s=1e-6, prompt_tokens=1024, output_tokens=256)
    decode_s = capacity.step_s(sequences=1, context_tokens=1024 + 128)
    assert seen.tpot_s == pytest.approx(decode_s, rel=0.02)
    assert seen.ttft_s < 0.2


def test_a_scale_multiplies_times(capacity: ReplicaCapacity) -> None:
    slow = ReplicaCapacity(*replica("llama3-8b", "H200", 1), time_scale=2.0)
    assert slow.step_s(sequences=8, context_tokens=8000) == 2 * capacity.step_s(sequences=8, context_tokens=8000)
    assert slow.prefill_tokens_per_s == pytest.approx(capacity.prefill_tokens_per_s / 2)


@pytest.mark.parametrize("more", [{"arrivals_cv2": 2.0}, {"prompts_cv2": 2.0}])
def test_more_variance_is_slower_in_the_tail(capacity: ReplicaCapacity, more: dict[str, float]) -> None:
    given = {"requests_per_s": 20.0, "prompt_tokens": 1024, "output_tokens": 256}
    even, uneven = capacity.predict(**given), capacity.predict(**given, **more)
    assert uneven.ttft_s > even.ttft_s
    assert uneven.tpot_s > even.tpot_s


def test_stages_of_a_pipeline_work_on_batches_beside_each_other() -> None:
    from kervan.cli.plan import plan_request

    request = plan_request(
        str(REPOSITORY / "benchmarks/models/llama3-70b"), gpu="H200", gpus=4, fixed={"pp": 2, "tp": 2},
        isl=parse_lengths("1024"), osl=parse_lengths("256"), rate=1.0, engine_args={},
    )  # fmt: skip
    found = screen.screen(load.load(request))[0]
    seen = ReplicaCapacity(found.step_time, found.memory.kv_tokens).predict(
        requests_per_s=0.5, prompt_tokens=1024, output_tokens=256
    )
    assert 0 < seen.tpot_s < 0.2
    assert 0 < seen.utilization < 1
