"""The load client's parsers byte by byte, and what it counts, over a transport in memory."""

import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import load

OSL = 3


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if end else b"")


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})


def usage(tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": tokens}})


DONE = b"data: [DONE]\n\n"
# The texts hold every marker that the client looks for, and multi-byte characters to be cut through.
TEXTS = ['a"usage":{"completion_tokens":9}', '\u00e9\U0001f600"error"', "data: [DONE]\n\n"]
WHOLE = chunked(*(token(t) for t in TEXTS), usage(OSL), DONE)


def parse(pieces: Sequence[bytes]) -> tuple[load.ResponseParser, list[bytes]]:
    response, events = load.ResponseParser(), load.EventParser()
    return response, [data for piece in pieces for data in events.feed(response.feed(piece))]


def cut(data: bytes, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    at = [0, *sorted(rng.sample(range(1, len(data)), rng.randint(1, 40))), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


@pytest.mark.parametrize(
    "pieces",
    [[WHOLE], [WHOLE[i : i + 1] for i in range(len(WHOLE))], *(cut(WHOLE, seed) for seed in range(50))],
)
def test_stream_is_the_same_however_it_is_cut(pieces: list[bytes]) -> None:
    response, events = parse(pieces)
    assert response.is_complete
    assert response.status == 200
    assert [json.loads(e)["choices"][0]["text"] for e in events[:OSL]] == TEXTS
    assert json.loads(events[OSL])["usage"]["completion_tokens"] == OSL
    assert events[OSL + 1 :] == [b"[DONE]"]


def test_stream_cut_in_two_at_every_byte() -> None:
    whole = parse([WHOLE])[1]
    for at in range(1, len(WHOLE)):
        assert parse([WHOLE[:at], WHOLE[at:]])[1] == whole


def test_chunks_need_not_be_events() -> None:
    body = token("x") + usage(1) + DONE
    assert parse([chunked(*(body[i : i + 1] for i in range(len(body))))])[1] == parse([chunked(body)])[1]


def test_reads_of_exactly_one_chunk() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    reads = [b"%x\r\n%s\r\n" % (len(p), p) for p in (token("x"), usage(1), DONE)]
    response, events = parse([head, *reads, b"0\r\n\r\n"])
    assert response.is_complete
    assert len(events) == 3


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno", b"no"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\nTrailer: 1\r\n\r\n", b"ok"),
    ],
)
def test_response_framings(raw: bytes, body: bytes) -> None:
    for step in (1, 2, 3, len(raw)):
        response = load.ResponseParser()
        assert b"".join(response.feed(raw[i : i + step]) for i in range(0, len(raw), step)) == body
        assert response.is_complete


def test_body_delimited_by_close() -> None:
    response = load.ResponseParser()
    assert response.feed(b"HTTP/1.0 200 OK\r\n\r\nab") + response.feed(b"c") == b"abc"
    assert not response.is_complete
    response.feed_eof()
    assert response.is_complete


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    ],
)
def test_malformed_responses_raise(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        load.ResponseParser().feed(raw)


def test_event_lines_end_in_crlf_comments_are_skipped_and_data_joins() -> None:
    assert load.EventParser().feed(b": ping\r\ndata: a\r\ndata:b\r\nid: 1\r\n\r\n\r\n") == [b"a\nb"]


class FakeTransport(asyncio.Transport):
    """Answers each request with the next of `replies`, cut in pieces; None closes the connection."""

    def __init__(self, stream: load.Stream, replies: list[Sequence[bytes | None]]) -> None:
        super().__init__()
        self.stream = stream
        self.replies = replies

    def write(self, data: bytes | bytearray | memoryview) -> None:
        asyncio.get_running_loop().create_task(self.answer(self.replies.pop(0)))

    async def answer(self, reply: Sequence[bytes | None]) -> None:
        for piece in reply:
            await asyncio.sleep(0)
            if not self.stream.is_open:
                return
            if piece is None:
                self.stream.connection_lost(None)
                return
            self.stream.data_received(piece)

    def abort(self) -> None:
        return


def run(
    replies: list[Sequence[bytes | None]],
    *,
    concurrency: int = 1,
    timeout_s: float = 5.0,
    refuse: Callable[[int], bool] = lambda attempt: False,
    mode: load.Mode = "completions",
) -> tuple[load.LoadResult, int]:
    """The result, and how many connections were opened."""
    opened = 0

    async def connect() -> load.Stream:
        nonlocal opened
        opened += 1
        if refuse(opened):
            raise ConnectionRefusedError("refused")
        stream = load.Stream()
        stream.connection_made(FakeTransport(stream, replies))
        return stream

    exchanges = asyncio.run(
        load.closed_loop(
            connect, [b"GET"] * len(replies), concurrency=concurrency, mode=mode, osl=OSL, timeout_s=timeout_s
        )
    )
    result = load.summarize(
        exchanges, mode=mode, concurrency=concurrency, isl=4, osl=OSL, seed=0, cpu_s=0.0, loop="asyncio"
    )
    return result, opened


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_counts_are_exact(concurrency: int) -> None:
    result, opened = run([cut(WHOLE, seed) for seed in range(20)], concurrency=concurrency)
    assert (result.num_requests, result.num_completed, result.errors) == (20, 20, {})
    assert result.output_tokens == 20 * OSL
    assert result.tokens_per_chunk == 1
    assert opened == concurrency  # connections are kept


def test_one_chunk_may_carry_several_tokens() -> None:
    result, _ = run([[chunked(token("abc"), usage(OSL), DONE)]])
    assert (result.output_tokens, result.tokens_per_chunk) == (OSL, OSL)


SERVER_ERROR = b"HTTP/1.1 500 X\r\nContent-Length: 4\r\n\r\noops"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ([SERVER_ERROR], "http_500"),
        ([chunked(token("a"), end=False), None], "truncated"),
        ([chunked(token("a"), usage(OSL))], "truncated"),
        ([None], "truncated"),
        ([chunked(token("a"), event({"error": {"message": "engine dead"}}), DONE)], "stream_error"),
        ([chunked(token("a"), DONE)], "no_usage"),
        ([chunked(token("a"), usage(OSL - 1), DONE)], "wrong_length"),
        ([b"garbage\r\n\r\n"], "protocol"),
        ([chunked(b"data: {not json\n\n", DONE)], "protocol"),
        ([], "timeout"),
    ],
)
def test_failures_are_counted_and_the_loop_goes_on(reply: Sequence[bytes | None], kind: str) -> None:
    result, _ = run([[WHOLE], reply, [WHOLE]], timeout_s=0.1)
    assert result.errors == {kind: 1}
    assert (result.num_requests, result.num_completed, result.output_tokens) == (3, 2, 2 * OSL)
    assert result.first_error is not None
    assert result.first_error.startswith(kind)


