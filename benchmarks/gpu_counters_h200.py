"""What the counters of `kervan observe gpus` say of loads whose nature is known.

    python benchmarks/gpu_counters_h200.py [--seconds 4] [--record FILE]

One GPU is kept busy with one kind of kernel after the other, each for some seconds, and its counters are read over the
last part of it. Loads, and what they should show:

    idle           nothing runs
    matmul         bf16 products of 8192 x 8192: tensor cores, as in prefill
    copy           a copy of 2 GiB within the GPU: memory only
    decode         a weight of 4096 x 14336 times 8 rows, in a CUDA graph: memory with a little of tensor cores
    small          one kernel of a few microseconds after the other: GPU_UTIL far above SM_ACTIVE
    host-to-gpu    copies from pinned memory: PCIe, and GPU_UTIL although no kernel runs

Without a GPU it says so, and exits with 1. Needs torch with CUDA, and nvidia-ml-py.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kervan.bench import records
from kervan.observe import gpu_counters
from kervan.observe.dcgm import COUNTERS

SHOWN = (
    "GPU_UTIL", "MEM_COPY_UTIL", "GR_ENGINE_ACTIVE", "SM_ACTIVE", "SM_OCCUPANCY", "PIPE_TENSOR_ACTIVE", "DRAM_ACTIVE",
    "SM_CLOCK", "POWER_USAGE", "PCIE_TX", "PCIE_RX", "NVLINK_TX",
)  # fmt: skip


def loads() -> dict[str, Callable[[], None]]:
    """Name -> work of some milliseconds, queued on the GPU and waited for."""
    import torch

    device = torch.device("cuda:0")
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    big = torch.empty(2 << 30, device=device, dtype=torch.uint8)
    into = torch.empty_like(big)
    weights = [torch.randn(4096, 14336, device=device, dtype=torch.bfloat16) for _ in range(24)]  # beyond the L2 cache
    rows = torch.randn(8, 4096, device=device, dtype=torch.bfloat16)
    tiny = torch.zeros(256, device=device)
    pinned = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    graph = torch.cuda.CUDAGraph()
    for weight in weights[:1]:
        rows @ weight
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for weight in weights:
            rows @ weight

    def waited(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    def many() -> None:
        for _ in range(1000):
            tiny.add_(1.0)

    return {
        "idle": lambda: time.sleep(0.01),
        "matmul": waited(lambda: [a @ a for _ in range(10)]),
        "copy": waited(lambda: [into.copy_(big) for _ in range(5)]),
        "decode": waited(lambda: [graph.replay() for _ in range(10)]),
        "small": waited(many),
        "host-to-gpu": waited(lambda: big[: pinned.numel()].copy_(pinned, non_blocking=True)),
    }


def measured(reader: gpu_counters.GpuReader, work: Callable[[], None], seconds: float) -> dict[str, float]:
    """The first GPU's counters over the second half of so many seconds of work."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            work()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    time.sleep(seconds / 2)
    found = reader.read(seconds / 2)[0]
    ended.set()
    thread.join()
    return found.values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    with gpu_counters.opened() as reader:
        if reader is None:
            sys.exit("no GPU can be read here: NVML's package (nvidia-ml-py), its library or a GPU is missing")
        by_short = {counter.short: counter.name for counter in COUNTERS}
        rows: dict[str, dict[str, float]] = {}
        print(f"{'load':12}" + "".join(f"{short[:10]:>11}" for short in SHOWN), flush=True)
        for name, work in loads().items():
            work()
            time.sleep(1.0)
            rows[name] = measured(reader, work, args.seconds)
            cells = [rows[name].get(by_short[short]) for short in SHOWN]
            print(f"{name:12}" + "".join(f"{'-' if c is None else f'{c:.4g}':>11}" for c in cells), flush=True)
    print(json.dumps(rows))
    if args.record:
        content = records.record("gpu-counters", {"seconds": args.seconds, "loads": rows})
        print(records.write(args.record, content | {"command": "python benchmarks/gpu_counters_h200.py"}))


if __name__ == "__main__":
    main()
