"""Work in processes of its own, one a rank, whose rows come back as they are made.

A GPU that such a process used is free again when it has ended, and one that hangs can be ended.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from kervan.errors import EngineError

STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Rank:
    """Who a process is. `store`: a file, new for this group, by which its ranks find each other."""

    number: int
    of: int
    store: str


# Called in the process of a rank with what it is to do; `keep` sends a row back.
Work = Callable[[Rank, Any, Callable[[Any], None]], None]


@dataclass(frozen=True, slots=True)
class _Failed:
    message: str


def run(work: Work, arguments: Any, *, ranks: int = 1, for_s: float) -> Iterator[Any]:
    """The rows of all ranks. `work` is a function of a module, and it and `arguments` are picklable.

    Raises: EngineError when a rank fails or ends early, or when not all have ended after `for_s`.
    """
    context = multiprocessing.get_context("spawn")
    end_s = time.monotonic() + for_s
    processes: dict[Connection, BaseProcess] = {}
    with tempfile.TemporaryDirectory(prefix="kervan-calibrate-") as folder:
        try:
            for number in range(ranks):
                mine, theirs = context.Pipe(duplex=False)
                rank = Rank(number, ranks, os.path.join(folder, "store"))  # noqa: PTH118 - torch wants a string
                process: BaseProcess = context.Process(
                    target=_main, args=(work, rank, arguments, theirs), name=f"kervan-calibrate-{number}", daemon=True
                )
                process.start()
                theirs.close()
                processes[mine] = process
            yield from _rows(dict(processes), end_s, for_s)
        finally:
            for link, process in processes.items():
                process.join(0)
                if process.is_alive():
                    process.kill()
                process.join(STOP_S)
                link.close()


def _rows(running: dict[Connection, BaseProcess], end_s: float, for_s: float) -> Iterator[Any]:
    while running:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise EngineError(f"{len(running)} of the processes had not ended after {for_s:.0f} s")
        for link in wait(list(running), timeout=min(left_s, 1.0)):
            assert isinstance(link, Connection)
            try:
                row = link.recv()
            except EOFError:  # the rank has ended
                process = running.pop(link)
                process.join(STOP_S)
                if process.exitcode:
                    raise EngineError(
                        f"{process.name} exited with status {process.exitcode} without a message"
                    ) from None
                continue
            if isinstance(row, _Failed):
                raise EngineError(row.message)
            yield row


def _main(work: Work, rank: Rank, arguments: Any, link: Connection) -> None:
    try:
        work(rank, arguments, link.send)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises
        lines = str(error).strip().splitlines()
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {lines[0][:300] if lines else ''} ({where.name}, line {where.lineno})"
        with suppress(OSError):
            link.send(_Failed(f"rank {rank.number} of {rank.of}: {problem}"))
    finally:
        link.close()
