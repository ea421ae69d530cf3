"""What ranks of `kervan calibrate`, `memory` and `pipeline` do that fail; their processes import it by name."""

import os
import threading
from collections.abc import Callable
from typing import Any

from kervan.comm import collectives
from kervan.comm.ranks import Doing, Rank


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


def fail_second(rank: Any, arguments: Any, keep: Callable[[Any], None]) -> None:
    if rank.number == 1:
        raise ValueError(f"no {arguments}\nand more")
    threading.Event().wait(60)


def die_second(rank: Any, arguments: Any, keep: Callable[[Any], None]) -> None:
    if rank.number == 1:
        os._exit(9)
