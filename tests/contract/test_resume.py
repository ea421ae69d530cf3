"""Exact resume on a real engine (CPU, float32): moved after every one of its tokens, a stream goes on as if it had not.

What vLLM does above its engine does not move; `tests/integration` has that.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.resume_asks import FEW, GRAMMARS, GREEDY, LONG_PROMPT, PENALTIES, PROMPT, SAMPLINGS, SEEDED, TAG, TALKING
from harness.resume_oracle import Ask, Oracle, check

from kervan.demo import make_lora_adapter, make_random_model

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(scratch: Path) -> Path:
    return make_random_model(scratch / "random")


@pytest.fixture(scope="module")
def lora(model: Path, scratch: Path) -> str:
    return str(make_lora_adapter(model, scratch / "lora"))


ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 48}
# Prompts and moved streams come in chunks of at most 64 tokens, and share the prefix cache.
WHOLE_ENGINE = {
    **ENGINE,
    "max_num_batched_tokens": 64,
    "enable_lora": True,
    "max_lora_rank": 8,
    "enable_prompt_embeds": True,
    "logits_processors": "harness.counting_processor:CountingProcessor",
    "reasoning_parser": "deepseek_r1",
    "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
}
GUESSING_ENGINE = {
    **ENGINE,
    "max_num_batched_tokens": 256,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, marks=pytest.mark.exhaustive, id="in turn"), pytest.param(True, id="overlapping")],
)
def oracle(model: Path, request: pytest.FixtureRequest) -> Iterator[Oracle]:
    """One whose steps come one after the other, and one that schedules the next before it knows the last one's tokens."""
    oracle = Oracle(str(model), **WHOLE_ENGINE, is_async=request.param)
    oracle.call("use_reasoning_parser", None)
    yield oracle
    oracle.close()


@pytest.fixture
def full(model: Path) -> Iterator[Oracle]:
    """One whose KV cache holds a third of a batch of moved streams, and whose steps overlap."""
    oracle = Oracle(str(model), **ENGINE, max_num_batched_tokens=64, num_gpu_blocks_override=20, is_async=True)
    yield oracle
    oracle.close()


@pytest.fixture
def guessing(model: Path) -> Iterator[Oracle]:
    """An oracle whose engine guesses tokens from those before."""
    oracle = Oracle(str(model), **GUESSING_ENGINE)
    yield oracle
    oracle.close()


def test_the_engines_are_those_that_need_the_most(oracle: Oracle, request: pytest.FixtureRequest) -> None:
    is_async = "overlapping" in request.node.callspec.id
    facts = oracle.call("facts")
    assert (facts["runner"], facts["async_scheduling"]) == ("V1", is_async)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("is_fresh", [False, True], ids=["prefix cached", "not cached"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_sampling(oracle: Oracle, sampling: dict[str, Any], is_fresh: bool) -> None:
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, sampling, is_fresh=is_fresh))
    check(whole, moved)
    assert len(set(whole.tokens)) > 5


def test_top_logprobs_of_everything_that_penalties_change(oracle: Oracle) -> None:
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, {**TALKING, "max_tokens": 12, "logprobs": 5}))
    check(whole, moved)
    assert all(len(row) == 6 for row in whole.logprobs)


def test_prompt_logprobs_come_once(oracle: Oracle) -> None:
    moved = oracle.call("carried", Ask(PROMPT, {**GREEDY, "prompt_logprobs": 1}), [50, 51])
    assert (moved["prompt_logprobs"], moved["generated"]) == (None, [50, 51])
    assert oracle.call("carried", Ask(PROMPT, {**GREEDY, "prompt_logprobs": 1}), [])["prompt_logprobs"] == 1


# ---- ends


def test_min_tokens_hold_back_an_end_that_the_model_wants(oracle: Oracle) -> None:
    eos = oracle.call("token_id", "<|im_end|>")
    few = {"allowed_token_ids": (*FEW, eos), "logit_bias": {eos: 100.0}}
    sampling = {**PENALTIES, **few, "temperature": 0.0, "max_tokens": 32, "min_tokens": 14}
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, sampling))
    check(whole, moved)
    assert (len(whole.tokens), whole.tokens[-1], whole.finish) == (15, eos, "stop")


def test_stop_token_ids(oracle: Oracle) -> None:
    stop = oracle.call("whole", Ask(PROMPT, TALKING)).tokens[11]
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, {**TALKING, "stop_token_ids": [stop]}))
    check(whole, moved)
    assert (whole.finish, whole.stop) == ("stop", stop)