def test_refused_connections_are_errors() -> None:
    result, opened = run([[WHOLE]] * 4, refuse=lambda attempt: attempt < 3)
    assert result.errors == {"connect": 1}  # attempts: at start (refused), again for request 1 (refused), for request 2
    assert (result.num_completed, opened) == (3, 3)


def test_server_may_close_after_each_answer() -> None:
    closing = WHOLE.replace(b"Transfer", b"Connection: close\r\nTransfer", 1)
    result, opened = run([[closing], [closing], [WHOLE, None]])
    assert result.errors == {}
    assert opened == 3


def test_generate_mode_reads_the_token_count_of_the_body() -> None:
    body = json.dumps({"text": "x", "tokens": OSL}).encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    result, _ = run([[reply], [reply.replace(b"tokens", b"takens")]], mode="generate")
    assert (result.output_tokens, result.errors) == (OSL, {"protocol": 1})
    assert result.tpot_p50_s is None
    assert result.ttft_p50_s is not None


def test_times_of_one_exchange() -> None:
    # Sent at 10.0; chunks at 10.5, 10.6, 10.9: TTFT 0.5, TPOT (10.9 - 10.5) / 2 = 0.2, longest gap 0.3.
    exchange = load.Exchange("completions", OSL, 10.0)
    for text, now in zip(TEXTS, (10.5, 10.6, 10.9), strict=True):
        exchange.on_event(token(text)[6:-2], now)
    exchange.on_event(usage(OSL)[6:-2], 11.0)
    exchange.on_event(b"[DONE]", 11.0)
    exchange.finish(200, 11.0)
    result = load.summarize(
        [exchange], mode="completions", concurrency=1, isl=4, osl=OSL, seed=0, cpu_s=0.0, loop="asyncio"
    )
    assert result.errors == {}
    assert result.ttft_p50_s == pytest.approx(0.5)
    assert result.tpot_p50_s == pytest.approx(0.2)
    assert result.longest_gap_s == pytest.approx(0.3)
    assert result.out_tok_s == pytest.approx(OSL / 1.0)


def test_prompts_are_seeded_and_of_exact_length() -> None:
    prompt = load.prompt_ids(7, 3, 64, 1000)
    assert len(prompt) == 64
    assert all(10 <= i < 1000 for i in prompt)
    assert prompt == load.prompt_ids(7, 3, 64, 1000)
    assert prompt != load.prompt_ids(7, 4, 64, 1000) != load.prompt_ids(8, 3, 64, 1000)


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.9, 3.7)])
def test_quantile_is_linear(q: float, expected: float) -> None:
    assert load.quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)  # 0.9: 3 + 0.7 * (4 - 3)
