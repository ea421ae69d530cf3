"""Exact resume on model runner V2, as GPUs have it: here its kernels run in Triton's interpreter, slowly.

`test_resume.py` has more cases, on V1; `python benchmarks/gpu_moves.py interpreted` runs those on V2. What V2 needs of kervan is less: it takes all from vLLM's scheduler.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import triton_on_cpu
from harness.resume_asks import (
    BAD_WORDS,
    FEW,
    GRAMMARS,
    GREEDY,
    LONG_PROMPT,
    PENALTIES,
    PROMPT,
    SAMPLINGS,
    SEEDED,
    TALKING,
)
from harness.resume_oracle import Ask, Oracle, check

from kervan.demo import make_lora_adapter, make_random_model

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        triton_on_cpu.WHERE is None and importlib.util.find_spec("triton") is None,
        reason="no Triton; `make test` gets it, or set KERVAN_TRITON to a directory with the package",
    ),
]
EVERY = 8  # tokens, after which streams are moved
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "max_num_seqs": 48,
    "max_num_batched_tokens": 64,
    "enable_lora": True,
    "max_lora_rank": 8,
    "reasoning_parser": "deepseek_r1",
    "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
}


@pytest.fixture(scope="module")
def model(scratch: Path) -> Path:
    return make_random_model(scratch / "random-v2")


@pytest.fixture(scope="module")
def oracle(model: Path) -> Iterator[Oracle]:
    oracle = Oracle(str(model), **ENGINE, is_interpreted=True, is_async=True)
    oracle.call("use_reasoning_parser", None)
    yield oracle
    oracle.close()


def test_the_engine_is_like_a_gpus(oracle: Oracle) -> None:
    facts = oracle.call("facts")
    assert (facts["runner"], facts["async_scheduling"]) == ("V2", True)


ASKS = {
    "penalties and logprobs": Ask(PROMPT, {**TALKING, "logprobs": 3}, is_fresh=True),
    "penalties, prefix cached": Ask(PROMPT, TALKING),
    "logit bias": Ask(PROMPT, SAMPLINGS["logit bias"]),
    "bad words": Ask(PROMPT, {**GREEDY, "allowed_token_ids": FEW, "bad_words": BAD_WORDS}),
    "seed": Ask(PROMPT, SAMPLINGS["seed, top_p, top_k, min_p, penalties"]),
    "grammar": Ask(PROMPT, {"temperature": 0.0, "max_tokens": 48, **PENALTIES}, GRAMMARS["regex"]),
    "long, in chunks, seed": Ask(LONG_PROMPT, {**SEEDED, "max_tokens": 40}, is_fresh=True),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_moved_streams(oracle: Oracle, ask: Ask) -> None:
    whole, moved = oracle.call("from_every_token", ask, every=EVERY)
    check(whole, moved, every=EVERY)


def test_min_tokens_hold_back_an_end_that_the_model_wants(oracle: Oracle) -> None:
    eos = oracle.call("token_id", "<|im_end|>")
    few = {"allowed_token_ids": (*FEW, eos), "logit_bias": {eos: 100.0}}
    sampling = {**PENALTIES, **few, "temperature": 0.0, "max_tokens": 32, "min_tokens": 14}
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, sampling), every=5)
    check(whole, moved, every=5)
    assert (len(whole.tokens), whole.tokens[-1], whole.finish) == (15, eos, "stop")


def test_stop_token_ids(oracle: Oracle) -> None:
    stop = oracle.call("whole", Ask(PROMPT, TALKING)).tokens[11]
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, {**TALKING, "stop_token_ids": [stop]}), every=5)
    check(whole, moved, every=5)
    assert (whole.finish, whole.stop) == ("stop", stop)


def test_an_adapter(oracle: Oracle, model: Path, scratch: Path) -> None:
    ask = Ask(PROMPT, TALKING, lora=str(make_lora_adapter(model, scratch / "lora-v2")))
    whole, moved = oracle.call("from_every_token", ask, every=EVERY)
    check(whole, moved, every=EVERY)
    assert whole.tokens != oracle.call("whole", Ask(PROMPT, TALKING)).tokens


@pytest.mark.parametrize("sampling", [TALKING, SEEDED], ids=["greedy", "seed"])
def test_an_engine_that_drops_the_kv_cache_of_moved_streams(oracle: Oracle, sampling: dict[str, Any]) -> None:
    """Unlike V1, with a seed too: V2's random numbers depend on the token's position."""
    ask = Ask(PROMPT, sampling, is_fresh=True)
    whole, moved = oracle.call("from_every_token", ask, every=EVERY, preempt_after=3)
    check(whole, moved, every=EVERY)


def test_a_thinking_budget_counts_the_tokens_before_the_move(oracle: Oracle) -> None:
    start, end = oracle.call("token_id", "<think>"), oracle.call("token_id", "</think>")
    ask = Ask([*PROMPT, start], {**TALKING, "max_tokens": 20, "thinking_token_budget": 9})
    whole, moved = oracle.call("from_every_token", ask, every=4)
    check(whole, moved, every=4)
    assert whole.tokens.index(end) == 9


def test_a_stream_survives_move_after_move(oracle: Oracle) -> None:
    ask = Ask(PROMPT, {**TALKING, "max_tokens": 12, "temperature": 1.0, "seed": 5})
    whole, tokens = oracle.call("moved_after_each_token", ask)
    assert tokens == whole.tokens


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp 2", "pp 2"])
def test_two_workers(model: Path, layout: dict[str, int]) -> None:
    """Model runner V1 cannot do pp 2 on a CPU."""
    engine = {key: ENGINE[key] for key in ("dtype", "enforce_eager", "max_model_len", "block_size", "max_num_seqs")}
    oracle = Oracle(str(model), **layout, **engine, max_num_batched_tokens=64, is_interpreted=True, is_async=True)
    try:
        assert oracle.call("facts")["runner"] == "V2"
        for ask in (
            Ask(PROMPT, {**TALKING, "logprobs": 3}),
            Ask(LONG_PROMPT, {**SEEDED, "max_tokens": 24}, is_fresh=True),
            Ask(PROMPT, {"temperature": 0.0, "max_tokens": 48, **PENALTIES}, GRAMMARS["regex"]),
        ):
            whole, moved = oracle.call("from_every_token", ask, every=EVERY)
            check(whole, moved, every=EVERY, min_tokens=3)
    finally:
        oracle.close()
