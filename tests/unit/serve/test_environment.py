"""What an engine's or gateway's process has of its actor's environment, and of the fleet's."""

import os
from typing import Any

import pytest

from kervan.config.fleet import FleetConfig
from kervan.serve.environment import process_environment, warm_owner_pid

EAGER = {"enforce_eager": True}


@pytest.mark.parametrize(
    ("engine_args", "is_on_cpu", "env", "expected"),
    [
        pytest.param(EAGER, True, {}, "1", id="nothing is compiled, log probabilities neither"),
        pytest.param(EAGER, True, {"TORCH_COMPILE_DISABLE": "0"}, "0", id="the user's word"),
        pytest.param({}, True, {}, None, id="vLLM compiles the model"),
        pytest.param({"enforce_eager": False}, True, {}, None, id="and is told to"),
        pytest.param(EAGER, False, {}, None, id="GPUs as vLLM has it"),
    ],
)
def test_nothing_is_compiled_on_eager_cpu_engines(
    engine_args: dict[str, Any],
    is_on_cpu: bool,
    env: dict[str, str],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    config = FleetConfig(model="m", engine_args=engine_args, env=env)
    assert process_environment(config, is_on_cpu=is_on_cpu).get("TORCH_COMPILE_DISABLE") == expected


def test_what_ray_set_for_its_actor_is_not_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = process_environment(FleetConfig(model="m", env={"HF_HUB_OFFLINE": "1"}), is_on_cpu=True)
    assert found.keys().isdisjoint({"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"})
    assert found["HF_HUB_OFFLINE"] == "1"


def test_the_gpus_of_an_actor_are_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert process_environment(FleetConfig(model="m"), is_on_cpu=False)["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_the_warm_process_ends_with_ray_or_with_the_process_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KERVAN_WARM_OWNER_PID", raising=False)
    assert warm_owner_pid() == os.getppid()
    monkeypatch.setenv("KERVAN_WARM_OWNER_PID", "4711")
    assert warm_owner_pid() == 4711
    monkeypatch.setenv("KERVAN_WARM_OWNER_PID", "nobody")
    assert warm_owner_pid() == os.getppid()
