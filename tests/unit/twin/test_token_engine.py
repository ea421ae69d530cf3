"""The twin's scheduler against hand-worked steps, and properties over random loads."""

import random
import zlib
from collections import Counter
from typing import Any

import pytest

from kervan.sim.prefix_cache import Media
from kervan.twin.token_engine import (
    StepTiming,
    TwinEngine,
    TwinLimits,
    TwinOutput,
    TwinRequest,
    answer,
    extend,
    next_token,
)

TIMING = StepTiming(base_s=1.0, prefill_token_s=0.1, sequence_s=0.01, context_token_s=0.001)
LIMITS = TwinLimits(num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=10, max_model_len=32)


def engine(**changes: int) -> TwinEngine:
    """Without a prefix cache: prompts here begin alike, and each token of them takes its time."""
    settings = (
        {field: getattr(LIMITS, field) for field in LIMITS.__slots__} | {"enable_prefix_caching": False} | changes
    )
    return TwinEngine(TIMING, TwinLimits(**settings))


def ask(name: str, num_prompt: int, max_tokens: int = 3, **more: object) -> TwinRequest:
    return TwinRequest(id=name, client=0, prompt=range(num_prompt), max_tokens=max_tokens, ignore_eos=True, **more)  # type: ignore[arg-type]


def run(twin: TwinEngine, num_steps: int = 10_000) -> dict[str, list[TwinOutput]]:
    """Step until there is no work; outputs by request."""
    given: dict[str, list[TwinOutput]] = {}
    for _ in range(num_steps):
        step = twin.start_step()
        if step is None:
            break
        for output in twin.end_step(step):
            given.setdefault(output.id, []).append(output)
        twin.check_integrity()
    return given


def test_a_prefill_and_its_decodes_take_what_the_timing_says() -> None:
    """Prompt of 6: step 1 computes 6 tokens, reads 6. Step 2 computes 1, reads 7: 1 + 0.01 + 0.007."""
    twin = engine()
    twin.add(ask("a", 6))
    first = twin.start_step()
    assert first is not None
    assert first.duration_s == pytest.approx(1 + 6 * 0.1 + 0.01 + 6 * 0.001)
    twin.end_step(first)
    second = twin.start_step()
    assert second is not None
    assert second.duration_s == pytest.approx(1 + 0.01 + 7 * 0.001)


def test_a_long_prompt_is_computed_in_chunks_beside_running_answers() -> None:
    """Budget 10: `a` decodes (1 token), so `b`'s 15 take steps of 9 and 6 tokens; its first token comes with the second."""
    twin = engine()
    twin.add(ask("a", 2, max_tokens=9))
    run(twin, 1)
    twin.add(ask("b", 15))
    chunks = []
    for _ in range(2):
        step = twin.start_step()
        assert step is not None
        chunks.append(step.prefill_tokens)
        outputs = twin.end_step(step)
    assert chunks == [9, 6]
    assert [output.id for output in outputs] == ["a", "b"]


def test_no_more_sequences_than_the_batch_holds() -> None:
    twin = engine()
    for name in "abc":
        twin.add(ask(name, 2))
    step = twin.start_step()
    assert step is not None
    assert (twin.num_running, twin.num_waiting) == (2, 1)
    twin.end_step(step)
    assert set(run(twin)) == set("abc")


def test_without_free_blocks_a_request_waits() -> None:
    """8 blocks of 4: `a`'s 10 + 9 tokens are computed in 4 steps; 7 blocks at 26 tokens leave one, `b` needs two."""
    twin = engine(max_num_seqs=8, max_num_batched_tokens=32)
    twin.add(ask("a", 25, max_tokens=7))
    twin.add(ask("b", 5))
    step = twin.start_step()
    assert step is not None
    assert (twin.num_running, twin.num_waiting) == (1, 1)
    assert twin.kv_cache_usage == 7 / 8
    twin.end_step(step)
    assert {name: len(outputs) for name, outputs in run(twin).items()} == {"a": 6, "b": 3}


