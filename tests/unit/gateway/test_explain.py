"""Where a request's time went: worked out by hand, for any order of steps, and of streams that really moved."""

import asyncio
import contextvars
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from harness.live import until
from harness.toy_fleet import Bench, make_bench
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan import logs
from kervan.fleet.timeline import MAX_STEPS, MAX_STREAMS, RequestRecord, Step, StreamTimeline, current_request
from kervan.gateway.explain import Part, RequestExplained, explained
from kervan.gateway.remembered import RequestMemory, is_named

ENDED_S = 10.0


def told(*steps: Step, arrived_s: float = 1.0, ended_s: float = ENDED_S) -> RequestExplained:
    """A request that was received at 0 and given to vLLM at 0.5."""
    record = RequestRecord("/v1/completions", 0.0, 1_800_000_000.25, forwarded_s=0.5, ended_s=ended_s, status=200)
    record.streams.append(StreamTimeline("cmpl-x-0", 100, arrived_s, list(steps)))
    record.num_streams = 1
    return explained(record, gateway="gw-1", now_s=20.0)


def rows(of: RequestExplained) -> list[tuple[str, float, float]]:
    return [(part.part, part.start_s, round(part.seconds, 6)) for part in of.streams[0].parts]


def test_a_request_that_nothing_happens_to() -> None:
    found = told(
        Step(1.0, "placed", "a", "fewest outstanding tokens", 90),
        Step(3.0, "first token", "a", cached_tokens=10, queue_s=0.5),
        Step(9.0, "ended", "a", "stop", 40),
    )
    assert [(p.part, p.seconds) for p in found.before] == [("admission", 0.5), ("tokenisation", 0.5)]
    assert rows(found) == [("queue", 1, 0), ("replica queue", 1, 0.5), ("prefill", 1.5, 1.5), ("decode", 3, 6)]
    prefill = found.streams[0].parts[2]
    assert (prefill.replica, prefill.tokens, prefill.cached_tokens) == ("a", 90, 10)
    assert found.streams[0].parts[3].tokens == 40
    assert (found.delivery_s, found.seconds, found.received) == (1.0, 10.0, "2027-01-15T08:00:00.250Z")
    assert (found.streams[0].ended, found.streams[0].moves) == ("stop", [])


def test_a_stream_that_is_held_and_moves_after_seven_tokens() -> None:
    found = told(
        Step(1.0, "held", why="no replica"),
        Step(2.0, "placed", "a", "fewest", 100),
        Step(3.0, "first token", "a"),
        Step(5.0, "moved", why="lost", tokens=7, since_s=4.5),
        Step(5.5, "placed", "b", "fewest", 107),
        Step(6.0, "first token", "b", queue_s=0.1),
        Step(9.0, "ended", "b", "length", 20),
    )
    assert rows(found) == [
        ("queue", 1, 1), ("prefill", 2, 1), ("decode", 3, 1.5), ("move", 4.5, 1.5), ("decode", 6, 3)
    ]  # fmt: skip
    (move,) = found.streams[0].moves
    assert (move.reason, move.source, move.target, move.after_tokens) == ("lost", "a", "b", 7)
    assert (move.pause_s, move.prefilled_tokens, move.start_s) == (1.5, 107, 4.5)
    assert found.streams[0].parts[0].why == "no replica"
    assert [p.tokens for p in found.streams[0].parts if p.part == "decode"] == [7, 13]


def test_a_stream_that_loses_its_replica_before_a_token_has_no_pause() -> None:
    found = told(
        Step(1.0, "placed", "a", tokens=100),
        Step(2.0, "moved", why="stalled"),
        Step(2.5, "placed", "b", tokens=100),
        Step(4.0, "first token", "b"),
        Step(9.0, "ended", "b", "stop", 5),
    )
    assert rows(found) == [
        ("queue", 1, 0), ("lost prefill", 1, 1), ("queue", 2, 0.5), ("prefill", 2.5, 1.5), ("decode", 4, 5)
    ]  # fmt: skip
    assert [(m.target, m.pause_s, m.prefilled_tokens) for m in found.streams[0].moves] == [("b", 0.0, 100)]


def test_two_replicas_lost_in_one_pause_are_two_moves() -> None:
    found = told(
        Step(1.0, "placed", "a", tokens=100),
        Step(2.0, "first token", "a"),
        Step(3.0, "moved", why="lost", tokens=4, since_s=2.9),
        Step(3.1, "placed", "b", tokens=104),
        Step(4.0, "moved", why="lost", tokens=4, since_s=2.9),
        Step(4.1, "placed", "c", tokens=104),
        Step(5.0, "first token", "c"),
        Step(6.0, "ended", "c", "stop", 9),
    )
    assert [(m.source, m.target) for m in found.streams[0].moves] == [("a", "b"), ("b", "c")]
    assert sum(part.seconds for part in found.streams[0].parts) == pytest.approx(5.0)


