"""`python -m kervan.ranks.agent`: torch's elastic agent for the ranks of this node; told what to do on its input."""

import os
import pickle
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Client
from typing import Any

from kervan.errors import ConfigError
from kervan.ranks.start import Ended, Failed, Hello, Nodes, Rank, Work


def main() -> None:
    """Fork the ranks and wait for them. Exit status: 0, or 1 when one failed."""
    work, arguments, address, key, ranks, nodes = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A program's own intra-op threads are for it to choose; without this, each rank takes all cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from other ranks
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks // 2)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=ranks,
        run_id="kervan",
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.rendezvous or "127.0.0.1:0",
        rdzv_configs=_rendezvous(nodes),
        local_addr=None if nodes.count > 1 else "127.0.0.1",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="spawn",  # torch 2.11 asks CUDA for its GPUs in this process, and a process forked then cannot use them
    )
    try:
        elastic_launch(config, _rank)(work, arguments, address, key)
    except ChildFailedError:
        sys.exit(1)
    except SignalException as told:
        sys.exit(128 + told.sigval)


def _rendezvous(nodes: Nodes) -> dict[str, Any]:
    return {"is_host": nodes.number == 0, "timeout": 300} if nodes.count > 1 else {"is_host": True}


def _end_with_parent() -> None:
    """Our input ends when the command does, however it ends: then nothing of it may live on."""
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1 << 16):
            pass
    with suppress(ProcessLookupError):
        os.killpg(os.getpid(), signal.SIGKILL)


def _rank(work: Work, arguments: Any, address: str, key: bytes) -> None:
    rank = Rank(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]),
        int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]),
    )  # fmt: skip
    with Client(address, family="AF_UNIX", authkey=key) as link:
        try:
            link.send(Hello(rank.number, rank.of))
            work(rank, arguments, link.send)
            link.send(Ended())
        except Exception as error:  # noqa: BLE001 - told to the command, which raises
            traceback.print_exc()
            with suppress(OSError):
                link.send(_failed(rank, error))
            sys.exit(1)


def _failed(rank: Rank, error: Exception) -> Failed:
    if isinstance(error, ConfigError):
        return Failed(str(error), is_config=True)
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):  # what went wrong first
        error = error.__cause__
    lines = str(error).strip().splitlines()
    where = traceback.extract_tb(error.__traceback__)[-1]
    problem = f"{type(error).__name__}: {lines[0][:300] if lines else ''} ({where.name}, line {where.lineno})"
    return Failed(f"rank {rank.number} of {rank.of}: {problem}")


if __name__ == "__main__":
    main()