def test_the_models_context_ends(oracle: Oracle) -> None:
    prompt = [20 + i % 300 for i in range(236)]
    whole, moved = oracle.call("from_every_token", Ask(prompt, {**TALKING, "max_tokens": 100}))
    check(whole, moved)
    assert (len(whole.tokens), whole.finish) == (20, "length")


def test_repetition_detection_sees_the_tokens_before_the_move(oracle: Oracle) -> None:
    detection = {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 6}
    sampling = {**GREEDY, "allowed_token_ids": [70, 71], "repetition_detection": detection}
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, sampling))
    check(whole, moved, min_tokens=6)
    assert (whole.finish, whole.stop) == ("repetition", "repetition_detected")


@pytest.mark.parametrize("reason", ["max_tokens", "eos", "stop token", "context"])
def test_a_stream_that_had_ended_generates_nothing_more(oracle: Oracle, reason: str) -> None:
    eos = oracle.call("token_id", "<|im_end|>")
    asks = {
        "max_tokens": (Ask(PROMPT, {"temperature": 0.0, "max_tokens": 3}), [50, 51, 52], "length", None),
        "eos": (Ask(PROMPT, {"temperature": 0.0, "max_tokens": 9}), [50, eos], "stop", None),
        "stop token": (Ask(PROMPT, {"max_tokens": 9, "stop_token_ids": [51]}), [50, 51], "stop", 51),
        # Another replica of the fleet had a longer max_model_len.
        "context": (Ask(PROMPT, {"max_tokens": 900, "min_tokens": 800}), [50] * 300, "length", None),
    }
    ask, generated, finish, stop = asks[reason]
    answer = oracle.call("resumed", ask, generated)
    assert (answer.tokens, answer.finish, answer.stop, answer.num_outputs) == ([], finish, stop, 1)


def test_a_prompt_beyond_the_context_ends_its_request_only(oracle: Oracle) -> None:
    with pytest.raises(AssertionError, match="prompt of 300 tokens, and max_model_len is 256 here"):
        oracle.call("arrives_with_prompt", [50] * 300)
    assert len(oracle.call("whole", Ask(PROMPT, TALKING)).tokens) == 32


# ---- grammars


@pytest.mark.sweep(6)
@pytest.mark.parametrize("library", ["xgrammar", "guidance", "outlines"])
@pytest.mark.parametrize("kind", GRAMMARS)
def test_grammars(oracle: Oracle, library: str, kind: str) -> None:
    if kind == "ebnf" and library == "outlines":
        pytest.skip("outlines has no EBNF")
    oracle.call("use_grammar_library", library)
    sampling = {"temperature": 0.0, "max_tokens": 48, **PENALTIES}
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, sampling, GRAMMARS[kind]))
    check(whole, moved, min_tokens=3)
    if kind == "json schema" and whole.finish == "stop":
        assert json.loads(oracle.call("text", whole.tokens), strict=False).keys() == {"name", "age"}


def test_a_structural_tag(oracle: Oracle) -> None:
    oracle.call("use_grammar_library", "xgrammar")
    whole, moved = oracle.call(
        "from_every_token", Ask(PROMPT, {"temperature": 0.0, "max_tokens": 48, **PENALTIES}, TAG)
    )
    check(whole, moved)
    assert oracle.call("text", whole.tokens).startswith("<call>{")


@pytest.mark.parametrize("library", ["xgrammar", "guidance"])
def test_a_grammar_that_does_not_take_the_tokens_ends_its_request_only(oracle: Oracle, library: str) -> None:
    oracle.call("use_grammar_library", library)
    ask = Ask(PROMPT, {"temperature": 0.0, "max_tokens": 48}, GRAMMARS["regex"])
    assert oracle.call("resumed", ask, [90, 91, 92]).finish == "error"
    whole, moved = oracle.call("from_every_token", ask)
    check(whole, moved, min_tokens=3)


@pytest.mark.parametrize("library", ["xgrammar", "guidance"])
def test_a_grammar_begins_where_the_reasoning_ends(oracle: Oracle, library: str) -> None:
    """Moved within the reasoning, at its end, and in what follows; the budget ends the reasoning after 7 tokens."""
    oracle.call("use_grammar_library", library)
    start, end = oracle.call("token_id", "<think>"), oracle.call("token_id", "</think>")
    sampling = {"temperature": 0.0, "max_tokens": 48, "thinking_token_budget": 7, **PENALTIES}
    oracle.call("use_reasoning_parser", "deepseek_r1")
    try:
        ask = Ask([*PROMPT, start], sampling, GRAMMARS["json schema"])
        whole, moved = oracle.call("from_every_token", ask)
    finally:
        oracle.call("use_reasoning_parser", None)
    check(whole, moved)
    assert whole.tokens.index(end) == 7
    assert oracle.call("text", whole.tokens[8:]).startswith("{")