def test_a_request_in_flight_is_told_up_to_now() -> None:
    found = told(Step(1.0, "placed", "a", tokens=9), Step(2.0, "first token", "a"), ended_s=0.0)
    assert (found.is_open, found.seconds, found.streams[0].ended) == (True, 20.0, "")
    assert found.streams[0].parts[-1] == Part("decode", 2.0, 18.0, "a", is_open=True)


def test_a_request_that_vllm_refused_opened_no_stream() -> None:
    record = RequestRecord("/v1/completions", 0.0, 1.0, forwarded_s=0.1, ended_s=0.3, status=400)
    found = explained(record, gateway="g", now_s=1.0)
    assert [p.part for p in found.before] == ["admission", "answered without a stream"]
    assert sum(p.seconds for p in found.before) == pytest.approx(0.3)


def test_a_request_in_flight_that_has_no_stream_yet_is_being_read_and_tokenised() -> None:
    record = RequestRecord("/v1/completions", 0.0, 1.0, forwarded_s=0.1, ended_s=0.0, status=0)
    found = explained(record, gateway="g", now_s=1.0)
    assert [(p.part, p.seconds) for p in found.before] == [("admission", 0.1), ("tokenisation", 0.9)]


WHATS = st.sampled_from(["waits", "held", "placed", "first token", "moved", "replayed"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WHATS, st.floats(0, 1), st.integers(0, 9)), max_size=12), st.booleans())
def test_whatever_happens_parts_follow_each_other_and_make_up_all_of_the_time(
    happened: list[tuple[str, float, int]], is_over: bool
) -> None:
    at_s, steps, tokens = 1.0, [], 0
    for what, later_s, more in happened:
        at_s, tokens = at_s + later_s, tokens + more
        since_s = at_s - later_s / 2 if tokens else 0.0
        steps.append(Step(at_s, what, "r", "why", tokens, queue_s=later_s, since_s=since_s))  # type: ignore[arg-type]
    if is_over:
        steps.append(Step(at_s, "ended", "r", "stop", tokens))
    found = told(*steps, ended_s=at_s + 1 if is_over else 0.0)
    parts = found.streams[0].parts
    assert sum(part.seconds for part in parts) == pytest.approx(at_s - 1.0 if is_over else 19.0)
    for one, other in itertools.pairwise(parts):
        assert other.start_s == pytest.approx(one.start_s + one.seconds)
    assert all(part.seconds >= -1e-9 for part in parts)


# ---- of streams that happen


@pytest.fixture
async def noted(quick: None) -> AsyncIterator[tuple[Bench, RequestRecord]]:
    """A bench whose streams belong to a request."""
    record = RequestRecord("/v1/completions", 0.0, 1.0)
    token = current_request.set(record)
    async with make_bench() as bench:
        yield bench, record
    current_request.reset(token)


async def test_a_stream_notes_where_it_was_and_how_it_moved(noted: tuple[Bench, RequestRecord]) -> None:
    bench, record = noted
    token = current_request.set(record)
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=[1] * 30, max_tokens=6)
    current_request.reset(token)
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    await bench.finished("s")
    (timeline,) = record.streams
    assert [step.what for step in timeline.steps] == [
        "placed",
        "first token",
        "moved",
        "placed",
        "first token",
        "ended",
    ]
    assert [step.replica for step in timeline.steps if step.what == "placed"] == ["a", "b"]
    assert [step.tokens for step in timeline.steps if step.what == "placed"] == [30, 32]
    (move,) = explained(record, gateway="g", now_s=timeline.steps[-1].at_s).streams[0].moves
    assert (move.reason, move.after_tokens, move.prefilled_tokens) == ("lost", 2, 32)
    assert move.pause_s > 0
    assert timeline.steps[-1].tokens == 6


async def test_a_stream_that_is_aborted_says_so(noted: tuple[Bench, RequestRecord]) -> None:
    bench, record = noted
    token = current_request.set(record)
    a = await bench.start("a")
    await bench.add("s")
    current_request.reset(token)
    await bench.placed(a, "s")
    await bench.client.abort(["s"])
    await until(lambda: a.aborted == ["s"])
    assert (record.streams[0].steps[-1].what, record.streams[0].steps[-1].why) == ("ended", "abort")


# ---- what is kept


