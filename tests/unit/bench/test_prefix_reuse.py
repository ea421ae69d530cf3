"""What a prefix cache gave and could have given: by hand, over processes, and in words."""

import itertools
import random

import pytest

from kervan.bench.prefix_reuse import CachedShare, Pieces, PrefixReuse, cached_share, pieces_of_prefix, pieces_of_trace
from kervan.cli import bench_view


def counted(*requests: tuple[int, Pieces], cached: int | None = None) -> PrefixReuse:
    """Requests of (prompt tokens, pieces)."""
    reuse = PrefixReuse()
    for prompt_tokens, pieces in requests:
        reuse.add(prompt_tokens=prompt_tokens, cached_tokens=cached, pieces=pieces, history_tokens=0)
    return reuse


def test_the_first_use_of_a_prefix_costs_and_the_others_do_not() -> None:
    """100 tokens are 6 blocks of 16."""
    one, other, short = pieces_of_prefix(0, 100), pieces_of_prefix(1, 100), pieces_of_prefix(0, 15)
    assert counted((150, one), (150, one), (150, other), (150, one)).reusable_tokens == 2 * 96
    assert short == ()


def test_a_traces_rows_share_what_they_begin_with() -> None:
    """Blocks of 512 tokens. The last token of a prompt is always computed, so a whole one of 600 gives 592."""
    rows = [((1, 2), 600), ((1, 2), 600), ((1, 3), 1024), ((1, 3, 4), 1025), ((3,), 512), ((1,), 512)]
    found = [0]
    reuse = PrefixReuse()
    for hash_ids, tokens in rows:
        pieces = pieces_of_trace(hash_ids, tokens)
        reuse.add(prompt_tokens=tokens, cached_tokens=None, pieces=pieces, history_tokens=0)
        found.append(reuse.reusable_tokens)
    assert [b - a for a, b in itertools.pairwise(found)] == [0, 592, 512, 1024, 0, 496]


def test_a_conversation_has_all_that_was_said_before() -> None:
    reuse = PrefixReuse()
    for prompt_tokens, history_tokens in ((100, 0), (200, 131), (200, 500)):
        reuse.add(prompt_tokens=prompt_tokens, cached_tokens=64, pieces=(), history_tokens=history_tokens)
    assert reuse.reusable_tokens == 0 + 128 + 192
    assert cached_share(reuse, queries=9.0, hits=9.0) == CachedShare("usage", 192, 500, 320)


@pytest.mark.parametrize("num_processes", [2, 5])
def test_processes_together_count_as_one_does(num_processes: int) -> None:
    rng = random.Random(num_processes)
    requests = [(1200, pieces_of_trace((rng.randint(1, 3), rng.randint(4, 6)), 1024)) for _ in range(40)]
    requests += [(200, pieces_of_prefix(rng.randint(0, 3), 100)) for _ in range(40)]
    parts = [counted(*requests[number::num_processes]) for number in range(num_processes)]
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].reusable_tokens == counted(*requests).reusable_tokens


def test_where_the_shares_come_from() -> None:
    told, silent = counted((100, ()), cached=48), counted((100, ()))
    assert cached_share(told, queries=50, hits=5).to_dict() == {
        "source": "usage", "cached_tokens": 48, "prompt_tokens": 100, "share": 0.48, "possible_tokens": 0,
        "possible_share": 0.0, "of_possible": None,
    }  # fmt: skip
    assert cached_share(silent, queries=200, hits=50).share == 0.25
    assert cached_share(silent, queries=200, hits=50).source == "metrics"
    nothing = cached_share(silent, queries=0, hits=0)
    assert (nothing.source, nothing.share, nothing.of_possible) == (None, None, None)
    silent.add(prompt_tokens=10, cached_tokens=None, pieces=(), history_tokens=None)
    assert cached_share(silent, queries=200, hits=50).possible_tokens is None


def test_in_words() -> None:
    assert bench_view._cache_line(CachedShare("usage", 1340, 4000, 2000)) == (
        "prefix cache: 1,340 of 4,000 prompt tokens (34%), 67% of the possible 2,000"
    )
    assert bench_view._cache_line(CachedShare("metrics", 10.0, 1000.0, None)) == (
        "prefix cache: 10 of 1,000 prompt tokens (1%) (by the server's metrics)"
    )
    assert bench_view._cache_line(CachedShare(None, None, 4000, 2000)) == (
        "prefix cache: the server says nothing of it; 2,000 of 4,000 prompt tokens could come from it"
    )
