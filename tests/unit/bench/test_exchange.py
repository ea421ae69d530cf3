"""What the client makes of answers: events cut anywhere, chunks of all kinds, and every way in which a stream fails."""

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.bench.exchange import Exchange
from kervan.bench.prompts import Request
from kervan.bench.sse import EventParser

HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def text(value: str, reason: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": value, "finish_reason": reason}], **more}


def delta(reason: str | None = None, **parts: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": reason}]}


def usage(completion: int, prompt: int = 5) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


DONE = b"[DONE]"


def play(
    chunks: Iterable[Any], *, exact: int | None = None, status: int = 200, fault: str | None = None,
    headers: dict[str, str] = HEADERS,
) -> Exchange:  # fmt: skip
    """Chunk n arrives n seconds after the request."""
    exchange = Exchange(0, 100.0, Request(b"", exact))
    exchange.sent_s = 100.5
    at_s = 101.0
    if status:
        exchange.on_status(status, headers)
    for chunk in chunks:
        exchange.on_body(chunk if isinstance(chunk, bytes) and chunk != DONE else event(chunk), at_s)
        at_s += 1
    exchange.on_end(at_s, fault)
    return exchange


def test_a_whole_completion() -> None:
    exchange = play([text("a"), text("b"), text("c", "length"), usage(3), DONE], exact=3)
    assert exchange.error is None
    assert (exchange.ttft_s, exchange.ttft_from_arrival_s) == (0.5, 1.0)
    assert exchange.gaps == [1.0, 1.0]
    assert (exchange.tpot_s, exchange.e2e_s) == (1.0, 3.0)
    assert (exchange.output_tokens, exchange.prompt_tokens) == (3, 5)


def test_a_chats_opening_and_closing_are_no_tokens() -> None:
    exchange = play(
        [delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("length"), usage(2), DONE]
    )
    assert exchange.error is None
    assert (exchange.ttft_s, exchange.num_chunks, exchange.gaps) == (1.5, 2, [1.0])


def test_an_unseen_end_of_text_token_counts_when_usage_says_so() -> None:
    chunks = [delta(role="assistant", content=""), delta(content="a"), delta("stop", content=""), usage(2), DONE]
    exchange = play(chunks)
    assert (exchange.error, exchange.num_chunks, exchange.gaps) == (None, 2, [1.0])
    only = play([delta(role="assistant", content=""), delta("stop", content=""), usage(1), DONE])
    assert (only.error, only.ttft_s) == (None, 1.5)


def test_reasoning_comes_before_the_answer() -> None:
    chunks = [delta(reasoning_content="hm"), delta(reasoning="so"), delta(content="42", reason="stop"), usage(3), DONE]
    exchange = play(chunks)
    assert exchange.ttft_s == 0.5
    assert exchange.first_answer_s == 103.0


def test_tool_calls_are_tokens() -> None:
    call = [{"index": 0, "function": {"name": "weather", "arguments": ""}}]
    exchange = play([delta(role="assistant"), delta(tool_calls=call), delta("tool_calls"), usage(2), DONE])
    assert (exchange.error, exchange.ttft_s) == (None, 1.5)


def test_a_chunk_of_several_tokens() -> None:
    exchange = play([text("a"), text("b c d", "length"), usage(4), DONE], exact=4)
    assert (exchange.error, exchange.num_chunks, exchange.output_tokens) == (None, 2, 4)
    assert exchange.chunk_tokens == []
    in_chunks = play(
        [text("a", usage={"completion_tokens": 1}), text("bcd", "length", usage={"completion_tokens": 4}), DONE]
    )
    assert in_chunks.chunk_tokens == [3]
    by_ids = play([text("a"), {"choices": [{"text": "bc", "token_ids": [1, 2], "finish_reason": "stop"}]}, DONE])
    assert by_ids.chunk_tokens == [2]


def test_choices_have_gaps_of_their_own() -> None:
    chunks = [text("a"), text("x", index=1), text("b", "stop"), text("y", "stop", index=1), usage(4), DONE]
    exchange = play(chunks, exact=4)
    assert (exchange.error, exchange.gaps) == (None, [2.0, 2.0])


def test_without_usage_chunks_are_counted() -> None:
    exchange = play([text("a"), text("b", "stop"), DONE])
    assert (exchange.error, exchange.output_tokens, exchange.prompt_tokens) == (None, 2, None)


def test_an_empty_completion_chunk_is_part_of_a_character() -> None:
    assert play([text(""), text("é", "length"), usage(2), DONE], exact=2).error is None


@pytest.mark.parametrize(
    ("error", "chunks", "more"),
    [
        ("http_500", [b"oh no"], {"status": 500}),
        ("http_307", [], {"status": 307}),
        ("no_stream", [b'{"choices": []}'], {"headers": {"content-type": "application/json"}}),
        ("closed", [], {"status": 0, "fault": "the connection closed"}),
        ("garbage", [], {"status": 0, "fault": "no HTTP: \x00"}),
        ("garbage", [text("a"), b"data: {nonsense\n\n"], {}),
        ("garbage", [b"data: \xff\xfe\n\n"], {}),
        ("garbage", [b'data: {"choices": 3}\n\n', DONE], {}),
        ("server_error", [text("a"), {"error": {"message": "out of memory"}}, DONE], {}),
        ("truncated", [text("a")], {}),
        ("truncated", [text("a"), usage(1)], {"fault": "the connection closed"}),
        ("empty", [usage(0), DONE], {}),
        ("wrong_length", [text("a", "stop"), usage(1), DONE], {"exact": 3}),
        ("duplicated", [text("a"), text("a"), text("b", "length"), usage(2), DONE], {}),
        ("duplicated", [text("a", "stop"), text("b"), usage(2), DONE], {}),
        ("duplicated", [text("a", "stop"), usage(1), DONE, DONE], {}),
    ],
)
def test_failures_have_a_kind(error: str, chunks: list[Any], more: dict[str, Any]) -> None:
    exchange = play(chunks, **more)
    assert exchange.error == error
    assert exchange.message


STREAM = (
    b": keep-alive\n\n"
    + event(delta(role="assistant", content=""))
    + b"event: message\r\nid: 7\r\ndata: " + json.dumps(delta(content="k\u00e9rvan \U0001f42a")).encode() + b"\r\n\r\n"
    + b"\n: ping\n\n"
    + "data: {\"choices\": [{\"index\": 0, \"delta\": {\"content\": \"\u00e7\u00f6l\"}}]}\n\n".encode()
    + b'data: {"choices": [\ndata: {"index": 0, "delta": {"content": "!"}, "finish_reason": "stop"}]}\n\n'
    + event(usage(3))
    + b"data:[DONE]\n\n"
)  # fmt: skip


def whole(pieces: Iterable[bytes]) -> Exchange:
    exchange = Exchange(0, 0.0, Request(b"", 3), keeps_text=True)
    exchange.on_status(200, HEADERS)
    for piece in pieces:
        exchange.on_body(piece, 1.0)
    exchange.on_end(2.0, None)
    return exchange


def test_byte_by_byte() -> None:
    exchange = whole(STREAM[i : i + 1] for i in range(len(STREAM)))
    assert exchange.error is None
    assert "".join(exchange.text or []) == "kérvan 🐪çöl!"


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cut_anywhere(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    exchange = whole(STREAM[a:b] for a, b in itertools.pairwise(places))
    assert (exchange.error, "".join(exchange.text or [])) == (None, "kérvan 🐪çöl!")


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_any_bytes_end_in_a_verdict(pieces: list[bytes]) -> None:
    exchange = whole(pieces)
    assert exchange.error is not None


PIECES = [
    event(text("a")),
    event(text("b", token_ids=[1])),
    event(text("c", index=1)),
    event(text("d", usage={"completion_tokens": 2})),
    event(delta(content="e")),
    event(delta(reasoning="f")),
    event(text("")) + event(text("g")),
    event(text("h"))[:9],
    event(text("h"))[9:],
    b'data: {"choices": []},{"choices": []}\n\n',
    b"data: {]\n\n",
    b'data: {"choices": [],\ndata: "usage": null}\n\n',
    b": ping\n\n",
    event(text("i", "stop")),
    event(DONE),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_pieces_looked_at_together_are_as_one_by_one(pieces: list[bytes], sizes: list[int]) -> None:
    def played(*, together: bool) -> tuple[Exchange, list[Any]]:
        seen: list[Any] = []
        exchange = Exchange(0, 0.0, Request(b""))
        exchange.on_chunk = lambda _, chunk, event, at_s: seen.append((chunk, event, at_s))
        exchange.on_status(200, HEADERS)
        times = list(map(float, range(1, len(pieces) + 1)))
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            if together:
                exchange.on_bodies(pieces[part], times[part])
            else:
                for piece, at_s in zip(pieces[part], times[part], strict=True):
                    exchange.on_body(piece, at_s)
            start += size
        exchange.on_end(100.0, None)
        return exchange, seen

    (one, seen_one), (many, seen_many) = played(together=False), played(together=True)
    assert seen_one == seen_many
    for name in ("error", "message", "gaps", "chunk_tokens", "num_chunks", "first_s", "first_answer_s", "last_s"):
        assert getattr(one, name) == getattr(many, name)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_line_ends(end: bytes) -> None:
    parser = EventParser()
    stream = b"data: a" + end + end + b"data: b" + end + b"data: c" + end + end
    assert [*parser.feed(stream[:9]), *parser.feed(stream[9:])] == [b"a", b"b\nc"]
