"""A tensor-parallel vLLM engine whose rank 1 sleeps in an all-reduce: it is named, and the engine goes on if it wakes."""

import os
import re
from pathlib import Path

import pytest
from harness.live import eventually_async
from harness.shared_fleet import Models
from harness.sleeping_rank_names import EXTENSION
from harness.twin_bench import SECRET, TwinBench
from harness.warm_place import WarmPlace

from kervan.config.fleet import FleetConfig
from kervan.fleet.control import EngineSpec
from kervan.fleet.process import EngineProcess

pytestmark = pytest.mark.timeout(600)


async def test_a_rank_that_sleeps_in_an_all_reduce_is_named(models: Models, tmp_path: Path, warm: WarmPlace) -> None:
    arguments = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
        "worker_extension_cls": EXTENSION,
    }  # fmt: skip
    config = FleetConfig(model=str(models.demo), tp=2, engine_args=arguments)
    engine = EngineProcess(
        EngineSpec("hung", list(config.engine_argv), "127.0.0.1", SECRET),
        log_path=tmp_path / "hung.log",
        env=warm.environment,
        fork_for_pid=os.getpid(),
    )
    try:
        bench = TwinBench(tmp_path)
        await bench.join("hung", engine)
        await bench.add("before", list(range(40, 60)), 8, temperature=0.0)
        await bench.ended("before")
        assert engine.why_stalled() == ""

        warm.fall_asleep()
        await bench.add("during", list(range(40, 60)), 8, temperature=0.0)
        await eventually_async(lambda: engine.why_stalled() and engine.rank_watch.hang, "the hang is sure", 120)
        hang = engine.rank_watch.hang
        named = r"rank 1 \(pid \d+\) is in broken_all_reduce \(sleeping_rank.py:\d+\)"
        assert re.fullmatch(rf"a collective hangs: {named}; rank 0 waits for it in \w+ \(\w+.py:\d+\)", hang), hang
        health = engine.health(stall_timeout_s=5.0)
        assert not health.is_healthy
        assert health.reason.endswith(f"(limit 5 s); {hang}")

        warm.wake()
        await bench.ended("during")
        assert bench.tokens("during") == bench.tokens("before")
        await eventually_async(lambda: engine.why_stalled() == "" == engine.rank_watch.hang, "it is forgotten", 20)
        bench.twins.clear()
        await bench.close()
    finally:
        warm.wake()
        engine.kill()
