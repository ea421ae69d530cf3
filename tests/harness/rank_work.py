"""What ranks of `kervan calibrate`, `memory` and `pipeline` do that fail; their processes import it by name."""

import os
import threading
from collections.abc import Callable
from typing import Any

from kervan.calibrate.ranks import Rank


def fail(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    keep("one row")
    raise RuntimeError(f"no {arguments}\nand more")


def die(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    os._exit(9)


def hang(rank: Rank, arguments: Any, keep: Callable[[Any], None]) -> None:
    threading.Event().wait()


def fail_second(rank: Any, arguments: Any, keep: Callable[[Any], None]) -> None:
    if rank.number == 1:
        raise ValueError(f"no {arguments}\nand more")
    threading.Event().wait(60)


def die_second(rank: Any, arguments: Any, keep: Callable[[Any], None]) -> None:
    if rank.number == 1:
        os._exit(9)
