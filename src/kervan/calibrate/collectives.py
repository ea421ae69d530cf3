"""All-reduce and send/recv over the GPUs of this host, eager and inside a CUDA graph.

NVLink multicast is never turned on: NCCL keeps what the environment says (NCCL_NVLS_ENABLE), and torch's own kernels,
which are measured as well, run without it.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from kervan.calibrate.clock import TARGET_S, Call, capture, elapsed_s
from kervan.calibrate.measurements import Collective
from kervan.calibrate.ranks import Rank

Op = Literal["all_reduce", "send_recv"]
KIB, MIB = 1 << 10, 1 << 20
SYMM_MEM_MAX_BYTES = 32 * MIB
TIMEOUT_S = 60.0
MAX_CALLS = 50
REPEATS = 7


@dataclass(frozen=True, slots=True)
class CollectivesPlan:
    """What the ranks measure: on GPUs by NCCL, or on CPU by gloo, which shows only that this code works."""

    on_gpu: bool
    bytes: tuple[int, ...] = tuple(8 * KIB * 2**i for i in range(16))  # 8 KiB to 256 MiB


def work(rank: Rank, plan: CollectivesPlan, keep: Callable[[Any], None]) -> None:
    """Work of one rank; rank 0 keeps the rows, and a text where torch's own kernels cannot run."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read when torch first uses such memory
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if plan.on_gpu:
        device = torch.device("cuda", rank.number)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if plan.on_gpu else "gloo",
        store=dist.FileStore(rank.store, rank.of),
        rank=rank.number,
        world_size=rank.of,
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=device if plan.on_gpu else None,
    )
    try:
        with torch.inference_mode():
            for row in _measure(rank, plan, device):
                if rank.number == 0:
                    keep(row)
    finally:
        dist.destroy_process_group()


def _measure(rank: Rank, plan: CollectivesPlan, device: Any) -> Iterator[Collective | str]:
    import torch.distributed as dist

    _check(device, rank)
    for size in plan.bytes:
        buffer = _zeros(size, device)
        yield from _rows("all_reduce", rank, size, lambda buffer=buffer: dist.all_reduce(buffer), device)  # type: ignore[misc]
    if rank.of == 2:
        for size in plan.bytes:
            yield from _rows("send_recv", rank, size, _hop(rank, _zeros(size, device)), device)
    if plan.on_gpu:
        yield from _symm_mem(rank, [size for size in plan.bytes if size <= SYMM_MEM_MAX_BYTES], device)


def _hop(rank: Rank, buffer: Any) -> Call:
    """Rank 0 sends, rank 1 receives."""
    import torch.distributed as dist

    if rank.number == 0:
        return lambda: dist.send(buffer, 1)
    return lambda: dist.recv(buffer, 0)


def _check(device: Any, rank: Rank) -> None:
    """A sum that is known, so that no time is taken of a collective that does not work.

    Raises: RuntimeError.
    """
    import torch
    import torch.distributed as dist

    numbers = torch.full((1024,), float(rank.number + 1), device=device)
    dist.all_reduce(numbers)
    expected = rank.of * (rank.of + 1) / 2
    if not bool((numbers == expected).all()):
        raise RuntimeError(f"an all-reduce over {rank.of} ranks gave {numbers[0].item()}, not {expected}")


def _rows(op: Op, rank: Rank, size: int, call: Call, device: Any) -> Iterator[Collective | str]:
    """A call as this rank sees it: eager, and on a GPU also in a graph, or a text why not."""
    import torch

    backend = "nccl" if device.type == "cuda" else "gloo"
    count = _agreed_count(call, device)
    took_s = []
    for _ in range(REPEATS):
        _barrier(device)
        begin_s = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took_s.append((time.perf_counter() - begin_s) / count)
    yield Collective(op, rank.of, size, False, backend, statistics.median(took_s))
    if device.type == "cuda":
        try:
            yield Collective(op, rank.of, size, True, backend, _graph_seconds(call, count, device))
        except RuntimeError as error:
            yield f"{op} of {size} bytes over {rank.of} ranks in a graph: not measured ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _graph_seconds(call: Call, count: int, device: Any) -> float:
    graph, _ = capture([call], count)
    took_s = []
    for _ in range(1 + REPEATS):
        _barrier(device)
        took_s.append(elapsed_s(graph.replay) / count)
    del graph
    return statistics.median(took_s[1:])


def _agreed_count(call: Call, device: Any) -> int:
    """Calls in a repeat: as rank 0 reckons after a few, so that all ranks make as many."""
    import torch
    import torch.distributed as dist

    for _ in range(3):
        call()
    _barrier(device)
    begin_s = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    count = max(3, min(MAX_CALLS, round(TARGET_S / (time.perf_counter() - begin_s))))
    agreed = torch.tensor([count], device=device)
    dist.broadcast(agreed, 0)
    return int(agreed.item())


def _barrier(device: Any) -> None:
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        dist.barrier(device_ids=[device.index])
        torch.cuda.synchronize()
    else:
        dist.barrier()


def _zeros(size: int, device: Any) -> Any:
    import torch

    return torch.zeros(max(1, size // 2), dtype=torch.bfloat16, device=device)


def _symm_mem(rank: Rank, sizes: Sequence[int], device: Any) -> Iterator[Collective | str]:
    """All-reduce by torch's kernels over memory that all GPUs map: one-shot or two-shot, the faster. Graph only.

    A text instead, where GPUs do not reach each other's memory.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    if not sizes:
        return
    group = dist.group.WORLD.group_name
    try:
        memory = symmetric.empty(max(sizes) // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(memory, group)
        memory.fill_(float(rank.number + 1))
        torch.cuda.synchronize()
        dist.barrier(device_ids=[device.index])
        total = torch.ops.symm_mem.one_shot_all_reduce(memory[:4096], "sum", group)
        is_right = bool((total == rank.of * (rank.of + 1) / 2).all())
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        yield f"symm_mem all-reduce: not measured ({_first_line(error)})"
        return
    if not is_right:
        yield "symm_mem all-reduce: not measured, its sum is wrong"
        return
    memory.zero_()
    for size in sizes:
        part = memory[: size // 2]
        ways: tuple[Call, ...] = (
            lambda part=part: torch.ops.symm_mem.one_shot_all_reduce(part, "sum", group),  # type: ignore[misc]
            lambda part=part: torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", group),  # type: ignore[misc]
        )
        seconds = min(_graph_seconds(way, MAX_CALLS, device) for way in ways)
        yield Collective("all_reduce", rank.of, size, True, "symm_mem", seconds)
