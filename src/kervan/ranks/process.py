"""`python -m kervan.ranks.process SOCKET`: one rank, which asks at SOCKET what it is to do.

Who it is, the environment says in torchrun's words: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; or in place of the last two KERVAN_RANK_STORE, a file that is new for this group.
"""

import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

from kervan.errors import ConfigError
from kervan.ranks import told
from kervan.ranks.rank import STORE, Ended, Failed, Job, Joined, Rank, stack_path


def main(address: str) -> None:
    """Do the job of the process that listens at `address`, and end when it ends."""
    told.listen()
    number, of, local, local_of = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    rank = Rank(number, of, local, local_of, os.environ.get(STORE, ""))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    link = Connection(sock.detach())
    stacks = stack_path(address, number).open("w")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    link.send(Joined(number, of, os.getpid()))
    last: Ended | Failed = Ended()
    try:
        job: Job = pickle.loads(link.recv_bytes())
        threading.Thread(target=_end_with, args=(link,), daemon=True, name="link").start()
        job.work(rank, job.arguments, link.send)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises
        traceback.print_exc()
        last = _failed(rank, error)
    with suppress(OSError):
        link.send(last)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what else is in this process, such as threads of NCCL, has nothing to say


def _end_with(link: Connection) -> None:
    """Nothing comes on the link but its end, which is the parent's."""
    with suppress(OSError, EOFError):
        link.recv()
    os._exit(1)


def _failed(rank: Rank, error: Exception) -> Failed:
    if isinstance(error, ConfigError):
        return Failed(str(error), is_config=True)
    while isinstance(error.__cause__, Exception):  # what went wrong first
        error = error.__cause__
    lines = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({where[0].name}, line {where[0].lineno})" if where else ""
    return Failed(f"rank {rank.number} of {rank.of}: {type(error).__name__}: {lines[0][:300] if lines else ''}{place}")


if __name__ == "__main__":
    main(sys.argv[1])