def test_a_prompt_starts_when_all_of_it_has_room() -> None:
    """8 blocks of 4: `a` has 3 of them, so `b`'s first 9 tokens would fit, but not its 24 (`scheduler_reserve_full_isl`)."""
    twin = engine()
    twin.add(ask("a", 10, max_tokens=2))
    twin.add(ask("b", 24))
    run(twin, 1)
    step = twin.start_step()
    assert step is not None
    assert (twin.num_running, twin.num_waiting, step.prefill_tokens) == (1, 1, 0)
    assert [output.id for output in twin.end_step(step)] == ["a"]
    assert set(run(twin)) == {"b"}


def test_a_full_pool_preempts_the_youngest_and_its_answer_is_the_same() -> None:
    """Two prompts of 14 tokens (4 blocks each) fill the pool; at 17 tokens `a` needs a fifth block: `b` goes back."""
    twin = engine(max_num_batched_tokens=32)
    for name in "ab":
        twin.add(ask(name, 14, max_tokens=10))
    given = run(twin)
    assert twin.num_preempted == 1
    assert [output.token for output in given["b"]] == answer(range(14), 10, LIMITS)
    assert [len(given[name]) for name in "ab"] == [10, 10]


def test_reserved_blocks_preempt_and_come_back() -> None:
    twin = engine(max_model_len=16, max_num_batched_tokens=32)
    for name in "ab":
        twin.add(ask(name, 12, max_tokens=4))
    run(twin, 1)
    twin.reserve(0.5)
    twin.check_integrity()
    assert (twin.num_running, twin.kv_cache_usage) == (1, 1 - 1 / 8)
    twin.reserve(1.0)  # a request of full length must still fit: 4 blocks of 8 stay
    assert twin.num_running == 1
    assert set(run(twin)) == {"a", "b"}
    assert twin.kv_cache_usage == 0.5
    twin.reserve(0)
    assert twin.kv_cache_usage == 0


@pytest.mark.parametrize("num_given", range(10))
def test_a_moved_answer_goes_on_as_if_it_had_stayed(num_given: int) -> None:
    """Prompt + the tokens so far on another twin: the rest is the rest."""
    whole = answer([5, 6, 7], 10, LIMITS)
    assert answer([5, 6, 7, *whole[:num_given]], 10 - num_given, LIMITS) == whole[num_given:]


def test_a_lost_a_doubled_and_a_changed_token_show_in_what_follows() -> None:
    whole = answer(range(20), 60, LIMITS)
    for damaged in (whole[:9] + whole[10:11], whole[:10] + whole[9:10], [*whole[:9], whole[9] + 1]):
        after = answer([*range(20), *damaged], 3, LIMITS)
        assert after not in ([*whole[i : i + 3]] for i in range(60))