def test_what_is_kept_of_a_request_is_bounded() -> None:
    record = RequestRecord("/v1/completions", 0.0, 1.0)
    timelines = [record.open(f"s{i}", 1, 0.0) for i in range(100)]
    assert (len(record.streams), record.num_streams, timelines[MAX_STREAMS]) == (MAX_STREAMS, 100, None)
    first = timelines[0]
    assert first is not None
    for _ in range(100):
        first.note("held")
    first.note("ended", why="stop")
    assert (len(first.steps), first.num_left_out) == (MAX_STEPS + 1, 100 - MAX_STEPS)


def remember(memory: RequestMemory, request_id: str, *streams: str) -> None:
    scope = {"path": "/v1/chat/completions", "headers": [(b"x-request-id", request_id.encode())]}
    with memory.begin(scope, 0.0):
        record = current_request.get()
        assert record is not None
        record.stream_id = f"gw-1-{request_id}"
        for stream in streams:
            record.open(stream, 1, 0.0)


def test_the_last_requests_are_remembered_and_no_more() -> None:
    memory = RequestMemory(2)
    for name in ("one", "two", "three"):
        remember(memory, name, f"chatcmpl-{name}-0badcafe")
    assert memory.find("one") is None
    assert memory.find("two") is not None
    assert current_request.get() is None


TRACEPARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_log_lines_within_a_request_have_its_ids_and_those_after_it_none() -> None:
    def told() -> dict[str, object]:
        record = logging.LogRecord("vllm", logging.WARNING, "", 0, "slow", None, None)
        return logs.JsonFormatter().fields(record)

    headers = [(b"x-request-id", b"mine"), (b"traceparent", TRACEPARENT)]
    late: list[Callable[[], dict[str, object]]] = []
    with RequestMemory(0).begin({"path": "/v1/completions", "headers": headers}, 0.0):
        context = contextvars.copy_context()  # of a task that outlives the request, as vLLM's reader of outputs does
        late.append(lambda: context.run(told))
        assert (told()["request_id"], told()["trace_id"]) == ("mine", TRACEPARENT.decode().split("-")[1])
    assert "request_id" not in told()
    assert "request_id" not in late[0]()


def test_a_client_that_comes_back_is_told_of_with_the_request_that_began() -> None:
    memory = RequestMemory(5)
    remember(memory, "one", "cmpl-one-0-0badcafe")
    scope = {"path": "/v1/completions", "headers": [(b"x-request-id", b"one")]}
    with memory.begin_again(scope, "gw-1-one", b""):
        current_request.get().open("cmpl-one-0-1badcafe", 1, 0.0)  # type: ignore[union-attr]
    remember(memory, "two", "cmpl-two-0-0badcafe")
    first = memory.find("one")
    assert first is not None and first.method == "POST"
    (later,) = memory.later(first)
    assert (later.method, later.path, later.stream_id) == ("GET", "/v1/streams/{id}", "gw-1-one")
    for number in range(3):
        remember(memory, f"more{number}")
    alone = memory.find("gw-1-one")  # the first one is forgotten
    assert alone is later and memory.later(alone) == []


async def test_a_request_in_flight_is_found_and_tasks_that_it_starts_belong_to_it() -> None:
    memory = RequestMemory(2)
    with memory.begin({"path": "/v1/completions", "headers": [(b"x-request-id", b"mine")]}, 0.0):
        assert await asyncio.create_task(asyncio.to_thread(current_request.get)) is memory.find("mine")
    found = memory.find("mine")
    assert found is not None and found.ended_s > 0


@pytest.mark.parametrize(
    ("given", "is_found"),
    [
        ("chatcmpl-abc", True), ("abc", True), ("gw-1-abc", True), ("chatcmpl-abc-0badcafe", True), ("ab", False),
        ("", False), ("chatcmpl-", False), ("cmpl-abc", False),
    ],
)  # fmt: skip
def test_a_request_is_found_by_every_name_that_a_client_has_of_it(given: str, is_found: bool) -> None:
    memory = RequestMemory(2)
    remember(memory, "abc", "chatcmpl-abc-0badcafe", "1_chatcmpl-abc")
    assert (memory.find(given) is not None) is is_found


def test_a_second_choice_and_a_second_prompt_are_found_too() -> None:
    record = RequestRecord("/v1/completions", 0.0, 1.0)
    record.open("1_cmpl-abc-0-0badcafe", 1, 0.0)
    assert is_named(record, "cmpl-abc") and is_named(record, "abc")


def test_what_is_told_is_json() -> None:
    assert b'"part":"prefill"' in msgspec.json.encode(told(Step(1.0, "placed", "a", tokens=9)))
