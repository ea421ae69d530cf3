"""What ranks of `kervan calibrate`, `memory` and `pipeline` do that fail; their processes import it by name."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kervan.comm import collectives
from kervan.errors import ConfigError
from kervan.ranks import told
from kervan.ranks.rank import Doing, Rank


def fail(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    keep("one row")
    raise RuntimeError(f"no {arguments}\nand more")


def die(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    os._exit(9)


def hang(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    keep(Doing("a wait", 0.2))
    threading.Event().wait()


def plans(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    """Measure several plans (by name) with ranks that are started once; rank 0 keeps (name, row)."""
    import torch

    device = collectives.join(rank, on_gpu=False)
    with torch.inference_mode():
        for name, plan in arguments.items():
            for row in collectives.measure(rank, plan, device, keep):
                if rank.number == 0:
                    keep((name, row))


def fail_second(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    if rank.number == 1:
        raise ValueError(f"no {arguments}\nand more")
    threading.Event().wait(60)


def die_second(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    if rank.number == 1:
        print("bye", flush=True)
        os._exit(9)
    raise RuntimeError("Connection closed by peer")


def miss_another(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    other = Path(rank.store).with_name("other-is-here")
    if rank.number == 1:
        other.touch()
        threading.Event().wait(60)
    while not other.exists():
        time.sleep(0.01)
    raise RuntimeError("Connection reset by peer")


def refuse(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    raise ConfigError(f"{arguments} is odd")


def sleep(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    keep("here")
    threading.Event().wait(60)


def save_when_told(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    keep("at work")
    while not told.is_told():
        time.sleep(0.01)
    keep(f"saved {rank.number}")


def environment(rank: Rank, arguments: tuple[str, ...], keep: Callable[[Any], None]) -> None:
    keep(tuple(os.environ.get(name) for name in arguments))


def greet_in_a_v(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    """What torch 2.11 does when a pipeline begins, on any version; keeps the ranks that this one has sent to."""
    import torch
    import torch.distributed as dist
    from torch.distributed import pipelining

    from kervan.pipeline import schedules, stage_work
    from kervan.ranks.group import join

    join(rank, "gloo", timeout_s=60)
    zbv = schedules.SCHEDULES["zbv"]
    shape = (torch.empty(1, 4, device="meta"),)
    stages = [
        stage_work.NeighbouringStage(
            torch.nn.Linear(4, 4), index, 2 * rank.of, torch.device("cpu"), input_args=shape, output_args=shape
        )
        for index in schedules.place(zbv, ranks=rank.of, chunks=2)[rank.number]
    ]
    pipelining.ScheduleZBVZeroBubble(stages, 4)
    greetings = [one for stage in stages for one in stage._get_init_p2p_neighbors_ops()]
    for work in dist.batch_isend_irecv(greetings):
        work.wait()
    keep((rank.number, [one.peer for one in greetings if one.op is dist.isend]))
    dist.destroy_process_group()