def test_tokens_stay_in_range_and_cover_it() -> None:
    limits = TwinLimits(num_blocks=1, first_token=7, last_token=16)
    seen = Counter(next_token(zlib.crc32(bytes([i % 256, i // 256])), limits) for i in range(10_000))
    assert set(seen) == set(range(7, 17))
    assert min(seen.values()) > 800


def test_answers_that_end_by_themselves_have_the_mean_length_asked_for() -> None:
    twin = TwinEngine(
        TIMING, TwinLimits(num_blocks=10_000, mean_answer_tokens=50, max_num_seqs=400, max_model_len=1024)
    )
    for i in range(400):
        twin.add(TwinRequest(id=str(i), client=0, prompt=[i], max_tokens=900))
    given = run(twin)
    assert all(outputs[-1].finish == "stop" and outputs[-1].token == 1000 for outputs in given.values())
    mean = sum(map(len, given.values())) / 400
    assert 50 * 0.85 < mean < 50 * 1.15  # three standard errors of a geometric mean: 50 / sqrt(400) * 3 = 7.5


def test_stop_tokens_min_tokens_and_the_context_end_an_answer() -> None:
    tokens = answer(range(4), 12, LIMITS)
    twin = engine(max_num_seqs=3)
    stop = frozenset({tokens[2], tokens[6]})
    twin.add(ask("early", 4, max_tokens=12, stop_tokens=stop))
    twin.add(ask("late", 4, max_tokens=12, stop_tokens=stop, min_tokens=3))
    twin.add(TwinRequest(id="full", client=0, prompt=range(27), max_tokens=99, ignore_eos=True))
    given = run(twin)
    assert [output.token for output in given["early"]] == tokens[:3]
    assert (given["early"][-1].finish, given["early"][-1].stop_token) == ("stop", tokens[2])
    assert [output.token for output in given["late"]] == tokens[:7]
    assert (len(given["full"]), given["full"][-1].finish) == (32 - 27, "length")


def test_the_first_token_tells_when_it_was_queued_and_scheduled() -> None:
    twin = engine()
    twin.add(ask("a", 2), now_s=5.0)
    step = twin.start_step(7.0)
    assert step is not None
    (output,) = twin.end_step(step)
    assert output.first is not None
    assert (output.first.prompt_tokens, output.first.queued_s, output.first.scheduled_s) == (2, 5.0, 7.0)


def test_aborts_during_a_step() -> None:
    twin = engine()
    for name in "ab":
        twin.add(ask(name, 4))
    step = twin.start_step()
    assert step is not None
    twin.abort(["a", "unknown"])
    assert [output.id for output in twin.end_step(step)] == ["b"]
    twin.check_integrity()
    twin.abort(["b"])
    assert not twin.has_work
    assert twin.kv_cache_usage == 0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_answer_is_whole_and_no_block_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    limits = TwinLimits(
        num_blocks=rng.randint(16, 40), block_size=4, max_num_seqs=rng.randint(1, 9),
        max_num_batched_tokens=rng.randint(1, 40), max_model_len=64, enable_prefix_caching=seed % 4 > 0,
    )  # fmt: skip
    twin = TwinEngine(TIMING, limits)
    prompts: dict[str, list[int]] = {}
    given: dict[str, list[int]] = {}
    aborted = set()
    for i in range(300):
        if i < 150 and rng.random() < 0.3:
            name = str(i)
            before = prompts[rng.choice(list(prompts))] if prompts and rng.random() < 0.7 else []
            start = before[: rng.randint(0, len(before))]
            prompts[name] = start + [rng.randrange(1000) for _ in range(rng.randint(1, 40 - min(39, len(start))))]
            scope = rng.choice(["one tenant", "another"])
            twin.add(
                TwinRequest(
                    id=name, client=0, prompt=prompts[name], max_tokens=rng.randint(1, 20), ignore_eos=True, scope=scope
                )
            )
        if rng.random() < 0.05 and prompts:
            name = rng.choice(list(prompts))
            if twin.clients_of(0) and name in twin.clients_of(0):
                aborted.add(name)
            twin.abort([name])
        if rng.random() < 0.05:
            twin.reserve(rng.choice([0, 0.3, 0.9]))
        if rng.random() < 0.02:
            assert twin.reset_prefix_cache(preempts=True)
        step = twin.start_step()
        if step is None:
            continue
        assert step.scheduled.batch.tokens <= limits.max_num_batched_tokens
        assert step.sequences <= limits.max_num_seqs
        for output in twin.end_step(step):
            given.setdefault(output.id, []).append(output.token)
        twin.check_integrity()
    while (step := twin.start_step()) is not None:
        for output in twin.end_step(step):
            given.setdefault(output.id, []).append(output.token)
    assert not twin.has_work
    for name in set(prompts) - aborted:
        assert given[name] == answer(prompts[name], len(given[name]), limits)
    assert extend(extend(0, [1, 2]), [3]) == extend(0, [1, 2, 3])


# ---- the prefix cache


def found(twin: TwinEngine, *requests: TwinRequest) -> list[int]:
    """Tokens that each found in the cache; all were added before any of them ran."""
    for request in requests:
        twin.add(request)
    given = run(twin)
    firsts = [given[request.id][0].first for request in requests]
    return [first.cached_tokens for first in firsts if first is not None]


def caching(**changes: int) -> TwinEngine:
    return engine(**{"num_blocks": 16, "enable_prefix_caching": True} | changes)


def test_a_prompt_that_begins_as_one_before_is_computed_from_there_on() -> None:
    """Blocks of 4. `a` leaves 2 full ones, its first answered token in the third; of 9 equal tokens, 8 are found."""
    twin = caching()
    assert found(twin, ask("a", 9, max_tokens=1)) == [0]
    twin.add(ask("b", 9))
    step = twin.start_step()
    assert step is not None
    assert step.prefill_tokens == 1
    assert step.duration_s == pytest.approx(1 + 0.1 + 0.01 + 9 * 0.001)
    (output,) = twin.end_step(step)
    assert output.first is not None
    assert (output.first.prompt_tokens, output.first.cached_tokens, output.first.stored_tokens) == (9, 8, 0)
    counts = twin.new_prefix_counts()
    assert (counts.requests, counts.queries, counts.hits) == (2, 18, 8)
    assert twin.new_prefix_counts().requests == 0


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    assert found(caching(), ask("a", 8), ask("b", 8), ask("c", 9)) == [0, 4, 8]


def test_the_next_turn_of_a_chat_finds_the_answer_too() -> None:
    """6 tokens asked and 7 answered: the last one was never computed, so 12 are in the cache."""
    twin = caching()
    chat = [*range(6), *answer(range(6), 7, LIMITS)]
    twin.add(ask("a", 6, max_tokens=7))
    run(twin)
    more = TwinRequest(id="b", client=0, prompt=[*chat, 1, 2, 3], max_tokens=1, ignore_eos=True)
    assert found(twin, more) == [12]


def test_what_was_unused_for_longest_is_given_up_first_from_its_end() -> None:
    """16 blocks of 4: `a` and `b` leave 5 each; `c` takes the 6 empty ones and the last 3 of `a`, whose second request
    then takes the last 3 of `b`."""
    twin = caching(max_num_batched_tokens=40, max_model_len=40)

    def request(name: str, first: int, length: int) -> TwinRequest:
        return TwinRequest(id=name, client=0, prompt=range(first, first + length), max_tokens=1, ignore_eos=True)

    assert found(twin, request("a", 100, 20)) == [0]
    assert found(twin, request("b", 200, 20)) == [0]
    assert found(twin, request("c", 300, 36)) == [0]
    assert found(twin, request("a2", 100, 20)) == [8]
    assert found(twin, request("b2", 200, 20)) == [8]


@pytest.mark.parametrize(
    "other", [{"scope": "other"}, {"media": (Media("cat", 1, 2),)}, {"reads_cache": False}], ids=lambda o: next(iter(o))
)
def test_what_differs_in_more_than_tokens_is_not_shared(other: dict[str, Any]) -> None:
    twin = caching()
    assert found(twin, ask("a", 9)) == [0]
    assert found(twin, ask("b", 9, **other)) == [0]
    if "reads_cache" in other:
        counts = twin.new_prefix_counts()
        assert (counts.requests, counts.queries) == (1, 9)
    else:
        assert found(twin, ask("c", 9, **other)) == [8]


def test_equal_media_are_shared_where_they_stand_alike() -> None:
    twin = caching()
    cat, dog = (Media("cat", 5, 2),), (Media("dog", 5, 2),)
    assert found(twin, ask("a", 13, media=cat)) == [0]
    assert found(twin, ask("b", 13, media=dog)) == [4]
    assert found(twin, ask("c", 13, media=cat)) == [12]


def test_a_reset_forgets_all_unless_blocks_are_in_use() -> None:
    twin = caching()
    found(twin, ask("a", 9))
    assert twin.reset_prefix_cache()
    assert found(twin, ask("b", 9)) == [0]
    twin.add(ask("c", 9))
    run(twin, 1)
    assert not twin.reset_prefix_cache()
    assert twin.reset_prefix_cache(preempts=True)
    assert (twin.num_running, twin.num_waiting, twin.num_preempted) == (0, 1, 1)
    assert [output.token for output in run(twin)["c"]] == answer(range(9), 3, LIMITS)[1:]


def test_without_a_cache_nothing_is_found() -> None:
    twin = engine(num_blocks=16)
    assert found(twin, ask("a", 9)) == found(twin, ask("b", 9)) == [0]
    assert twin.new_prefix_counts().queries == 0
    assert twin.reset_prefix_cache()