# ---- the engine


def test_a_thinking_budget_counts_the_tokens_before_the_move(oracle: Oracle) -> None:
    start, end = oracle.call("token_id", "<think>"), oracle.call("token_id", "</think>")
    whole, moved = oracle.call("from_every_token", Ask([*PROMPT, start], {**TALKING, "thinking_token_budget": 9}))
    check(whole, moved)
    assert whole.tokens.index(end) == 9


@pytest.mark.parametrize("is_fresh", [False, True], ids=["prefix cached", "not cached"])
def test_an_adapter(oracle: Oracle, lora: str, is_fresh: bool) -> None:
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, TALKING, lora=lora, is_fresh=is_fresh))
    check(whole, moved)
    assert whole.tokens != oracle.call("whole", Ask(PROMPT, TALKING)).tokens


@pytest.mark.parametrize("sampling", [TALKING, SEEDED], ids=["greedy", "seed"])
def test_a_long_stream_comes_in_chunks(oracle: Oracle, sampling: dict[str, Any]) -> None:
    """A prompt of 100 tokens and up to 60 generated ones, 64 a step."""
    whole, moved = oracle.call("from_every_token", Ask(LONG_PROMPT, {**sampling, "max_tokens": 60}, is_fresh=True))
    check(whole, moved)


def test_an_engine_that_drops_the_kv_cache_of_moved_streams(oracle: Oracle) -> None:
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, TALKING, is_fresh=True), preempt_after=3)
    check(whole, moved)


def test_an_engine_that_preempts_moved_streams(full: Oracle) -> None:
    for sampling in (TALKING, SEEDED, {**SEEDED, **PENALTIES}):
        ask = Ask(PROMPT, {**sampling, "max_tokens": 60}, is_fresh=True)
        whole = full.call("whole", ask)
        before = full.call("num_preemptions")
        moved = full.call("answers", [ask] * 32, [whole.tokens[:4]] * 32)
        assert [answer.tokens for answer in moved] == [whole.tokens] * 32
        assert full.call("num_preemptions") > before


def test_a_moved_stream_is_aborted(oracle: Oracle) -> None:
    assert oracle.call("aborted", Ask(PROMPT, TALKING), [50, 51, 52]) == 0


def test_a_stream_survives_move_after_move(oracle: Oracle) -> None:
    whole, tokens = oracle.call("moved_after_each_token", Ask(PROMPT, {**TALKING, "temperature": 1.0, "seed": 5}))
    assert tokens == whole.tokens


def test_a_logits_processor_of_the_users(oracle: Oracle) -> None:
    """It asks for the token whose number is that of the tokens so far."""
    whole, moved = oracle.call("from_every_token", Ask(PROMPT, {**GREEDY, "extra_args": {"counts": True}}))
    check(whole, moved)
    assert whole.tokens == [100 + position for position in range(32)]


def test_a_prompt_of_embeddings(oracle: Oracle) -> None:
    whole, moved = oracle.call("from_every_token", Ask((), TALKING, embeds=24))
    check(whole, moved)


def test_the_oracle_notices_what_is_lost(oracle: Oracle) -> None:
    """With the generated tokens as prompt, as a naive resume has them."""
    whole = oracle.call("whole", Ask(PROMPT, TALKING))
    for cut in range(4, 28):
        naive = oracle.call("whole", Ask((*PROMPT, *whole.tokens[:cut]), {**TALKING, "max_tokens": 32 - cut}))
        assert naive.tokens != whole.tokens[cut:]


def test_speculative_decoding(guessing: Oracle) -> None:
    for sampling in ({**GREEDY, "allowed_token_ids": FEW[:4]}, {**TALKING, "frequency_penalty": 0.2}):
        whole, moved = guessing.call("from_every_token", Ask([*PROMPT, *FEW, *FEW], sampling))
        check(whole, moved)
    assert guessing.call("num_accepted_guesses") > 0


@pytest.mark.exhaustive
def test_two_workers(model: Path) -> None:
    """With tp 2, each has a model runner of its own, in a process of its own."""
    oracle = Oracle(str(model), tp=2, **ENGINE, max_num_batched_tokens=64)
    try:
        assert oracle.call("runner_is_v1") is True
        for ask in (
            Ask(PROMPT, {**TALKING, "logprobs": 3}),
            Ask(LONG_PROMPT, {**SEEDED, "max_tokens": 40}, is_fresh=True),
            Ask(PROMPT, {"temperature": 0.0, "max_tokens": 48, **PENALTIES}, GRAMMARS["regex"]),
        ):
            check(*oracle.call("from_every_token", ask))
    finally:
        oracle.close()
