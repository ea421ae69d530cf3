"""Lets the workers of an engine say where they are, also from inside a collective that does not return."""

import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

from kervan.fleet.rank_watch import dump_path


def install(worker: Any, directory: str) -> None:
    """On SIGUSR2 a worker writes the stacks of its threads to a file of its own. Runs in each worker, once."""
    file = dump_path(Path(directory), worker.rank, os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    worker.kervan_stacks = file  # faulthandler keeps its number only, and it must stay open
