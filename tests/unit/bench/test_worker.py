"""A worker's reports, over the link to the process that started it."""

import asyncio
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from kervan.bench import worker
from kervan.bench.counting import WorkerProgress
from kervan.bench.load import Endpoint, Load
from kervan.bench.load_client import Share
from kervan.bench.prompts import Alphabet
from kervan.config.workload import Slo

BODY = b"".join(
    b"data: %s\n\n" % data
    for data in (
        b'{"choices": [{"text": " a", "finish_reason": "length"}]}',
        b'{"choices": [], "usage": {"prompt_tokens": 16, "completion_tokens": 1}}',
        b"[DONE]",
    )
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HEAD % len(BODY) + BODY)
    await writer.drain()
    writer.close()


@pytest.fixture
def url() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answering, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    server.close()
    loop.close()


def links() -> tuple[Connection, Connection]:
    """Ours and the worker's, which holds less than a report."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return Connection(ours.detach()), Connection(theirs.detach())


def test_a_report_that_is_larger_than_the_link_s_buffer_arrives_whole(url: str) -> None:
    ours, theirs = links()
    share = Share(
        Load(isl="16", osl="1", streams=2, num_requests=40), Endpoint(url=url, model="m"), Alphabet(1000), Slo()
    )
    process = multiprocessing.get_context("spawn").Process(target=worker.run, args=(share, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "ready"
        ours.send(("start", time.time()))
        process.join(1)  # nobody reads meanwhile: it ends only if it gives up a report
        reports = []
        while not (reports and isinstance(reports[-1], worker.WorkerFinished)):
            reports.append(ours.recv())
        assert all(isinstance(report, WorkerProgress) for report in reports[:-1])
    finally:
        process.kill()
        process.join()
