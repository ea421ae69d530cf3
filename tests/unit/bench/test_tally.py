"""Counts of many exchanges, merged over processes; and compared with the server's own."""

import random

import pytest

from kervan.bench.exchange import Exchange
from kervan.bench.prompts import Request
from kervan.bench.reconcile import Counters, compare, read_counters
from kervan.bench.tally import MAX_BUCKETS, NUM_BLOCKS, RequestTally, Timeline, block_of, merge_all
from kervan.config.workload import Slo

HEADERS = {"content-type": "text/event-stream"}


def exchange(
    sent_s: float, gaps: list[float], *, ttft_s: float = 0.1, late_s: float = 0.0, prompt: int = 7, is_cut: bool = False
) -> Exchange:
    """One token, then one after each gap; `is_cut`: the connection breaks at the end."""
    found = Exchange(0, sent_s - late_s, Request(b"", None if is_cut else len(gaps) + 1, 7))
    found.sent_s, found.was_sent, found.has_kernel_time = sent_s, True, True
    found.on_status(200, HEADERS)
    at_s = sent_s + ttft_s
    for number, gap_s in enumerate([0.0, *gaps]):
        at_s += gap_s
        reason = '"length"' if number == len(gaps) and not is_cut else "null"
        found.on_body(b'data: {"choices": [{"text": "a", "finish_reason": %s}]}\n\n' % reason.encode(), at_s)
    if not is_cut:
        counts = b'{"prompt_tokens": %d, "completion_tokens": %d}' % (prompt, len(gaps) + 1)
        found.on_body(b'data: {"choices": [], "usage": ' + counts + b"}\n\ndata: [DONE]\n\n", at_s)
    found.on_end(at_s, "the connection closed" if is_cut else None)
    return found


def add(tally: RequestTally, found: Exchange, block: int = 0) -> None:
    tally.add(found, block=block)


def test_counts() -> None:
    tally = RequestTally(1000.0, Slo(ttft_s=0.25), stall_s=2.0)
    add(tally, exchange(1000.0, [0.5, 2.5]))
    add(tally, exchange(1001.0, [0.5], late_s=0.2))
    add(tally, exchange(1001.0, [], prompt=9))
    add(tally, exchange(1002.0, [1.0], is_cut=True))
    assert (tally.ok, tally.good, tally.errors) == (3, 2, {"truncated": 1})
    assert (tally.output_tokens, tally.input_tokens, tally.failed_output_tokens) == (6, 23, 2)
    assert (tally.wrong_input_tokens, tally.stalls, tally.stalled_streams) == (1, 1, 1)
    assert tally.longest_gap_s == pytest.approx(2.5)
    assert tally.duration_s == pytest.approx(3.1)
    assert tally.busy_s == pytest.approx(3.1 + 0.6 + 0.1 + 1.1)
    assert tally.whole("ttft_s").count == 3
    assert tally.whole("gap_s").count == 3
    assert tally.whole("tpot_s").quantile(1) == pytest.approx(1.5)
    assert tally.whole("ttft_from_arrival_s").quantile(1) == pytest.approx(0.3)
    assert sum(cell.tokens for cell in tally.timeline.cells.values()) == 6
    assert sum(cell.errors for cell in tally.timeline.cells.values()) == 1


