"""A twin's process against vLLM's own message classes, over real sockets: what an engine would be asked, and says."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from harness.live import until
from harness.twin_bench import LIMITS, SECRET, TwinBench, member

from kervan.config.fault import Fault
from kervan.fleet.client import FleetClient
from kervan.twin import wire as twin_wire
from kervan.twin.token_engine import StepTiming, answer

NUM_LONG = 600


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[TwinBench]:
    bench = TwinBench(tmp_path)
    yield bench
    await bench.close()


def test_the_defaults_that_vllm_leaves_out() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreEventType, EngineCoreRequestType, FinishReason

    default = SamplingParams()
    assert (default.max_tokens, default.min_tokens, default.ignore_eos) == (
        twin_wire.MAX_TOKENS_DEFAULT,
        twin_wire.MIN_TOKENS_DEFAULT,
        twin_wire.IGNORE_EOS_DEFAULT,
    )
    kinds = [EngineCoreRequestType.ADD, EngineCoreRequestType.ABORT, EngineCoreRequestType.UTILITY]
    assert [kind.value for kind in kinds] == [twin_wire.ADD, twin_wire.ABORT, twin_wire.UTILITY]
    assert {str(FinishReason(value)): value for value in twin_wire.FINISH.values()} == twin_wire.FINISH
    assert (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED) == (twin_wire.QUEUED, twin_wire.SCHEDULED)


def test_a_directory_without_a_tokenizer_gets_one_that_vllm_takes(tmp_path: Path) -> None:
    from vllm.tokenizers import get_tokenizer

    from kervan.fleet.vllm import frontend

    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 900})
    )
    argv = ["--model", str(tmp_path)]
    with contextlib.ExitStack() as files:
        option, made = frontend._tokenizer_argv(argv, files)
        assert option == "--tokenizer"
        tokenizer = get_tokenizer(made)
        assert (len(tokenizer), tokenizer.eos_token_id) == (900, 1)
        assert frontend._tokenizer_argv([*argv, "--tokenizer", "other/one"], files) == []
    assert not Path(made).exists()
    (tmp_path / "tokenizer.json").touch()
    with contextlib.ExitStack() as files:
        assert frontend._tokenizer_argv(argv, files) == []


async def test_answers_their_ends_and_their_first_tokens(bench: TwinBench) -> None:
    await bench.start("a")
    prompt = list(range(700))
    whole = answer(prompt, 20, LIMITS)
    await bench.add("length", prompt)
    await bench.add("default", prompt, twin_wire.MAX_TOKENS_DEFAULT)
    await bench.add("stop", prompt, stop_token_ids=[whole[4]])
    await bench.add("late stop", prompt, stop_token_ids=[whole[4]], min_tokens=7)
    await bench.ended("length", "default", "stop", "late stop")
    assert bench.tokens("length") == bench.tokens("late stop") == whole
    assert bench.tokens("default") == whole[:16]
    assert bench.tokens("stop") == whole[:5]
    assert [str(bench.outputs[name][-1].finish_reason) for name in ("length", "stop")] == ["length", "stop"]
    assert bench.outputs["stop"][-1].stop_reason == whole[4]
    first, second, *_ = bench.outputs["length"]
    assert first.prefill_stats.num_prompt_tokens == 700
    queued, scheduled = first.events
    assert queued.timestamp <= scheduled.timestamp <= time.monotonic()
    assert (second.prefill_stats, second.events, second.finish_reason) == (None, None, None)


async def test_utility_calls_are_answered(bench: TwinBench) -> None:
    await bench.start("a")
    assert await bench.client.call("get_supported_tasks", ()) == [["generate"]]
    assert await bench.client.call("is_sleeping", ()) == [False]
    assert await bench.client.call("anything_else", (1, "x")) == [None]


async def test_the_prefix_cache_is_told_of_as_vllm_does(bench: TwinBench) -> None:
    """100 tokens are 6 blocks of 16; another tenant finds none, nor does anybody after a reset."""
    await bench.start("a")
    prompt = list(range(100))
    for name, salt in (("first", None), ("second", None), ("tenant", "their salt")):
        await bench.add(name, prompt, 2, salt=salt)
        await bench.ended(name)
    stats = bench.outputs["second"][0].prefill_stats
    assert (stats.num_prompt_tokens, stats.num_computed_tokens, stats.num_cached_tokens) == (100, 4, 96)
    assert stats.num_local_cached_tokens == 96
    assert [bench.outputs[name][0].prefill_stats.num_cached_tokens for name in ("first", "tenant")] == [0, 0]
    found = [one.prefix_cache_stats for one in bench.stats]
    assert (sum(one.requests for one in found), sum(one.queries for one in found)) == (3, 300)
    assert sum(one.hits for one in found) == 96
    assert {one.num_running_reqs for one in bench.stats} == {0, 1}
    assert await bench.client.call("reset_prefix_cache", (False, False)) == [True]
    await bench.add("after", prompt, 1000)
    await until(lambda: bench.tokens("after"))
    assert bench.outputs["after"][0].prefill_stats.num_cached_tokens == 0
    assert await bench.client.call("reset_prefix_cache", (False, False)) == [False]
    assert await bench.client.call("reset_prefix_cache", (True, False)) == [True]
    await bench.ended("after")
    assert bench.tokens("after") == answer(prompt, 1000, LIMITS)


async def test_answers_survive_kills_drains_and_crashes(bench: TwinBench) -> None:
    """40 answers, too long to end on a draining twin, on three twins: one is killed, one drains, one is told to crash; every token is checked."""
    timing = StepTiming(base_s=2.5e-2, prefill_token_s=1e-6, sequence_s=0.0, context_token_s=0.0)
    for name in "abc":
        await bench.start(name, timing)
    prompts = {f"s{i}": [i, *range(i + 3)] for i in range(40)}
    for name, prompt in prompts.items():
        await bench.add(name, prompt, NUM_LONG)
    await until(lambda: all(len(bench.tokens(name)) > 20 for name in prompts))
    bench.twins["a"].kill()
    await bench.start("d", timing)
    bench.twins["b"].drain()
    await until(lambda: bench.client.counts.moved >= 15)
    bench.twins["c"].suffer(Fault("crash", 40))
    await until(bench.twins["c"].ended.is_set)
    bench.follow()
    await bench.ended(*prompts)
    assert {name: bench.tokens(name) for name in prompts} == {
        name: answer(prompt, NUM_LONG, LIMITS) for name, prompt in prompts.items()
    }
    assert bench.client.counts.given_up == 0


async def test_a_long_prefill_is_no_dead_engine(bench: TwinBench) -> None:
    twin = await bench.start("a", StepTiming(base_s=0.01, prefill_token_s=0.02, sequence_s=0.0, context_token_s=0.0))
    await bench.add("s", [1] * 150, 3)  # 3 s in one step
    unhealthy = []

    def is_over() -> bool:
        unhealthy.extend([] if (health := twin.health(stall_timeout_s=1.5)).is_healthy else [health.reason])
        return bench.is_over("s")

    await until(is_over)
    assert unhealthy == []
    assert len(bench.tokens("s")) == 3


async def test_faults_show_in_load_and_end(bench: TwinBench) -> None:
    twin = await bench.start("a")
    await bench.add("s", [1, 2, 3], 4000)
    await until(lambda: len(bench.tokens("s")) > 10)
    twin.suffer(Fault("hang"))
    await until(lambda: "injected fault: hang" in twin.load.note)
    steps = twin.load.num_steps
    await until(lambda: time.monotonic() - twin._last_report_s < 0.5)
    await asyncio.sleep(1.5)
    assert (twin.load.num_steps, twin.load.has_work) == (steps, True)
    assert not twin.health(stall_timeout_s=1.0).is_healthy
    twin.suffer(Fault("kv-pressure", 0.5))
    await until(lambda: twin.load.kv_cache_usage >= 0.5)
    twin.suffer(Fault("none"))
    await until(lambda: twin.load.note == "" and twin.load.num_steps > steps)
    await bench.client.abort(["s"])
    await until(lambda: not twin.load.has_work)


async def test_a_process_is_struck(bench: TwinBench) -> None:
    """Killed, it is gone; stopped, it lives and says nothing, until somebody ends it."""
    killed, hung = await bench.start("a"), await bench.start("b")
    killed.strike("kill")
    await until(killed.ended.is_set)
    killed.strike("kill")  # one that is gone already
    hung.strike("hang")
    await until(lambda: psutil.Process(hung.pid).status() == psutil.STATUS_STOPPED)
    await until(lambda: not hung.health(1.5).is_healthy)
    assert not hung.ended.is_set()
    hung.kill()
    assert hung.ended.is_set()


async def test_a_gateway_without_layouts_is_refused(bench: TwinBench) -> None:
    await bench.start("a")
    bench.client.codec.layouts = {}
    stranger = FleetClient(bench.client.codec, secret=SECRET)
    stranger.set_members([member("a", bench.twins["a"])])
    await until(lambda: stranger.refusals)
    assert "install one kervan version" in stranger.refusals["a"]
    await stranger.close()
    await bench.add("s", [1, 2, 3])
    await bench.ended("s")
