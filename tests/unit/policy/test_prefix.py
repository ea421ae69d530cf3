import random
import struct
import tracemalloc
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.policy import prefix
from kervan.policy.prefix import LEAST_SHARE, SURPLUS, Match, PrefixTable, PromptContent, Spans

KEY = prefix.fleet_key("a fleet's secret")
SPAN = 4  # tokens, so that tables can be worked by hand


def spans(*token_ids: int, key: bytes = KEY, **content: object) -> Spans:
    return Spans(PromptContent(token_ids, **content), SPAN, key)  # type: ignore[arg-type]


def hashed(*hashes: int) -> Spans:
    made = spans()
    made.hashes = array("Q", hashes)
    return made


def held(match: Match) -> dict[str, int]:
    return {name: spans for spans, members in match.levels() for name in match.ids(members)}


@pytest.mark.parametrize(("block_size", "expected"), [(16, 64), (32, 64), (48, 96), (64, 64), (1, 64), (528, 528)])
def test_a_span_is_whole_blocks(block_size: int, expected: int) -> None:
    assert prefix.span_tokens(block_size) == expected


def test_prompts_share_the_spans_before_the_first_difference() -> None:
    one, other = spans(*range(14)), spans(*range(9), 99, 10, 11, 12)
    assert (len(one.hashes), len(other.hashes)) == (3, 3)  # 14 and 13 tokens: the rest is no whole span
    assert one.hashes[:2] == other.hashes[:2]
    assert one.hashes[2] != other.hashes[2]
    assert one.num_tokens == 14


def test_a_later_span_with_the_same_tokens_is_another_one() -> None:
    assert len(set(spans(*[7] * 16).hashes)) == 4


@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(0, 40), max_size=4))
def test_a_prompt_hashes_alike_whole_and_in_parts(token_ids: list[int], cuts: list[int]) -> None:
    grown, begun = spans(), 0
    for cut in [*sorted(cuts), len(token_ids)]:
        grown.extend(token_ids[begun : max(begun, cut)])
        begun = max(begun, cut)
    assert grown.hashes == spans(*token_ids).hashes


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"scope": ("lora", "/a", "")}, id="another adapter"),
        pytest.param({"scope": ("", "", "tenant-a")}, id="another tenant's salt"),
        pytest.param({"scope": ("", "", "tenant-b")}, id="and one more"),
        pytest.param({"items": ((0, "cat"),)}, id="an image"),
        pytest.param({"items": ((0, "dog"),)}, id="another image"),
        pytest.param({"key": prefix.fleet_key("another fleet")}, id="another fleet"),
    ],
)
def test_what_the_cache_keeps_apart_is_apart(content: dict[str, object]) -> None:
    shared = {"scope": ("", "", ""), "key": KEY}
    others = [shared, {**shared, "scope": ("lor", "a/a", "")}, {**shared, "items": ((0, "ca"), (0, "t"))}]
    mine = set(spans(*range(16), **{**shared, **content}).hashes)  # type: ignore[arg-type]
    for other in others:
        assert mine.isdisjoint(spans(*range(16), **other).hashes)  # type: ignore[arg-type]


def test_an_image_sets_apart_what_comes_from_its_span_on() -> None:
    plain, with_image = spans(*range(16)), spans(*range(16), items=((9, "cat"),))
    assert plain.hashes[:2] == with_image.hashes[:2]
    assert set(plain.hashes[2:]).isdisjoint(with_image.hashes[2:])
    two = spans(*range(16), items=((9, "cat"), (10, "dog")))
    assert two.hashes[2] != with_image.hashes[2]


def test_ids_that_no_vocabulary_has_are_no_tokens() -> None:
    with pytest.raises(struct.error):
        spans(1, 2, 3, 1 << 40)


def test_every_replica_is_found_with_what_it_has() -> None:
    table = PrefixTable()
    for name in ("a", "b", "c", "d"):
        table.add(name, max_spans=100)
    table.learn("a", [1, 2, 3, 4, 5])
    table.learn("b", [1, 2])
    table.learn("c", [1, 2, 30])
    match = table.match(hashed(1, 2, 3, 4, 6), max_tokens=1000)
    assert held(match) == {"a": 4, "b": 2, "c": 2}
    assert [spans for spans, _ in match.levels()] == [4, 2]
    assert (match.tokens("a"), match.tokens("b"), match.tokens("d"), match.tokens("gone")) == (16, 8, 0, 0)
    assert match.most_tokens == 16
    assert held(table.match(hashed(1, 2), max_tokens=7)) == {"a": 2, "b": 2, "c": 2}
    assert table.match(hashed(1, 2), max_tokens=7).tokens("a") == 7  # vLLM computes the last token in any case
    assert table.match(hashed(9, 2), max_tokens=7).num_spans == 0
    assert table.match(hashed(), max_tokens=7).num_spans == 0


