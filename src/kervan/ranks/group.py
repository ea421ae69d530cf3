"""Ranks join one process group of torch."""

from datetime import timedelta
from typing import Any

from kervan.ranks.rank import Doing, Keep, Rank

START_S = 300.0  # until all ranks have imported torch


def join(rank: Rank, backend: str, *, timeout_s: float, device: Any = None, keep: Keep = lambda _: None) -> None:
    """Make the process group of all ranks. `timeout_s`: of each collective. `device`: a GPU; NCCL connects at once.

    Ranks first wait until all have imported torch, which takes long on a busy host and is no fault of its links.
    """
    import torch.distributed as dist

    start = timedelta(seconds=START_S)
    if rank.store:
        store = dist.FileStore(rank.store, rank.of)
    else:
        met, _, _ = next(dist.rendezvous("env://", rank.number, rank.of, timeout=start))
        store = dist.PrefixStore("kervan", met)
    store.set_timeout(start)
    store.set(f"here-{rank.number}", "")
    keep(Doing("waiting for the other ranks to import torch"))
    store.wait([f"here-{number}" for number in range(rank.of)], start)
    keep(Doing("joining the process group", timeout_s))
    dist.init_process_group(
        backend,
        store=store,
        rank=rank.number,
        world_size=rank.of,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )
