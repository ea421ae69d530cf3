"""The client against real sockets: servers that behave, and servers that do not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kervan.bench import load_client
from kervan.bench.counting import RequestCounter
from kervan.bench.exchange import Exchange
from kervan.bench.load import Endpoint, Load
from kervan.bench.load_client import LoadClient, Share
from kervan.bench.pacer import Pacer, Schedule
from kervan.bench.prompts import Alphabet
from kervan.bench.tally import RequestTally
from kervan.config.workload import Slo
from kervan.errors import ConfigError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Handler = Callable[[bytes, asyncio.StreamWriter, int], Awaitable[None]]


def chunked(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def token(reason: str = "null") -> bytes:
    return b'data: {"choices": [{"text": " a", "finish_reason": %s}]}\n\n' % reason.encode()


def answer(num_tokens: int, prompt: int = 16) -> list[bytes]:
    """The pieces of a whole answer, without HTTP around them."""
    last = b'data: {"choices": [], "usage": {"prompt_tokens": %d, "completion_tokens": %d}}\n\n' % (prompt, num_tokens)
    return [*[token()] * (num_tokens - 1), token('"length"'), last, b"data: [DONE]\n\n"]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server that reads whole requests and hands body, writer and the request's number to `handler`."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                count += 1
                await handler(body, writer, count)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def run(url: str, *, slo: Slo = Slo(), target: dict[str, Any] | None = None, **load: Any) -> RequestTally:  # noqa: B008
    """A load of one worker within this loop."""
    settings: dict[str, Any] = {"isl": "16", "osl": "4", "timeout_s": 5.0, **load}
    if not {"stages", "trace", "streams"} & set(settings):
        settings |= {"streams": 2, "num_requests": settings.get("num_requests", 6)}
    share = Share(Load(**settings), Endpoint(url=url, model="m", **(target or {})), Alphabet(1000), slo)
    return (await counted(share)).tally


async def counted(share: Share, timeout_s: float = 30) -> RequestCounter:
    """A share sent to its end, and what was counted."""
    client = LoadClient(share)
    client.prepare()
    await client.connect_first()
    counter = RequestCounter(share, time.time())
    await asyncio.wait_for(client.run(counter.tally.start_s, counter), timeout_s)
    counter.tally.reconnected, counter.tally.sent_away = client.reconnected, client.sent_away
    return counter


async def good(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD)
    for piece in answer(json.loads(body)["max_tokens"], len(json.loads(body)["prompt"])):
        writer.write(chunked(piece))
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")


async def good_chat(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    piece = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
    writer.write(HEAD + chunked(piece) + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def test_a_whole_load() -> None:
    bodies: list[dict[str, Any]] = []

    async def keep(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        bodies.append(json.loads(body))
        await good(body, writer, number)

    async with serving(keep) as url:
        tally = await run(url, streams=3, num_requests=10, osl="2..6", seed=5)
    assert (tally.ok, tally.errors, tally.wrong_input_tokens) == (10, {}, 0)
    assert tally.output_tokens == sum(body["max_tokens"] for body in bodies)
    assert tally.input_tokens == 160
    assert tally.whole("gap_s").count == tally.output_tokens - 10
    assert all(body["ignore_eos"] and body["stream"] and len(body["prompt"]) == 16 for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 10
    async with serving(keep) as url:
        await run(url, streams=1, num_requests=10, osl="2..6", seed=5)
    key = lambda body: (body["max_tokens"], body["prompt"])  # noqa: E731
    assert sorted(map(key, bodies[:10])) == sorted(map(key, bodies[10:]))


async def cuts_oddly(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    """The same answer in each way that HTTP and events allow."""
    first, *middle, last, usage, done = answer(json.loads(body)["max_tokens"], len(json.loads(body)["prompt"]))
    size = b"%X" % len(first)
    pieces = [HEAD[:30], HEAD[30:] + size[:1], size[1:] + b";name=value\r\n" + first + b"\r", b"\n"]
    for piece in middle:
        pieces += [chunked(piece[:20]), chunked(piece[20:-1]), chunked(piece[-1:])]
    whole = chunked(last.replace(b"\n", b"\r\n")) + chunked(usage + done)
    pieces += [whole[:-3], whole[-3:], b"0\r\n", b"Trailer: x\r\n", b"\r\n"]
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.001)


async def test_an_answer_cut_oddly() -> None:
    async with serving(cuts_oddly) as url:
        tally = await run(url, num_requests=6, osl="8")
    assert (tally.ok, tally.errors, tally.wrong_input_tokens, tally.reconnected) == (6, {}, 0, 0)
    assert (tally.output_tokens, tally.whole("gap_s").count) == (48, 42)


async def paced(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD)
    for piece in answer(json.loads(body)["max_tokens"], len(json.loads(body)["prompt"])):
        writer.write(chunked(piece))
        await writer.drain()
        await asyncio.sleep(0.012)
    writer.write(b"0\r\n\r\n")


@pytest.mark.parametrize("has_epoll", [True, False])
async def test_many_streams_whose_reads_wait_for_each_other(has_epoll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_epoll:
        monkeypatch.delattr("select.epoll")
    async with serving(paced) as url:
        tally = await run(url, streams=40, num_requests=120, osl="16", timeout_s=20.0)
    assert (tally.ok, tally.errors) == (120, {})
    assert (tally.output_tokens, tally.whole("gap_s").count) == (1920, 1800)


async def fails(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops")


async def redirects(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


async def hangs(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    await asyncio.sleep(20)


async def hangs_midway(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + chunked(token()))
    await writer.drain()
    await asyncio.sleep(20)


async def closes_midway(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + chunked(token()))
    await writer.drain()
    writer.close()


async def closes_at_once(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.close()


async def resets(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.transport.abort()


async def ends_without_done(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + chunked(token()) + b"0\r\n\r\n")


async def sends_garbage(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"\x00\xff what is this\r\n\r\n")
    await writer.drain()
    writer.close()


async def sends_broken_json(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + chunked(b"data: {]\n\n") + b"0\r\n\r\n")


async def breaks_chunking(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + b"zz\r\n" + token())


async def answers_json(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


async def tells_an_error(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    error = b'data: {"error": {"message": "engine died", "code": 500}}\n\n'
    writer.write(HEAD + chunked(token()) + chunked(error) + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def stops_early(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + b"".join(map(chunked, answer(2))) + b"0\r\n\r\n")


async def says_it_twice(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(HEAD + b"".join(map(chunked, [token(), *answer(4)])) + b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (fails, "http_500"), (redirects, "http_307"), (hangs, "timeout"), (hangs_midway, "timeout"),
        (closes_midway, "truncated"), (closes_at_once, "closed"), (resets, "closed"), (ends_without_done, "truncated"),
        (sends_garbage, "garbage"), (sends_broken_json, "garbage"), (breaks_chunking, "garbage"),
        (answers_json, "no_stream"), (tells_an_error, "server_error"), (stops_early, "wrong_length"),
        (says_it_twice, "duplicated"),
    ],
)  # fmt: skip
async def test_bad_servers_are_counted_by_kind(handler: Handler, kind: str) -> None:
    async with serving(handler) as url:
        tally = await run(url, num_requests=4, timeout_s=0.4)
    assert (tally.ok, tally.errors) == (0, {kind: 4})
    assert tally.messages[kind][0]


async def test_a_server_that_refuses() -> None:
    async with serving(good) as url:
        pass
    tally = await run(url, num_requests=4)
    assert (tally.ok, tally.errors) == (0, {"refused": 4})


@pytest.mark.parametrize("handler", [fails, closes_at_once, stops_early])
async def test_streams_pause_after_failures(handler: Handler) -> None:
    """0.1 s after the first and 0.2 s after the second: then the load is over."""
    async with serving(handler) as url:
        tally = await run(url, streams=3, duration_s=0.28)
    assert tally.ok == 0
    assert 3 <= tally.num_errors <= 6


async def test_a_pause_is_what_the_server_asks_and_starts_anew_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[tuple[int, float | None]] = []

    def pause_s(failures: int, retry_after_s: float | None) -> float:
        pauses.append((failures, retry_after_s))
        return 0.0

    monkeypatch.setattr(load_client, "pause_s", pause_s)

    async def busy(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 3:
            await good(body, writer, number)
        elif number == 2:
            writer.write(b"HTTP/1.1 503 Full\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n")
        else:
            await fails(body, writer, number)

    async with serving(busy) as url:
        tally = await run(url, streams=1, num_requests=4)
    assert pauses == [(1, None), (2, 7.0), (1, None)]
    assert (tally.ok, tally.errors, tally.told_to_wait) == (1, {"http_500": 2, "http_503": 1}, 1)
    assert tally.longest_retry_after_s == 7.0


@pytest.mark.parametrize("end", [{"duration_s": 5.0}, {"num_requests": 50}])
async def test_streams_end_when_the_server_asks_them_to_come_back_after_the_end(end: dict[str, Any]) -> None:
    async def shut(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 503 Full\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n")

    async with serving(shut) as url:
        tally = await asyncio.wait_for(run(url, streams=4, **end), 3)
    assert (tally.errors, tally.told_to_wait, tally.sent_away) == ({"http_503": 4}, 4, 4)


async def test_a_pause_ends_with_the_load() -> None:
    async def busy(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 503 Full\r\nRetry-After: 50\r\nContent-Length: 0\r\n\r\n")

    async with serving(busy) as url:
        share = Share(Load(streams=1, duration_s=60), Endpoint(url=url, model="m"), Alphabet(1000), Slo())
        client, counter = LoadClient(share), RequestCounter(share, time.time())
        client.prepare()
        running = asyncio.create_task(client.run(counter.tally.start_s, counter))
        while not counter.tally.num_errors:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        client.stop_sending()
        await asyncio.wait_for(running, 5)


async def test_what_succeeds_among_failures_is_measured() -> None:
    async def every_second(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        await (fails if number % 2 else good)(body, writer, number)

    async with serving(every_second) as url:
        tally = await run(url, num_requests=10)
    assert (tally.ok, tally.errors) == (5, {"http_500": 5})


async def test_an_idle_connection_that_the_server_closed_is_made_again() -> None:
    async def closes_after(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        await good(body, writer, number)
        await writer.drain()
        writer.close()

    async with serving(closes_after) as url:
        tally = await run(url, num_requests=8)
    assert (tally.ok, tally.errors) == (8, {})


@pytest.mark.parametrize("form", ["length", "until_close", "pieces"])
async def test_forms_of_http(form: str) -> None:
    async def serve(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        text = b"".join(answer(4))
        if form == "length":
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(text)
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + head + text)
        elif form == "until_close":
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text)
            await writer.drain()
            writer.close()
        else:
            whole = HEAD + b"".join(map(chunked, answer(4))) + b"0\r\n\r\n"
            for i in range(0, len(whole), 7):
                writer.write(whole[i : i + 7])
                await writer.drain()
                await asyncio.sleep(0)

    async with serving(serve) as url:
        tally = await run(url, num_requests=4)
    assert (tally.ok, tally.errors) == (4, {})


async def test_an_open_loop_sends_at_the_intended_times_and_does_not_wait_for_answers() -> None:
    from kervan.bench.arrivals import parse_stages

    async with serving(hangs) as url:
        tally = await run(url, stages=parse_stages("burst:5,20@0.3s"), process="constant", timeout_s=0.5)
    assert tally.errors == {"timeout": 11}
    assert tally.whole("late_s").count == 11


async def test_more_arrivals_than_streams_may_be_are_errors() -> None:
    from kervan.bench.arrivals import parse_stages

    async with serving(hangs) as url:
        tally = await run(url, stages=parse_stages("burst:9"), max_streams=4, timeout_s=0.4)
    assert tally.errors == {"timeout": 4, "not_sent": 5}


async def test_a_conversation_holds_what_was_said() -> None:
    asked: list[list[dict[str, str]]] = []

    async def chat(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        asked.append(json.loads(body)["messages"])
        piece = b'data: {"choices": [{"delta": {"content": "so %d"}, "finish_reason": "stop"}]}\n\n' % number
        writer.write(HEAD + chunked(piece) + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with serving(chat) as url:
        share = Share(
            Load(streams=1, num_requests=3, turns=3, isl="5", ignore_eos=False),
            Endpoint(url=url, model="m", api="chat"),
            Alphabet(words=(" a", " b")),
            Slo(),
        )
        assert (await counted(share)).tally.ok == 3
    assert [len(messages) for messages in asked] == [1, 3, 5]
    assert [m["content"] for m in asked[2] if m["role"] == "assistant"] == ["so 1", "so 2"]
    assert asked[2][:2] == asked[1][:2]


async def test_ended_by_hand() -> None:
    async with serving(hangs_midway) as url:
        share = Share(Load(streams=3, duration_s=60), Endpoint(url=url, model="m"), Alphabet(1000), Slo())
        client, counter = LoadClient(share), RequestCounter(share, time.time())
        client.prepare()
        running = asyncio.create_task(client.run(counter.tally.start_s, counter))
        while counter.progress(client.in_flight()).in_flight < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        client.end()
        await asyncio.wait_for(running, 5)
    assert (counter.tally.ok, counter.tally.errors, client.unfinished) == (0, {}, 3)


async def test_a_later_prompt_that_cannot_be_built_ends_a_closed_loop_with_the_reason() -> None:
    """The template has 7 tokens: prompts of 6 and 7 are too short, and seed 2 begins with longer ones."""
    async with serving(good_chat) as url:
        endpoint = Endpoint(url=url, model="m", api="chat")
        load = Load(streams=1, num_requests=100, isl="6..20", osl="1", seed=2)
        share = Share(load, endpoint, Alphabet(words=(" a", " b"), extra_tokens=7), Slo())
        with pytest.raises(ConfigError, match="the server adds 7 tokens to each prompt"):
            await counted(share, 10)


async def test_what_an_observer_raises_ends_the_load() -> None:
    class Picky(RequestCounter):
        def on_done(self, exchange: Exchange) -> None:
            super().on_done(exchange)
            if self.tally.ok == 2:
                raise ConfigError("two are enough")

    async with serving(good) as url:
        share = Share(Load(streams=2, duration_s=60, isl="16"), Endpoint(url=url, model="m"), Alphabet(1000), Slo())
        client, counter = LoadClient(share), Picky(share, time.time())
        client.prepare()
        with pytest.raises(ConfigError, match="two are enough"):
            await asyncio.wait_for(client.run(counter.tally.start_s, counter), 5)
    assert counter.tally.ok == 2
    assert counter.tally.num_errors == 0


async def test_the_calibration_server_says_what_it_did() -> None:
    pacer = Pacer(Schedule(ttft_s=0.01, tick_s=0.002, tokens=5))
    ticking = asyncio.create_task(pacer.tick_forever())
    load = Load(streams=2, num_requests=4, isl="16", osl="5")
    target = Endpoint(url=f"http://127.0.0.1:{pacer.port}", model="pacer")
    counter = await counted(Share(load, target, Alphabet(1000), Slo(), is_calibration=True), 20)
    ticking.cancel()
    pacer.close()
    assert (counter.tally.ok, counter.tally.errors) == (4, {})
    assert counter.floor is not None
    assert (counter.floor.ttft.count, counter.floor.gap.count) == (4, 16)
    # Kernel times on both sides of the loopback: what is left is far below what was waited for.
    assert (counter.floor.ttft.quantile(0.5) or 0) < (counter.floor.ttft_measured.quantile(0.5) or 0)


async def test_a_conversation_with_several_calls_at_once() -> None:
    """3 turns of 2 calls: 1 + 2 + 2 requests, each with all that was said before; its prompt and answer can be cached."""
    asked: list[list[dict[str, str]]] = []

    async def chat(body: bytes, writer: asyncio.StreamWriter, number: int) -> None:
        asked.append(json.loads(body)["messages"])
        tokens = 16 * len(asked[-1])
        text = b'{"choices": [{"delta": {"content": "%d"}, "finish_reason": "stop"}]}' % number
        usage = {"prompt_tokens": tokens, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 16}}
        last = json.dumps({"choices": [], "usage": usage}).encode()
        events = b"".join(chunked(b"data: %s\n\n" % event) for event in (text, last, b"[DONE]"))
        writer.write(HEAD + events + b"0\r\n\r\n")

    async with serving(chat) as url:
        target = Endpoint(url=url, model="m", api="chat")
        load = Load(streams=1, num_requests=5, turns=3, calls=2, isl="4", osl="1")
        tally = (await counted(Share(load, target, Alphabet(words=(" a", " b")), Slo()))).tally
    assert (tally.ok, tally.errors) == (5, {})
    assert [len(messages) for messages in asked] == [1, 3, 3, 5, 5]
    first, a, b, c, d = asked
    assert a[:2] == b[:2] == [*first, {"role": "assistant", "content": "1"}]
    assert c[:4] == d[:4] == [*a, c[3]]  # it goes on from the first of the calls
    assert (a[-1] == b[-1], c[-1] == d[-1]) == (False, False)
    reuse = tally.prefix_reuse
    # Known of 16 and 48 tokens: prompt and answer without its last token, in whole blocks of 16.
    assert (reuse.reusable_tokens, reuse.cached_tokens, reuse.num_unknown) == (2 * 16 + 2 * 48, 80, 0)
