"""vLLM's log lines, as 0.24 and 0.32 write them, and the sum of the parts."""

import pytest

from kervan.fleet.vllm.start_parts import split

PHASES = {"imports": 20.0, "config": 1.5, "engine": 60.0, "canary": 0.5}
GPU_LOG = """\
(EngineCore pid=7) INFO 11-22 [gpu_model_runner.py:5256] Model loading took 14.99 GiB memory and 8.250000 seconds
(EngineCore pid=7) INFO 11-22 [gpu_model_runner.py:6657] Graph capturing finished in 4 secs, took 0.61 GiB
(EngineCore pid=7) INFO 11-22 [core.py:338] init engine (profile, create kv cache, warmup model) took 30.50 s \
(compilation: 21.75 s)
"""
V2_LOG = """\
INFO [model_runner.py:303] Model loading took 14.99 GiB and 8.250000 seconds
INFO [model_runner.py:727] Graph capturing finished in 4 secs, took 0.61 GiB
INFO [core.py:328] init engine (profile, create kv cache, warmup model) took 30.50 s (compilation: 21.75 s — \
language_model: 20.75 s, encoder: 1.00 s)
"""


@pytest.mark.parametrize("log", [GPU_LOG, V2_LOG])
def test_a_gpu_start(log: str) -> None:
    parts = split(PHASES, log)
    assert parts == {
        "imports": 20.0,
        "config": 1.5,
        "workers": 21.25,
        "weights": 8.25,
        "compile": 21.75,
        "graphs": 4.0,
        "profiling": 4.75,
        "canary": 0.5,
    }
    assert sum(parts.values()) == sum(PHASES.values())


def test_a_cpu_start_compiles_nothing() -> None:
    parts = split(PHASES, "INFO init engine (profile, create kv cache, warmup model) took 2.00 s\n")
    assert (parts["workers"], parts["compile"], parts["graphs"], parts["profiling"]) == (58.0, 0.0, 0.0, 2.0)


def test_of_several_workers_the_last_counts() -> None:
    line = "INFO Model loading took 1.0 GiB memory and {} seconds\n"
    assert split(PHASES, line.format("3.0") + line.format("5.0"))["weights"] == 5.0


def test_what_has_no_engine_has_its_own_parts() -> None:
    assert split({"imports": 0.4}, GPU_LOG) == {"imports": 0.4}
