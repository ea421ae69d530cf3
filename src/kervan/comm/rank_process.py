"""`python -m kervan.comm.rank_process SOCKET`: one rank, which asks at SOCKET what it is to do.

Who it is, the environment says in torchrun's words: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; or in
place of the last two KERVAN_RANK_STORE, a file that is new for this group.
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

from kervan.comm.ranks import Failed, Job, Joined, Rank, stack_path

STORE = "KERVAN_RANK_STORE"


def main(address: str) -> None:
    """Do the job of the process that listens at `address`, and end when it ends."""
    number, of, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    rank = Rank(number, of, local, os.environ.get(STORE, ""))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    link = Connection(sock.detach())
    stacks = stack_path(address, number).open("w")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    link.send(Joined(number, os.getpid(), socket.gethostname()))
    sys.path[:] = link.recv()
    job: Job = pickle.loads(link.recv_bytes())
    threading.Thread(target=_end_with, args=(link,), daemon=True, name="link").start()
    try:
        job.work(rank, job.arguments, link.send)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises
        lines = str(error).strip().splitlines()
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {lines[0][:300] if lines else ''} ({where.name}, line {where.lineno})"
        with suppress(OSError):
            link.send(Failed(f"rank {number} of {of}: {problem}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what else is in this process, such as threads of NCCL, has nothing to say


def _end_with(link: Connection) -> None:
    with suppress(OSError, EOFError):
        link.recv()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
