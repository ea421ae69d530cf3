"""A GPU's memory while an engine starts: left behind by one that was killed, or shared with others."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

WAIT_S = 60.0


@contextlib.contextmanager
def taking(vllm_config: VllmConfig, *, is_shared: bool, is_here: bool) -> Iterator[None]:
    """Let an engine take its memory inside: vLLM measures what is free, and counts what others take as its own.

    Waits until the visible GPUs have the share that vLLM will ask for: the worker of a killed engine holds its memory
    for seconds, and starting before it is gone fails for good. When it does not come free in time, vLLM's own error
    tells by whom it is held. `is_shared`: engines that share a GPU start on it one after the other. `is_here`: the
    workers are on this node.
    """
    if not current_platform.is_cuda() or not is_here:
        yield
        return
    with contextlib.ExitStack() as locks, _visible_gpus() as gpus:
        for name, _ in gpus if is_shared else []:
            locks.enter_context(_lock(f"kervan-{name}.lock"))
        for _, handle in gpus:
            _wait_until_free(handle, vllm_config.cache_config.gpu_memory_utilization)
        yield


@contextlib.contextmanager
def _visible_gpus() -> Iterator[list[tuple[str, Any]]]:
    """UUIDs and NVML handles of the GPUs that this process may use."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
    handles = [
        pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]
    try:
        yield [(str(pynvml.nvmlDeviceGetUUID(handle)), handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _wait_until_free(handle: Any, utilization: float) -> None:
    from vllm.third_party import pynvml

    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        if memory.free >= utilization * memory.total:
            return
        time.sleep(0.1)


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Held by one process of this node; the kernel frees it when the process ends."""
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