def test_the_end_of_the_prompt_that_was_used_longest_ago_goes_first() -> None:
    table = PrefixTable()
    table.add("a", max_spans=6)
    table.learn("a", [1, 2, 3, 4])
    table.learn("a", [1, 20, 21])
    assert table.num_spans("a") == 6
    table.learn("a", [30, 31])  # 4 and 3 go: 1 was used again, and 2 is before 3
    assert held(table.match(hashed(1, 2, 3, 4), max_tokens=99)) == {"a": 2}
    assert held(table.match(hashed(1, 20, 21), max_tokens=99)) == {"a": 3}
    assert held(table.match(hashed(30, 31), max_tokens=99)) == {"a": 2}


def test_a_replica_that_leaves_leaves_nothing_and_its_bit_is_used_again() -> None:
    table = PrefixTable()
    for name in ("a", "b", "c"):
        table.add(name, max_spans=9)
        table.learn(name, [1, 2])
    table.remove("b")
    table.remove("b")
    table.learn("b", [1, 2])
    assert "b" not in table
    assert held(table.match(hashed(1, 2), max_tokens=99)) == {"a": 2, "c": 2}
    table.add("d", max_spans=9)
    table.add("a", max_spans=9)  # under its old name, with an empty cache
    assert held(table.match(hashed(1, 2), max_tokens=99)) == {"c": 2}
    assert len(table.match(hashed(1), max_tokens=99).replica_ids) == 3
    table.clear()
    assert table.match(hashed(1), max_tokens=99).num_spans == 0
    table.learn("c", [1])
    assert held(table.match(hashed(1), max_tokens=99)) == {"c": 1}


def test_a_replica_that_had_less_than_expected_is_taken_to_keep_less() -> None:
    table = PrefixTable()
    table.add("a", max_spans=1000)
    table.learn("a", [*range(1000)])
    for _ in range(200):
        table.correct("a", had_all=False)
    assert table.num_spans("a") <= 1000 * LEAST_SHARE * (1 + SURPLUS)
    assert table.match(hashed(0, 1), max_tokens=99).num_spans > 0  # the beginning is kept
    for _ in range(200):
        table.correct("a", had_all=True)
    table.learn("a", [*range(5000, 6000)])
    assert table.num_spans("a") >= 1000
    table.correct("gone", had_all=False)


class Model:
    """The same without a shared table: a list of spans per replica, the oldest first."""

    def __init__(self, max_spans: int) -> None:
        self.max_spans = max_spans
        self.spans: list[int] = []

    def learn(self, hashes: list[int]) -> None:
        for span in reversed(hashes):
            if span in self.spans:
                self.spans.remove(span)
            self.spans.append(span)
        if len(self.spans) > self.max_spans * (1 + SURPLUS):
            self.spans = self.spans[-self.max_spans :]

    def num_first(self, hashes: list[int]) -> int:
        return next((n for n, span in enumerate(hashes) if span not in self.spans), len(hashes))


# Prompts of a tree: a span is named by the path to it, as chained hashes are.
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(
    lambda path: [int("1" + "".join(map(str, path[: n + 1]))) for n in range(len(path))]
)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), PATHS), max_size=40), PATHS, st.integers(2, 12))
def test_the_table_tells_what_a_list_per_replica_tells(
    learned: list[tuple[str, list[int]]], asked: list[int], max_spans: int
) -> None:
    table, models = PrefixTable(), {name: Model(max_spans) for name in "abc"}
    for name in models:
        table.add(name, max_spans=max_spans)
    for name, hashes in learned:
        table.learn(name, hashes)
        models[name].learn(hashes)
        kept = models[name].spans
        assert table.num_spans(name) == len(kept)
        assert all(span // 10 in kept or span < 20 for span in kept), "what is before a span goes after it"
    found = held(table.match(hashed(*asked), max_tokens=99))
    assert found == {name: n for name, model in models.items() if (n := model.num_first(asked))}
    for name in models:
        table.remove(name)
    assert table._owners == {}


def test_a_day_of_random_prompts_takes_no_more_memory_than_the_first_minutes() -> None:
    rng = random.Random(1)
    tracemalloc.start()
    try:
        table = PrefixTable()
        for name in ("a", "b"):
            table.add(name, max_spans=500)
        sizes = []
        for _ in range(3):
            for _ in range(120):  # 60 of 64 spans for each: 8 times what a replica keeps
                table.learn(rng.choice("ab"), [rng.getrandbits(64) for _ in range(64)])
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(sizes) < 1.3 * min(sizes)
    assert max(sizes) / (table.num_spans("a") + table.num_spans("b")) < 300  # bytes a span: 75 a block of 16 tokens
    assert len(table._owners) == table.num_spans("a") + table.num_spans("b")
