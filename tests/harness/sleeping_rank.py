"""A worker of vLLM whose rank 1 sleeps inside an all-reduce once a file is there (`worker_extension_cls`)."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from harness.sleeping_rank_names import VARIABLE

_all_reduce = CpuCommunicator.all_reduce


def broken_all_reduce(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As vLLM's; on rank 1 it does not go on while the file is there."""
    while torch.distributed.get_rank() == 1 and Path(os.environ[VARIABLE]).exists():
        time.sleep(0.1)
    return _all_reduce(self, *args, **kwargs)


CpuCommunicator.all_reduce = broken_all_reduce


class SleepingRank:
    """vLLM's worker class gets this base, and with it this module."""