def test_merging_processes_is_as_one_process() -> None:
    rng = random.Random(4)
    one, parts = RequestTally(1000.0), [RequestTally(1000.0) for _ in range(3)]
    for number in range(200):
        found = exchange(
            1000 + number * 0.7, [rng.random() for _ in range(rng.randrange(6))], is_cut=rng.random() < 0.2
        )
        for tally in (one, parts[number % 3]):
            add(tally, found, block=number * NUM_BLOCKS // 200)
    merged = merge_all(parts)
    for name in ("ok", "errors", "output_tokens", "num_chunks", "longest_gap_s", "duration_s"):
        assert getattr(merged, name) == getattr(one, name)
    for metric in ("ttft_s", "gap_s", "e2e_s"):
        assert merged.whole(metric).quantiles((0.1, 0.9)) == one.whole(metric).quantiles((0.1, 0.9))
    assert merged.timeline.width_s == one.timeline.width_s
    assert merged.timeline.cells.keys() == one.timeline.cells.keys()
    assert sum(c.tokens for c in merged.timeline.cells.values()) == pytest.approx(one.output_tokens)


def test_gaps_counted_in_bulk_are_as_counted_one_by_one() -> None:
    rng = random.Random(5)
    bulk, singly = RequestTally(1000.0), RequestTally(1000.0)
    for number in range(300):
        gaps = [rng.expovariate(20) for _ in range(rng.randrange(60))]
        found = exchange(1000 + number * 0.3, gaps)
        add(bulk, found, block=number % NUM_BLOCKS)
        found.per_choice_last_s[1] = 0.0  # with two choices, each gap is counted by itself
        found.gaps = [2 * gap_s for gap_s in gaps]  # and the timeline takes half of it
        add(singly, found, block=number % NUM_BLOCKS)
    cells, one_by_one = bulk.timeline.cells, singly.timeline.cells
    assert cells.keys() == one_by_one.keys()
    assert [cell.tokens for cell in cells.values()] == pytest.approx([one_by_one[n].tokens for n in cells])
    assert [2 * cell.gap_max_s for cell in cells.values()] == pytest.approx([one_by_one[n].gap_max_s for n in cells])
    for metric in ("gap_s", "token_gap_s"):
        for q in (0.1, 0.5, 0.9, 1):
            assert 2 * bulk.whole(metric).quantile(q) == pytest.approx(singly.whole(metric).quantile(q), rel=0.02)
    assert bulk.whole("gap_s").count == singly.whole("gap_s").count
    assert bulk.fresh_gap.count == singly.fresh_gap.count == bulk.whole("gap_s").count


def test_a_timeline_of_any_length_has_few_cells() -> None:
    timeline = Timeline()
    for second in range(36_000):
        timeline.at(second).tokens += 1
    assert len(timeline.cells) <= MAX_BUCKETS
    assert sum(cell.tokens for cell in timeline.cells.values()) == 36_000
    later = Timeline()
    later.at(1.0).tokens += 5
    later.merge(timeline)
    assert later.width_s == timeline.width_s
    assert sum(cell.tokens for cell in later.cells.values()) == 36_005


def test_blocks_are_stretches() -> None:
    assert [block_of(job, 64, 0, None) for job in (0, 1, 2, 63)] == [0, 0, 1, 31]
    assert [block_of(0, None, at, 32.0) for at in (0, 1.5, 31.9)] == [0, 1, 31]


PAGE = """# HELP vllm:generation_tokens_total x
vllm:generation_tokens_total{engine="0",model_name="m"} 120.0
vllm:generation_tokens_total{engine="1",model_name="m"} 30.0
vllm:prompt_tokens_total{engine="0"} 7e1
vllm:request_success_total{finished_reason="stop"} 3
vllm:request_success_total{finished_reason="length"} 4
vllm:time_to_first_token_seconds_sum{a="b"} 1.5
vllm:time_to_first_token_seconds_count{a="b"} 7
vllm:time_to_first_token_seconds_bucket{le="0.1"} 5
"""


def test_counters_of_a_page() -> None:
    assert read_counters(PAGE) == Counters(7, 150, 70, 1.5, 7)
    assert read_counters(PAGE.replace("vllm:", "ray_vllm_")) == Counters(7, 150, 70, 1.5, 7)
    prefix = 'vllm:prefix_cache_queries_total{engine="0"} 9\nvllm:prefix_cache_hits_total{engine="0"} 4\n'
    found = read_counters(PAGE + prefix)
    assert found is not None
    assert (found.prefix_queries, found.prefix_hits) == (9, 4)
    assert read_counters("up 1\n") is None
    assert Counters(7, 150, 70, 1.5, 7).minus(Counters(1, 50, 10, 0.5, 1)) == Counters(6, 100, 60, 1.0, 6)


def test_reconciliation() -> None:
    tally = RequestTally(1000.0)
    for number in range(10):
        add(tally, exchange(1000.0 + number, [0.1, 0.1]))
    assert compare(tally, Counters(10, 30, 70, 1.0, 10)).status == "agrees"
    for wrong in (Counters(11, 30, 70, 1, 10), Counters(10, 31, 70, 1, 10), Counters(10, 30, 70, 5.0, 10)):
        assert compare(tally, wrong).status == "disagrees"
    add(tally, exchange(1020.0, [0.1], is_cut=True))
    assert compare(tally, Counters(11, 33, 77, 1, 10)).status == "agrees"  # the server may have finished it
    assert compare(tally, Counters(12, 33, 77, 1, 10)).status == "disagrees"


def test_a_server_that_is_away_is_in_the_time_of_the_run() -> None:
    tally = RequestTally(100.0)
    away = Exchange(0, 103.0, Request(b""))
    away.fail("refused", "no connection")
    away.on_end(103.5, None)
    tally.add(away, block=0)
    assert (tally.duration_s, tally.busy_s, tally.errors) == (0.5, 0.0, {"refused": 1})
