"""One process of the client: sends its share of a load, counts, and reports to the process that started it."""

import asyncio
import contextlib
import gc
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kervan.bench import eventloop
from kervan.bench.counting import FloorSketches, RequestCounter
from kervan.bench.load_client import LoadClient, Share
from kervan.bench.sketch import Sketch
from kervan.bench.tally import RequestTally
from kervan.errors import KervanError

REPORT_PERIOD_S = 0.5


@dataclass(slots=True)
class WorkerFinished:
    """The last report of a worker."""

    worker: int
    tally: RequestTally
    cpu_s: float
    wall_s: float
    lag: Sketch  # how late this process' event loop ran its own timers
    loop: str
    floor: FloorSketches | None = None


@dataclass(slots=True)
class WorkerFailed:
    """Sent by a worker that cannot go on, with the reason."""

    worker: int
    message: str


def run(share: Share, link: Connection) -> None:
    """A worker's life: say ready, wait for the start time, send, report; `stop` ends it early.

    `link` gives ("start", time) and ("stop",), and gets "ready", WorkerProgress, and last WorkerFinished or
    WorkerFailed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that shows the report
    factory, name = eventloop.factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            runner.run(_serve(share, link, name))
        except KervanError as error:
            with contextlib.suppress(OSError):
                link.send(WorkerFailed(share.worker, str(error)))


async def _serve(share: Share, link: Connection, loop_name: str) -> None:
    loop = asyncio.get_running_loop()
    client = LoadClient(share)
    client.prepare()
    await client.connect_first()
    gc.collect()
    gc.freeze()  # the prebuilt requests are no garbage: keep collections short
    gc.set_threshold(50_000)  # and few: what a token leaves behind has no cycles
    link.send("ready")
    command = await loop.run_in_executor(None, link.recv)
    if command[0] == "stop":
        return
    counter = RequestCounter(share, command[1])
    running = loop.create_task(client.run(command[1], counter))

    def end_when_told() -> None:
        with contextlib.suppress(EOFError, OSError):
            link.recv()  # "stop", or the starter is gone
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(client.end)

    # Not `add_reader`: uvloop's makes the link non-blocking, and a report that is larger than its buffer is cut.
    threading.Thread(target=end_when_told, daemon=True, name="commands").start()
    cpu_s, wall_s = time.process_time(), time.monotonic()
    while not running.done():
        await asyncio.wait({running}, timeout=REPORT_PERIOD_S)
        with contextlib.suppress(OSError):
            link.send(counter.progress(client.in_flight()))
    await running
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
    counter.tally.unfinished, counter.tally.reconnected = client.unfinished, client.reconnected
    counter.tally.sent_away = client.sent_away
    with contextlib.suppress(OSError):
        link.send(WorkerFinished(share.worker, counter.tally, cpu_s, wall_s, client.lag, loop_name, counter.floor))
